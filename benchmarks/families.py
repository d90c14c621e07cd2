"""Which model families work: a tiny random model of each, through the interpreter and both backends.

    python -m benchmarks.families [NAMES...] [--backends tvm,onnx] [-n 16] [--json FILE]

`interpreter`: the largest difference of logits to transformers' eager model in float32. A backend passes when its
float32 artifact gives the interpreter's greedy tokens, up to a place where the interpreter's two best logits are within 1e-4.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from moec import runtime
from moec.compiler.errors import MoecError
from moec.compiler.frontend.families_table import check_family, families, tiny_model
from moec.compiler.frontend.model import graph_of
from moec.compiler.interpreter import Interpreter
from moec.compiler.pipeline import compile_model
from moec.compiler.progress import Progress

PROMPT = 12
TIE = 1e-4


def greedy(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The interpreter's greedy tokens, and the margin of each."""
    interpreter, ids, margins = Interpreter(*graph_of(model)), list(prompt), []
    for _ in range(new_tokens):
        logits = interpreter(ids=torch.tensor([ids]), positions=torch.arange(len(ids))[None])[0][0, -1]
        best = logits.topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return ids[len(prompt) :], margins


def backend_result(name: str, model: Any, backend: str, wanted: list[int], margins: list[float], prompt: list[int]) -> str:
    """`yes`, or why not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            out = Path(folder) / f"{name}.moec"
            compile_model(model, out, backend=backend, recipe="f32", progress=Progress(quiet=True))
            session = runtime.load(out)
            found = [t.id for t in session.generate(prompt, max_new_tokens=len(wanted), ignore_eos=True)]
        except MoecError as error:
            return str(error).splitlines()[0]
        except Exception as error:  # noqa: BLE001  # a table of what fails must survive what fails
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for a, b, margin in zip(found, wanted, margins, strict=True):
        if a != b:
            return "yes" if margin < TIE else f"other tokens, where the margin is {margin:.1e}"
    return "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--backends", default="tvm,onnx")
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args()
    backends, rows = args.backends.split(","), []
    print(f"| family | traced | interpreter | {' | '.join(f'{b} tokens' for b in backends)} | note |")
    print(f"|---|---|---|{'---|' * len(backends)}---|")
    for name in args.names or families():
        row = check_family(name)
        record: dict[str, Any] = {"family": name, "traced": row.traced, "error": row.error, "ok": row.ok, "note": row.reason}
        if row.ok:
            _, model = tiny_model(name)
            prompt = torch.randint(
                1, model.config.get_text_config().vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(1)
            ).tolist()
            wanted, margins = greedy(model, prompt, args.n)
            for backend in backends:
                record[backend] = backend_result(name, model, backend, wanted, margins, prompt)
        results = [record.get(b, "") for b in backends]
        notes = dict.fromkeys([record["note"], *(r[:160] for r in results if r not in ("", "yes"))])
        cells = ["yes" if row.traced else "no", f"{row.error:.0e}" if row.ok else "no", *("yes" if r == "yes" else "no" for r in results)]
        print(f"| {name} | {' | '.join(cells)} | {'; '.join(n for n in notes if n)} |", flush=True)
        rows.append(record)
    counts = [sum(bool(r["ok"]) for r in rows), *(sum(r.get(b) == "yes" for r in rows) for b in backends)]
    print(f"\n{len(rows)} families: {counts[0]} equal, " + ", ".join(f"{c} through {b}" for b, c in zip(backends, counts[1:], strict=True)))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
