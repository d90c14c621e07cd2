"""The `moec` command: finds the command's file, and turns errors into one line and exit status 2."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from moec import __version__
from moec.runtime.errors import MoecError, unknown

COMMANDS = ("compile", "run", "eval", "compare", "bench", "inspect", "export", "verify", "targets", "doctor")
"""The commands that help lists, in this order."""

HIDDEN = ("plan", "serve")
"""Commands that answer that they are not available yet."""


def _show_version(value: bool) -> None:
    if value:
        print(f"moec {__version__}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")]


def _options(version: _Version = False) -> None:
    """Compile Mixture-of-Experts models for one piece of hardware, and run them."""


def build_app(names: Sequence[str]) -> typer.Typer:
    """The application with the commands of these names."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_options)
    for name in names:
        module = import_module(f"moec.compiler.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            any_arguments = {"ignore_unknown_options": True, "allow_extra_args": True} if name in HIDDEN else {}
            app.command(name, hidden=name in HIDDEN, context_settings=any_arguments)(module.command)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 on success, 2 on bad input, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        if chosen is not None and chosen not in (*COMMANDS, *HIDDEN):
            raise unknown("command", chosen, COMMANDS)
        names = COMMANDS if chosen is None else (chosen,)  # one command's file is all that is imported
        status = build_app(names)(args=arguments, prog_name="moec", standalone_mode=False)
        sys.stdout.flush()
    except MoecError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        return _fail(error.format_message())
    except BrokenPipeError:  # `moec run ... | head`: the reader went away, which is no error
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except MemoryError:
        return _fail("out of memory: choose a smaller context, batch or model, or a machine with more")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    """Print one line; what a hostile file put into it cannot steer the terminal."""
    line = " ".join(message.split())
    print("error: " + "".join(letter if letter.isprintable() else "?" for letter in line), file=sys.stderr)
    return 2
