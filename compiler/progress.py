"""Progress of long work: a bar on a terminal, plain lines elsewhere, always on standard error.

    with Progress("quantize", total=len(params), unit="tensors") as progress:
        for param in params:
            progress.advance(label=param.name)
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_LINE_EVERY_S = 5.0


class Progress:
    """One piece of long work.

    Args:
        name: what is being done, in a word or two.
        total: units of work, if known.
        unit: what is counted.
        stream: where to write; standard error unless given.
    """

    def __init__(self, name: str, total: int | None = None, unit: str = "", stream: TextIO | None = None) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self._stream = stream or sys.stderr
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console  # not needed where there is no terminal
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[label]}"), console=Console(file=self._stream), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, label="")
        return self

    def advance(self, count: int = 1, label: str = "") -> None:
        """Count work as done; `label` says at what it stands."""
        self.done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, label=label)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(f"{self._state()} {label}".rstrip(), file=self._stream, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            print(f"{self._state()} in {time.monotonic() - self._start:.1f} s", file=self._stream, flush=True)

    def _state(self) -> str:
        of = f"/{self.total}" if self.total is not None else ""
        return f"{self.name}: {self.done}{of} {self.unit}".rstrip()
