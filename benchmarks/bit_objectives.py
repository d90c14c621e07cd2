"""Which objective of bit assignment predicts the damage best, and what does the choice do end to end?

    python -m benchmarks.bit_objectives MODEL --calibration FILES --data FILES [--correlate] [--steps JSON] [--device cuda]

First each objective's damages of every (projection, format) are compared with the exact KL divergence of that one change, by Spearman's
rank correlation. Then each objective assigns the formats of each budget, one quantiser makes the values, and the result's KL divergence to
the model is measured on texts that were not calibrated on: on the first text, and the mean over the others. Uniform formats of the same
size, units and scopes are compared alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.allocation import Problem, make_units
from moec.compiler.calibration.text import Text, read_text
from moec.compiler.context import Context
from moec.compiler.damage import Damage
from moec.compiler.evaluate import windows
from moec.compiler.frontend import huggingface
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.model import Model
from moec.compiler.passes import make_pass, run_passes
from moec.compiler.plan import param_bytes
from moec.compiler.quantizers import get_quantizer
from moec.compiler.sensitivity import get_objective
from moec.compiler.weights import MemoryWeights

FORMATS = ("int2_channel", "int2_g128", "int2_g64", "int3_channel", "int3_g128", "int4_g128")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "kl": {"tokens": 4096}, "gauss_newton": {}, "fisher": {}, "output": {}, "hessian": {}, "mc_moe": {},
}  # fmt: skip


class Bench:
    """A model, its texts, and the table in the making."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, tokenizer = options, load_tokenizer(options.model)
        lazy = Model(*huggingface.load(options.model))
        self.source = held(lazy)
        self.text: Text = read_text(options.calibration, tokenizer, tokens=options.calibration_tokens)
        paths = [p for f in options.data for p in (sorted(f.glob("*.txt")) if f.is_dir() else [f])]
        self.damages: dict[str, Damage] = {}
        with torch.device(options.device):
            for index, path in enumerate(paths):
                ids = np.asarray(tokenizer.encode(path.read_text(), add_special_tokens=False).ids)
                inputs, targets = windows(ids, 512)
                count = max(1, (options.tokens if index == 0 else options.tokens // 8) // 512)
                rows = torch.cat([inputs[:count], targets[:count, -1:]], 1)
                self.damages[path.stem] = Damage(self.source, rows.to(options.device))
        self.rows: list[dict[str, Any]] = []

    def context(self) -> Context:
        return Context(text=self.text, reference=self.source)

    def measure(self, name: str, make: Callable[[Context], Model]) -> Model:
        """Make a model, print its line, and return it with its values held."""
        context, start = self.context(), time.monotonic()
        model = make(context)
        values = held(model)
        with torch.device(self.options.device):
            found = {text: damage(values).kl_divergence for text, damage in self.damages.items()}
        first, *others = found.values()
        experts = [p for p in model.graph.params.values() if len(p.type.shape) == 3]
        bits = 8 * sum(map(param_bytes, experts)) / sum(int(np.prod([int(d) for d in p.type.shape])) for p in experts)
        row = {"name": name, "bits": bits, "kl": found, "seconds": time.monotonic() - start}
        row["journal"] = [{k: v for k, v in entry.items() if k != "formats"} for entry in context.journal]
        self.rows.append(row)
        print(f"{name:<64} {bits:7.4f} bits  KL {first:.4f}  {np.mean(others or [first]):.4f}  {row['seconds']:.0f} s", flush=True)
        return model


def held(model: Model) -> Model:
    """The model with every value in memory."""
    return Model(model.graph, MemoryWeights({n: model.load(n).cpu() for n in model.graph.params}))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([v.flatten().argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def correlate(bench: Bench) -> None:
    """Print how well each objective ranks what the exact KL ranks."""
    units = tuple(make_units(bench.source, "projection", ["experts"]))
    problem = Problem(bench.source, bench.context(), units, FORMATS, get_quantizer("rtn"))
    truth: Tensor | None = None
    for name, chosen in OBJECTIVES.items():
        start = time.monotonic()
        with torch.device(bench.options.device):
            found = get_objective(name, chosen).damages(problem).cpu()
        truth = found if truth is None else truth
        each = [rank_correlation(found[:, o], truth[:, o]) for o in range(len(FORMATS))]
        sums = ", ".join(f"{v:.3g}" for v in found.sum(0).tolist())
        print(f"{name:<14} rank correlation {np.mean(each):.3f} within a format, {rank_correlation(found, truth):.3f} over all; ", end="")
        print(f"sums {sums}; {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Print the correlations and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=1 << 14)
    parser.add_argument("--tokens", type=int, default=1 << 14, help="tokens of the first text; the others have an eighth each")
    parser.add_argument("--steps", help="JSON: a list of [name, [[pass, options], ...]]; a name that starts with + goes on from the last")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--correlate", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options)
    if options.correlate:
        correlate(bench)
    last = bench.source
    for name, steps in json.loads(options.steps or "[]"):

        def make(context: Context, first: Model = last if name[0] == "+" else bench.source, steps: list[Any] = steps) -> Model:
            with torch.device(options.device):
                return run_passes(first, [make_pass(kind, given) for kind, given in steps], context)

        last = bench.measure(name, make)
    if options.json:
        options.json.write_text(json.dumps(bench.rows, indent=1))


if __name__ == "__main__":
    main()
