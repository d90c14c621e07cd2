"""Where the interpreter and the passes compute: a name on the command line -> torch's default device while a piece of work runs.

Models, batches and random numbers follow torch's default device, which is a thread's own: work in other threads is given tensors that are
there already. Tracing, lowering and the files of an artifact are made by the processor whatever the device is.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from moec.compiler.errors import MoecError


def on_device(name: str | None) -> AbstractContextManager[Any]:
    """What makes a device torch's default one; it can be entered more than once.

    Args:
        name: `cpu`, `cuda` or `cuda:N`; None leaves torch's default device as it is.

    Raises:
        MoecError: no such name, or torch cannot compute there; at once, not when it is entered.

    >>> with on_device("cpu"):
    ...     torch.empty(1).device
    device(type='cpu')
    """
    if name is None:
        return nullcontext()
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise MoecError(f"--device {name}: expected cpu, cuda, or cuda:N for one of several GPUs")
    device = torch.device(name)
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise MoecError(f"--device {name}: torch {torch.__version__} says: {said}; {_remedy()}") from error
    return nullcontext() if device == torch.get_default_device() else device


def _remedy() -> str:
    """What to do where a GPU cannot be had."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "install a CUDA build of torch (https://pytorch.org/get-started/locally says which), or use --device cpu"
    if not (count := torch.cuda.device_count()):
        return "install the GPU's driver (`nvidia-smi` must list the GPU), or use --device cpu"
    return f"choose one of cuda:0 to cuda:{count - 1}, or use --device cpu"
