"""Our own artifacts, through the ONNX backend with float activations."""

from pathlib import Path

from benchmarks.peers import Speed, moec_tvm


def measure(model: Path, prompt_tokens: int, new_tokens: int, threads: int, repetitions: int) -> list[Speed]:
    """As `moec_tvm.measure`."""
    return moec_tvm.measure(model, prompt_tokens, new_tokens, threads, repetitions, "onnx")
