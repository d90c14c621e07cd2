"""`tvm_ffi`, imported without torch.

tvm_ffi imports torch where it is installed (to load the two libraries in a safe order on Windows, and for zero-copy torch tensors, which
the runtime does not use). That takes seconds and hundreds of megabytes; it works without, so torch is hidden for the moment.
"""

from __future__ import annotations

import sys


def _hide_torch() -> None:
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        return  # somebody else needs it, or it is too late
    sys.modules["torch"] = None  # type: ignore[assignment]  # what makes `import torch` raise ImportError
    try:
        import tvm_ffi  # noqa: F401  # imported for the side effect
    finally:
        del sys.modules["torch"]


_hide_torch()

import tvm_ffi  # noqa: E402  # after torch is hidden

__all__ = ["tvm_ffi"]
