"""llama.cpp on the CPU, through llama-cpp-python in an environment of its own (ours never depends on it).

    python -m venv LLAMA && CMAKE_ARGS=-DGGML_NATIVE=ON LLAMA/bin/pip install --no-binary llama-cpp-python \
        llama-cpp-python==0.3.36 gguf==0.19.0
    export MOEC_LLAMA_PYTHON=LLAMA/bin/python

The checkpoint becomes a GGUF file once and stays in the cache folder ($MOEC_BENCHMARK_CACHE, ~/.cache/moec-benchmarks).
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path

from benchmarks.peers import PeerUnavailableError, Speed

SCRIPTS = Path(__file__).parents[1] / "llama_cpp"


def peer_python() -> str:
    if python := os.environ.get("MOEC_LLAMA_PYTHON"):
        return python
    raise PeerUnavailableError("MOEC_LLAMA_PYTHON is not set: name a Python that has llama-cpp-python and gguf")


def run_script(script: str, *arguments: str) -> str:
    """Standard output of one of the scripts that run under llama.cpp's Python."""
    # -P: the script's folder must not hide installed packages of the same name
    command = [peer_python(), "-P", str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise PeerUnavailableError(f"llama.cpp: {script}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def gguf_file(checkpoint: Path, weights: str) -> Path:
    """The checkpoint's GGUF file, written on the first call."""
    cache = Path(os.environ.get("MOEC_BENCHMARK_CACHE") or Path.home() / ".cache" / "moec-benchmarks")
    cache.mkdir(parents=True, exist_ok=True)
    files = sorted([*checkpoint.glob("*.safetensors"), checkpoint / "config.json"])
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((str(checkpoint.resolve()), state)).encode()).hexdigest()[:12]
    out = cache / f"{checkpoint.name}-{weights}-{digest}.gguf"
    if not out.exists():
        run_script("write_gguf.py", str(checkpoint), str(out), "--type", weights)
    return out


def measure(model: Path, prompt_tokens: int, new_tokens: int, threads: int, repetitions: int, weights: str = "q4_0") -> list[Speed]:
    """`weights` is one of q4_0, q8_0, f16, f32; `model` may also be a GGUF file."""
    file = model if model.suffix == ".gguf" else gguf_file(model, weights)
    numbers = {"-p": prompt_tokens, "-n": new_tokens, "-t": threads, "-r": repetitions}
    options = [text for flag, number in numbers.items() for text in (flag, str(number))]
    runs = json.loads(run_script("worker.py", str(file), *options))["runs"]
    return [Speed(**run) for run in runs]
