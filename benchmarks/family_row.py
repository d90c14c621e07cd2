"""One family of `benchmarks.families`, in a process of its own: `python -m benchmarks.family_row NAME OUT.json [--backends ...] [-n N]`.

OUT.json holds what is known so far after every step, so that whoever stops this process still learns how far it came.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from moec import runtime
from moec.compiler.backends.tokenwise import ROW_WISE, is_tokenwise
from moec.compiler.errors import MoecError
from moec.compiler.frontend.families_table import check_family
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph, dim_symbols
from moec.compiler.pipeline import compile_model
from moec.compiler.progress import Progress
from moec.compiler.weights import WeightSource

PROMPT = 12
"""Tokens of the prompt: more than the windows and chunks of 8 tokens that tiny configurations have."""

TIE = 1e-4
"""Two best logits this near each other are equally good: from there on the tokens may differ."""

_STATES = {"linear_attention": "linear attention", "aten.conv1d.default": "a short convolution"}


def greedy(graph: Graph, weights: WeightSource, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The interpreter's greedy tokens, and the margin of each."""
    interpreter, ids, margins = Interpreter(graph, weights), list(prompt), []
    for _ in range(new_tokens):
        logits = interpreter(ids=torch.tensor([ids]), positions=torch.arange(len(ids))[None])[0][0, -1]
        best = logits.topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return ids[len(prompt) :], margins


def state_of(graph: Graph) -> str:
    """What in a graph looks at earlier tokens besides attention; empty if nothing does."""
    nodes = [n for n in graph.nodes if n.op not in ROW_WISE and n.op != "attention" and not is_tokenwise(graph, n)]
    found = [_STATES[n.op] for n in nodes if n.op in _STATES]
    if any(sum("T" in dim_symbols(d) for d in o.type.shape) > 1 for n in nodes for o in n.outputs):
        found.append("attention under a mask that the model computes")
    return " and ".join(dict.fromkeys(found)) or ", ".join(dict.fromkeys(n.op for n in nodes[:3]))


def backend_result(
    name: str, traced: tuple[Graph, WeightSource], backend: str, wanted: list[int], margins: list[float], prompt: list[int]
) -> str:
    """`yes`, or why not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            out = Path(folder) / f"{name}.moec"
            compile_model(traced, out, backend=backend, recipe="f32", progress=Progress(quiet=True))
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


def fill(record: dict[str, Any], out: Path, backends: list[str], new_tokens: int) -> None:
    """Try the family of a record, which is written to `out` after every step."""

    def step(name: str) -> None:
        record["step"] = name
        out.write_text(json.dumps(record))

    step("interpreter")
    checked = check_family(record["family"])
    row, graph, weights = checked.row, checked.graph, checked.weights
    record |= {"traced": row.traced, "ok": row.ok, "note": row.reason, "error": row.error if row.error == row.error else None}
    if row.ok and graph is not None and weights is not None:
        record["state"], record["experts"] = state_of(graph), row.ops.get("experts", 0)
        vocabulary = checked.model.config.get_text_config().vocab_size
        prompt = torch.randint(1, vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
        wanted, margins = greedy(graph, weights, prompt, new_tokens)
        for backend in backends:
            step(backend)
            record[backend] = backend_result(record["family"], (graph, weights), backend, wanted, margins, prompt)
    step("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--backends", default="tvm,onnx")
    parser.add_argument("-n", type=int, default=16)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    fill({"family": args.name}, args.out, [b for b in args.backends.split(",") if b], args.n)


if __name__ == "__main__":
    main()
