"""`moec targets`: the hardware that moec compiles for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated

import typer

from moec.compiler.cli.common import JsonOption, format_size, import_extra, parse_list, print_json
from moec.compiler.progress import Progress
from moec.runtime.host import available_cores
from moec.targets import get_target, known_targets

app = typer.Typer(help="The hardware that moec compiles for.", invoke_without_command=True)


@app.callback()
def default(context: typer.Context) -> None:
    """List, show or measure targets."""
    if context.invoked_subcommand is None:
        list_targets()


@app.command("list")
def list_targets(json: JsonOption = False) -> None:
    """List the targets."""
    targets = [get_target(name) for name in known_targets()]
    if json:
        print_json({"targets": [asdict(target) for target in targets]})
        return
    for target in targets:
        memory = "" if target.memory_bytes is None else format_size(target.memory_bytes)
        bandwidth = "" if target.mem_bw_gb_s is None else f"{target.mem_bw_gb_s:g} GB/s"
        print(f"{target.name:<12} {target.kind:<5} {memory:>10} {bandwidth:>10}  {target.description}")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A target, or a file that describes one.")],
    json: JsonOption = False,
) -> None:
    """Show a target and where its figures come from."""
    target = asdict(get_target(name))
    if json:
        print_json(target)
        return
    for field, value in target.items():
        if isinstance(value, tuple):
            for line in value:
                print(f"{field}: {line}")
        else:
            print(f"{field}: {'not published' if value is None else value}")


@app.command("measure")
def measure(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A checkpoint, or a folder with its config.json.")] = None,
    layer: Annotated[list[str] | None, typer.Option(metavar="E,K,D,F", help="A layer's experts, top-k and sizes; repeatable.")] = None,
    formats: Annotated[str, typer.Option(metavar="NAME,...", help="Weight formats; `a/b`: of gate_up and of down.")] = "int4_g128",
    tokens: Annotated[str, typer.Option(metavar="T,...", help="Numbers of tokens.")] = "1,2,4,8,16,64,256,1024,4096",
    target: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="What the GPU is; found by its name unless given.")] = None,
    activations: Annotated[
        str, typer.Option(metavar="bfloat16|float32|fp8", help="Of the kernels; compiled models have float32, as two terms of bfloat16.")
    ] = "float32",
    seconds: Annotated[float, typer.Option(metavar="S", min=1, help="After so long no new timing begins.")] = 600,
    jobs: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes that compile; all cores unless given.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Try all candidates, and not the most promising ones only.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Where the records go.")] = None,
    json: JsonOption = False,
) -> None:
    """Find the fastest kernels for the MoE layers of a model on this machine's GPU.

    What is found is kept (in $MOEC_MEASURED, or ~/.local/share/moec/measured), and compiling takes it from there. A sweep that ran out of
    time, or was interrupted, goes on when it is called again; timings of other versions of the kernels or of TVM are made anew.
    """
    here = import_extra("moec.compiler.measure.here", "compile")
    sweep = import_extra("moec.compiler.measure.sweep", "compile")
    layers = import_extra("moec.compiler.measure.layers", "compile").layers_of(model, layer or [], formats.split(","), activations)
    known = None if target is None else get_target(target)
    counts = parse_list(tokens, "--tokens")
    wanted = here.Sweep(layers, counts, known, output, seconds, jobs or available_cores(), every)
    found = here.measure_here(wanted, Progress())
    failed, left, rows = found.failed, found.left, [row for record in found.records for row in sweep.summary(record, found.target)]
    if json:
        problems = [{"layer": task.case.layer.name, "kernel": task.kernel, "tokens": task.tokens, "problem": why} for task, why in failed]
        spent = {"compiled": found.compiled, "compile_seconds": found.seconds[0], "timing_seconds": found.seconds[1]}
        print_json({"best": rows, "failed": problems, "left": left, **spent})
        return
    print("| layer | kernel | T | us | over the default | of | options |\n|---|---|---|---|---|---|---|")
    for row in rows:
        gain = "" if row["gain"] is None else f"{row['gain']:.2f}"
        print(f"| {row['layer']} | {row['kernel']} | {row['tokens']} | {row['us']:.2f} | {gain} | {row['tried']} | {row['options']} |")
    if gains := [row["gain"] for row in rows if row["gain"] is not None and row["kernel"] in ("decode", "prefill")]:
        worth = f"{geometric_mean(gains):.2f} times as fast as with defaults on average, {max(gains):.2f} at most"
        print(f"layers are {worth}; {found.compiled} kernels compiled in {found.seconds[0]:.0f} s, timed in {found.seconds[1]:.0f} s")
    if failed:
        print(f"{len(failed)} candidates failed, the first ({failed[0][0].kernel}, T = {failed[0][0].tokens}): {failed[0][1]}")
    if left:
        print(f"{left} candidates are left: call it again to go on")
