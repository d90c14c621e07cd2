"""The GPU that this process measures on: libraries of kernels, graphs that are timed, and what the hardware reaches."""

from __future__ import annotations

import ctypes
import hashlib
import statistics
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moec.runtime.errors import MoecError
from moec.runtime.executors.tvm import CUDA_RUNTIME, RUNTIME, load_runtime

DEVICE = "cuda"
_FLUSH_BYTES = 1 << 28  # several times any L2

_machine_code: dict[str, Path] = {}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches.

    Args:
        copy_gb_s: of a copy of 1 GiB, bytes read and written.
        read_gb_s: of a sum over 1 GiB.
        bf16_tflop_s: of a product of two bfloat16 matrices of 8192 by 8192.
    """

    copy_gb_s: float
    read_gb_s: float
    bf16_tflop_s: float

    @property
    def bandwidth(self) -> float:
        """GB/s that reading weights is compared with."""
        return max(self.copy_gb_s, self.read_gb_s)

    def to_json(self) -> dict[str, float]:
        """Its fields."""
        return {name: round(value, 1) for name, value in asdict(self).items()}


def check_gpu() -> str:
    """The GPU's name.

    Raises:
        MoecError: there is none.
    """
    if not torch.cuda.is_available():
        raise MoecError("no GPU that torch can use: measuring needs one; `python -m benchmarks.moe_layer build` does not")
    return torch.cuda.get_device_name()


@cache
def tvm_ffi_module(folder: Path | None = None) -> Any:
    """`tvm_ffi` with TVM's runtime for GPUs loaded: installed ones, else those in a folder.

    Raises:
        MoecError: a part is missing.
    """
    try:
        import tvm_ffi
    except ModuleNotFoundError as error:
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        wheel = next(iter(sorted(folder.glob(f"apache_tvm_ffi-*-{tag}-*.whl"))), None) if folder else None
        if wheel is None:
            raise MoecError(f"tvm_ffi is missing and {folder} has no wheel for {tag}: pip install apache-tvm-ffi") from error
        place = tempfile.mkdtemp(prefix="tvm_ffi-")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        sys.path.insert(0, place)
        import tvm_ffi
    load_runtime(folder / RUNTIME if folder else None)
    if tvm_ffi.get_global_func("runtime.get_cuda_stream", allow_missing=True) is None:
        ctypes.CDLL(str(_cuda_runtime(folder)), ctypes.RTLD_GLOBAL)
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _find_machine_code, override=True)
    return tvm_ffi


def _cuda_runtime(folder: Path | None) -> Path:
    places = [Path(root, "tvm/lib") for root in sys.path]
    found = next((place / CUDA_RUNTIME for place in ([folder] if folder else []) + places if (place / CUDA_RUNTIME).is_file()), None)
    if found is None:
        raise MoecError(f"{CUDA_RUNTIME} is missing: it is in the package apache-tvm, and a build copies it")
    return found


def _find_machine_code(source: str, *_: Any) -> bytes:
    name = hashlib.sha256(str(source).encode()).hexdigest()[:32]
    if (path := _machine_code.get(name)) is None:
        raise MoecError(f"no machine code {name}.cubin for these kernels: build the folder again")
    return path.read_bytes()


def load_library(folder: Path, name: str) -> Any:
    """A library that was built."""
    ffi = tvm_ffi_module(folder)
    if not (path := (folder / f"{name}.so").absolute()).is_file():
        raise MoecError(f"{path}: no such library; build the folder again")
    _machine_code.update({found.stem: found for found in folder.glob("*.cubin") if found.stem not in _machine_code})
    return ffi.load_module(str(path))


@contextmanager
def torch_stream(ffi: Any) -> Iterator[None]:
    """The kernels of TVM on torch's current stream.

    Not `ffi.use_torch_stream`, which is missing where `tvm_ffi` was imported without torch, as the runtime does.

    Args:
        ffi: `tvm_ffi`; None: nothing is TVM's.
    """
    if ffi is None:
        yield
        return
    stream = torch.cuda.current_stream()
    with ffi.use_raw_stream(ffi.device(str(stream.device)), stream.cuda_stream):
        yield


def time_graph(calls: Sequence[Callable[[], object]], repetitions: int, ffi: Any = None) -> float:
    """Median microseconds of a call: all in one CUDA graph, which is replayed, each time with other things in the L2 cache.

    Args:
        ffi: `tvm_ffi`, if the calls are of kernels that TVM launches.
    """
    with torch_stream(ffi):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    capture: Any = torch.cuda.graph(graph)
    with capture, torch_stream(ffi):
        for call in calls:
            call()
    return _median(graph.replay, repetitions) / len(calls)


def time_eager(calls: Sequence[Callable[[], object]], repetitions: int) -> float:
    """Median microseconds of a call, without a graph."""
    calls[0]()

    def run() -> None:
        for call in calls:
            call()

    return _median(run, repetitions) / len(calls)


@cache
def _flush() -> torch.Tensor:
    return torch.zeros(_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)


def _median(run: Callable[[], object], repetitions: int) -> float:
    """Microseconds."""
    times = []
    for turn in range(repetitions + 1):
        _flush().add_(1)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if turn:  # the first warms up
            times.append(1e3 * begin.elapsed_time(end))
    return float(statistics.median(times))


def measure_ceilings(repetitions: int = 9) -> Ceilings:
    """What the device reaches now."""
    size = 1 << 30
    rates = _bandwidths(size, repetitions)
    torch.cuda.empty_cache()
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = _median(lambda: torch.mm(a, b, out=out), repetitions)
    return Ceilings(*rates, 2 * 8192**3 / product / 1e6)


def _bandwidths(size: int, repetitions: int) -> tuple[float, float]:
    """GB/s of a copy and of a sum."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    words = source.view(torch.int64)
    return 2 * size / _median(lambda: target.copy_(source), repetitions) / 1e3, size / _median(words.sum, repetitions) / 1e3
