"""What `moec inspect` says about a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.compiler.calibration.collect import collect, load_or_collect, model_fingerprint
from moec.compiler.calibration.locality import Use, expert_use
from moec.compiler.calibration.statistics import Statistics, load_statistics
from moec.compiler.calibration.text import Files, calibration_text
from moec.compiler.device import on_device
from moec.compiler.draw import page
from moec.compiler.errors import MoecError
from moec.compiler.frontend import huggingface
from moec.compiler.heatmap import use_section
from moec.compiler.layers import need_layers
from moec.compiler.model import Model
from moec.compiler.plan import make_plan
from moec.compiler.progress import Progress
from moec.compiler.recipe import NOTHING
from moec.compiler.text import print_graph
from moec.targets import get_target


@dataclass(frozen=True)
class Inspection:
    """A summary as data, and the use of experts where it was asked for."""

    summary: dict[str, Any]
    uses: tuple[Use, ...] = ()


def inspect_checkpoint(
    model: str | Path,
    *,
    graph: bool = False,
    stats: bool = False,
    locality: bool = False,
    html: str | Path | None = None,
    calibration: Files | None = None,
    calibration_tokens: int = 1 << 16,
    statistics: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """A summary of a checkpoint, from its configuration and (where there are any) its weights' headers.

    Args:
        model: a checkpoint folder or a hub name in the local cache.
        graph: add the graph's text.
        stats: add how the experts are used on calibration text.
        locality: add how experts repeat from token to token (SRP and SCH); implies `stats`.
        html: a file to draw the graph, and the use of experts, into.
        calibration, calibration_tokens, seed: the text, as in `compile_model`.
        device: what text runs through the model on, as in `compile_model`.
        statistics: a file that keeps what was measured; enough without text if it is there.

    Raises:
        MoecError: no such model or text, statistics of another model, or `stats` without either.
    """
    place = on_device(device)
    folder = huggingface.resolve(model)
    loaded = Model(*huggingface.load(folder))
    plan = make_plan(loaded.graph, NOTHING, get_target("cpu"), None)
    uses, domains = list[Use](), tuple[str, ...]()
    if stats or locality:
        file = Path(statistics) if statistics is not None else None
        with place:
            measured = _statistics(loaded, folder, calibration, calibration_tokens, seed, file, progress or Progress())
            uses, domains = expert_use(measured, locality=locality), measured.domains
    if html is not None:
        try:
            Path(html).write_text(page(loaded.graph, plan, use_section(uses, domains) if uses else ""))
        except OSError as error:
            raise MoecError(f"cannot write {html}: {error.strerror}") from error
    summary = {"model": {"name": loaded.graph.name, **loaded.graph.meta}, **plan.to_json()}
    if uses:
        summary["use"] = {"domains": list(domains), "layers": [use.to_json() for use in uses]}
    return Inspection({**summary, "graph": print_graph(loaded.graph)} if graph else summary, tuple(uses))


def _statistics(
    model: Model, folder: Path, calibration: Files | None, tokens: int, seed: int, file: Path | None, progress: Progress
) -> Statistics:
    need_layers(model.graph, "inspect --stats")
    if calibration is not None:
        text = calibration_text(calibration, folder, model, tokens, seed)
        return collect(model, text, progress) if file is None else load_or_collect(model, text, file, progress)
    if file is None or not file.is_file():
        missing = f"there is no {file}" if file is not None else "found neither"
        raise MoecError(f"inspect --stats needs --calibration FILE, or --statistics of an earlier run ({missing})")
    found = load_statistics(file)
    if found.model_fingerprint != model_fingerprint(model):
        raise MoecError(f"{file}: these statistics are of another model: calibrate {folder} with --calibration FILE")
    return found
