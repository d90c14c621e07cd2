"""`moec compare`: not available in this version."""

from __future__ import annotations

from moec.compiler.cli.common import not_available


def command() -> None:
    """Not available in this version."""
    raise not_available("compare")
