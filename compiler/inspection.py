"""What `moec inspect` says about a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moec.compiler.draw import page
from moec.compiler.errors import MoecError
from moec.compiler.frontend import huggingface
from moec.compiler.plan import make_plan
from moec.compiler.recipe import NOTHING
from moec.compiler.text import print_graph
from moec.targets import get_target


def inspect_checkpoint(
    model: str, *, graph: bool = False, stats: bool = False, locality: bool = False, html: str | None = None
) -> dict[str, Any]:
    """A summary of a checkpoint, from its configuration and (where there are any) its weights' headers.

    Args:
        model: a checkpoint folder or a hub name in the local cache.
        graph: add the graph's text.
        stats, locality: need calibration.
        html: a file to draw the graph into.

    Raises:
        MoecError: no such model, or something that needs calibration is asked for.
    """
    for option, wanted in (("--stats", stats), ("--locality", locality)):
        if wanted:
            raise MoecError(f"inspect {option} needs calibration, which is not available in this version: leave it out")
    traced, _ = huggingface.load(model)
    plan = make_plan(traced, NOTHING, get_target("cpu"), None)
    if html is not None:
        try:
            Path(html).write_text(page(traced, plan))
        except OSError as error:
            raise MoecError(f"cannot write {html}: {error.strerror}") from error
    summary = {"model": {"name": traced.name, **traced.meta}, **plan.to_json()}
    return {**summary, "graph": print_graph(traced)} if graph else summary
