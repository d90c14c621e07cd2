"""`moec inspect`: what is in an artifact or a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moec.compiler.cli.common import DeviceOption, JsonOption, format_size, import_extra, print_json
from moec.runtime.artifact import open_artifact
from moec.runtime.errors import MoecError
from moec.runtime.manifest import MANIFEST, Manifest


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL|ARTIFACT", help="A checkpoint or an artifact.")],
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph of a checkpoint.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Add how often each expert is chosen.")] = False,
    locality: Annotated[bool, typer.Option("--locality", help="Add how experts repeat from token to token.")] = False,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page as well, with --stats heat maps of expert use.")] = None,
    calibration: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Text for --stats and --locality; repeatable.")] = None,
    calibration_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="About how many tokens of it.")] = 1 << 16,
    statistics: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keeps what was measured: read if it is there, written if not.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the choice of text.")] = 0,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Say what an artifact or a checkpoint holds, and with --stats what the experts of a checkpoint do."""
    if not (Path(model) / MANIFEST).is_file():
        inspection = import_extra("moec.compiler.inspection", "compile")
        found = inspection.inspect_checkpoint(
            model,
            graph=graph,
            stats=stats,
            locality=locality,
            html=html,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            statistics=statistics,
            seed=seed,
            device=device,
        )
        if json:
            print_json(found.summary)
        elif graph:
            print(found.summary["graph"], end="")
        else:
            _print_checkpoint(found)
        return
    if stats or locality:
        raise MoecError(f"{model}: --stats and --locality look at checkpoints; an artifact does not keep routing traces")
    with open_artifact(model) as artifact:
        summary = summarize(artifact.manifest)
    if json:
        print_json(summary)
        return
    print(f"{summary['model'].get('name')} ({summary['model'].get('model_type')}), compiled by moec {summary['moec_version']}")
    print(f"backend {summary['backend']}, target {summary['target'].get('name')}")
    print(f"vocabulary {summary['model']['vocab_size']}, context {summary['model']['context_length']}")
    print(f"weights {format_size(summary['weight_bytes'])} in {summary['parameters']:,} parameters", end="")
    print(f"; files {format_size(summary['file_bytes'])}")
    for name, entry in summary["formats"].items():
        print(f"  {name}: {entry['tensors']} tensors, {entry['parameters']:,} parameters")
    if (line := _cache(summary)) is not None:
        print(line)
    for step in summary["recipe"]:
        print(f"recipe: {step}")
    for line in _history(summary):
        print(line)


def _cache(summary: Mapping[str, Any]) -> str | None:
    """What keys and values take; older artifacts do not say how much, some nothing."""
    dtype, size = summary["cache_dtype"], summary["cache_bytes_per_token"]
    if not isinstance(dtype, str):
        return None
    return f"key/value cache in {dtype}" if not isinstance(size, int) else f"key/value cache {format_size(size)} a token in {dtype}"


def _history(summary: Mapping[str, Any]) -> Iterator[str]:
    """What was done to the model and what it cost; a manifest may say anything here, or less."""
    journal, text, quality = (summary[key] for key in ("journal", "calibration", "quality"))
    for note in journal if isinstance(journal, list) else ():
        yield "  did: " + (", ".join(f"{name} {value}" for name, value in note.items()) if isinstance(note, dict) else str(note))
    if isinstance(text, dict):
        domains = text.get("domains")
        yield f"calibrated on {text.get('tokens')} tokens of {', '.join(map(str, domains)) if isinstance(domains, list) else '?'}"
    if not isinstance(quality, dict):
        return
    parts = {
        "kl_divergence": "KL divergence {:.4f} nats a token",
        "top1_agreement": "same best token {:.2%}",
        "perplexity": "perplexity {:.3f}",
        "reference_nll": "{:.4f} nats a token before",
        "nll": "{:.4f} after",
        "tokens": "on {} held-out tokens",
    }
    known = [text.format(quality[name]) for name, text in parts.items() if isinstance(quality.get(name), (int, float))]
    yield "quality: " + ", ".join(known + [f"{name} {value}" for name, value in quality.items() if name not in parts])


def _print_checkpoint(found: Any) -> None:
    for name, value in found.summary.items():
        if name != "use":
            print(f"{name}: {value}")
    if not found.uses:
        return
    heatmap = import_extra("moec.compiler.heatmap", "compile")
    head = ["layer", "experts", "used", "entropy", "variation", "domains", "most used", "least used", "SRP", "SCH (cache in K: hit rate)"]
    rows = [head, *heatmap.use_table(found.uses)]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(head))]
    print(f"use of experts on {', '.join(found.summary['use']['domains'])}, {found.uses[0].tokens:,} tokens")
    for row in rows:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row[: len(rows[1])], widths, strict=False)).rstrip())


def summarize(manifest: Manifest) -> dict[str, Any]:
    """What `moec inspect --json` prints about an artifact."""
    sizes = manifest.raw.get("sizes")
    tensors: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for weight in manifest.weights.values():
        names = weight.format if isinstance(weight.format, tuple) else (weight.format,)
        count = 1
        for size in weight.shape:
            count *= size
        for name in names:  # a stacked weight counts one tensor an expert
            tensors[name] += 1
            parameters[name] += count // len(names)
    return {
        **{key: manifest.raw.get(key) for key in ("moec_version", "format_version", "backend", "quality", "calibration", "sizes")},
        "model": manifest.model,
        "target": manifest.target,
        "recipe": manifest.raw.get("recipe") or [],
        "journal": manifest.raw.get("journal") or [],
        "weight_bytes": manifest.weight_bytes,
        "cache_dtype": manifest.executor.get("cache_dtype"),
        "cache_bytes_per_token": sizes.get("cache_bytes_per_token") if isinstance(sizes, dict) else None,
        "file_bytes": sum(entry.size for entry in manifest.files.values()),
        "parameters": parameters.total(),
        "formats": {name: {"tensors": tensors[name], "parameters": parameters[name]} for name in sorted(tensors)},
        "files": {name: entry.size for name, entry in manifest.files.items()},
    }
