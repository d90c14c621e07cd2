"""Ways to merge experts. A file's name is the method's.

A file has `NEEDS` ("statistics", "inputs", as of `moec.passes.criteria`), `align` (whether the neurons of an expert are put in the order
of those of its group's first member before they are averaged), and `group(view, keep) -> groups`: lists of experts, the leading one first.
Merged experts are averages by how often each was used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moec.compiler.plugins import file_names, load_file
from moec.passes.criteria import View


@dataclass(frozen=True)
class Method:
    """A method: its name, what it needs, and its functions."""

    name: str
    needs: tuple[str, ...]
    align: bool
    group: Callable[[View, int], list[list[int]]]


def known_methods() -> list[str]:
    """The names of all methods."""
    return file_names(__name__)


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        MoecError: there is none; the message lists those that exist.
    """
    module = load_file(__name__, "method of merging", name)
    return Method(name, module.NEEDS, module.ALIGN, module.group)
