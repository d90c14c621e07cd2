"""`python -m benchmarks.moe_layer build`: which libraries there are to be, and compiling them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.moe_layer import SHAPES, write_json
from moec.compiler.measure.cases import Case, Index
from moec.compiler.measure.layers import make_layer
from moec.runtime.errors import MoecError, unknown
from moec.targets import Target
from moec.targets.kernels.cuda.experts_layer import Layer

PLAN = "moe_layer.json"


@dataclass(frozen=True)
class Entry:
    """One cell of the table: what runs for T tokens of a layer, and where its options are from."""

    shape: str
    tokens: int
    why: str
    case: Case

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values."""
        return {"shape": self.shape, "tokens": self.tokens, "why": self.why, "case": self.case.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Entry:
        """The inverse of `to_json`."""
        return cls(values["shape"], values["tokens"], values["why"], Case.from_json(values["case"]))


def read_plan(folder: Path, shapes: str | None, formats: str | None, tokens: str | None) -> list[Entry]:
    """What a build was asked for, of these shapes, formats and T (all unless given)."""
    path = folder / PLAN
    if not path.is_file():
        raise MoecError(f"{folder}: no {PLAN}; `python -m benchmarks.moe_layer build {folder}` makes it, on any machine")
    entries = [Entry.from_json(value) for value in json.loads(path.read_text())]
    wanted = [None if text is None else text.split(",") for text in (shapes, formats, tokens)]
    return [
        entry for entry in entries
        if all(w is None or x in w for w, x in zip(wanted, (entry.shape, format_of(entry.case.layer), str(entry.tokens)), strict=True))
    ]  # fmt: skip


def format_of(layer: Layer) -> str:
    """The formats of a layer as the command line has them."""
    return layer.formats if layer.dtype == "bfloat16" else f"{layer.dtype}:{layer.formats}"


def layers(shapes: str, formats: str) -> list[tuple[str, Layer]]:
    """The layers that a command line names."""
    found = []
    for shape in shapes.split(","):
        size, widths = (SHAPES[shape], []) if shape in SHAPES else _size(shape)
        for text in formats.split(","):
            dtype, _, names = text.rpartition(":")
            found.append((shape, make_layer((*size, True), names, dtype or "bfloat16", widths)))
    return found


def _size(shape: str) -> tuple[tuple[int, int, int, int], list[int]]:
    """E, K, D, F, and F of experts in turn."""
    parts = shape.split("x")
    widths = parts[-1].split("+")
    if len(parts) != 4 or not all(part.isdecimal() for part in (*parts[:3], *widths)):
        raise unknown("shape", shape, SHAPES)
    experts, top_k, d = map(int, parts[:3])
    return (experts, top_k, d, max(map(int, widths))), [int(width) for width in widths]


def entries_for(options: Namespace, target: Target, tvm: str) -> list[Entry]:
    """The cells of the table."""
    from moec.targets.kernels.cuda.tuned import choose
    from moec.targets.measured import SHIPPED, own_folder

    folders = [*([options.records] if options.records else []), own_folder(), SHIPPED]
    found = []
    for shape, layer in layers(options.shapes, options.formats):
        for tokens in map(int, options.tokens.split(",")):
            choice = choose(target, layer, tokens, folders, tvm)
            case = Case.of(choice.kernel, layer, choice.options, tokens, activation=options.activation, biases=options.biases)
            found.append(Entry(shape, tokens, choice.why, case))
    return found


def build(options: Namespace) -> int:
    """Compile what is missing."""
    from moec.compiler.measure import build as compile_
    from moec.compiler.measure.sweep import tasks
    from moec.compiler.progress import Progress
    from moec.targets import get_target
    from moec.targets.measured import read_records

    target = get_target(options.target)
    entries = entries_for(options, target, compile_.tvm_version())
    cases = [entry.case for entry in entries]
    if options.sweep:
        named = [layer for _, layer in layers(options.shapes, options.formats)]
        cases += [
            task.case for task in tasks(named, [int(t) for t in options.tokens.split(",")], target, read_records(target.name), every=True)
        ]
    failed = _compile(compile_.build(options.folder, cases, target, options.jobs), len(set(cases)), Progress())
    built = Index.read(options.folder).files
    kept = {(e.shape, e.tokens, e.case.layer): e for e in (*_old_plan(options.folder), *entries) if e.case in built}
    write_json(options.folder / PLAN, [entry.to_json() for entry in kept.values()])
    for problem in compile_.copy_runtime(options.folder, options.python):
        print(f"missing: {problem}")
    for case, problem in failed:
        print(f"failed: {case.kernel} {case.layer.name} T = {case.tokens} {dict(case.options)}: {problem}")
    print(f"{options.folder}: {len(cases) - len(failed)} of {len(cases)} libraries for {target.name}")
    return 1 if failed else 0


def _compile(done: Iterable[tuple[Case, str | None]], total: int, progress: Any) -> list[tuple[Case, str]]:
    failed = []
    with progress.counter("libraries") as count:
        for i, (case, problem) in enumerate(done):
            count(i + 1, total)
            if problem is not None:
                failed.append((case, problem))
    return failed


def _old_plan(folder: Path) -> Sequence[Entry]:
    try:
        return read_plan(folder, None, None, None)
    except (MoecError, KeyError, ValueError):
        return ()
