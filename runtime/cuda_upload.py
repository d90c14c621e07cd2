"""Arrays of the host on their way to a GPU's memory.

The GPU copies directly only from memory that is pinned, of which there should not be much; what a mapped file has goes there first, and the
driver does that in small steps of one thread. So threads copy pieces into a few pinned buffers here, while those that are full travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle

import numpy as np

from moec.runtime.cuda import Driver, Event
from moec.runtime.host import available_cores
from moec.runtime.tvm_arrays import Array

PIECE = 4 << 20
"""Bytes that travel at once: much longer than a call of the driver takes."""

THREADS = 4
"""Threads that read at most: one reads a mapped file more slowly than a GPU takes it."""

Parts = list[tuple[int, Array]]
"""Bytes [n] and where they begin in a buffer."""


def upload(driver: Driver, memory: int, arrays: Sequence[Array], starts: Sequence[int], stream: int, piece: int = PIECE) -> None:
    """Copy arrays into the memory of a GPU, and wait for it.

    Args:
        memory: its address.
        starts: where each array begins, in bytes, one behind the other; between them anything may be written.
        piece: bytes that travel at once.
    """
    threads = min(THREADS, available_cores())
    buffers = [(driver.host_array(piece), driver.event()) for _ in range(2 * threads)]
    turns = cycle(buffers)
    copied = deque[tuple[int, Array, Event, Future[tuple[int, int]]]]()

    def send() -> None:
        number, buffer, event, future = copied.popleft()
        begin, end = future.result()
        driver.copy_in(memory + number * piece + begin, buffer[begin:end], stream)
        event.put(stream)

    with ThreadPoolExecutor(threads) as pool:
        for number, parts in pieces(arrays, starts, piece):
            if len(copied) == threads:
                send()
            buffer, event = next(turns)  # which was sent as many pieces ago as there are threads
            event.wait()
            copied.append((number, buffer, event, pool.submit(_fill, buffer, parts)))
        while copied:
            send()
    driver.wait(stream)


def pieces(arrays: Sequence[Array], starts: Sequence[int], size: int) -> Iterator[tuple[int, Parts]]:
    """Memory that arrays begin at these places of, cut into pieces of some bytes: (number of the piece, what is in it).

    >>> [(n, [(at, x.tolist()) for at, x in found]) for n, found in pieces([np.arange(5, dtype=np.uint8), np.ones(1, np.uint8)], [0, 6], 4)]
    [(0, [(0, [0, 1, 2, 3])]), (1, [(0, [4]), (2, [1])])]
    """
    current, parts = 0, Parts()
    for array, start in zip(arrays, starts, strict=True):
        whole, done = np.ascontiguousarray(array).reshape(-1).view(np.uint8), 0
        while done < whole.size:
            number, at = divmod(start + done, size)
            if number != current and parts:
                yield current, parts
                parts = Parts()
            current = number
            part = whole[done : done + size - at]
            parts.append((at, part))
            done += part.size
    if parts:
        yield current, parts


def _fill(buffer: Array, parts: Parts) -> tuple[int, int]:
    """Copy parts into a buffer; returns where the first begins and the last ends."""
    for at, part in parts:
        buffer[at : at + part.size] = part
    return parts[0][0], parts[-1][0] + parts[-1][1].size
