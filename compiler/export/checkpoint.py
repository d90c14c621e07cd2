"""A changed model as a checkpoint that plain transformers loads: pruned, merged, slimmed, re-routed, or dequantised.

The names and shapes of the tensors are those of the hub: transformers' own conversion tables, run backwards. One layer is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moec.compiler.artifact import io_errors
from moec.compiler.errors import MoecError
from moec.compiler.export.configuration import Configured, configure
from moec.compiler.export.packed import PackedTensors
from moec.compiler.factors import folded
from moec.compiler.frontend.layout import Computed, Layout
from moec.compiler.frontend.source import Stored
from moec.compiler.frontend.tensors import read_json
from moec.compiler.ir import Graph
from moec.compiler.model import Model
from moec.compiler.progress import Progress
from moec.compiler.roles import layer_of
from moec.compiler.stored import as_stored
from moec.compiler.weights import WeightSource

SHARD_BYTES = 5_000_000_000
"""The most that a file of tensors holds, but for a layer that is larger."""

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_COPIED, _NOT_COPIED = (".json", ".txt", ".model", ".jinja"), ("config.json", "manifest.json", "graph.txt")


class CheckpointWriter:
    """A checkpoint in the making.

    Args:
        model: the changed model.
        source: the graph before the change.
        stored, original: the weights before the change, as the module keeps them and as the graph sees them; None where only the changed
            model is there (an artifact).
        config: transformers' configuration of the source.
        dtype: element type of float tensors; None for that of the source.
        packed: write the codes of quantised experts and linear layers, not their values.
    """

    def __init__(
        self, model: Model, source: Graph, stored: Stored | None, original: WeightSource | None, config: Any, dtype: str | None, what: str,
        packed: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.stored, self.original, self.what = folded(as_stored(model)), stored, original, what
        self.dtype = DTYPES[dtype] if dtype else config.dtype if config.dtype in DTYPES.values() else torch.float32
        self.made: Configured = configure(config, source, self.model.graph, what)
        self._computed = {
            param.name: name for name, layout in self.made.normal.layouts.items() if isinstance(layout, Computed) for param in layout.inputs
        }

        self.packed = PackedTensors(model, self.made.normal.layouts, self.dtype, what) if packed else None

    def write(self, out: Path, folders: Sequence[Path], progress: Progress) -> None:
        """Write everything to a folder that is not there yet.

        Args:
            folders: where the source's config.json (in the first) and its other small files are.

        Raises:
            MoecError: a file cannot be written. Nothing is left at `out`.
        """
        part = out.with_name(out.name + ".part")
        try:
            with io_errors(part):
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
                self._write_tensors(part, progress)
                self._write_config(part, folders[0])
                for path in (p for folder in folders for p in folder.iterdir()):
                    if path.suffix in _COPIED and not path.name.startswith(_NOT_COPIED) and not path.name.endswith(".index.json"):
                        shutil.copyfile(path, part / path.name)
                part.rename(out)
        except SafetensorError as error:
            raise MoecError(f"cannot write {part}: {error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _write_tensors(self, part: Path, progress: Progress) -> None:
        groups: dict[int, list[str]] = defaultdict(list)
        for name in self._names():
            layer = layer_of(name)
            groups[-1 if layer is None else layer].append(name)
        pending: dict[str, Tensor] = {}
        files: list[list[str]] = []
        total = 0

        def flush() -> None:
            if pending:
                save_file(pending, part / f"{len(files)}.tmp", metadata={"format": "pt"})
                files.append(list(pending))
                pending.clear()

        for layer in progress.track(sorted(groups), "layers"):
            made = self._reverted({name: self._value(name) for name in groups[layer]})
            if self.packed is not None:
                made = self.packed.replace(made, groups[layer], self._reverted)
            size = sum(t.nbytes for t in made.values())
            total += size
            if pending and size + sum(t.nbytes for t in pending.values()) > SHARD_BYTES:
                flush()
            pending.update(made)
        flush()
        weight_map: dict[str, str] = {}
        for index, names in enumerate(files):
            file = "model.safetensors" if len(files) == 1 else f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
            (part / f"{index}.tmp").rename(part / file)
            weight_map |= dict.fromkeys(names, file)
        if len(files) > 1:
            index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (part / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")

    def _names(self) -> Iterator[str]:
        """The module's own names, a tied weight once."""
        seen: set[int] = set()
        module = self.made.module
        saved = module.state_dict()
        for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
            if name in saved and id(tensor) not in seen:
                seen.add(id(tensor))
                yield name

    def _value(self, name: str) -> Tensor:
        """A tensor in the module's layout."""
        if name in self.model.graph.params:
            value = _restored(self.model.weights.load(name), self.made.normal.layouts.get(name))
            value = value.reshape([int(d) for d in self.made.original[name].type.shape])
        else:
            if (whole := self._computed.get(name)) is not None and self.original is not None:
                if not torch.equal(self.model.load(whole), self.original.load(whole).float()):
                    raise MoecError(f"{self.what}: {whole} is computed from {name} in transformers and was changed: it cannot be exported")
            if self.stored is None:
                raise MoecError(f"{self.what}: the artifact does not hold {name}; export the checkpoint with the artifact's recipe instead")
            value = self.stored.load(name)
        return value.to(self.dtype).contiguous() if value.is_floating_point() else value.contiguous()

    def _reverted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the hub's names."""
        from transformers.core_model_loading import revert_weight_conversion

        try:
            made: dict[str, Tensor] = revert_weight_conversion(self.made.module, dict(tensors))
        except Exception as error:  # transformers raises whatever torch raised
            raise MoecError(
                f"{self.what}: transformers cannot bring {next(iter(tensors))} into its checkpoint's form ({str(error).splitlines()[0]})"
            ) from error
        return {name: value.contiguous().clone() for name, value in made.items()}  # views of one tensor would be saved as one

    def _write_config(self, part: Path, folder: Path) -> None:
        """config.json as it was, with the changed keys."""
        data = read_json(folder / "config.json")
        data.pop("quantization_config", None)  # values are written
        for key, value in self.made.changes.items():
            owner, config = data, self.made.config
            for name in key[:-1]:
                owner, config = owner.setdefault(name, {}), getattr(config, name)
            for alias, real in getattr(type(config), "attribute_map", {}).items():
                if real == key[-1]:
                    owner.pop(alias, None)
            owner[key[-1]] = value
        for name in ("torch_dtype", "dtype"):
            if name in data or name == "dtype":
                data[name] = str(self.dtype).removeprefix("torch.")
        if self.packed is not None:
            data["quantization_config"] = self.packed.config()
        (part / "config.json").write_text(json.dumps(data, indent=2) + "\n")


def _restored(value: Tensor, layout: Layout | Computed | None) -> Tensor:
    """A value from the graph's layout back in the module's. Experts' weights are stacked."""
    if layout is None or isinstance(layout, Computed) or layout.flat:
        return value
    if layout.interleaved:
        halves = value.unflatten(1, (2, -1))  # [E, 2, F, ...]
        value = halves.transpose(1, 2).flatten(1, 2)
    return value.transpose(-1, -2) if layout.transposed else value
