"""The experts of a layer, as tuning and the choice of kernels see them. Data only, no compiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, FragmentLayout

FP8 = "fp8"
"""The type of activations that are bfloat16 outside and may be multiplied as E4M3."""


@dataclass(frozen=True)
class Layer:
    """The experts of a layer, as far as tuning goes.

    Args:
        experts, top_k, d, f: E, K, D, F.
        gate_up, down: the format of all experts, or of each.
        dtype: of activations, `bfloat16`, `float32` as two terms of it, or `fp8`: bfloat16 that may be rounded to E4M3.
        gated: whether there is a gate projection.
        widths: F of each expert where they differ; f is the largest.
    """

    experts: int
    top_k: int
    d: int
    f: int
    gate_up: str | tuple[str, ...]
    down: str | tuple[str, ...]
    dtype: str = "bfloat16"
    gated: bool = True
    widths: tuple[int, ...] = ()

    @property
    def layout(self) -> ExpertsLayout:
        """How its weights lie in memory."""
        return ExpertsLayout(self.experts, self.d, self.f, self.gate_up, self.down, self.gated, self.widths)

    @property
    def terms(self) -> int:
        """Terms of bfloat16 that an activation is."""
        return 2 if self.dtype == "float32" else 1

    @property
    def outside(self) -> str:
        """The type of x and of the result."""
        return "bfloat16" if self.dtype == FP8 else self.dtype

    @property
    def most_error(self) -> float:
        """Of the result, relative to float64, beyond which options are not chosen."""
        return 5e-2 if self.dtype == FP8 else 5e-3

    @property
    def narrow(self) -> bool:
        """Whether the kernels of `narrow` can run it."""
        formats = {f for names in (self.gate_up, self.down) for f in ((names,) if isinstance(names, str) else names)}
        return self.dtype == FP8 and not self.widths and all(f.startswith("fp8_") for f in formats)

    @property
    def formats(self) -> str:
        """The formats in a word: `int4_g128`, `int4_g128/int2_g64` (gate_up and down), `int2_g64+int4_g64` (of experts)."""
        up, down = (f if isinstance(f, str) else "+".join(sorted(set(f))) for f in (self.gate_up, self.down))
        return up if up == down else f"{up}/{down}"

    @property
    def name(self) -> str:
        """A file name."""
        formats = self.formats.replace("/", "-")
        rest = ("" if self.gated else "-plain") + ("" if self.dtype == "bfloat16" else f"-{self.dtype}")
        rest += f"-of{sum(self.widths)}" if self.widths else ""
        return f"experts-{self.experts}x{self.d}x{self.f}-top{self.top_k}-{formats}{rest}"

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values; `widths` only where there are."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return fields if self.widths else {name: value for name, value in fields.items() if name != "widths"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layer:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**fields)


def bits(layer: Layer) -> float:
    """Bits of a weight, the mean over experts and projections, scales not counted."""
    both = [(f,) * layer.experts if isinstance(f, str) else f for f in (layer.gate_up, layer.down)]
    found = [FragmentLayout(ROWS, BLOCK, name).bits for names in both for name in names]
    return sum(found) / len(found)
