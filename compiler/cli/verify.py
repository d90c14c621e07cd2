"""`moec verify`: every byte of an artifact against its digests."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from moec.compiler.cli.common import ArtifactArgument, JsonOption, print_json
from moec.runtime.artifact import open_artifact
from moec.runtime.errors import MoecError
from moec.runtime.verify import find_problems


def command(artifact: ArtifactArgument, json: JsonOption = False) -> None:
    """Check every byte of an artifact, and that no file is there that does not belong."""
    folder = Path(artifact)
    problems = find_problems(folder)
    if json:
        print_json({"artifact": artifact, "ok": not problems, "problems": [asdict(problem) for problem in problems]})
    if problems:
        raise MoecError(f"{artifact}: " + "; ".join(map(str, problems)))
    with open_artifact(folder) as opened:  # headers, and what the manifest says about them
        if not json:
            print(f"{artifact}: {len(opened.manifest.files)} files match their digests")
