"""`moec compare`: not available in this version."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.compiler.cli.common import not_available


def command(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Not available in this version."""
    del arguments
    raise not_available("compare")
