"""What a pass is, and how a list of passes runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

import moec.passes
from moec.compiler import verify
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.model import Model
from moec.compiler.plugins import file_names, load_file
from moec.runtime.errors import unknown


@runtime_checkable
class Pass(Protocol):
    """A change to a model: a frozen dataclass whose fields are its options in recipes and on the command line."""

    def run(self, model: Model, context: Context) -> Model:
        """The changed model; the same object if there was nothing to change."""
        ...


def known_passes() -> list[str]:
    """The names of all passes: the files of the folder `passes`."""
    return file_names(moec.passes.__name__)


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """The pass of this name with these options.

    Raises:
        MoecError: the pass or an option is unknown (the message has the nearest name), or an option has a wrong value.
    """
    kind = load_file(moec.passes.__name__, "pass", name).PASS
    known = [f.name for f in fields(kind)]
    for option in options:
        if option not in known:
            raise unknown(f"option of the pass {name}", option, known)
    made = kind(**options)
    assert isinstance(made, Pass)
    return made


def run_passes(
    model: Model, passes: Sequence[Pass], context: Context | None = None, after: Callable[[Pass, Model], None] | None = None
) -> Model:
    """Run passes in order.

    Args:
        context: what passes may need besides the model; an empty one (no calibration text) unless given.
        after: called with each pass and the model that it left (printing, timing).

    Raises:
        MoecError: a pass could not do its work, or with `MOEC_CHECK=2` left an invalid graph; the notes say after which passes.
    """
    context, done = context or Context(), list[str]()
    for step in passes:
        try:
            model = step.run(model, context)
            if verify.CHECK >= 2:
                verify.verify(model.graph)
        except MoecError as error:
            error.add_note(f"in the pass {step!r}, after the passes {done}")
            raise
        done.append(type(step).__name__)
        if after:
            after(step, model)
    return model
