"""What compiling with calibration costs: seconds, peak memory of the process, peak memory of a GPU.

    python -m benchmarks.compile_cost CHECKPOINT --calibration TEXT... [--recipe FILE] [--calibration-tokens N] [--device cuda]
        [--backend onnx] [-o OUT.moec]

The whole of `moec compile` in this process, tracing and writing included, into a folder that is removed again unless `-o` names one.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from moec.compiler.pipeline import compile_model

RECIPE = Path(__file__).parent / "recipes" / "gptq-4.12.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=1 << 16)
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moec-cost-") as folder:
        output = args.output or Path(folder) / "model.moec"
        compile_model(
            args.checkpoint, output, backend=args.backend, recipe=args.recipe, calibration=args.calibration,
            calibration_tokens=args.calibration_tokens, device=args.device,
        )  # fmt: skip
        seconds = time.monotonic() - started
        sizes = json.loads((output / "manifest.json").read_text())
    record = {
        "checkpoint_bytes": sum(p.stat().st_size for p in args.checkpoint.glob("*.safetensors")),
        "recipe": Path(args.recipe).stem,
        "calibration_tokens": args.calibration_tokens,
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "threads": torch.get_num_threads(),
        "weight_bytes": sizes["sizes"]["weight_bytes"],
        "quality": sizes["quality"],
    }
    if args.device != "cpu":
        record["gpu"] = torch.cuda.get_device_name(args.device)
        record["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(args.device) / 2**30, 2)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
