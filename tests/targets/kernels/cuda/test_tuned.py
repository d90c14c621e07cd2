"""Which options records choose, what is lent, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from moec.runtime.errors import MoecError
from moec.targets import Target, cuda, get_target
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.family import FAMILIES, fingerprint, sources
from moec.targets.kernels.cuda.space import MOST_DECODE, candidates, default, fits, limits, needs
from moec.targets.kernels.cuda.tuned import choose, dispatch, order
from moec.targets.measured import SHIPPED, Measurement, Record, read_records, write_record

BOX = Target("box", "a GPU of ours", "cuda", cuda("sm_90a", 232_448))
LAYER = Layer(64, 8, 2048, 1024, "int4_g128", "int4_g128")
NOW = {family: fingerprint(family) for family in FAMILIES}
SIZES = [(8, 2, 4096, 14336), (64, 8, 2048, 1024), (128, 8, 2048, 768), (64, 6, 2048, 1408), (32, 4, 2880, 2880), (256, 8, 7168, 2048)]


def measured(kernel: str, t: int, us: float, error: float | None = None, **options: int) -> Measurement:
    return Measurement(kernel, t, tuple(sorted(options.items())), us, error)


def store(folder: Path, *measurements: Measurement, layer: Layer = LAYER, kernels: dict[str, str] = NOW) -> list[Path]:
    record = Record("box", "experts", layer.to_json(), "GPU", "0.27.0", kernels, {}, measurements)
    write_record(folder / "box" / f"{layer.name}.json", record)
    return [folder]


def up(us: float, tokens: int = 1, **changed: int) -> Measurement:
    return measured("gate_up", tokens, us, **{"warps": 8, "splits": 4, "unroll": 64, "residency": 0, **changed})


def down(us: float, tokens: int = 1, warps: int = 16) -> Measurement:
    return measured("down", tokens, us, down_warps=warps, down_unroll=64)


def many(us: float, t: int, size: int, error: float | None = None, exact: int = 1) -> Measurement:
    return measured("prefill", t, us, error, tokens=size, tiles=1, stages=4, terms=1, exact=exact, residency=1, depth=2)


def test_the_fastest_is_chosen_and_its_time_is_the_sum(tmp_path: Path) -> None:
    folders = store(tmp_path, up(9.0), up(8.0, splits=2), down(6.0, warps=8), down(5.0))
    found = choose(BOX, LAYER, 1, folders)
    assert (found.kernel, found.us, found.measured) == ("decode", 13.0, True)
    assert found.options == {"warps": 8, "splits": 2, "unroll": 64, "residency": 0, "down_warps": 16, "down_unroll": 64}
    assert found.why == "measured on GPU"


def test_the_nearest_tokens_count(tmp_path: Path) -> None:
    folders = store(tmp_path, up(9.0), up(30.0, 4, splits=8), down(5.0), down(20.0, 4, 32))
    found = choose(BOX, LAYER, 3, folders)
    assert found.options["splits"] == 8 and found.options["down_warps"] == 32
    assert (found.us, found.why) == (None, "measured on GPU for T = 4")


def test_the_large_kernels_run_few_tokens_where_they_are_faster(tmp_path: Path) -> None:
    folders = store(tmp_path, up(50.0, 8), down(40.0, 8), many(80.0, 8, 8))
    assert choose(BOX, LAYER, 8, folders).kernel == "prefill"
    assert choose(BOX, LAYER, 7, folders).kernel == "decode"


def test_what_is_off_is_not_chosen(tmp_path: Path) -> None:
    folders = store(tmp_path, many(10.0, 64, 16, error=6e-3), many(12.0, 64, 32, error=3e-3))
    assert choose(BOX, LAYER, 64, folders).options["tokens"] == 32


def test_age_is_said(tmp_path: Path) -> None:
    folders = store(tmp_path, many(10.0, 64, 16), kernels={**NOW, "prefill": "other"})
    assert choose(BOX, LAYER, 64, folders, tvm="0.28.0").why == "measured on GPU with an earlier version of the kernels and TVM 0.27.0"


def test_alike_layers_lend_and_others_do_not(tmp_path: Path) -> None:
    folders = store(tmp_path, up(9.0, splits=8), down(5.0), many(10.0, 64, 8))
    alike = choose(BOX, replace(LAYER, f=1408, top_k=6), 1, folders)
    assert alike.options["splits"] == 8 and not alike.measured and alike.us is None
    assert alike.why == f"lent by {LAYER.name}, T = 1, measured on GPU"
    far = replace(LAYER, d=16384, f=16384, experts=8, top_k=1)
    for other in (far, replace(LAYER, gated=False)):
        found = choose(BOX, other, 1, folders)
        assert found.why == "default: nothing like it was measured on box"
        assert found.options == default("decode", other, 1)


def test_other_activations_borrow_what_suits_them(tmp_path: Path) -> None:
    wide = replace(LAYER, dtype="float32")
    folders = store(tmp_path, up(9.0, splits=8), down(5.0), many(10.0, 64, 32, exact=0), many(20.0, 64, 24))
    few, prefill = choose(BOX, wide, 1, folders), choose(BOX, wide, 64, folders)
    assert few.options["splits"] == 8 and not few.measured
    assert prefill.options == default("prefill", wide, 64)  # the fastest rounds weights, which says nothing of others
    folders = store(tmp_path / "exact", many(10.0, 64, 24), many(20.0, 64, 32))
    prefill = choose(BOX, wide, 64, folders)
    assert prefill.why == f"lent by {LAYER.name}, T = 64, measured on GPU"
    assert (prefill.options["tokens"], prefill.options["terms"], prefill.options["exact"]) == (24, 2, 1)


def test_blocks_that_stay_are_as_many_as_the_gpu_has_room_for() -> None:
    found = candidates("prefill", LAYER, 1024, size=78)
    assert {options["multiprocessors"] for options in found} == {0, 78}
    small = replace(BOX, multiprocessors=78)
    assert choose(small, LAYER, 1024, []).options["multiprocessors"] == 78


def test_kernels_are_known_by_all_their_sources() -> None:
    decode, prefill = ({path.stem for path in sources(family)} for family in ("decode", "prefill"))
    assert {"experts_decode", "stream", "routing", "intrinsics", "layout", "experts_layout", "emit", "activation", "pipeline"} <= decode
    assert {"experts_prefill", "product", "matrix", "sort", "intrinsics", "layout", "experts_layout", "emit", "pipeline"} <= prefill
    assert "product" not in decode
    assert not {"space", "tuned"} & (decode | prefill)


def test_no_tokens_run_the_kernels_of_any_number(tmp_path: Path) -> None:
    assert choose(BOX, LAYER, 0, store(tmp_path, up(9.0), down(5.0))).kernel == "prefill"


def test_without_records_all_is_default(tmp_path: Path) -> None:
    assert choose(BOX, LAYER, 64, [tmp_path]).options == default("prefill", LAYER, 64)


def test_own_records_come_first(tmp_path: Path) -> None:
    folders = store(tmp_path / "own", up(9.0, splits=8), down(5.0)) + store(tmp_path / "shipped", up(1.0), down(1.0))
    assert choose(BOX, LAYER, 1, folders).options["splits"] == 8


def test_what_should_cost_least_is_among_the_best_that_were_measured() -> None:
    cells = 0
    for record in read_records("h100-sxm", [SHIPPED]):
        layer, times = Layer.from_json(record.layer), dict[int, dict[str, float]]()
        for m in record.measurements:
            if m.kernel == "prefill":
                times.setdefault(m.tokens, {})[str(dict(m.options))] = m.us
        for tokens, found in times.items():
            measured = [dict(m.options) for m in record.measurements if (m.kernel, m.tokens) == ("prefill", tokens)]
            first = order([], "prefill", layer, tokens, measured)[:8]
            assert min(found[str(options)] for options in first) <= 1.1 * min(found.values()), (layer.name, tokens)
            cells += 1
    assert cells


def test_dispatch_covers_every_t(tmp_path: Path) -> None:
    folders = store(tmp_path, up(9.0), down(5.0), many(10.0, 16, 8), many(12.0, 256, 32), many(50.0, 4096, 64))
    ranges = dispatch(BOX, LAYER, folders=folders)
    bounds = [bound for bound, _ in ranges]
    assert bounds[:MOST_DECODE] == list(range(1, MOST_DECODE + 1))
    assert bounds[-1] is None
    inner = [bound for bound in bounds if bound is not None]
    assert all(a < b for a, b in pairwise(inner))
    assert [choice.options["tokens"] for _, choice in ranges[MOST_DECODE:]] == [8, 32, 64]
    for bound, choice in ranges[MOST_DECODE:-1]:
        assert bound is not None
        assert choose(BOX, LAYER, bound // 3 * 2, folders).options == choice.options


def test_dispatch_ends_where_there_are_no_kernels(tmp_path: Path) -> None:
    old = replace(get_target("a100"), tvm=cuda("sm_75", 64 << 10))
    assert [bound for bound, _ in dispatch(old, LAYER, folders=[tmp_path])] == list(range(1, MOST_DECODE + 1))
    with pytest.raises(MoecError, match="pass fewer tokens"):
        choose(old, LAYER, 64, [tmp_path])


def test_what_did_well_elsewhere_is_tried_first(tmp_path: Path) -> None:
    store(tmp_path, down(5.0, warps=8), down(9.0, warps=16), down(7.0, warps=32))
    options = [{"down_warps": w, "down_unroll": u} for u in (64, 128) for w in (16, 32, 8)]
    found = order(read_records("box", [tmp_path]), "down", LAYER, 2, options)
    assert [o["down_warps"] for o in found if o["down_unroll"] == 64] == [8, 32, 16]
    assert found[0] == {"down_warps": 8, "down_unroll": 64}
    assert found[-1] == {"down_warps": 16, "down_unroll": 64}, "worse than half again counts less than what is not known"


@pytest.mark.parametrize("name", ["h100", "a100", "l4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", SIZES)
def test_candidates_fit_and_the_default_is_one(size: tuple[int, int, int, int], dtype: str, name: str) -> None:
    layer, target = Layer(*size, "int4_g128", "int4_g128", dtype), get_target(name)
    own = limits(target)
    limit, _, clusters = own
    for tokens in (1, 2, 4, 8, 64, 4096):
        for kernel in ("gate_up", "down") if tokens <= MOST_DECODE else ("prefill",):
            found = candidates(kernel, layer, tokens, *own)
            assert found[0] == default(kernel, layer, tokens, *own)
            assert len({tuple(sorted(options.items())) for options in found}) == len(found)
            assert all(fits(kernel, layer, tokens, options, limit, clusters) for options in found[1:])
            assert clusters or not any(options.get("cluster") for options in found)
        choice = choose(target, layer, tokens, [])
        if choice.kernel == "prefill" and tokens <= MOST_DECODE:
            assert needs("gate_up", layer, tokens, candidates("gate_up", layer, tokens, *own)[0])[1] > limit
        for kernel in ("gate_up", "down") if choice.kernel == "decode" else ("prefill",):
            chosen = {name: choice.options[name] for name in default(kernel, layer, tokens, *own)}
            threads, shared = needs(kernel, layer, tokens, chosen)
            assert threads <= 1024
            assert shared <= limit


@pytest.mark.parametrize("record", read_records("h100-sxm", [Path(__file__).parents[4] / "targets/measured"]), ids=lambda r: r.layer["f"])
def test_records_that_ship_are_used(record: Record) -> None:
    layer = Layer.from_json(record.layer)
    assert record.target == "h100-sxm"
    for m in record.measurements:
        assert m.us > 0
        assert {"prefill": m.tokens > MOST_DECODE}.get(m.kernel, m.tokens <= MOST_DECODE)
        assert set(dict(m.options)) <= {*default(m.kernel, layer, m.tokens), "cluster", "ring"}, (
            "what is not named has the value of the spec's default"
        )
    for tokens in {m.tokens for m in record.measurements}:
        assert choose(get_target(record.target), layer, tokens, [Path(__file__).parents[4] / "targets/measured"]).measured
