"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoecError(Exception):
    """Bad input or a request that cannot be met. The message says what, where, what was expected and what to do.

    The command line prints it as one line and exits with status 2.
    """


def unknown(kind: str, name: str, choices: Iterable[str]) -> MoecError:
    """The error for a name that is not among the choices, with the nearest one.

    >>> str(unknown("target", "h10", ["h100", "cpu"]))
    "unknown target 'h10': did you mean 'h100'? Choices: cpu, h100"
    """
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return MoecError(f"unknown {kind} {name!r}:{hint} Choices: {', '.join(choices)}")
