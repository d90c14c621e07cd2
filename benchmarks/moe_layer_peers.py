"""Other libraries' expert layers on the tensors that our kernels get, and the one that always runs: torch's grouped product in bfloat16.

A peer of one's own is a file such as this:

    bits = 4.125                       # of a weight as it reads them, scales counted; leave it out for those of the format that is timed

    def layer(weights, x, ids, routing_weights):
        if weights.formats != "int4_g128":
            return None
        up, down = weights.cached("mine", lambda w: (repack(*w.codes("gate_up")), repack(*w.codes("down"))))
        return lambda: their_moe(x, up, down, ids, routing_weights)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.measure import reference
from moec.compiler.measure.layer import LayerWeights
from moec.runtime.errors import MoecError
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.layout import ROWS


@dataclass
class PeerWeights:
    """The weights of a layer in plain order: gate rows, then up rows; experts first."""

    ours: LayerWeights
    _cache: dict[str, Any] = field(default_factory=dict)

    @property
    def layer(self) -> Layer:
        """E, K, D, F and formats."""
        return self.ours.layer

    @property
    def formats(self) -> str:
        """In a word, such as `int4_g128`."""
        return self.layer.formats

    def cached(self, name: str, make: Callable[[PeerWeights], Any]) -> Any:
        """What `make` gives, made once for these weights."""
        if name not in self._cache:
            self._cache[name] = make(self)
        return self._cache[name]

    def values(self, part: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[E, 2 F, D] of `gate_up` or [E, D, F] of `down`, dequantised.

        Raises:
            MoecError: experts differ in size.
        """
        if self.layer.widths:
            raise MoecError(f"{part}: experts differ in size")
        stack, arrays = self._side(part)
        return torch.stack([self._plain(part, reference.matrix(stack, arrays, e, dtype)) for e in range(self.layer.experts)])

    def codes(self, part: str) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
        """Codes uint8 [E, N, K], scales float16 [E, N, groups], zero points (None: half of the levels), bits, group (0: a row).

        Raises:
            MoecError: experts differ in format, or it has no codes.
        """
        stack, arrays = self._side(part)
        if stack.tabled:
            raise MoecError(f"{part}: experts differ in format or in size")
        found = [reference.matrix_codes(stack, arrays, e) for e in range(self.layer.experts)]
        zero = None
        if found[0].zero is not None:
            zero = torch.stack([self._plain(part, q.zero) for q in found if q.zero is not None])
        both = [torch.stack([self._plain(part, x) for x in parts]) for parts in ([q.codes for q in found], [q.scale for q in found])]
        return both[0], both[1], zero, found[0].bits, found[0].group

    def _side(self, part: str) -> tuple[Any, reference.Arrays]:
        layout = self.layer.layout
        return (layout.gate_up, self.ours.gate_up) if part == "gate_up" else (layout.down, self.ours.down)

    def _plain(self, part: str, rows: Tensor) -> Tensor:
        """Rows of gate_up in plain order."""
        layout = self.layer.layout
        if part == "down" or not layout.gated:
            return rows[: layout.d if part == "down" else layout.f]
        tiles = rows.reshape(layout.f_tiles, 2, ROWS // 2, rows.shape[1]).transpose(0, 1)
        return tiles.reshape(2, -1, rows.shape[1])[:, : layout.f].reshape(2 * layout.f, rows.shape[1])


@dataclass(frozen=True)
class Peer:
    """Another library: `layer` as above, and bits of a weight if not those of the format."""

    name: str
    layer: Callable[[PeerWeights, Tensor, Tensor, Tensor], Callable[[], Tensor] | None]
    bits: float | None = None


def grouped_mm(weights: PeerWeights, x: Tensor, ids: Tensor, routing_weights: Tensor) -> Callable[[], Tensor] | None:
    """torch's grouped product in bfloat16: sort, two products, sum. Slots must all run an expert."""
    layer = weights.layer
    if x.dtype != torch.bfloat16 or not layer.gated or bool(((ids < 0) | (ids >= layer.experts)).any()):
        return None
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm")  # noqa: B009  # its name in torch before 2.10
    up, down = weights.cached("bf16", lambda w: [w.values(part).transpose(1, 2) for part in ("gate_up", "down")])
    experts = torch.arange(layer.experts, device=ids.device, dtype=ids.dtype)

    def run() -> Tensor:
        flat = ids.reshape(-1)
        chosen, order = flat.sort(stable=True)
        ends = torch.searchsorted(chosen, experts, right=True).int()
        h = product(x[order // layer.top_k], up, offs=ends)
        gate, value = h.chunk(2, -1)
        y = product(F.silu(gate) * value, down, offs=ends)
        y = y * routing_weights.reshape(-1)[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add_(0, order // layer.top_k, y)

    return run


def load_peers(files: Sequence[Path]) -> list[Peer]:
    """torch's, and those in files.

    Raises:
        MoecError: a file has no function `layer`.
    """
    found = [Peer("grouped_mm-bf16", grouped_mm, 16.0)]
    for path in files:
        spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise MoecError(f"--peer {path}: expected a Python file with a function layer(weights, x, ids, routing_weights)")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(function := getattr(module, "layer", None)):
            raise MoecError(f"--peer {path}: it has no function layer(weights, x, ids, routing_weights)")
        found.append(Peer(getattr(module, "name", path.stem), function, getattr(module, "bits", None)))
    return found
