"""`compile_model`: the whole way from a checkpoint to an artifact, on one page."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moec
from moec.compiler.artifact import ArtifactWriter, Shard, plan_shards, weight_table
from moec.compiler.backends import cache_dtype, check_activations, make_backend, takes_mixed_experts
from moec.compiler.backends.base import Backend
from moec.compiler.calibration.text import Files, calibration_text
from moec.compiler.context import Context
from moec.compiler.device import on_device
from moec.compiler.errors import MoecError
from moec.compiler.frontend import huggingface
from moec.compiler.frontend.model import graph_of
from moec.compiler.frontend.tokenizer import tokenizer_files
from moec.compiler.ir import Graph
from moec.compiler.model import Model
from moec.compiler.passes import run_passes
from moec.compiler.plan import Plan, make_plan, parse_size
from moec.compiler.progress import Progress
from moec.compiler.recipe import NOTHING, load_recipe
from moec.compiler.split_experts import uniform_experts
from moec.compiler.stored import pack
from moec.compiler.text import print_graph
from moec.compiler.verify import CHECK, verify
from moec.compiler.weights import WeightSource
from moec.targets import Target, get_target


def compile_model(
    model: str | Path | torch.nn.Module | tuple[Graph, WeightSource],
    output: str | Path | None = None,
    *,
    target: str = "cpu",
    backend: str = "tvm",
    recipe: str | Path | None = None,
    memory: str | int | None = None,
    latency: float | None = None,
    max_kl: float | None = None,
    calibration: Files | None = None,
    calibration_tokens: int = 1 << 16,
    statistics: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    resume: bool = True,
    dry_run: bool = False,
    portable: bool = False,
    activations: str = "float",
    kv_cache_dtype: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Compile a checkpoint for a target.

    Args:
        model: a checkpoint folder, a hub name in the local cache, a causal language model of transformers in memory, or a graph
            and its weights as `moec.compiler.frontend.model.graph_of` gives them.
        output: the artifact's folder; not needed for a dry run. An older artifact there is replaced when the new one is complete.
        target: a name of `moec.targets` or a file.
        backend: `tvm` or `onnx`.
        recipe: a file or a name; without one, every weight keeps its value.
        memory: refuse a model whose weights need more (`12GiB`, or bytes).
        max_kl: the most damage that passes may do, in nats a token on held-out calibration text.
        calibration: text files, or a folder of them, for passes that look at what the model does.
        calibration_tokens: about how many tokens of them to use.
        statistics: a file that keeps what was measured on them; read if it is there, written if not.
        seed: of everything that is random.
        device: what passes compute on, `cpu`, `cuda` or `cuda:N`; torch's default device unless given. The artifact is for `target`.
        resume: keep what an interrupted run of the same work finished: weight files in `OUT.part`, and in `OUT.work` what passes keep.
        dry_run: stop after planning; works from `config.json` alone.
        portable: the ONNX backend writes standard operators only.
        activations: what products are computed with. TVM on GPUs: `float` (16 bits or more), or where tokens are many `bfloat16`, or `fp8`
            with weights in it. ONNX Runtime: on a CPU `float`, or `int8` (faster, about 1 % off a product); on a GPU `float16`, which
            `float` means there, or `bfloat16`.
        kv_cache_dtype: what keys and values of attention are kept in, `float32`, or `bfloat16` on GPUs, which take it unless told; the ONNX
            backend has what it computes with.

    Returns:
        What was (or would be) written: sizes by role and format, and the graph's operations.

    Raises:
        MoecError: bad input. Nothing is left at `output`.
    """
    if latency is not None:
        raise MoecError("--latency needs the budget solver, which this version does not have: use --recipe")
    if output is None and not dry_run:
        raise MoecError("no output given: add -o OUT.moec, or --dry-run to see the plan only")
    if calibration is None and (max_kl is not None or statistics is not None):
        raise MoecError(f"{'--max-kl' if max_kl is not None else '--statistics'} needs calibration text: add --calibration FILE")
    progress, place = progress or Progress(), on_device(device)
    chosen = load_recipe(recipe) if recipe is not None else NOTHING
    hardware = get_target(target)
    check_activations(backend, hardware, activations)
    cached = cache_dtype(backend, hardware, kv_cache_dtype, activations)
    with progress.step("trace"):
        checkpoint = huggingface.resolve(model) if isinstance(model, str | Path) else None
        source = Model(*(huggingface.load(checkpoint) if checkpoint else model if isinstance(model, tuple) else graph_of(model)))
    context = Context(
        text=None if calibration is None else calibration_text(calibration, checkpoint, source, calibration_tokens, seed),
        reference=source, target=hardware, max_kl=max_kl, seed=seed,
        statistics_file=Path(statistics) if statistics is not None else None, progress=progress,
    )  # fmt: skip
    with _work_folder(None if dry_run or output is None else Path(output), resume) as context.work:
        with place:
            compiled = run_passes(source, chosen.passes, context)
        if CHECK:
            verify(compiled.graph)
        if dry_run:
            return _within(make_plan(compiled.graph, chosen, hardware, None, cached), memory)
        assert output is not None
        with place:
            quality = _quality(compiled, context)
        compiled = uniform_experts(compiled, factored_only=takes_mixed_experts(backend, hardware))
        with progress.step("lower"):
            lowered = make_backend(backend, compiled.graph, hardware, portable, activations, kv_cache_dtype=cached)
        shards = plan_shards(lowered)
        plan = _within(make_plan(compiled.graph, chosen, hardware, shards, cached), memory)
        history = {"recipe": list(chosen.steps), "journal": context.journal, "quality": quality, "calibration": _record(context)}
        _write(Path(output), checkpoint, compiled, lowered, shards, history, hardware, backend, resume, plan, progress, place)
    return plan


