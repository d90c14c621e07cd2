"""`moec compare`: models times recipes, bytes against quality."""

from __future__ import annotations

import json as encoder
from pathlib import Path
from typing import Annotated, Any

import typer

from moec.compiler.cli.common import DeviceOption, import_extra, print_json
from moec.runtime.errors import MoecError


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoints; names that end in .yaml are more recipes.")],
    recipe: Annotated[list[str], typer.Option("--recipe", "-r", metavar="FILE|NAME", help="A recipe, or a folder of them; repeatable.")],
    data: Annotated[list[str], typer.Option("--data", metavar="FILE", help="Text to evaluate on, or a folder of *.txt; repeatable.")],
    calibration: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Text that passes may look at; repeatable.")] = None,
    calibration_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="About how many tokens of it.")] = 1 << 16,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Repeat recipes that depend on the seed so many times.")] = 1,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="About how many tokens of each text.")] = 1 << 15,
    context: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tokens of a window.")] = None,
    max_kl: Annotated[float | None, typer.Option(metavar="X", help="The most KL divergence that searching passes may cost.")] = None,
    device: DeviceOption = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FOLDER", help="Keep finished rows there, and resume.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.svg", help="Draw bytes against KL and perplexity.")] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="Write the table there.")] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write everything as JSON; - prints it and nothing else.")] = None,
) -> None:
    """Compare recipes: bytes, bits, perplexity, KL divergence and agreement with the unchanged model.

    Every text is tokenised as one stream and cut into windows as by `moec eval`. A recipe that fails is a row with its error, and the exit
    status is 2 in the end. Several recipes may follow one --recipe (`--recipe examples/recipes/*.yaml`).
    """
    compare = import_extra("moec.compiler.compare", "compile")
    if plot is not None:
        import_extra("moec.compiler.report", "report").canvas(plot)  # what is missing shows before hours of work
    recipes = [*recipe, *(m for m in models if m.endswith((".yaml", ".yml")))]
    found = compare.compare(
        [m for m in models if not m.endswith((".yaml", ".yml"))],
        recipes,
        data,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        seeds=seeds,
        max_tokens=max_tokens,
        context=context,
        max_kl=max_kl,
        device=device,
        output=output,
    )
    result, table = found.to_json(), found.table()
    if output is not None:
        _write(Path(output) / "table.md", table)
        _write(Path(output) / "comparison.json", _text(result))
    if plot is not None:
        found.plot(plot)
    if markdown is not None:
        _write(Path(markdown), table)
    if json == "-":
        print_json(result)
    else:
        if json is not None:
            _write(Path(json), _text(result))
        print(table, end="")
    if failed := [row for row in found.rows if row.error]:
        raise MoecError(f"{len(failed)} of {len(found.rows)} rows failed; {failed[0].model}, {failed[0].recipe}: {failed[0].error}")


def _text(result: dict[str, Any]) -> str:
    return encoder.dumps(result, indent=1, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise MoecError(f"cannot write {path}: {error.strerror or error}") from error
