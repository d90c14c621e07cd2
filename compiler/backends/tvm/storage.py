"""How each parameter is stored: as the kernels read it for matrices, as float32 (or the integers they are) for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moec.compiler.backends.base import StoredArray
from moec.compiler.backends.tvm.platform import ExpertsLayout, Formats, MatrixLayout, MatrixStack, Platform
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Node, Param
from moec.compiler.packed import CodedFormat, Packed, Quantized
from moec.runtime.formats import get_format
from moec.runtime.formats.float import PlainFormat
from moec.targets.kernels.cpu.experts_layout import Factors

MATRICES = {3: "gate_up", 4: "down", 7: "gate_up_left", 8: "gate_up_right", 9: "down_left", 10: "down_right"}
"""The names in `ExpertsLayout.stacks` of inputs of `experts`."""

Arrays = Mapping[str, NDArray[np.generic]]


class Storage(Protocol):
    """How one parameter is stored."""

    @property
    def stacked(self) -> bool: ...

    def arrays(self) -> dict[str, StoredArray]: ...

    def store(self, packed: Packed, expert: int | None) -> dict[str, NDArray[np.generic]]: ...

    def restore(self, arrays: Arrays, expert: int | None) -> Packed: ...


@dataclass(frozen=True)
class MatrixStorage:
    """A matrix [N, K] that `linear` or `embedding` reads."""

    layout: MatrixLayout
    stacked: bool = False

    def arrays(self) -> dict[str, StoredArray]:
        return {name: StoredArray(dtype, shape) for name, (shape, dtype) in self.layout.arrays().items()}

    def store(self, packed: Packed, expert: int | None) -> dict[str, NDArray[np.generic]]:
        del expert
        return _tile(self.layout, packed)

    def restore(self, arrays: Arrays, expert: int | None) -> Packed:
        del expert
        return _untile(self.layout, arrays)


@dataclass(frozen=True)
class ExpertStorage:
    """One of the stacked matrices of `experts`, by its name in the layout; the rows of gate_up are interleaved.

    Experts of several formats have the arrays of their own; then `table` int32 [E, 2] has the format of each, and its place there.
    """

    layout: ExpertsLayout
    matrix: str
    stacked: bool = True

    @property
    def _stack(self) -> MatrixStack:
        return self.layout.stacks()[self.matrix]

    @property
    def _interleaved(self) -> bool:
        return self.matrix in ("gate_up", "gate_up_left")

    def arrays(self) -> dict[str, StoredArray]:
        stack, found = self._stack, dict[str, StoredArray]()
        for index, matrix in enumerate(stack.classes):
            members, end = tuple(stack.members(index)), stack.suffix(index)
            arrays = matrix.arrays(len(members)).items()
            found |= {f"{name}{end}": StoredArray(dtype, shape, members if stack.mixed else None) for name, (shape, dtype) in arrays}
        return {**found, "table": StoredArray("int32", (self.layout.experts, 2))} if stack.mixed else found

    def _own(self, expert: int | None) -> tuple[MatrixLayout, str, NDArray[np.int32]]:
        """An expert's layout, what the names of its arrays end in, and its row of the table."""
        assert expert is not None
        stack = self._stack
        row = stack.table()[expert]
        return stack.classes[row[0]], stack.suffix(int(row[0])), row

    def store(self, packed: Packed, expert: int | None) -> dict[str, NDArray[np.generic]]:
        matrix, end, row = self._own(expert)
        if matrix.format == "zero":
            return {}
        if self._interleaved:
            order = self.layout.interleave
            if isinstance(packed, Quantized):
                packed = Quantized(order(packed.codes), order(packed.scale), order(packed.zero))
            else:
                packed = order(packed)
        found = {f"{name}{end}": array for name, array in _tile(matrix, packed).items()}
        return {**found, "table": row} if end else found

    def restore(self, arrays: Arrays, expert: int | None) -> Packed:
        matrix, end, _ = self._own(expert)
        if matrix.format == "zero":
            return np.zeros((self.layout.parts * self.layout.f if self.matrix == "gate_up" else self.layout.d, matrix.k), np.uint8)
        own = {name.removesuffix(end): array for name, array in arrays.items() if name.endswith(end) and name != "table"}
        packed, order = _untile(matrix, own), self.layout.deinterleave
        if not self._interleaved:
            return packed
        if isinstance(packed, Quantized):
            return Quantized(order(packed.codes), order(packed.scale), order(packed.zero))
        values: Packed = order(packed)
        return values


@dataclass(frozen=True)
class ExpertBiasStorage:
    """The biases of `experts`, padded as its kernel reads them."""

    layout: ExpertsLayout
    up: bool
    format: str
    stacked: bool = False

    @property
    def _shape(self) -> tuple[int, int]:
        return self.layout.experts, self.layout.parts * self.layout.f if self.up else self.layout.d

    def arrays(self) -> dict[str, StoredArray]:
        return {"data": StoredArray("float32", self.layout.bias_shapes[0 if self.up else 1])}

    def store(self, packed: Packed, expert: int | None) -> dict[str, NDArray[np.generic]]:
        del expert
        values = _widen(packed, self.format).reshape(self._shape)
        other = np.zeros((self.layout.experts, self.layout.d if self.up else self.layout.parts * self.layout.f), np.float32)
        up, down = self.layout.biases(*((values, other) if self.up else (other, values)))
        return {"data": up if self.up else down}

    def restore(self, arrays: Arrays, expert: int | None) -> Packed:
        del expert
        data = arrays["data"].astype(np.float32)
        values = self.layout.deinterleave(data[..., None])[..., 0] if self.up else data[:, : self._shape[1]]
        return _narrow(np.ascontiguousarray(values), self.format)


