"""Targets: the hardware that moec compiles for, as data. A file in this folder holds one `Target`; its name is the file's.

Numbers have their unit in the name and a source. `None` stands for a figure that the vendor does not publish; the cost model then
uses what `moec targets measure` measured.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from moec.runtime.errors import MoecError, unknown

__all__ = ["Target", "get_target", "known_targets"]


@dataclass(frozen=True)
class Target:
    """One piece of hardware.

    Args:
        name: the file's name with dashes.
        description: what it is, in words.
        kind: `cpu` or `cuda`.
        tvm: TVM's target as a string or as JSON text.
        memory_bytes: memory that holds weights and caches.
        mem_bw_gb_s: memory bandwidth, 10^9 bytes a second.
        peak_f32_tflops, peak_bf16_tflops, peak_int8_tops: dense arithmetic peaks, 10^12 a second.
        sources: where the figures come from.
    """

    name: str
    description: str
    kind: str
    tvm: str
    memory_bytes: int | None = None
    mem_bw_gb_s: float | None = None
    peak_f32_tflops: float | None = None
    peak_bf16_tflops: float | None = None
    peak_int8_tops: float | None = None
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "cuda"):
            raise MoecError(f"target {self.name}: kind {self.kind!r} is neither cpu nor cuda")
        for field in ("memory_bytes", "mem_bw_gb_s", "peak_f32_tflops", "peak_bf16_tflops", "peak_int8_tops"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise MoecError(f"target {self.name}: {field} must be positive, not {value}")


def known_targets() -> list[str]:
    """The names of all targets."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def get_target(name: str) -> Target:
    """The target of this name.

    Raises:
        MoecError: there is none; the message lists those that exist.
    """
    if name not in known_targets():
        raise unknown("target", name, known_targets())
    target = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").TARGET
    assert isinstance(target, Target)
    return target
