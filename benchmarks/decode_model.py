"""A model of a published shape without its weights: the code is compiled here, and random weights are made where it runs.

`python -m benchmarks.decode build` writes what `run` reads, a folder that is small enough to carry to a machine without a compiler.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moec.compiler.backends.base import StoredArray
    from moec.compiler.ir import Param

FILE = "decode.json"
SPREAD = 0.02
"""Standard deviation of random weights, the `initializer_range` of the published configurations."""

ALIGNED = 64
"""Bytes at whose multiples arrays begin in a file."""

Arrays = dict[tuple[str, str], NDArray[np.generic]]


def build(
    folder: Path, config: Mapping[str, Any], recipe: str, experts: Sequence[str], target: str, context: int,
    kv_cache_dtype: str | None = None, activations: str = "float",
) -> None:  # fmt: skip
    """Compile a configuration into a folder: the library, its machine code and what the runtime has to know.

    Args:
        config: as in a checkpoint's config.json.
        recipe: that needs no weights, such as `int4`.
        experts: formats that the experts of a layer have in turn, instead of the recipe's.
        context: tokens that a sequence may have.
        kv_cache_dtype, activations: as of `compile_model`.
    """
    from moec.compiler.backends import cache_dtype, check_activations, takes_mixed_experts
    from moec.compiler.backends.tvm.backend import TvmBackend
    from moec.compiler.backends.tvm.storage import experts_layout
    from moec.compiler.context import Context
    from moec.compiler.frontend import huggingface
    from moec.compiler.model import Model
    from moec.compiler.passes import run_passes
    from moec.compiler.plan import make_plan
    from moec.compiler.recipe import load_recipe
    from moec.compiler.split_experts import uniform_experts
    from moec.targets import get_target

    chosen, hardware = load_recipe(recipe), get_target(target)
    cached = cache_dtype("tvm", hardware, kv_cache_dtype)
    check_activations("tvm", hardware, activations)
    with tempfile.TemporaryDirectory() as name:
        Path(name, "config.json").write_text(json.dumps(dict(config)))
        source = Model(*huggingface.load(name))
        model = run_passes(source, chosen.passes, Context(reference=source, target=hardware))
        if experts:
            model = _with_experts(model, experts)
        model = uniform_experts(model, factored_only=takes_mixed_experts("tvm", hardware))
        backend, plan = TvmBackend(model.graph, hardware, cached, activations), make_plan(model.graph, chosen, hardware, None, cached)
        folder.mkdir(parents=True, exist_ok=True)
        section = backend.build(folder, {})
        own = [name for name in backend.graph.params if name.rpartition(".")[2] == "inv_freq"]  # the frontend's, not the checkpoint's
        constants = [(name, "data", model.weights.load(name).numpy().tolist()) for name in own]
    for node in (node for node in backend.graph.nodes if node.op == "experts"):
        stacks = experts_layout(backend.graph, node, backend.platform).stacks()
        named = ((name, stacks[part]) for name, part in zip(node.inputs[3:5], ("gate_up", "down"), strict=True))
        constants += [(name, "table", stack.table().tolist()) for name, stack in named if stack.mixed]
    params = backend.graph.params.values()
    arrays = [(p.name, name, list(a.shape), a.dtype, _scale(p, a)) for p in params for name, a in backend.storage(p).items()]
    found = {"section": section, "arrays": arrays, "constants": constants, "bytes_per_token": plan.bytes_per_token}
    found |= {"vocab_size": int(config["vocab_size"]), "context_length": context, "recipe": recipe, "experts": list(experts)}
    (folder / FILE).write_text(json.dumps(found))


def _with_experts(model: Any, formats: Sequence[str]) -> Any:
    """The model whose experts have these formats in turn."""
    stacks = [model.graph.params[name] for node in model.graph.nodes if node.op == "experts" for name in node.inputs[3:5]]
    mixed = (replace(p, format=tuple(islice(cycle(formats), int(p.type.shape[0])))) for p in stacks)
    return replace(model, graph=model.graph.with_params(mixed))


def _scale(param: Param, array: StoredArray) -> float:
    """The scale of one of a parameter's arrays."""
    if param.format is None:
        return 1.0
    return spread_scale(param.format if isinstance(param.format, str) else param.format[array.members[0] if array.members else 0])


def spread_scale(name: str) -> float:
    """The scale that gives random codes of a format the spread of weights."""
    from moec.runtime.formats import get_format

    levels = getattr(get_format(name), "levels", 0)
    return SPREAD * (12**0.5) / levels if levels else 1.0


def random_weights(found: Mapping[str, Any], seed: int = 0) -> Arrays:
    """Arrays of the stored shapes by (parameter, component): random codes and values, constant scales, norms of one.

    What is alike in all layers is made once; on a GPU each parameter has memory of its own all the same.
    """
    draw, made, weights = np.random.default_rng(seed), dict[object, NDArray[np.generic]](), Arrays()
    constants = {(param, component): values for param, component, values in found["constants"]}
    for param, component, shape, dtype, scale in found["arrays"]:
        if (param, component) in constants:
            weights[param, component] = np.array(constants[param, component], dtype).reshape(shape)
            continue
        key = component.partition("_")[0], tuple(shape), dtype, scale
        if key not in made:
            made[key] = _random(draw, *key).reshape(shape)
        weights[param, component] = made[key]
    return weights


def _random(draw: np.random.Generator, component: str, shape: tuple[int, ...], dtype: str, scale: float) -> NDArray[np.generic]:
    size = int(np.prod(shape))
    if component == "scale":
        return np.full(size, scale, dtype)
    if dtype == "float32":
        return np.ones(size, np.float32) if len(shape) == 1 else SPREAD * draw.standard_normal(size, np.float32)
    if component == "values" and dtype == "uint16":  # bfloat16
        return (SPREAD * draw.standard_normal(size, np.float32)).view(np.uint32).__rshift__(16).astype(np.uint16)
    return np.frombuffer(draw.bytes(size * np.dtype(dtype).itemsize), dtype)


def mapped(weights: Arrays, file: Path) -> Arrays:
    """The arrays as those of an artifact are: parts of one mapped file, each parameter's in a place of its own."""
    starts = dict[tuple[str, str], int]()
    with file.open("wb") as stream:
        for key, array in weights.items():
            stream.seek(-(-stream.tell() // ALIGNED) * ALIGNED)
            starts[key] = stream.tell()
            array.tofile(stream)
    memory = np.memmap(file, np.uint8, "r")
    return {key: memory[starts[key] : starts[key] + x.nbytes].view(x.dtype).reshape(x.shape) for key, x in weights.items()}


def read(folder: Path) -> dict[str, Any]:
    """What `build` wrote."""
    found: dict[str, Any] = json.loads((folder / FILE).read_text())
    return found


def load(folder: Path, weights: Arrays, max_sequences: int) -> Any:
    """The executor of a folder of `build` with these weights."""
    from moec.runtime.executors.tvm import RUNTIME, TvmExecutor, open_device

    found = read(folder)
    section = found["section"]
    device = open_device(section, folder.joinpath, folder / RUNTIME, str(folder))
    sizes = found["vocab_size"], found["context_length"]
    return TvmExecutor(folder / section["library"], section, weights, *sizes, None, max_sequences, device)