@contextmanager
def _work_folder(output: Path | None, resume: bool) -> Iterator[Path | None]:
    """The folder `OUT.work`, which passes make to keep in it what memory need not hold; it stays only where a run was killed."""
    if output is None:
        yield None
        return
    folder = output.with_name(output.name + ".work")
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    except Exception:  # what failed once would fail again
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _quality(model: Model, context: Context) -> dict[str, Any] | None:
    """What the passes cost, on the held-out part of the calibration text."""
    if context.text is None or model is context.reference:
        return None
    with context.progress.step("quality"):
        found = context.damage(model, "the quality report")
    if context.max_kl is not None and found.kl_divergence > context.max_kl:
        raise MoecError(
            f"the recipe costs {found.kl_divergence:.4f} nats a token (KL divergence on held-out text), "
            f"more than --max-kl {context.max_kl}: choose a milder recipe or a larger --max-kl"
        )
    return found.to_json()


def _record(context: Context) -> dict[str, Any] | None:
    """What the artifact says of the calibration."""
    if (text := context.text) is None:
        return None
    return {"domains": list(text.domains), "tokens": text.tokens, "fingerprint": text.fingerprint(), "seed": context.seed}


def _within(plan: Plan, memory: str | int | None) -> Plan:
    if memory is not None and plan.weight_bytes > (limit := parse_size(memory)):
        raise MoecError(
            f"the weights need {plan.weight_bytes} bytes, more than --memory {memory} ({limit} bytes): choose a smaller --recipe"
        )
    return plan


def _write(
    out: Path,
    checkpoint: Path | None,
    model: Model,
    lowered: Backend,
    shards: list[Shard],
    history: dict[str, Any],
    target: Target,
    backend: str,
    resume: bool,
    plan: Plan,
    progress: Progress,
    place: AbstractContextManager[Any],
) -> None:
    started = time.time()
    _require_space(out, sum(s.nbytes for s in shards))
    writer = ArtifactWriter(out, _fingerprint(model.graph, checkpoint, shards, history, backend), resume and checkpoint is not None)
    try:

        def arrays(name: str) -> Iterator[tuple[int | None, Mapping[str, np.ndarray]]]:
            param = lowered.graph.params[name]
            experts = range(int(param.type.shape[0])) if lowered.stacked(param) else (None,)
            for expert in experts:
                yield expert, lowered.store(param, pack(model.weights, param, expert), expert)

        with place:  # what was not quantised yet is now
            for shard in progress.track(shards, "weights"):
                writer.write_shard(shard, arrays)
        with progress.step("code"):
            locations = {key: location for shard in shards for key, (_, location) in shard.arrays.items()}
            executor = lowered.build(writer.folder, locations)
        for line in executor.get("notes", ()):  # such as which kernels were measured, and which are a guess
            progress.note(line)
        writer.write_text("graph.txt", print_graph(model.graph))
        for name, content in tokenizer_files(checkpoint).items() if checkpoint else ():
            writer.write_bytes(name, content)
        if checkpoint:  # what `moec export` needs to write a checkpoint again
            writer.write_bytes("checkpoint/config.json", (checkpoint / "config.json").read_bytes())
        writer.commit(_manifest(model.graph, history, target, backend, executor, shards, plan, time.time() - started))
    except MoecError:
        shutil.rmtree(writer.folder, ignore_errors=True)  # what failed once would fail again: only a killed run is resumed
        raise


def _require_space(out: Path, needed: int) -> None:
    folder = next(p for p in out.absolute().parents if p.exists())
    part = out.with_name(out.name + ".part")
    needed -= sum(p.stat().st_size for p in part.rglob("*") if p.is_file())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise MoecError(f"disk full: {out} needs {needed} more bytes and {folder} has {free}: free some space or write elsewhere")


def _fingerprint(graph: Graph, checkpoint: Path | None, shards: list[Shard], history: dict[str, Any], backend: str) -> str:
    digest = hashlib.sha256()
    for part in (moec.__version__, print_graph(graph), backend, json.dumps(history), _files_of(checkpoint)):
        digest.update(part.encode() + b"\0")
    for shard in shards:
        digest.update(shard.header)
    return digest.hexdigest()


def _files_of(checkpoint: Path | None) -> str:
    """What tells a checkpoint's files from changed ones without reading them."""
    files = sorted(p for p in checkpoint.iterdir() if p.suffix in (".safetensors", ".json")) if checkpoint else []
    return "\n".join(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)


def _manifest(
    graph: Graph,
    history: dict[str, Any],
    target: Target,
    backend: str,
    executor: dict[str, Any],
    shards: list[Shard],
    plan: Plan,
    seconds: float,
) -> dict[str, Any]:
    eos = graph.meta.get("eos_token_id")
    model = {
        "name": graph.name,
        **graph.meta,
        "eos_token_ids": [] if eos is None else list(eos) if isinstance(eos, tuple) else [eos],
    }
    return {
        "format": "moec",
        "format_version": 1,
        "requires": [],
        "moec_version": moec.__version__,
        "model": model,
        "backend": backend,
        "target": asdict(target),
        "executor": executor,
        **history,
        "sizes": {
            "weight_bytes": plan.weight_bytes,
            "bytes_per_token": plan.bytes_per_token,
            "cache_bytes_per_token": plan.cache_bytes_per_token,
            "parameters": plan.parameters,
            "active_parameters": plan.active_parameters,
            "compile_seconds": round(seconds, 1),
        },
        "weights": weight_table(shards, graph.params),
    }
