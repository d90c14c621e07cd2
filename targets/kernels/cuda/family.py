"""The families of kernels that are measured, and which version of their sources this is: records of other versions do not decide."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

FAMILIES = {"decode": ("experts_decode", "pipeline"), "prefill": ("experts_prefill", "sort", "pipeline")}
"""The modules that the kernels of a few tokens and of many are built by; what they import of this folder belongs to them."""

_IMPORT = re.compile(r"^from moec\.targets\.kernels\.cuda\.(\w+) import", re.MULTILINE)

FAMILY = {"gate_up": "decode", "down": "decode", "decode": "decode", "prefill": "prefill"}


@cache
def sources(family: str) -> tuple[Path, ...]:
    """The source files of a family of kernels."""
    found, new = set[str](), set(FAMILIES[family])
    while new:
        found |= new
        texts = [Path(__file__).with_name(f"{name}.py").read_text() for name in new]
        new = {name for text in texts for name in _IMPORT.findall(text)} - found
    return tuple(Path(__file__).with_name(f"{name}.py") for name in sorted(found))


@cache
def fingerprint(family: str) -> str:
    """Which version of the sources of a family of kernels this is."""
    digest = hashlib.sha256()
    for path in sources(family):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
