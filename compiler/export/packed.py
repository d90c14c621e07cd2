"""Integer codes in a checkpoint, as compressed-tensors' `pack-quantized` layout has them (vLLM and others read it).

    NAME.weight [N, K]  ->  NAME.weight_packed  int32 [N, ceil(K bits / 32)], the codes of a row low bits first
                            NAME.weight_scale   [N, groups], value = (code - 2^(bits-1)) scale
                            NAME.weight_shape   int64 [2]: N, K

config.json says the rest in `quantization_config`: a group of modules for each format, and the modules that have none.
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.frontend.layout import Computed, Layout
from moec.compiler.ir import Param
from moec.compiler.layers import moe_layers
from moec.compiler.model import Model
from moec.compiler.packed import Quantized, is_quantized
from moec.compiler.roles import parameter_roles
from moec.compiler.stored import pack as packed_weight
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat, pack_bits

BITS = (4, 8)
"""Widths that readers of the layout have kernels for."""

Revert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From the module's tensors to those of the hub."""


class PackedTensors:
    """The packed weights of a checkpoint in the making.

    Args:
        model: with codes, or formats to round to.
        layouts: how the module keeps parameters that the graph sees otherwise.
        dtype: of the scales.
        what: what error messages begin with.

    Raises:
        MoecError: nothing is quantised, or in a format that the layout does not have, or experts have low-rank factors.
    """

    def __init__(self, model: Model, layouts: Mapping[str, Layout | Computed], dtype: torch.dtype, what: str) -> None:
        self.model, self.layouts, self.dtype, self.what = model, layouts, dtype, f"{what} --packed"
        if layer := next((layer for layer in moe_layers(model.graph) if layer.factors), None):
            raise MoecError(
                f"{self.what}: the experts of %{layer.name} have low-rank factors, which the layout has no place for: leave --packed out, "
                "which adds them to the values, or the factors out of the recipe"
            )
        roles = parameter_roles(model.graph)
        self.formats = {
            name: self._format(param)
            for name, param in model.graph.params.items()
            if roles[name] in ("experts", "linear") and is_quantized(param)
        }
        if not self.formats:
            raise MoecError(f"{self.what}: no expert or linear layer is quantised: choose a recipe that does, such as int4")
        self._modules: dict[str, list[str]] = {}
        self._ignored: list[str] = ["lm_head"]

    def _format(self, param: Param) -> IntFormat:
        names = {param.format} if isinstance(param.format, str) else set(param.format)
        fmt = get_format(next(iter(names)))
        if len(names) > 1:
            raise MoecError(
                f"{self.what}: {param.name} has experts of different formats ({', '.join(sorted(names))}), it needs one for all"
            )
        if type(fmt) is not IntFormat or fmt.bits not in BITS or not fmt.symmetric:
            raise MoecError(
                f"{self.what}: {param.name} is {next(iter(names))}; the layout that is written has symmetric int4 and int8: choose a "
                "recipe with int4_g<group>, int4_channel, int8_g<group> or int8_channel, or leave --packed out"
            )
        k = int(param.type.shape[-1])
        if fmt.group and k % fmt.group:
            raise MoecError(f"{self.what}: {param.name} has rows of {k} weights, no multiple of its groups of {fmt.group}: choose others")
        layout = self.layouts.get(param.name)
        if layout is not None and (isinstance(layout, Computed) or layout.transposed or layout.flat):
            raise MoecError(f"{self.what}: transformers keeps {param.name} transposed or computes it: leave --packed out")
        return fmt

    def replace(self, made: Mapping[str, Tensor], names: Iterable[str], revert: Revert) -> dict[str, Tensor]:
        """The hub's tensors with those of quantised parameters among `names` as codes.

        Args:
            made: what `revert` makes of the values of `names`.
        """
        found = dict(made)
        quantized = [name for name in names if name in self.formats]
        parts = {name: self._codes(name) for name in quantized}
        for name in quantized:  # one at a time, so that it is known which tensors of the hub come of it
            codes, scales = (revert({name: part}) for part in parts[name])
            for hub, code in codes.items():
                if code.ndim != 2 or not hub.endswith(".weight") or hub not in found or found[hub].shape != code.shape:
                    raise MoecError(f"{self.what}: the hub keeps {hub} as {list(code.shape)}, and the layout is of linear layers [N, K]")
                module, fmt = hub.removesuffix(".weight"), self.formats[name]
                del found[hub]
                found[f"{module}.weight_packed"] = _words(code, fmt.bits)
                found[f"{module}.weight_scale"] = scales[hub].to(self.dtype).contiguous()
                found[f"{module}.weight_shape"] = torch.tensor(code.shape)
                self._modules.setdefault(fmt.name, []).append(module)
        self._ignored += [n.removesuffix(".weight") for n, t in found.items() if n.endswith(".weight") and t.ndim == 2]
        return found

    def _codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes and scales of a parameter as the module keeps it: uint8 [..., N, K], float32 [..., N, groups]."""
        param = self.model.graph.params[name]
        stacked = len(param.type.shape) == 3
        experts: list[int | None] = list(range(int(param.type.shape[0]))) if stacked else [None]
        packed = [packed_weight(self.model.weights, param, expert) for expert in experts]
        arrays = [(torch.from_numpy(p.codes), torch.from_numpy(p.scale).float()) for p in packed if isinstance(p, Quantized)]
        codes, scale = (torch.stack(part) if stacked else part[0] for part in zip(*arrays, strict=True))
        layout = self.layouts.get(name)
        if isinstance(layout, Layout) and layout.interleaved:
            codes, scale = (x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) for x in (codes, scale))
        return codes, scale

    def config(self) -> dict[str, Any]:
        """`quantization_config`."""
        groups = {}
        for index, (name, modules) in enumerate(sorted(self._modules.items())):
            fmt = get_format(name)
            assert isinstance(fmt, IntFormat)
            weights = {
                "num_bits": fmt.bits, "type": "int", "symmetric": True, "dynamic": False,
                "strategy": "group" if fmt.group else "channel", "group_size": fmt.group or None,
            }  # fmt: skip
            targets = ["Linear"] if len(self._modules) == 1 else sorted(modules)
            groups[f"group_{index}"] = {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": sorted(set(self._ignored)), "kv_cache_scheme": None,
        }  # fmt: skip


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] -> int32 [N, ceil(K bits / 32)], low bits first."""
    packed = pack_bits(codes.contiguous().numpy(), bits)
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(padded).view("<i4"))
