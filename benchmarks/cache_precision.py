"""What a cache of keys and values in bfloat16 costs: perplexity, and the distance to the same model with one in float32.

    python -m benchmarks.cache_precision CHECKPOINT --data TEXT... [--context 512] [--tokens 8192] [--json]

The interpreter runs each window of a text twice. The second time keys (after norms and rope) and values are rounded to bfloat16 before
every attention, as the CUDA kernels do, those of the token itself too. Everything else is float32 both times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from moec.compiler.damage import Distance, Tally, batches
from moec.compiler.errors import MoecError
from moec.compiler.evaluate import read_windows, window_length
from moec.compiler.frontend import huggingface
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.interpreter import Interpreter, Observer, evaluate
from moec.compiler.ir import Node
from moec.compiler.model import Model
from moec.compiler.reference import pooled

GROUP = 4
"""Batches of windows that run at once: their logits are kept until both models have answered."""


class RoundedCache:
    """An observer of a model's run that computes attention from keys and values in bfloat16."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """See `Observer`."""
        if node.op != "attention":
            return None
        return [self._attention(node, each) for each in inputs]

    def _attention(self, node: Node, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        q, k, v, *_ = inputs
        assert q is not None
        assert k is not None
        assert v is not None
        sinks = [self.model.weights.load(name).to(q) for name in node.inputs[3:] if name]
        return evaluate(node, [q, k.bfloat16().to(k), v.bfloat16().to(v), *sinks], {}, q.dtype, q.device)


def distance(model: Model, observer: Observer, ids: Tensor, targets: Tensor) -> Distance:
    """What an observer that rounds does to a model on windows [W, T], whose next tokens are `targets`."""
    interpreter, tally, done = Interpreter(model.graph, model.weights), Tally(), 0
    parts = batches(ids)
    for start in range(0, len(parts), GROUP):
        group, truth = parts[start : start + GROUP], dict[int, Tensor]()
        interpreter.run(group, lambda index, out: truth.update({index: out[0].log_softmax(-1)}))  # noqa: B023  # run at once
        found = dict[int, Tensor]()
        interpreter.run(group, lambda index, out: found.update({index: out[0]}), observer=observer)  # noqa: B023
        for index, part in enumerate(group):
            wanted = targets[done : done + len(part["ids"])]
            tally.add(truth[index], found[index], wanted)
            done += len(wanted)
    return tally.distance()


def table(found: Mapping[str, Distance], kind: str) -> str:
    """What rounding to a type did, by text, as a Markdown table."""
    lines = [
        f"| text | tokens | perplexity, float32 | {kind} | change | KL, nats a token | same best token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        before = Distance(each.tokens, each.reference_nll, 0, 1, each.reference_nll).perplexity
        cells = name, each.tokens, f"{before:.4f}", f"{each.perplexity:.4f}", f"{each.perplexity / before - 1:+.4%}"
        lines.append(f"| {' | '.join(map(str, cells))} | {each.kl_divergence:.2e} | {each.top1_agreement:.3%} |")
    return "\n".join(lines)


def command(description: str | None, kinds: Sequence[str], observer: Callable[[Model, str], Observer]) -> None:
    """A command that prints what rounding to one of these kinds does to a checkpoint.

    Args:
        observer: of a model and a kind, rounds.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--kind", choices=kinds, default=kinds[0])
    parser.add_argument("--context", type=int)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        model, tokenizer = Model(*huggingface.load(args.checkpoint)), load_tokenizer(args.checkpoint)
        context = window_length(args.context, int(model.graph.meta["context_length"]))
        found = {
            path.stem: distance(model, observer(model, args.kind), *read_windows(path, tokenizer, context, args.tokens))
            for path in args.data
        }
    except MoecError as error:
        parser.exit(2, f"{error}\n")
    found["all"] = pooled(list(found.values()))
    print(json.dumps({name: each.to_json() for name, each in found.items()}) if args.json else table(found, args.kind))


def main() -> None:
    command(__doc__, ("bfloat16",), lambda model, _: RoundedCache(model))


if __name__ == "__main__":
    main()
