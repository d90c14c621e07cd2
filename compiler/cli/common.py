"""What several commands share: option types, sizes, JSON output, and imports of what an extra installs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

import typer

from moec.runtime.errors import MoecError

ArtifactArgument = Annotated[str, typer.Argument(metavar="ARTIFACT", help="A compiled model: a folder NAME.moec.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="cpu|cuda|cuda:N", help="What the interpreter and passes compute on; torch's default unless given."),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Threads; all cores unless given.")]


def format_size(size: float) -> str:
    """A size for people.

    >>> format_size(7209368), format_size(12 * 2**30)
    ('6.9 MiB', '12.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_list(text: str, option: str, low: int = 1) -> list[int]:
    """The integers of a comma list.

    >>> parse_list("128,512", "-p")
    [128, 512]

    Raises:
        MoecError: it is no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 and int(part) >= low for part in parts):
        raise MoecError(f"{option} {text!r}: expected integers of at least {low} separated by commas, such as 128,512")
    return [int(part) for part in parts]


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    json.dump(value, sys.stdout, ensure_ascii=False, allow_nan=False, indent=2)
    print()


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a part of moec that needs more than the base install.

    Raises:
        MoecError: a package is missing; the message says what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != "moec":
            raise MoecError(f"this needs the package {error.name}: pip install 'moec[{extra}]'") from error
        raise


def not_available(command: str) -> MoecError:
    """The error of a command that a later version will have."""
    return MoecError(f"`moec {command}` is not available in this version; `moec --help` lists what is")
