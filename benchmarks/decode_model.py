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
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = "decode.json"
SPREAD = 0.02
"""Standard deviation of random weights, the `initializer_range` of the published configurations."""

Arrays = dict[tuple[str, str], NDArray[np.generic]]


def build(folder: Path, config: Mapping[str, Any], recipe: str, experts: Sequence[str], target: str, context: int) -> None:
    """Compile a configuration into a folder: the library, its machine code and what the runtime has to know.

    Args:
        config: as in a checkpoint's config.json.
        recipe: that needs no weights, such as `int4`.
        experts: formats that the experts of a layer have in turn, instead of the recipe's.
        context: tokens that a sequence may have.
    """
    from moec.compiler.backends import takes_mixed_experts
    from moec.compiler.backends.tvm.backend import TvmBackend
    from moec.compiler.context import Context
    from moec.compiler.frontend import huggingface
    from moec.compiler.model import Model
    from moec.compiler.passes import run_passes
    from moec.compiler.plan import make_plan
    from moec.compiler.recipe import load_recipe
    from moec.compiler.split_experts import uniform_experts
    from moec.targets import get_target

    chosen, hardware = load_recipe(recipe), get_target(target)
    with tempfile.TemporaryDirectory() as name:
        Path(name, "config.json").write_text(json.dumps(dict(config)))
        source = Model(*huggingface.load(name))
        model = run_passes(source, chosen.passes, Context(reference=source, target=hardware))
        if experts:
            model = _with_experts(model, experts)
        model = uniform_experts(model, factored_only=takes_mixed_experts("tvm", hardware))
        backend, read = TvmBackend(model.graph, hardware), make_plan(model.graph, chosen, hardware, None).bytes_per_token
        folder.mkdir(parents=True, exist_ok=True)
        section = backend.build(folder, {})
        constants = {}
        for param in backend.graph.params.values():
            if param.name.rpartition(".")[2] == "inv_freq":  # the frontend's own numbers, not the checkpoint's
                constants[param.name] = model.weights.load(param.name).numpy().tolist()
    arrays = [(p.name, c, list(a.shape), a.dtype) for p in backend.graph.params.values() for c, a in backend.storage(p).items()]
    spreads = {p.name: _scale(p.format) for p in backend.graph.params.values() if isinstance(p.format, str)}
    found = {"section": section, "arrays": arrays, "scales": spreads, "constants": constants, "bytes_per_token": read}
    found |= {"vocab_size": int(config["vocab_size"]), "context_length": context, "recipe": recipe, "experts": list(experts)}
    (folder / FILE).write_text(json.dumps(found))


def _with_experts(model: Any, formats: Sequence[str]) -> Any:
    """The model whose experts have these formats in turn."""
    stacks = [model.graph.params[name] for node in model.graph.nodes if node.op == "experts" for name in node.inputs[3:5]]
    mixed = (replace(p, format=tuple(islice(cycle(formats), int(p.type.shape[0])))) for p in stacks)
    return replace(model, graph=model.graph.with_params(mixed))


def _scale(name: str) -> float:
    """The scale that gives random codes of a format the spread of weights."""
    from moec.runtime.formats import get_format

    levels = getattr(get_format(name), "levels", 0)
    return SPREAD * (12**0.5) / levels if levels else 1.0


def random_weights(found: Mapping[str, Any], seed: int = 0) -> Arrays:
    """Arrays of the stored shapes by (parameter, component): random codes and values, constant scales, norms of one.

    What is alike in all layers is made once; on a GPU each parameter has memory of its own all the same.
    """
    draw, made, weights = np.random.default_rng(seed), dict[object, NDArray[np.generic]](), Arrays()
    for param, component, shape, dtype in found["arrays"]:
        if param in found["constants"]:
            weights[param, component] = np.array(found["constants"][param], dtype).reshape(shape)
            continue
        key = component, tuple(shape), dtype, found["scales"].get(param, 1e-3)
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


def load(folder: Path, max_sequences: int) -> tuple[Any, dict[str, Any]]:
    """The executor of a folder of `build`, with random weights, and what the file says."""
    from moec.runtime.executors.tvm import RUNTIME, TvmExecutor, open_device

    found = json.loads((folder / FILE).read_text())
    section = found["section"]
    device = open_device(section, folder.joinpath, folder / RUNTIME, str(folder))
    library, sizes = folder / section["library"], (found["vocab_size"], found["context_length"])
    return TvmExecutor(library, section, random_weights(found), *sizes, None, max_sequences, device), found
