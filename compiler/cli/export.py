"""`moec export`: a changed model for other programs."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.compiler.cli.common import DeviceOption, import_extra


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL|ARTIFACT", help="A checkpoint or an artifact.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")],
    to: Annotated[str, typer.Option(metavar="hf", help="hf: a checkpoint that transformers loads.")] = "hf",
    recipe: Annotated[str | None, typer.Option(metavar="FILE|NAME", help="What to do to a checkpoint first.")] = None,
    calibration: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Text that passes may look at; repeatable.")] = None,
    calibration_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="About how many tokens of it.")] = 1 << 16,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of everything that is random.")] = 0,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(metavar="bf16|f16|f32", help="Of the tensors; the checkpoint's own unless given.")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Write int4 and int8 codes, as compressed-tensors packs them.")] = False,
) -> None:
    """Write a pruned, merged, re-routed or quantised model as a checkpoint that plain transformers loads.

    Quantised weights are written as the values that their codes stand for, or with --packed as codes, for vLLM and others. What a
    configuration of transformers cannot say (layers with different numbers of experts, experts that are skipped) is an error.
    """
    export = import_extra("moec.compiler.export", "compile")
    export.export_model(
        model,
        output,
        to=to,
        recipe=recipe,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        packed=packed,
    )
    print(f"written to {output}")
