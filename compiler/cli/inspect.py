"""`moec inspect`: what is in an artifact or a checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from moec.compiler.cli.common import JsonOption, format_size, import_extra, print_json
from moec.runtime.artifact import open_artifact
from moec.runtime.manifest import MANIFEST, Manifest


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL|ARTIFACT", help="A checkpoint or an artifact.")],
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph of a checkpoint.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Add how often each expert is chosen.")] = False,
    locality: Annotated[bool, typer.Option("--locality", help="Add how experts repeat from token to token.")] = False,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page as well.")] = None,
    json: JsonOption = False,
) -> None:
    """Say what an artifact or a checkpoint holds."""
    if not (Path(model) / MANIFEST).is_file():
        inspection = import_extra("moec.compiler.inspection", "compile")
        found = inspection.inspect_checkpoint(model, graph=graph, stats=stats, locality=locality, html=html)
        if json:
            print_json(found)
        elif graph:
            print(found["graph"], end="")
        else:
            for name, value in found.items():
                print(f"{name}: {value}")
        return
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
    for step in summary["recipe"]:
        print(f"recipe: {step}")
    for name, value in (summary["quality"] or {}).items():
        print(f"quality: {name} {value}")


def summarize(manifest: Manifest) -> dict[str, Any]:
    """What `moec inspect --json` prints about an artifact."""
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
        **{key: manifest.raw.get(key) for key in ("moec_version", "format_version", "backend", "quality", "sizes")},
        "model": manifest.model,
        "target": manifest.target,
        "recipe": manifest.raw.get("recipe") or [],
        "weight_bytes": manifest.weight_bytes,
        "file_bytes": sum(entry.size for entry in manifest.files.values()),
        "parameters": parameters.total(),
        "formats": {name: {"tensors": tensors[name], "parameters": parameters[name]} for name in sorted(tensors)},
        "files": {name: entry.size for name, entry in manifest.files.items()},
    }
