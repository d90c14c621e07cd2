"""Executors: what runs an artifact's code, one file a backend (`manifest["backend"]` is the file's name).

Each file has

    def load_executor(artifact: Artifact, threads: int | None, max_sequences: int) -> Executor

which reads its section `artifact.executor`, takes files by `artifact.path(name)` (their digests are checked by then) and weights from
`artifact.weights[param, component]` (read-only, memory-mapped; valid until the artifact is closed).
"""

from __future__ import annotations

import importlib
import pkgutil

from moec.runtime.artifact import Artifact
from moec.runtime.errors import MoecError, unknown
from moec.runtime.executor import Executor
from moec.runtime.host import check_features
from moec.runtime.onnx_gpu import PACKAGE


def load_executor(artifact: Artifact, threads: int | None, max_sequences: int) -> Executor:
    """The executor of an artifact's backend.

    Raises:
        MoecError: this version has no such backend, a package that it needs is not installed, or this processor cannot run the code.
    """
    backend = artifact.manifest.backend
    if backend not in (names := [module.name for module in pkgutil.iter_modules(__path__)]):
        raise unknown("backend", backend, names)
    if any(name.endswith(".so") for name in artifact.manifest.files):
        check_features(_features(artifact), str(artifact.folder))
    try:
        module = importlib.import_module(f"{__name__}.{backend}")
        executor: Executor = module.load_executor(artifact, threads, max_sequences)
    except ModuleNotFoundError as error:
        extra = f"'moec[{backend}]'" if backend == "onnx" else "moec"
        if error.name == "onnxruntime" and "provider" in artifact.executor:
            extra = f"'{PACKAGE}', as it was compiled for a GPU"
        raise MoecError(f"{artifact.folder}: running it needs the package {error.name}: pip install {extra}") from error
    return executor


def _features(artifact: Artifact) -> list[str]:
    """The instruction sets that native code of an artifact needs: those of its target."""
    target = artifact.manifest.target
    features = target.get("features") or []
    if target.get("kind") != "cpu" or not isinstance(features, list):
        return []
    return [str(feature) for feature in features]
