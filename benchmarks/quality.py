"""What each weight format costs in quality: one table of recipes and backends.

    python -m benchmarks.quality CHECKPOINT --data TEXT... [--recipes f32,bf16,int8,...] [--backends tvm,onnx] [--max-tokens N]

Perplexity, KL divergence and top-1 agreement against the checkpoint in float32 (through the interpreter), and the bytes of the files.
Several texts are scored one by one and averaged by tokens.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from moec.compiler.evaluate import Evaluation, evaluate
from moec.compiler.pipeline import compile_model
from moec.compiler.progress import Progress

QUIET = Progress(quiet=True)


def pooled(results: list[Evaluation]) -> Evaluation:
    """One evaluation over the tokens of several."""
    tokens = sum(r.tokens for r in results)

    def mean(name: str) -> float:
        return sum(getattr(r, name) * r.tokens for r in results) / tokens

    nll = mean("nll")
    return Evaluation(tokens, nll, math.exp(nll), results[0].context, mean("kl_divergence"), mean("top1_agreement"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--recipes", default="f32,bf16,int8,int4,int4-g32,int3,int2")
    parser.add_argument("--backends", default="tvm,onnx")
    parser.add_argument("--max-tokens", type=int, help="of each text")
    parser.add_argument("--context", type=int)
    args = parser.parse_args()
    print("| recipe | backend | files MB | bits a weight | perplexity | KL, nats/token | top-1 agreement |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in args.recipes.split(","):
            for backend in args.backends.split(","):
                out = Path(folder) / f"{recipe}-{backend}.moec"
                plan = compile_model(args.checkpoint, out, backend=backend, recipe=recipe, progress=QUIET)
                found = pooled([
                    evaluate(
                        out, text, reference=args.checkpoint, context=args.context, max_tokens=args.max_tokens, progress=QUIET
                    )
                    for text in args.data
                ])  # fmt: skip
                size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
                print(
                    f"| {recipe} | {backend} | {size / 1e6:.2f} | {8 * plan.weight_bytes / plan.parameters:.2f}"
                    f" | {found.perplexity:.3f} | {found.kl_divergence:.6f} | {found.top1_agreement:.4f} |",
                    flush=True,
                )
    print(f"\n{found.tokens} tokens, windows of {found.context}: {', '.join(p.name for p in args.data)}")


if __name__ == "__main__":
    main()