@dataclass(frozen=True)
class PlainStorage:
    """Anything else: float32 for floating point, integers as they are."""

    shape: tuple[int, ...]
    format: str
    stacked: bool = False

    def arrays(self) -> dict[str, StoredArray]:
        dtype = {"i64": "int64", "i32": "int32", "u8": "uint8", "bool": "bool"}.get(self.format, "float32")
        return {"data": StoredArray(dtype, self.shape)}

    def store(self, packed: Packed, expert: int | None) -> dict[str, NDArray[np.generic]]:
        del expert
        return {"data": _widen(packed, self.format).reshape(self.shape)}

    def restore(self, arrays: Arrays, expert: int | None) -> Packed:
        del expert
        return _narrow(arrays["data"], self.format)


def _tile(layout: MatrixLayout, packed: Packed) -> dict[str, NDArray[np.generic]]:
    fmt = get_format(layout.format)
    if not isinstance(packed, Quantized):
        return layout.tile_values(np.ascontiguousarray(packed))
    assert isinstance(fmt, CodedFormat)
    return layout.tile(packed.codes, packed.scale, None if fmt.symmetric else packed.zero)


def _untile(layout: MatrixLayout, arrays: Arrays) -> Packed:
    if not isinstance(get_format(layout.format), CodedFormat):
        return layout.untile_values(arrays)
    return Quantized(*layout.untile(arrays))


def _widen(packed: Packed, name: str) -> NDArray[np.generic]:
    assert not isinstance(packed, Quantized)
    if name not in ("f32", "f16", "bf16", "f64"):
        return packed
    return PlainFormat(name).unpack({"data": packed}, packed.shape)


def _narrow(values: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    if name not in ("f32", "f16", "bf16", "f64"):
        return values
    return PlainFormat(name).pack(values.astype(np.float32))["data"]


def plan_storage(graph: Graph, platform: Platform) -> dict[str, Storage]:
    """How each parameter of the graph is stored.

    Raises:
        MoecError: a parameter is used or quantised in a way for which there is no kernel.
    """
    return {name: _storage(graph, param, platform) for name, param in graph.params.items()}


def matrix_layout(storage: Storage) -> MatrixLayout:
    """The layout of a matrix that `linear` or `embedding` reads."""
    assert isinstance(storage, MatrixStorage)
    return storage.layout


def experts_layout(graph: Graph, node: Node, platform: Platform) -> ExpertsLayout:
    """The layout of an `experts` node's weights."""
    up, down = (graph.params[node.inputs[i]] for i in (3, 4))
    experts, d, f = (int(size) for size in down.type.shape)
    gated = bool(node.attrs.get("gated", True))
    factors = _factors(graph, node, 7), _factors(graph, node, 9)
    return platform.experts(experts, d, f, (_formats(up), _formats(down)), gated, factors)


def _factors(graph: Graph, node: Node, at: int) -> Factors | None:
    """The low-rank factors that are the inputs `at` and `at` + 1."""
    if len(node.inputs) <= at or not node.inputs[at]:
        return None
    left, right = (graph.params[name] for name in node.inputs[at : at + 2])
    return Factors(int(right.type.shape[1]), _format(left), _format(right))


def _storage(graph: Graph, param: Param, platform: Platform) -> Storage:
    found: list[Storage] = []
    shape = tuple(int(d) for d in param.type.shape)
    for node in graph.users.get(param.name, ()):
        for position in (i for i, name in enumerate(node.inputs) if name == param.name):
            if node.op in ("linear", "embedding") and position == 1:
                found.append(MatrixStorage(platform.matrix(shape[0], shape[1], _format(param))))
            elif node.op == "experts" and position in MATRICES:
                found.append(ExpertStorage(experts_layout(graph, node, platform), MATRICES[position]))
            elif node.op == "experts" and position in (5, 6):
                found.append(ExpertBiasStorage(experts_layout(graph, node, platform), position == 5, _format(param)))
            else:
                if not isinstance(get_format(_format(param)), PlainFormat):
                    raise MoecError(f"@{param.name}: {node.op} has no kernel for {_format(param)}; leave this weight unquantised")
                found.append(PlainStorage(shape, _format(param)))
    if any(other != found[0] for other in found):
        users = ", ".join(f"{n.op} (%{n.name})" for n in graph.users[param.name])
        raise MoecError(f"@{param.name}: its users {users} need it in different layouts; give each its own copy")
    return found[0]


def _formats(param: Param) -> Formats:
    """The format of all experts, or of each where they differ."""
    same = isinstance(param.format, str) or len(set(param.format)) > 1
    return param.format if same else param.format[0]


def _format(param: Param) -> str:
    found = _formats(param)
    if not isinstance(found, str):
        formats = ", ".join(sorted(set(found)))
        raise MoecError(f"@{param.name}: different formats ({formats}) of one parameter are for the projections of experts only")
    return found
