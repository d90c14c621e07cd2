"""The layer benchmark, as far as it goes without a GPU: what is built, peers on plain weights, and the checks' routings."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Self

import pytest
import torch

from benchmarks import moe_layer, moe_layer_build
from benchmarks.moe_layer_peers import PeerWeights, grouped_mm, load_peers
from benchmarks.moe_layer_run import COLUMNS, Row, Timing, routings
from moec.compiler.measure.cases import Index
from moec.compiler.measure.device import Ceilings
from moec.compiler.measure.layer import Tokens, expected_result, random_tokens, random_weights, relative_error
from moec.compiler.measure.layers import make_layer
from moec.compiler.measure.reference import matrix
from moec.runtime.errors import MoecError
from moec.targets.kernels.cuda.experts_layer import Layer

SIZE = (5, 2, 264, 40, True)


@pytest.mark.parametrize("formats", ["int4_g64", "int3_g32_asym/bf16", "int2_g64+int8_g128"])
def test_peers_get_the_weights_of_our_layer(formats: str) -> None:
    layer = make_layer(SIZE, formats)
    weights, tokens = random_weights(layer, 1, device="cpu"), random_tokens(layer, 9, 2, device="cpu")
    plain = PeerWeights(weights)
    up, down = (plain.values(part, torch.float64) for part in ("gate_up", "down"))
    assert (up.shape, down.shape) == ((5, 80, 264), (5, 264, 40))
    found = torch.zeros(9, 264, dtype=torch.float64)
    for t in range(9):
        for s in range(2):
            e = int(tokens.ids[t, s])
            gate, value = (up[e] @ tokens.x[t].double()).chunk(2)
            found[t] += tokens.routing_weights[t, s].double() * (down[e] @ (torch.nn.functional.silu(gate) * value))
    assert relative_error(found, expected_result(weights, tokens)) < 1e-12


def test_codes_of_peers_are_plain_rows() -> None:
    layer = make_layer(SIZE, "int3_g32_asym/int4_g64")
    plain = PeerWeights(random_weights(layer, 1, device="cpu"))
    codes, scale, zero, bits, group = plain.codes("gate_up")
    assert (codes.shape, scale.shape, bits, group) == ((5, 80, 264), (5, 80, 9), 3, 32)
    assert zero is not None
    wide = [x.double().repeat_interleave(32, 2)[..., :264] for x in (zero, scale)]
    torch.testing.assert_close((codes.double() - wide[0]) * wide[1], plain.values("gate_up", torch.float64))
    codes, scale, zero, bits, group = plain.codes("down")
    assert zero is None
    torch.testing.assert_close(
        (codes.double() - 8) * scale.double(),
        torch.stack([matrix(layer.layout.down, plain.ours.down, e) for e in range(5)]),
    )
    with pytest.raises(MoecError, match="differ in format"):
        PeerWeights(random_weights(make_layer(SIZE, "int2_g64+int8_g64"), 1, device="cpu")).codes("down")


def test_torch_s_grouped_product_is_the_layer() -> None:
    layer = make_layer((6, 2, 256, 128, True), "int4_g64")
    weights, tokens = random_weights(layer, 1, device="cpu"), random_tokens(layer, 33, 2, "zipf", device="cpu")
    run = grouped_mm(PeerWeights(weights), tokens.x, tokens.ids, tokens.routing_weights)
    assert run is not None
    try:
        found = run()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch's grouped product does not run here: {error}")
    assert relative_error(found, expected_result(weights, tokens)) < 1.5e-2
    tokens.ids[0, 0] = -1
    assert grouped_mm(PeerWeights(weights), tokens.x, tokens.ids, tokens.routing_weights) is None


def test_peers_are_files_with_a_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("bits = 4.125\n\ndef layer(weights, x, ids, routing_weights):\n    return None\n")
    found = load_peers([tmp_path / "mine.py"])
    assert [(peer.name, peer.bits) for peer in found] == [("grouped_mm-bf16", 16.0), ("mine", 4.125)]
    (tmp_path / "bad.py").write_text("x = 1\n")
    for name in ("bad.py", "none.py"):
        with pytest.raises(MoecError, match=r"layer\(weights, x, ids, routing_weights\)"):
            load_peers([tmp_path / name])


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_checks_have_every_kind_of_routing(count: int) -> None:
    layer = make_layer(SIZE, "bf16")
    found = routings_on_cpu(layer, count)
    assert all(tokens.ids.shape == (count, 2) for tokens in found)
    if not count:
        return
    drawn, odd, one = (tokens.ids for tokens in found)
    assert ((drawn >= 0) & (drawn < 5)).all()
    assert (odd < 0).any() or (odd >= 5).any()
    assert (one[:, 0] == 0).all() and one[0].tolist() == [0, 0]


def routings_on_cpu(layer: Layer, count: int) -> list[Tokens]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.moe_layer_run.random_tokens", partial(random_tokens, device="cpu"))
        return routings(layer, count)


def test_figures_are_in_closed_form() -> None:
    layer = make_layer((4, 2, 256, 128, True), "int4_g128")
    weights, tokens = random_weights(layer, 1, device="cpu"), random_tokens(layer, 3, 2, device="cpu")
    tokens.ids[:] = torch.tensor([0, 1])
    tokens.ids[0, 1] = -1
    one_expert = 3 * 256 * 128 // 2 + 2 * 3 * 256 * 128 // 128  # codes, and scales of float16
    assert weights.nbytes(tokens.ids) == 2 * one_expert
    timing = Timing(moe_layer.parser().parse_args(["run", "x"]), Ceilings(1000.0, 2000.0, 0.001))
    found = timing.figures(10.0, weights, [tokens])
    assert found["gb_s"] == pytest.approx(2 * one_expert / 10.0 / 1e3)
    flop = 2 * 5 * 3 * 256 * 128
    assert found["tflop_s"] == pytest.approx(flop / 10.0 / 1e6)
    assert found["floor_us"] == pytest.approx(flop / 0.001 / 1e6), "arithmetic is the limit here"
    slim = random_weights(make_layer((4, 2, 256, 256, True), "int4_g128", widths=(256, 128)), 1, device="cpu")
    assert timing.figures(10.0, slim, [tokens])["tflop_s"] == pytest.approx(2 * (3 * 256 + 2 * 128) * 3 * 256 / 10.0 / 1e6)
    assert slim.nbytes(torch.tensor([[0, 1]])) == one_expert + 3 * 256 * 256 // 2 + 2 * (512 * 2 + 256 * 2)
    faster = Timing(timing.options, Ceilings(1000.0, 2000.0, 1000.0)).figures(10.0, weights, [tokens])
    assert faster["floor_us"] == pytest.approx(2 * one_expert / 2000.0 / 1e3)


def test_a_build_has_a_plan_that_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that is made up: libraries are asked for once, and a second build keeps them."""
    asked = []

    def compile_case(case: object, folder: str, name: str, *_: object) -> str | None:
        asked.append(case)
        Path(folder, f"{name}.so").write_bytes(b"")
        return "no" if getattr(case, "tokens", None) == 3 else None

    class Here:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, f: object, *args: object) -> object:
            from concurrent.futures import Future

            future: Future[object] = Future()
            future.set_result(compile_case(*args))  # type: ignore[arg-type]
            return future

    monkeypatch.setattr("moec.compiler.measure.build.ProcessPoolExecutor", Here)
    monkeypatch.setattr("moec.compiler.cuda_code.cuda_compiler", lambda: "nvcc")
    monkeypatch.setattr("moec.compiler.measure.build.copy_runtime", lambda folder, python: [])
    arguments = ["build", str(tmp_path), "--shapes", "odd,4x2x256x128", "--formats", "int4_g64,float32:int2_g64+int4_g64"]
    assert moe_layer.main([*arguments, "--tokens", "1,64"]) == 0
    first = len(asked)
    assert first == 8
    plan = moe_layer_build.read_plan(tmp_path, None, None, None)
    assert {(e.shape, e.tokens) for e in plan} == {(s, t) for s in ("odd", "4x2x256x128") for t in (1, 64)}
    assert all(entry.case in Index.read(tmp_path).files for entry in plan)
    assert [e.tokens for e in moe_layer_build.read_plan(tmp_path, "odd", "int4_g64", None)] == [1, 64]
    assert {e.case.layer.dtype for e in moe_layer_build.read_plan(tmp_path, None, "float32:int2_g64+int4_g64", "1")} == {"float32"}
    assert moe_layer.main([*arguments, "--tokens", "1,3"]) == 1, "T = 3 does not compile"
    assert len(asked) == first + 4
    assert len(moe_layer_build.read_plan(tmp_path, None, None, None)) == 8
    json.loads((tmp_path / "cases.json").read_text())
    ((_, slim),) = moe_layer_build.layers("4x2x256x128+64+32", "int4_g64")
    assert (slim.f, slim.widths) == (128, (128, 64, 32, 128))
    assert Layer.from_json(json.loads(json.dumps(slim.to_json()))) == slim


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_layer.main(["build", str(tmp_path), "--shapes", "mixtrall"]) == 2
    assert "did you mean 'mixtral'" in capsys.readouterr().err
    with pytest.raises(MoecError, match="moe_layer build"):
        moe_layer_build.read_plan(tmp_path, None, None, None)


def test_a_row_says_what_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    Row("olmoe", "int4_g128", 1, "moec decode", us=10.0, floor_us=5.0, share=0.5, gb_s=2500.0, tflop_s=1.0, error=2e-3).show()
    Row("olmoe", "int4_g128", 1, "peer x", problem="RuntimeError: no").show()
    first, second = capsys.readouterr().out.splitlines()
    assert "| 10.0 | 50% | 2500 | 1.0 | 2.0e-03 |" in first
    assert "RuntimeError: no" in second
    assert first.count("|") == second.count("|") == len(COLUMNS) + 1
