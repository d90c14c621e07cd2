"""A Hugging Face checkpoint as a graph: `load("folder or hub name")`.

The checkpoint is data: config.json is read through its model's own configuration class after everything that could name code or an
implementation is dropped, weights come from safetensors only, and code that a checkpoint carries is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moec.compiler.errors import MoecError
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.frontend.fp8 import block_of
from moec.compiler.frontend.model import finish
from moec.compiler.frontend.source import NoWeights, Stored
from moec.compiler.frontend.tensors import Tensors, read_json
from moec.compiler.ir import Graph
from moec.compiler.weights import WeightSource
from moec.runtime.errors import unknown

_NEVER = ("auto_map", "trust_remote_code", "model_file", "custom_pipelines", "quantization_config", "torchscript")


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint: the folder itself, or where the hub's local cache keeps the model of that name.

    Raises:
        MoecError: there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise MoecError(f"{name}: expected a checkpoint folder, found a file; give the folder that holds config.json")
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(name), local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            pass
        raise MoecError(f"{name}: no such folder, and the local hub cache has no model of that name; download it first")
    raise MoecError(f"{name}: no such folder; expected a checkpoint folder with config.json, or a hub name OWNER/MODEL")


def _data_only(value: Any) -> Any:
    """A configuration without private keys and keys that name code, at every depth."""
    if isinstance(value, dict):
        return {k: _data_only(v) for k, v in value.items() if not k.startswith("_") and k not in _NEVER}
    return [_data_only(v) for v in value] if isinstance(value, list) else value


def config_of(folder: Path) -> Any:
    """The configuration of a checkpoint, of transformers' own class for its model type.

    Raises:
        MoecError: config.json is missing or damaged, or its model type is not one of transformers' own.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    path = folder / "config.json"
    data = read_json(path)
    block_of(data, path)
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise MoecError(f"{path}: expected a model_type, found {model_type!r}; the file is not a model's configuration")
    if model_type not in CONFIG_MAPPING_NAMES:
        if data.get("auto_map"):
            raise MoecError(
                f"{path}: model type {model_type!r} exists only as code inside the checkpoint, which is never run;"
                " use a checkpoint whose model type is part of transformers"
            )
        raise MoecError(f"{path}: {unknown('model type', model_type, CONFIG_MAPPING_NAMES)}"[:400] + " (...)")
    try:
        return CONFIG_MAPPING[model_type].from_dict(_data_only(data))
    except Exception as error:
        raise MoecError(f"{path}: {model_type} does not accept this configuration ({str(error).splitlines()[0]})") from error


def model_of(config: Any, where: str) -> Any:
    """The causal language model of a configuration, on the meta device, in float32.

    Raises:
        MoecError: transformers has none for it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    for candidate in (config, text):
        if type(candidate) in MODEL_FOR_CAUSAL_LM_MAPPING:
            cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(candidate)]
            cls = cls[0] if isinstance(cls, tuple) else cls
            candidate = text if cls.config_class is type(text) else candidate
            try:
                with torch.device("meta"):
                    return cls._from_config(candidate, dtype=torch.float32).eval()
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise MoecError(f"{where}: {cls.__name__} cannot be built from this configuration ({reason})") from error
    raise MoecError(f"{where}: transformers has no causal language model of type {config.model_type!r}; expected a decoder-only model")


def load(path: str | Path) -> tuple[Graph, WeightSource]:
    """The graph of a checkpoint in normal form, verified, and its weights, which stay on disk.

    A folder with config.json and no weights gives the graph; reading a weight of it is an error.

    Raises:
        MoecError: what is wrong with the checkpoint, in one line.
    """
    with torch.device("cpu"):  # constants that tracing makes are weights, wherever the model is run later
        return _load(resolve(path))


def _load(folder: Path) -> tuple[Graph, WeightSource]:
    config = config_of(folder)
    dtype = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(config.dtype, "f32")
    model = model_of(config, str(folder))
    stored: Stored
    if any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin")):
        stored = Checkpoint(Tensors(folder, block_of(read_json(folder / "config.json"), folder / "config.json")), model)
    else:
        stored = NoWeights(str(folder), dtype)
    graph, weights = finish(model, stored)
    weights.check(graph)
    return graph, weights
