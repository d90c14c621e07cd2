"""Our own artifacts, through the TVM backend: compiled once into the cache folder, measured by the routine behind `moec bench`."""

import os
from pathlib import Path

from benchmarks.peers import Speed


def measure(
    model: Path, prompt_tokens: int, new_tokens: int, threads: int, repetitions: int, backend: str = "tvm", activations: str = "float"
) -> list[Speed]:
    """Compile the checkpoint with the recipe $MOEC_BENCHMARK_RECIPE (int4) and time it."""
    from moec.compiler.pipeline import compile_model
    from moec.runtime import load
    from moec.runtime.measure import measure_speed

    recipe = os.environ.get("MOEC_BENCHMARK_RECIPE", "int4")
    cache = Path(os.environ.get("MOEC_BENCHMARK_CACHE") or Path.home() / ".cache" / "moec-benchmarks")
    cache.mkdir(parents=True, exist_ok=True)
    artifact = cache / f"{model.name}-{recipe}-{backend}-{activations}.moec"
    if not artifact.exists():
        compile_model(model, artifact, backend=backend, recipe=recipe, activations=activations)
    with load(artifact, threads=threads) as session:
        runs = [measure_speed(session, prompt_tokens, new_tokens, 1, 1, seed) for seed in range(repetitions)]
    return [Speed(r.prefill_tokens_per_s.mean, r.decode_tokens_per_s.mean) for r in runs]
