"""The tensors of a checkpoint folder: safetensors files, read lazily, headers first.

Nothing is executed and nothing outside the folder is opened (links of a hub cache to its own blobs are followed).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.frontend import fp8

_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F64": "f64", "I64": "i64", "I32": "i32", "U8": "u8", "BOOL": "bool"}

_OPEN_FILES = 2

_READ_BYTES = 1 << 28
"""So much is read of a file before it is opened anew: what was read of a mapped file counts as this process's memory."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        MoecError: there is no such file, or it holds no JSON object.
    """
    if not path.is_file():
        raise MoecError(f"{path.parent}: there is no {path.name} in this folder; expected a checkpoint in Hugging Face's layout")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MoecError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(data, dict):
        raise MoecError(f"{path}: expected a JSON object, found a {type(data).__name__}; download the file again")
    return data


class Tensors:
    """The tensors of a folder by name, without their values.

    Args:
        folder: the checkpoint.
        block: of fp8 weights, which are read as the values they stand for; None if there are none.

    Raises:
        MoecError: a file is missing, damaged, or named outside the folder.
    """

    def __init__(self, folder: Path, block: fp8.Block | None = None) -> None:
        self.folder, self._block = folder, block
        self._file: dict[str, Path] = {}
        self._kind: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._open: dict[Path, Any] = {}
        self._read_bytes: dict[Path, int] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._read_index(index)
        else:
            files = sorted(folder.glob("*.safetensors"))
            if not files:
                other = next((p.name for p in sorted(folder.glob("*.bin"))), None)
                found = f"found only {other}, which can run code when it is loaded" if other else "found none"
                raise MoecError(f"{folder}: expected weights in *.safetensors files, {found}; convert the checkpoint to safetensors")
            for file in files:
                for name in self._names(file):
                    if name in self._file:
                        raise MoecError(f"{folder}: the tensor {name} is in both {self._file[name].name} and {file.name}")
                    self._file[name] = file

    def _read_index(self, index: Path) -> None:
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
            raise MoecError(f"{index}: expected an object weight_map from tensor names to files; download the file again")
        for shard in sorted(set(named.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise MoecError(f"{index}: the shard {shard!r} is not a *.safetensors file of this folder")
            file = self.folder / shard
            if not file.is_file():
                raise MoecError(f"{self.folder}: the shard {shard} is missing; {index.name} names it; download it")
            present = set(self._names(file))
            for name, of in named.items():
                if of == shard and name not in present:
                    raise MoecError(f"{file}: the tensor {name} is missing; {index.name} says it is in this shard")
                if of == shard:
                    self._file[name] = file

    def _handle(self, file: Path) -> Any:
        handle = self._open.get(file)
        if handle is None:  # several threads may read: what one of them closes here stays open for those that have it
            while len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open)), None)
            try:
                handle = safe_open(file, framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]  # kept open
            except (SafetensorError, OSError, ValueError) as error:
                raise MoecError(f"{file}: truncated or damaged ({error}); download the file again") from error
            self._open[file], self._read_bytes[file] = handle, 0
        return handle

    def _names(self, file: Path) -> Iterable[str]:
        names: Iterable[str] = self._handle(file).keys()
        return names

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def names(self) -> list[str]:
        """Every tensor's name, those of scales left out."""
        return [n for n in self._file if not (self._block and n.endswith(fp8.SCALE) and n.removesuffix(fp8.SCALE) in self._file)]

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(element type, shape) of a tensor, from the header.

        Raises:
            MoecError: the element type is one that only quantised checkpoints have, or an fp8 weight has no scales.
        """
        if name not in self._kind:
            view = self._handle(self._file[name]).get_slice(name)
            stored = str(view.get_dtype())
            if stored == fp8.STORED and self._block is not None:
                self._check_scales(name, tuple(view.get_shape()), self._block)
                self._kind[name] = "f32", tuple(view.get_shape())
                return self._kind[name]
            if stored not in _DTYPES:
                raise MoecError(
                    f"{self._file[name]}: the tensor {name} has the element type {stored}; expected one of {', '.join(_DTYPES)}:"
                    " start from the checkpoint before it was quantised"
                )
            self._kind[name] = _DTYPES[stored], tuple(view.get_shape())
        return self._kind[name]

    def _check_scales(self, name: str, shape: tuple[int, ...], block: fp8.Block) -> None:
        scales = name + fp8.SCALE
        found = self.kind(scales)[1] if scales in self._file else None
        if len(shape) < 2 or found != fp8.scale_shape(shape, block):
            expected = list(fp8.scale_shape(shape, block)) if len(shape) > 1 else "a matrix"
            raise MoecError(
                f"{self._file[name]}: the fp8 tensor {name} {list(shape)} has the scales {found and list(found)}, expected {expected}: "
                f"a tensor {scales} with a number for each block of {block[0]} by {block[1]}; download the checkpoint again"
            )

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor's values, or those of one index of its first axis (which stays, with size one).

        Raises:
            MoecError: a value is NaN or infinite.
        """
        file = self._file[name]
        view = self._handle(file).get_slice(name)
        value: Tensor = view[...] if row is None else view[row : row + 1]
        self._read_bytes[file] += value.nbytes
        if self._read_bytes[file] > _READ_BYTES:
            self._open.pop(file, None)
        if value.dtype == torch.float8_e4m3fn and self._block is not None:
            scale = self.read(name + fp8.SCALE, row if value.ndim > 2 else None)
            scale = fp8.rows_of(scale, row, self._block) if row is not None and value.ndim == 2 else scale
            value = fp8.values(value, scale, self._block)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            where = (~torch.isfinite(value)).nonzero()[0].tolist()
            if row is not None:
                where[0] = row
            at = f"{file}: the tensor {name}"
            raise MoecError(f"{at} has a value that is NaN or infinite, at {where}; the checkpoint is damaged")
        return value
