"""The weights of a checkpoint under the names and shapes of transformers' modules, one expert at a time.

Hub checkpoints often keep each expert's projections apart; transformers' modules keep them fused. Its own conversion tables say
which tensors make which parameter by which operations. They are followed lazily: for one expert of a parameter only that expert's
tensors (or that row of a fused tensor) are read, and the operations run on those.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.frontend.tensors import Tensors
from moec.compiler.ir import Param


@dataclass
class _Source:
    """Where a parameter comes from: tensors by the pattern that they matched, and the operations (None: as it is)."""

    converter: Any
    tensors: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def run(self, target: str, tensors: dict[str, list[Tensor]], model: Any) -> dict[str, Tensor]:
        converter = deepcopy(self.converter)
        for pattern, values in tensors.items():
            for value in values:
                converter.add_tensor(target, target, pattern, lambda value=value: value)
        made = converter.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Checkpoint:
    """A `WeightSource` over a checkpoint.

    Args:
        tensors: the checkpoint's tensors.
        model: the module that they belong to (on the meta device; its parameters give names and shapes).
    """

    def __init__(self, tensors: Tensors, model: Any) -> None:
        self.tensors, self.model = tensors, model
        self._sources: dict[str, tuple[str, _Source]] = {}
        self._index()

    def _index(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        table = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        wanted = self.model.state_dict()
        groups: dict[str, _Source] = {}
        prefix = self.model.base_model_prefix
        for name in sorted(self.tensors.names(), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
            if target not in wanted and name in wanted:
                target, pattern = name, None
            if target not in wanted:
                continue
            group = groups.setdefault(target, _Source(by_pattern.get(pattern)))
            group.tensors.setdefault(pattern or name, []).append(name)
        for first, group in groups.items():
            self._add(first, group)

    def _add(self, first: str, group: _Source) -> None:
        kinds = {n: self.tensors.kind(n) for names in group.tensors.values() for n in names}
        if group.converter is None:
            (names,) = group.tensors.values()
            group.shapes = {first: kinds[names[0]][1]}
        else:
            meta = {p: [torch.empty(kinds[n][1], device="meta") for n in names] for p, names in group.tensors.items()}
            try:
                group.shapes = {name: tuple(value.shape) for name, value in group.run(first, meta, self.model).items()}
            except MoecError:
                raise
            except Exception as error:
                read = [n for names in group.tensors.values() for n in names]
                raise MoecError(
                    f"{self.tensors.folder}: {read[0]} and {len(read) - 1} more tensors do not make {first}"
                    f" ({str(error).splitlines()[0]}); expected the tensors that transformers' {self.model.config.model_type} names"
                ) from error
        for target in group.shapes:
            self._sources[target] = first, group

    def format(self, name: str) -> str:
        """The element type in which the file stores a parameter."""
        names = next(iter(self._source(name)[1].tensors.values()))
        return self.tensors.kind(names[0])[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, from the headers."""
        return self._source(name)[1].shapes[name]

    def _source(self, name: str) -> tuple[str, _Source]:
        if name not in self._sources:
            raise MoecError(f"{self.tensors.folder}: the checkpoint has no tensor for {name}; download it again, or check config.json")
        return self._sources[name]

    def check(self, param: Param) -> None:
        """Check a parameter's presence and shape from the headers alone.

        Raises:
            MoecError: it is missing, or its shape is another than the model's.
        """
        expected, found = tuple(param.type.shape), self.shape(param.name)
        if expected != found:
            raise MoecError(
                f"{self.tensors.folder}: {param.name} has the shape {list(found)}, expected {list(expected)} from config.json:"
                " the two belong to different models"
            )

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """The value of a parameter, or of one index of its first axis, as stored."""
        first, group = self._source(name)
        if group.converter is None:
            (names,) = group.tensors.values()
            value = self.tensors.read(names[0], expert)
            return value if expert is None else value[0]
        shape = group.shapes[name]
        if expert is not None and (part := self._one(group, expert, shape)) is not None:
            value = group.run(first, part, self.model)[name]
            if tuple(value.shape) == (1, *shape[1:]):
                return value[0]
        tensors = {p: [self.tensors.read(n) for n in names] for p, names in group.tensors.items()}
        value = group.run(first, tensors, self.model)[name]
        return value if expert is None else value[expert]

    def _one(self, group: _Source, expert: int, shape: tuple[int, ...]) -> dict[str, list[Tensor]] | None:
        """The tensors of one expert, if the operations treat experts alike; None if only the whole parameter can be made."""
        first_axis = [getattr(op, name, None) for op in group.converter.operations for name in ("dim", "dim0", "dim1")]
        merges = type(group.converter.operations[0]).__name__ == "MergeModulelist" and group.converter.operations[0].dim == 0
        if merges and 0 not in first_axis[3:] and all(len(names) == shape[0] for names in group.tensors.values()):
            return {p: [self.tensors.read(names[expert])] for p, names in group.tensors.items()}
        fused = all(len(n) == 1 and self.tensors.kind(n[0])[1][0] == shape[0] for n in group.tensors.values())
        if fused and 0 not in first_axis:
            return {p: [self.tensors.read(names[0], expert)] for p, names in group.tensors.items()}
        return None
