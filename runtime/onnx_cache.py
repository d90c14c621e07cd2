"""The keys and values of the sequences that ONNX Runtime works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

Layers = Sequence[Sequence[int]]
"""Of each layer: key/value heads, size of a key, size of a value."""

_FIRST_CAPACITY = 256
"""Tokens for which a cache has room at first; it doubles when it is full."""

_ALIGNMENT = 64

_ONE_ROW = np.zeros(1, np.int32)


def _aligned(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """An array that is not touched before it is used, at a multiple of 64 bytes."""
    count = int(np.prod(shape))
    raw = np.empty(count + _ALIGNMENT // 4, np.float32)
    start = -(raw.ctypes.data // 4) % (_ALIGNMENT // 4)
    return raw[start : start + count].reshape(shape)


class Cache(Protocol):
    """Keys and values of several sequences, by slot, and the session that extends them."""

    batches: bool
    """Whether several sequences can run at once."""

    def reserve(self, slot: int, length: int) -> None:
        """Make room for a sequence of that length, keeping what is there."""
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Forget what comes after `length` tokens."""
        ...

    def run(self, slots: Sequence[int], lengths: Sequence[int], feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Append to the sequences in `slots`, which are neighbours, and return logits [B, R, V]. `lengths` include the new tokens."""
        ...

    def step(self, slot: int, length: int, token: int) -> NDArray[np.float32]:
        """Append one token to a sequence of `length` tokens and return logits [1, V]."""
        ...


@dataclass(frozen=True)
class _Step:
    """What a step of one token of one sequence reads and writes, bound once."""

    binding: IOBinding
    feeds: dict[str, NDArray[Any]]
    logits: NDArray[np.float32]


class SharedCache:
    """For GroupQueryAttention: one buffer a layer, past and present at once."""

    batches = True

    def __init__(self, session: InferenceSession, layers: Layers, vocab_size: int, context: int, slots: int) -> None:
        self.session, self.layers, self.vocab_size, self.context, self.most_slots = session, layers, vocab_size, context, slots
        self.capacity, self.slots = 0, 0
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self._inputs = {i.name for i in session.get_inputs()}
        self._bindings: dict[tuple[int, int], IOBinding] = {}
        self._steps: dict[int, _Step] = {}

    def reserve(self, slot: int, length: int) -> None:
        capacity = self.capacity
        while capacity < length:
            capacity = min(max(2 * capacity, _FIRST_CAPACITY), self.context)
        slots = self.slots
        while slots <= slot:
            slots = min(max(2 * slots, 1), self.most_slots)
        if (slots, capacity) == (self.slots, self.capacity):
            return
        for layer, (heads, *sizes) in enumerate(self.layers):
            for kind, size in zip(("key", "value"), sizes, strict=True):
                self._enlarge(f"{kind}.{layer}", (slots, heads, capacity, size))
        self.slots, self.capacity = slots, capacity
        self._bindings.clear()
        self._steps.clear()

    def truncate(self, slot: int, length: int) -> None:
        """Nothing to do: what lies beyond a sequence's length is not read."""
        del slot, length

    def _enlarge(self, name: str, shape: tuple[int, ...]) -> None:
        """Make room in one array, keeping what is there."""
        array = _aligned(shape)
        if (old := self.arrays.get(name)) is not None:
            array[: self.slots, :, : self.capacity] = old
        self.arrays[name] = array

    def _bind_cache(self, first: int, count: int) -> IOBinding:
        binding = self.session.io_binding()
        for name, array in self.arrays.items():
            part = array[first : first + count]
            binding.bind_input(f"past_{name}", "cpu", 0, np.float32, part.shape, part.ctypes.data)
            binding.bind_output(f"present_{name}", "cpu", 0, np.float32, part.shape, part.ctypes.data)
        return binding

    def _binding(self, first: int, count: int) -> IOBinding:
        if (first, count) not in self._bindings:
            self._bindings[first, count] = self._bind_cache(first, count)
        return self._bindings[first, count]

    def _bind_step(self, slot: int) -> _Step:
        kinds = {"seqlens_k": (np.int32, (1,)), "total_sequence_length": (np.int32, ())}
        feeds: dict[str, NDArray[Any]] = {"ids": np.zeros((1, 1), np.int64), "positions": np.zeros((1, 1), np.int64), "rows": _ONE_ROW}
        feeds |= {name: np.zeros(shape, kind) for name, (kind, shape) in kinds.items()}
        step = _Step(self._bind_cache(slot, 1), feeds, np.zeros((1, 1, self.vocab_size), np.float32))
        for name in feeds.keys() & self._inputs:
            step.binding.bind_input(name, "cpu", 0, feeds[name].dtype, feeds[name].shape, feeds[name].ctypes.data)
        step.binding.bind_output("logits", "cpu", 0, np.float32, step.logits.shape, step.logits.ctypes.data)
        return step

    def step(self, slot: int, length: int, token: int) -> NDArray[np.float32]:
        if (step := self._steps.get(slot)) is None:
            step = self._steps[slot] = self._bind_step(slot)
        feeds = step.feeds
        feeds["ids"][0, 0], feeds["positions"][0, 0] = token, length
        feeds["seqlens_k"][0], feeds["total_sequence_length"][()] = length, length + 1
        self.session.run_with_iobinding(step.binding)
        logits: NDArray[np.float32] = step.logits[0].copy()
        return logits

    def run(self, slots: Sequence[int], lengths: Sequence[int], feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        binding = self._binding(slots[0], len(slots))
        feeds |= {"seqlens_k": np.array(lengths, np.int32) - np.int32(1), "total_sequence_length": np.array(max(lengths), np.int32)}
        for name in feeds.keys() & self._inputs:
            array = feeds[name]
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        logits = np.empty((len(slots), len(feeds["rows"]), self.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._execute(binding)
        return logits

    def _execute(self, binding: IOBinding) -> None:
        self.session.run_with_iobinding(binding)


class CopiedCache:
    """For standard operators: past goes in, present comes out."""

    batches = False

    def __init__(self, session: InferenceSession, layers: Layers) -> None:
        self.session = session
        self._inputs = {i.name for i in session.get_inputs()}
        self.shapes = {
            f"{kind}.{layer}": (1, heads, 0, size)
            for layer, (heads, *sizes) in enumerate(layers)
            for kind, size in zip(("key", "value"), sizes, strict=True)
        }
        self.arrays: dict[int, dict[str, NDArray[np.float32]]] = {}

    def reserve(self, slot: int, length: int) -> None:
        del length  # the arrays grow by themselves
        if slot not in self.arrays:
            self.truncate(slot, 0)

    def truncate(self, slot: int, length: int) -> None:
        if length == 0 or slot not in self.arrays:
            self.arrays[slot] = {name: np.empty(shape, np.float32) for name, shape in self.shapes.items()}
        self.arrays[slot] = {name: array[:, :, :length] for name, array in self.arrays[slot].items()}

    def step(self, slot: int, length: int, token: int) -> NDArray[np.float32]:
        feeds: dict[str, NDArray[Any]] = {"ids": np.array([[token]]), "positions": np.array([[length]]), "rows": _ONE_ROW}
        logits: NDArray[np.float32] = self.run([slot], [length + 1], feeds)[0]
        return logits

    def run(self, slots: Sequence[int], lengths: Sequence[int], feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        (slot,) = slots
        del lengths  # the arrays know
        feeds = {name: array for name, array in feeds.items() if name in self._inputs}
        past = {f"past_{name}": np.ascontiguousarray(array) for name, array in self.arrays[slot].items()}
        logits, *present = self.session.run(["logits", *(f"present_{name}" for name in self.shapes)], {**feeds, **past})
        self.arrays[slot] = dict(zip(self.shapes, present, strict=True))
        return np.asarray(logits)
