"""ONNX Runtime on an NVIDIA GPU: its sessions, and caches of keys and values that never leave the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import MoecError
from moec.runtime.onnx_cache import Layers, SharedCache

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue, SessionOptions

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

PACKAGE = "onnxruntime-gpu[cuda,cudnn]"
"""What pip installs for it: ONNX Runtime and NVIDIA's libraries that it loads."""

_OPTIONS = {CPU: dict[str, str](), CUDA: {"use_tf32": "0"}}
"""Options of a provider. Products that stay float32 do so because they must be exact: TF32 would round what they read to 11 bits."""

_SMALLER = 2
"""16-bit numbers in what caches are allocated as, float32: numpy has no bfloat16, and ONNX Runtime no operators to copy either."""


def check_provider(provider: str, where: str, needed: str) -> None:
    """Check that the installed ONNX Runtime has a provider, and load the libraries that it needs.

    Args:
        where: names the artifact in errors.
        needed: the least version of ONNX Runtime.

    Raises:
        MoecError: it has not.
    """
    import onnxruntime as ort

    if provider not in _OPTIONS:
        raise MoecError(f"{where}: was compiled for ONNX Runtime's {provider}, which this version of moec does not know: update moec")
    if provider not in ort.get_available_providers():
        raise MoecError(
            f"{where}: was compiled for an NVIDIA GPU, and the installed onnxruntime {ort.__version__} has no {provider}: "
            f"pip uninstall onnxruntime, then pip install '{PACKAGE}>={needed}'; or compile it for a CPU target"
        )
    if provider == CUDA:
        ort.preload_dlls()  # from NVIDIA's packages, where they are not on the loader's path


def open_session(path: Path, options: SessionOptions, provider: str) -> InferenceSession:
    """A session of a provider; of the processor's where the provider does not start (see `check_started`)."""
    import onnxruntime as ort

    return ort.InferenceSession(path, options, providers=[(provider, _OPTIONS[provider])], enable_fallback=int(provider == CPU))


def check_started(session: InferenceSession, provider: str, where: str) -> None:
    """Check that a session runs where it should.

    Raises:
        MoecError: the provider did not start.
    """
    import onnxruntime as ort

    if provider not in session.get_providers():
        version = getattr(ort, "cuda_version", "") or "its version"
        raise MoecError(
            f"{where}: onnxruntime {ort.__version__} cannot start its {provider}, for the reason above: it needs an NVIDIA GPU, a driver "
            f"for CUDA {version} and its libraries (pip install '{PACKAGE}')"
        )


class DeviceCache(SharedCache):
    """Keys and values in a device's memory, of 16-bit numbers.

    Args:
        grow: the session of the model that makes room (inputs `cache` and `pads`, output `grown`).
        device: `cuda`, or `cpu` for models that a processor runs as well.
        kind: ONNX's type of the numbers.
    """

    def __init__(
        self,
        session: InferenceSession,
        layers: Layers,
        vocab_size: int,
        context: int,
        slots: int,
        grow: InferenceSession,
        device: str,
        kind: int,
    ) -> None:
        super().__init__(session, layers, vocab_size, context, slots)
        self.grow, self.device, self.kind = grow, device, kind
        self.values: dict[str, OrtValue] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def _enlarge(self, name: str, shape: tuple[int, ...]) -> None:
        from onnxruntime import OrtValue

        stored = (*shape[:-1], shape[-1] // _SMALLER)
        if (old := self.values.get(name)) is None:
            self.values[name] = OrtValue.ortvalue_from_numpy(np.zeros(stored, np.float32), self.device, 0)
        else:
            new = OrtValue.ortvalue_from_shape_and_type(stored, np.float32, self.device, 0)
            more = [b - a for a, b in zip(self._shapes[name], shape, strict=True)]
            binding = self.grow.io_binding()
            binding.bind_ortvalue_input("cache", old)
            binding.bind_cpu_input("pads", np.array([0, 0, 0, 0, *more], np.int64))
            binding.bind_ortvalue_output("grown", new)
            self.grow.run_with_iobinding(binding)
            self.values[name] = new
        self._shapes[name] = shape

    def _bind_cache(self, first: int, count: int) -> IOBinding:
        binding = self.session.io_binding()
        for name, value in self.values.items():
            shape = (count, *self._shapes[name][1:])
            start = value.data_ptr() + first * int(np.prod(shape[1:])) * np.dtype(np.float32).itemsize // _SMALLER
            binding.bind_input(f"past_{name}", self.device, 0, self.kind, shape, start)
            binding.bind_output(f"present_{name}", self.device, 0, self.kind, shape, start)
        return binding

    def _execute(self, binding: IOBinding) -> None:
        binding.synchronize_inputs()
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def step(self, slot: int, length: int, token: int) -> NDArray[np.float32]:
        """As `Cache.step`. A binding copies inputs to a device when they are bound, so that they are bound anew."""
        feeds: dict[str, NDArray[Any]] = {"ids": np.array([[token]]), "positions": np.array([[length]]), "rows": np.zeros(1, np.int32)}
        logits: NDArray[np.float32] = self.run([slot], [length + 1], feeds)[0]
        return logits


def device_cache(
    session: InferenceSession, grow: InferenceSession, section: Mapping[str, Any], vocab_size: int, context: int, slots: int
) -> DeviceCache:
    """The caches of an artifact for a GPU.

    Args:
        section: the manifest's `executor`.
    """
    device = "cuda" if section["provider"] == CUDA else "cpu"
    layers: Sequence[Sequence[int]] = section["cache"]
    return DeviceCache(session, layers, vocab_size, context, slots, grow, device, int(section["cache_type"]))
