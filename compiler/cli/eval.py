"""`moec eval`: perplexity, and the distance from a reference."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.compiler.cli.common import JsonOption, import_extra, print_json


def command(
    model: Annotated[str, typer.Argument(metavar="ARTIFACT|MODEL", help="An artifact or a checkpoint.")],
    data: Annotated[str, typer.Option(metavar="FILE", help="The text.")],
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="A checkpoint or artifact to compare with.")] = None,
    context: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tokens of a window.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure perplexity on a text, and the distance from a reference.

    The text is tokenised as one stream and cut into non-overlapping windows of N tokens; each window is fed, and every next
    token scored (the token after the window included; an incomplete tail is dropped).
    """
    evaluate = import_extra("moec.compiler.evaluate", "compile")
    result = evaluate.evaluate(model, data=data, reference=reference, context=context).to_json()
    if json:
        print_json(result)
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
