"""Do the runtime and the interpreter compute the same function of the same packed weights?

    python -m benchmarks.agreement CHECKPOINT --data TEXT [--recipes int8,int4] [--backends tvm,onnx] [--tokens 8192]

Prints the mean KL divergence (nats a token) of each artifact to the interpreter, which reads the artifact's own weights back.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from moec import runtime
from moec.compiler.artifact_weights import open_artifact
from moec.compiler.evaluate import windows
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.interpreter import Interpreter
from moec.compiler.pipeline import compile_model
from moec.compiler.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipes", default="int8,int4")
    parser.add_argument("--backends", default="tvm,onnx")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=256)
    args = parser.parse_args()
    ids = load_tokenizer(args.checkpoint).encode(args.data.read_text(), add_special_tokens=False).ids
    inputs = windows(ids, args.context)[0][: max(1, args.tokens // args.context)]
    positions = torch.arange(args.context)[None]
    quiet = Progress(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in args.recipes.split(","):
            for backend in args.backends.split(","):
                artifact = Path(folder) / f"{recipe}-{backend}.moec"
                compile_model(args.checkpoint, artifact, backend=backend, recipe=recipe, progress=quiet)
                session = runtime.load(artifact)
                truths: dict[int, torch.Tensor] = {}
                batches = [{"ids": window[None], "positions": positions} for window in inputs]
                Interpreter(*open_artifact(artifact)).run(batches, lambda index, out: truths.update({index: out[0][0]}))  # noqa: B023
                kl, worst, tokens, same = 0.0, 0.0, 0, 0
                for index, window in enumerate(inputs):
                    truth = truths[index].double().log_softmax(-1)
                    handle = session.executor.add()
                    logits = session.executor.forward([(handle, window.numpy())], all_logits=True)
                    session.executor.remove(handle)
                    found = torch.from_numpy(logits).double().log_softmax(-1)
                    each = (truth.exp() * (truth - found)).sum(-1)
                    kl, worst, tokens = kl + float(each.sum()), max(worst, float(each.max())), tokens + len(each)
                    same += int((truth.argmax(-1) == found.argmax(-1)).sum())
                record = {"recipe": recipe, "backend": backend, "tokens": tokens, "kl_mean": kl / tokens, "kl_max": worst}
                print(json.dumps({**record, "top1_agreement": same / tokens}), flush=True)


if __name__ == "__main__":
    main()
