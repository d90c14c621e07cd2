"""Small words in which the CUDA kernels are written, on top of TVM's IRBuilder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.pipeline import FITTING, OVERLAP

Expr = Any
Buffer = Any

WARP = 32

_LAUNCH = {0: "blockIdx.x", 1: "blockIdx.y", 2: "blockIdx.z"}
_SHARED = "tirx.use_dyn_shared_memory"


def argument(name: str, shape: tuple[Expr, ...], dtype: str) -> Buffer:
    """The next parameter of the function being built."""
    return T.arg(name, T.buffer(shape, dtype, layout=None))


def local(count: int, dtype: str) -> Buffer:
    """Registers of a thread. Index them with constants only."""
    return T.alloc_buffer((count,), dtype, scope="local", layout=None)


class Shared:
    """Memory of a block, of which parts are taken one after the other; all elements have 4 bytes.

    One allocation with views, since TVM would place several by what it takes for their use, and leave out what no index reaches.
    """

    def __init__(self, words: int) -> None:
        self._words, self._next = words, 0
        self._memory = T.alloc_buffer((max(words, 4),), "uint32", scope="shared.dyn", layout=None, align=16)

    def take(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """The next part, at a multiple of 16 bytes."""
        first, size = self._next, prod(shape)
        self._next = first + ceil_div(size, 4) * 4
        assert self._next <= self._words, (self._next, self._words)
        return T.decl_buffer(shape, dtype, data=self._memory.data, elem_offset=first, scope="shared.dyn", layout=None)


def store(buffer: Buffer, value: Expr, *index: Expr) -> None:
    """Write one element."""
    T.buffer_store(buffer, value, list(index))


def at(buffer: Buffer, *index: Expr) -> Expr:
    """The address of an element."""
    return T.address_of(buffer[index])


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Run the body where the condition holds."""
    with T.If(condition), T.Then():
        yield


def const(value: float, dtype: str) -> Expr:
    """A constant."""
    return tirx.const(value, dtype)


def sync() -> None:
    """Wait for all threads of the block."""
    T.evaluate(T.tvm_storage_sync("shared.dyn"))


@contextmanager
def strided(begin: Expr, end: Expr, step: int) -> Iterator[Expr]:
    """The body for begin, begin + step, ... below end."""
    with T.serial((T.max(end - begin, 0) + step - 1) // step) as i:
        yield T.Bind(begin + i * step)


def kernel(name: str, threads: int, arguments: Callable[[], Any], grid: Callable[[Any], Sequence[Expr]], body: Callable[..., None], *,
           words: int = 0, blocks_per_multiprocessor: int = 0, cluster: int = 1) -> tirx.PrimFunc:  # fmt: skip
    """A PrimFunc of one kernel that may begin while the one before it ends.

    Args:
        arguments: declares the parameters; what it returns goes to the other two.
        grid: the blocks along x, y and z.
        body: called with the parameters, the block's memory, the index of the block along each axis, and that of the thread.
        words: of 4 bytes, of the block's memory.
        blocks_per_multiprocessor: at least so many fit, which limits the registers; 0 leaves that to the compiler.
        cluster: blocks along x that run at the same time and reach each other's memory.
    """
    with IRBuilder() as builder, T.prim_func(private=True), ExitStack() as stack:
        T.func_name(name)
        operands = arguments()
        extents = grid(operands)
        tags = [_LAUNCH[axis] for axis in range(len(extents))]
        together = ["clusterCtaIdx.x"] if cluster > 1 else []
        launch = [*tags, *together, "threadIdx.x", OVERLAP, _SHARED]
        attributes: dict[str, Any] = {"tirx.noalias": True, "op_pattern": 8, "tirx.kernel_launch_params": launch}
        if blocks_per_multiprocessor:
            attributes[FITTING] = blocks_per_multiprocessor
        T.func_attr(attributes)
        blocks = [stack.enter_context(T.launch_thread(tag, extent)) for tag, extent in zip(tags, extents, strict=True)]
        for tag in together:
            stack.enter_context(T.launch_thread(tag, cluster))
        thread = stack.enter_context(T.launch_thread("threadIdx.x", threads))
        body(operands, Shared(words), *blocks, thread)
    return builder.get()
