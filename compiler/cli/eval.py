"""`moec eval`: perplexity, and the distance from a reference."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.compiler.cli.common import DeviceOption, JsonOption, import_extra, print_json


def command(
    model: Annotated[str, typer.Argument(metavar="ARTIFACT|MODEL", help="An artifact or a checkpoint.")],
    data: Annotated[str, typer.Option(metavar="FILE", help="The text.")],
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="A checkpoint or artifact to compare with.")] = None,
    context: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tokens of a window.")] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after about this many tokens.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", metavar="N", min=1, help="Threads of the runtime.")] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Measure perplexity on a text, and the distance from a reference.

    The text is tokenised as one stream and cut into non-overlapping windows of N tokens; each window is fed, and every next
    token scored (the token after the window included; an incomplete tail is dropped). --device is where checkpoints are interpreted;
    artifacts run on what they were compiled for.
    """
    evaluate = import_extra("moec.compiler.evaluate", "compile")
    measured = evaluate.evaluate(model, data, reference=reference, context=context, max_tokens=max_tokens, threads=threads, device=device)
    result = measured.to_json()
    if json:
        print_json(result)
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
