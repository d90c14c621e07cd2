"""Writing models for other programs: `export_model`."""

from __future__ import annotations

from pathlib import Path

from moec.compiler.artifact_weights import open_artifact
from moec.compiler.calibration.text import Files, calibration_text
from moec.compiler.context import Context
from moec.compiler.device import on_device
from moec.compiler.errors import MoecError
from moec.compiler.export.checkpoint import DTYPES, CheckpointWriter
from moec.compiler.frontend import huggingface
from moec.compiler.frontend.model import trace
from moec.compiler.frontend.source import GraphWeights
from moec.compiler.model import Model
from moec.compiler.passes import run_passes
from moec.compiler.progress import Progress
from moec.compiler.recipe import NOTHING, load_recipe
from moec.runtime.errors import unknown
from moec.runtime.manifest import MANIFEST
from moec.targets import get_target

FORMATS = ("hf",)

SOURCE_FOLDER = "checkpoint"
"""Where an artifact keeps the configuration of the checkpoint that it was made of."""


def export_model(
    model: str | Path,
    output: str | Path,
    *,
    to: str = "hf",
    recipe: str | Path | None = None,
    calibration: Files | None = None,
    calibration_tokens: int = 1 << 16,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    packed: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a changed model as a checkpoint for transformers.

    Args:
        model: a checkpoint folder or hub name, or an artifact.
        output: the folder to write, which must not exist yet.
        to: `hf`: config.json, safetensors files under the hub's names, the tokenizer.
        recipe: what to do to a checkpoint first; quantised weights are written as the values that their codes stand for, unless `packed`.
        calibration, calibration_tokens, seed, device: as in `compile_model`.
        dtype: `bf16`, `f16` or `f32`; the checkpoint's own unless given.
        packed: write the codes of experts and linear layers in symmetric int4 or int8, in compressed-tensors' layout. Scales are written
            in `dtype`; `f16` keeps all their bits.

    Raises:
        MoecError: bad input, or a model that transformers' class cannot express (layers with different numbers of experts, skipped
            slots, mixed widths). Nothing is left at `output`.
    """
    out, progress, place = Path(output), progress or Progress(), on_device(device)
    if to not in FORMATS:
        raise unknown("export format", to, FORMATS)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if out.exists():
        raise MoecError(f"{out} exists already: choose another output, moec will not replace it")
    what = "export --to hf"
    if (Path(model) / MANIFEST).is_file():
        if recipe is not None:
            raise MoecError("--recipe changes a checkpoint; an artifact has been through its own already: leave it out")
        folder = Path(model) / SOURCE_FOLDER
        if not (folder / "config.json").is_file():
            raise MoecError(f"{model}: the artifact has no {SOURCE_FOLDER}/config.json; export the checkpoint with the artifact's recipe")
        changed = Model(*open_artifact(model))
        config = huggingface.config_of(folder)
        source = trace(huggingface.model_of(config, what))[0].graph
        writer = CheckpointWriter(changed, source, None, None, config, dtype, what, packed)
        writer.write(out, [folder, Path(model)], progress)
        return
    folder = huggingface.resolve(model)
    chosen = load_recipe(recipe) if recipe is not None else NOTHING
    with progress.step("trace"):
        graph, weights = huggingface.load(folder)
    loaded = Model(graph, weights)
    text = None if calibration is None else calibration_text(calibration, folder, loaded, calibration_tokens, seed)
    with place:
        changed = run_passes(loaded, chosen.passes, Context(text, loaded, get_target("cpu"), seed=seed, progress=progress))
    stored = weights.stored if isinstance(weights, GraphWeights) else None
    with progress.step("configuration"):
        writer = CheckpointWriter(changed, graph, stored, weights, huggingface.config_of(folder), dtype, what, packed)
    writer.write(out, [folder], progress)
