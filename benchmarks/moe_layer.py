"""The experts of a MoE layer on a GPU: checked against float64 and timed beside what the GPU reaches and beside other libraries.

    python -m benchmarks.moe_layer build FOLDER [--target h100] [--shapes mixtral,...] [--formats int4_g128,...] [--tokens 1,4,...]
    python -m benchmarks.moe_layer run FOLDER [--skew zipf] [--skipped 0.5] [--peer FILE.py] [--json FILE]
    python -m benchmarks.moe_layer sweep FOLDER --records FOLDER [--seconds N]

`build` compiles kernels, without a GPU, and keeps what is there; `--sweep` adds all candidates of a sweep. `run` and `sweep` go where the
GPU is: they need this repository, torch, numpy and FOLDER, but no compiler and no TVM.

Shapes are E, K, D, F of real models, or `64x8x2048x1024`; `64x8x2048x1024+512` where experts in turn have so many neurons. Formats:
`int4_g128`; `int4_g128/int2_g64` of gate_up and down; `int2_g64+int4_g64` of experts in turn; `float32:` before a format is of float32
activations, as two terms of bfloat16, `fp8:` of those that may be rounded to E4M3.

A time is the median of a CUDA graph of some layers whose weights take turns, the L2 cache flushed in between, top-k given. The floor is
the larger of the bytes of the experts that run over the measured bandwidth, and the arithmetic over the measured rate of a bfloat16
product of 8192 by 8192. The error is the worst of several routings (as drawn; with ids out of range; one expert that takes every token,
and a token that runs it twice), relative to float64 on the dequantised weights.

A peer is a file with a function `layer(weights, x, ids, routing_weights)`, which gives a callable that returns the layer's output [T, D],
or None if it cannot do this one; see `benchmarks.moe_layer_peers`. What it is given is on the GPU, and is what our kernels get.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moec.runtime.errors import MoecError

SHAPES = {
    "mixtral": (8, 2, 4096, 14336),
    "olmoe": (64, 8, 2048, 1024),
    "qwen3": (128, 8, 2048, 768),
    "dsv2": (64, 6, 2048, 1408),
    "gptoss": (32, 4, 2880, 2880),
    "odd": (6, 2, 520, 392),
}
"""E, K, D, F. `odd` is for checks: neither rows nor columns come in whole tiles."""

TOKENS = "1,4,16,64,256,1024,4096"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile kernels into a folder")
    run = commands.add_parser("run", help="check and time them")
    sweep = commands.add_parser("sweep", help="time all candidates")
    for each in (build, run, sweep):
        each.add_argument("folder", type=Path)
        each.add_argument("--shapes", default="mixtral,olmoe,qwen3,dsv2,gptoss" if each is build else None)
        each.add_argument("--formats", default="int4_g128" if each is build else None)
        each.add_argument("--tokens", default=TOKENS if each is build else None)
    build.add_argument("--target", default="h100")
    build.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    build.add_argument("--python", default=None, metavar="3.12", help="the version of Python where the GPU is, if another")
    build.add_argument("--sweep", action="store_true", help="all candidates too")
    build.add_argument("--records", type=Path, default=None, help="a folder of records that decides before those that ship")
    build.add_argument("--activation", default="silu")
    build.add_argument("--biases", action="store_true")
    run.add_argument("--skew", choices=("uniform", "zipf"), default="uniform")
    run.add_argument("--skipped", type=float, default=0.0, help="the share of each token's slots that run no expert")
    run.add_argument("--peer", action="append", default=[], metavar="FILE.py", type=Path)
    run.add_argument("--check", action="store_true", help="do not time")
    run.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the results there too")
    for each in (run, sweep):
        each.add_argument("--repetitions", type=int, default=15 if each is run else 9)
    sweep.add_argument("--records", type=Path, required=True)
    sweep.add_argument("--seconds", type=float, default=None)
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "build":
            from benchmarks.moe_layer_build import build

            return build(options)
        from benchmarks.moe_layer_run import run, sweep

        return run(options) if options.command == "run" else sweep(options)
    except MoecError as error:
        print(f"moe_layer: {error}", file=sys.stderr)
        return 2


def print_row(cells: Sequence[object]) -> None:
    """A row of a Markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def write_json(path: Path, value: object) -> None:
    """Write beside and rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
