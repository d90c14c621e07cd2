"""Statistics on disk: what a cut-off run leaves and how it goes on, files of other models, and `moec inspect` on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moec.compiler.calibration import collect as module
from moec.compiler.calibration.collect import collect, load_or_collect, model_fingerprint
from moec.compiler.calibration.locality import expert_use
from moec.compiler.calibration.statistics import LayerStatistics, Statistics, load_statistics
from moec.compiler.calibration.text import Text
from moec.compiler.errors import MoecError
from moec.compiler.frontend import huggingface
from moec.compiler.heatmap import use_section, use_table
from moec.compiler.inspection import inspect_checkpoint
from moec.compiler.ir import Node
from moec.compiler.model import Model
from moec.compiler.progress import Progress
from moec.compiler.text import parse_graph
from moec.compiler.weights import constant
from tests import graphs

QUIET = Progress(quiet=True)
TEXT = graphs.MOE
MODEL = graphs.model()


def deep() -> Model:
    """Two MoE layers: the second reads the first one's result."""
    layer = TEXT[TEXT.index("  %logits") : TEXT.index("  %n2")]
    again = layer.replace("%h1", "%h2").replace("%h2: f32[B, T, 16] = aten.add.Tensor(%h2", "%h3: f32[B, T, 16] = aten.add.Tensor(%h2")
    for name in ("logits", "w", "i", "e"):
        again = again.replace(f"%{name}:", f"%{name}b:").replace(f"%{name},", f"%{name}b,").replace(f"%{name})", f"%{name}b)")
    again = again.replace("layers.0.", "layers.1.")
    more = "".join(f"{line}\n" for line in TEXT.splitlines() if "layers.0.gate" in line or "layers.0.experts" in line if "param" in line)
    text = TEXT.replace("  param @norm.weight", more.replace("layers.0", "layers.1") + "  param @norm.weight")
    text = text.replace("  %n2: f32[B, T, 16] = rms_norm(%h2", again + "  %n2: f32[B, T, 16] = rms_norm(%h3")
    graph = parse_graph(text)
    return Model(graph, graphs.random_weights(graph))


def text(seed: int = 0) -> Text:
    ids = torch.randint(0, 40, (12, 16), generator=torch.Generator().manual_seed(seed))
    return Text(ids, (0,) * 6 + (1,) * 6, ("a", "b"), ids[:2])


def same(a: Statistics, b: Statistics) -> bool:
    tensors = [(getattr(x, f.name), getattr(b.layers[n], f.name)) for n, x in a.layers.items() for f in fields(LayerStatistics)]
    tensors += [(value, b.linear_square[n]) for n, value in a.linear_square.items()]
    return list(a.layers) == list(b.layers) and a.fingerprint == b.fingerprint and all(torch.equal(x, y) for x, y in tensors)


def test_a_cut_off_run_goes_on_after_the_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = deep(), tmp_path / "statistics.safetensors"
    unfinished = tmp_path / "statistics.safetensors.unfinished"
    whole, other = collect(model, text()), collect(model, text(1))
    monkeypatch.setattr(module, "SNAPSHOT_EVERY_S", 0.0)
    visit, seen = module._Collector.visit, list[str]()

    def cut(self: module._Collector, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        seen.append(node.name)
        if node.name == "eb" and not unfinished.exists():
            raise AssertionError("nothing was kept")
        if node.name == "eb" and len(seen) == len(set(seen)):
            raise KeyboardInterrupt
        return visit(self, node, inputs)

    monkeypatch.setattr(module._Collector, "visit", cut)
    with pytest.raises(KeyboardInterrupt):
        load_or_collect(model, text(), file, QUIET)
    assert not file.exists()
    with pytest.raises(MoecError, match="these statistics are unfinished"):
        load_statistics(unfinished)
    kept, first = unfinished.read_bytes(), list(seen)
    assert "e" in first
    resumed = load_or_collect(model, text(), file, QUIET)
    assert seen[len(first)] == first[first.index("e") + 1]  # not a node of the first layer ran again
    assert same(resumed, whole)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    assert same(load_or_collect(model, text(), file, QUIET), whole)
    with pytest.raises(MoecError, match="another model or calibration text"):
        load_or_collect(model, text(1), file, QUIET)
    file.unlink()
    unfinished.write_bytes(kept)  # of another text: measured from the beginning
    assert same(load_or_collect(model, text(1), file, QUIET), other)


@pytest.mark.parametrize("name", ["embed.weight", "layers.0.q.weight", "layers.0.gate.weight", "layers.0.experts.up", "norm.weight"])
def test_a_model_of_the_same_shape_is_another_model(name: str) -> None:
    value = MODEL.load(name).clone()
    value[len(value) - 1] *= 1.01
    other = MODEL.edited(MODEL.graph, {name: constant(value)})
    assert model_fingerprint(other) != model_fingerprint(MODEL) == model_fingerprint(graphs.model())
    assert collect(MODEL, text()).model_fingerprint == model_fingerprint(MODEL)


def test_inspecting_refuses_statistics_of_another_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "s.safetensors", tmp_path / "checkpoint"
    collect(MODEL, text()).save(file)
    monkeypatch.setattr(huggingface, "resolve", lambda _: folder)
    for seed in (0, 1):
        source = graphs.model(seed)
        monkeypatch.setattr(huggingface, "load", lambda _, source=source: (source.graph, source.weights))
        if not seed:
            assert inspect_checkpoint(folder, stats=True, statistics=file).uses[0].tokens == text().tokens
            continue
        with pytest.raises(MoecError, match=rf"these statistics are of another model: calibrate {folder} with --calibration FILE"):
            inspect_checkpoint(folder, stats=True, statistics=file)


def test_use_of_experts() -> None:
    measured = collect(MODEL, text())
    (use,) = expert_use(measured, locality=True)
    (layer,) = measured.layers.values()
    assert sum(use.share) == pytest.approx(1)
    assert use.share == pytest.approx((layer.count / (2 * layer.tokens)).tolist())
    assert [sum(d) for d in use.domain_share] == pytest.approx([1, 1])
    assert [(a + b) / 2 for a, b in zip(*use.domain_share, strict=True)] == pytest.approx(use.share)  # the domains are of one size
    assert use.share[use.most[0]] == max(use.share)
    assert use.locality is not None and 0 < use.locality.srp <= 1
    rates = list(use.locality.sch.values())
    assert rates == sorted(rates)
    assert use.to_json()["sch"] == use.locality.sch
    page = use_section([use], measured.domains)
    assert page.count("<svg") == 1 + 3  # the scale, all text, two domains
    assert page.count("times the even share</title>") == 3 * 6
    assert len(use_table([use])[0]) == 10
