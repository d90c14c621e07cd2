"""`moec targets`: the hardware that moec compiles for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from moec.compiler.cli.common import JsonOption, format_size, not_available, print_json
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
def measure() -> None:
    """Measure this machine (not available in this version)."""
    raise not_available("targets measure")
