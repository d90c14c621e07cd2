"""Progress of long work on standard error: a bar on a terminal, plain lines elsewhere.

progress = Progress()
with progress.step("trace"):
    ...
for shard in progress.track(shards, "weights"):
    ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

T = TypeVar("T")

_LINE_EVERY_S = 5.0


class Progress:
    """Where long work reports how far it is.

    Args:
        stream: where to write; standard error unless given.
        quiet: write nothing.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One piece of work whose size is not known."""
        start = time.monotonic()
        terminal = self._stream.isatty()
        if terminal:
            self._print(f"{name} ...", end="\r")
        yield
        self._print(f"{name}: {time.monotonic() - start:.1f} s")

    def track(self, items: Sequence[T], name: str) -> Iterator[T]:
        """Go through items, counting them."""
        start = time.monotonic()
        if self._stream.isatty() and not self._quiet:
            from rich.console import Console  # not needed where there is no terminal
            from rich.progress import track

            yield from track(items, name, console=Console(file=self._stream), transient=True)
        else:
            last = start
            for done, item in enumerate(items):
                yield item
                if time.monotonic() - last >= _LINE_EVERY_S:
                    last = time.monotonic()
                    self._print(f"{name}: {done + 1}/{len(items)}")
        self._print(f"{name}: {len(items)}/{len(items)}, {time.monotonic() - start:.1f} s")

    @contextmanager
    def counter(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Work that counts itself: yields a function of how much is done and of how much there is."""
        start, last = time.monotonic(), [time.monotonic()]
        if self._stream.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import Progress as Bars

            with Bars(console=Console(file=self._stream), transient=True) as bars:
                task = bars.add_task(name)
                yield lambda done, total: bars.update(task, completed=done, total=total)
        else:

            def count(done: int, total: int) -> None:
                if time.monotonic() - last[0] >= _LINE_EVERY_S:
                    last[0] = time.monotonic()
                    self._print(f"{name}: {done}/{total}")

            yield count
        self._print(f"{name}: {time.monotonic() - start:.1f} s")

    def note(self, text: str) -> None:
        """A line that is worth knowing."""
        self._print(text)

    def _print(self, text: str, end: str = "\n") -> None:
        if not self._quiet:
            print(text, end=end, file=self._stream, flush=True)
