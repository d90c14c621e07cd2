"""What a pass is, and how a list of passes runs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

import moec.passes
from moec.compiler import verify
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph
from moec.runtime.errors import unknown


@runtime_checkable
class Pass(Protocol):
    """A change to a graph: a frozen dataclass whose fields are its options in recipes and on the command line."""

    def run(self, graph: Graph) -> tuple[Graph, bool]:
        """The changed graph, and whether anything changed."""
        ...


def known_passes() -> list[str]:
    """The names of all passes: the files of the folder `passes`."""
    return sorted(m.name for m in pkgutil.iter_modules(moec.passes.__path__) if not m.ispkg)


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """The pass of this name with these options.

    Raises:
        MoecError: the pass or an option is unknown (the message has the nearest name), or an option has a wrong value.
    """
    if name not in known_passes():
        raise unknown("pass", name, known_passes())
    kind = importlib.import_module(f"moec.passes.{name}").PASS
    known = [f.name for f in fields(kind)]
    for option in options:
        if option not in known:
            raise unknown(f"option of the pass {name}", option, known)
    made = kind(**options)
    assert isinstance(made, Pass)
    return made


def run_passes(graph: Graph, passes: Sequence[Pass], after: Callable[[Pass, Graph], None] | None = None) -> tuple[Graph, bool]:
    """Run passes in order.

    Args:
        after: called with each pass and the graph that it left (printing, timing).

    Raises:
        MoecError: a pass could not do its work, or with `MOEC_CHECK=2` left an invalid graph; the notes say after which passes.
    """
    changed, done = False, list[str]()
    for step in passes:
        try:
            graph, step_changed = step.run(graph)
            if verify.CHECK >= 2:
                verify.verify(graph)
        except MoecError as error:
            error.add_note(f"in the pass {step!r}, after the passes {done}")
            raise
        changed |= step_changed
        done.append(type(step).__name__)
        if after:
            after(step, graph)
    return graph, changed
