"""Files of tensors that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moec.compiler.errors import MoecError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str) -> None:
    """Write a safetensors file beside its place, and give it its name when it is complete.

    Args:
        what: what error messages call it: `the statistics`.

    Raises:
        MoecError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata=dict(metadata))
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise MoecError(f"cannot write {what} {path}: {error}") from error
