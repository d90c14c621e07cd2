"""Values that a traced program reads and no checkpoint has: buffers that are not saved, and tensors made in `forward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.errors import MoecError


def unsaved_buffers(model: Any) -> dict[str, Tensor]:
    """Real values of the buffers that are not part of checkpoints, of a model that may be on the meta device.

    Transformers rebuilds such buffers (rotary frequencies, say) when it loads a model, in the model's own `_init_weights`; this asks
    it to do the same for the modules that own them, and for nothing else.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        own = {n: b for n, b in module.named_buffers(recurse=False) if n in module._non_persistent_buffers_set}
        if own and any(b.is_meta for b in own.values()):
            _rebuild(model, module, own)
        for name, buffer in own.items():
            value = getattr(module, name)
            if value.is_meta:
                raise MoecError(f"{type(module).__name__}: the value of its buffer {name!r} is not known without a checkpoint")
            found[f"{path}.{name}" if path else name] = value.detach().clone()
            if buffer.is_meta:
                module._buffers[name] = buffer
    return found


def _rebuild(model: Any, module: nn.Module, own: dict[str, Tensor]) -> None:
    """Fill the buffers of one module, on the CPU."""
    for name, buffer in own.items():
        fill = torch.full(buffer.shape, torch.nan) if buffer.is_floating_point() else torch.full(buffer.shape, -12345)
        module._buffers[name] = fill.to(buffer.dtype)
    model._init_weights(module)  # initialising its parameters too costs nothing on the meta device
    for name in own:
        value = module._buffers[name]
        assert value is not None
        unset = bool(torch.isnan(value).any()) if value.is_floating_point() else bool((value == -12345).all())
        if unset and value.numel():
            raise MoecError(f"{type(module).__name__}: transformers does not say how its buffer {name!r} is computed")
