"""`compare`: models times recipes, measured on the same texts: bytes against perplexity and KL divergence.

Each recipe's result is evaluated in the interpreter with the values that an artifact would hold; nothing is lowered. The unchanged model
(`none`) is always the first row of a model and the reference of the others. A recipe whose result depends on the seed is repeated.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import moec
from moec.compiler.calibration.text import Files, calibration_text
from moec.compiler.context import Context
from moec.compiler.device import on_device
from moec.compiler.errors import MoecError
from moec.compiler.evaluate import read_windows, window_length
from moec.compiler.frontend import huggingface
from moec.compiler.frontend.tokenizer import load_tokenizer
from moec.compiler.model import Model
from moec.compiler.passes import run_passes
from moec.compiler.plan import make_plan
from moec.compiler.progress import Progress
from moec.compiler.recipe import NOTHING, Recipe, load_recipe
from moec.compiler.reference import Reference, pooled
from moec.compiler.report import Comparison, Row, Run
from moec.compiler.stored import as_stored
from moec.targets import get_target

MAX_TOKENS = 1 << 15
"""Tokens of each text that are evaluated unless said otherwise."""


def compare(
    models: str | Path | Sequence[str | Path],
    recipes: Sequence[str | Path],
    data: Files,
    *,
    calibration: Files | None = None,
    calibration_tokens: int = 1 << 16,
    seeds: int = 1,
    max_tokens: int | None = MAX_TOKENS,
    context: int | None = None,
    max_kl: float | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure recipes against each other.

    Args:
        models: checkpoint folders or hub names.
        recipes: files or names; of a folder, its *.yaml files.
        data: texts to evaluate on; of a folder, its *.txt files.
        calibration: texts for passes that look at what the model does. Keep them apart from `data`.
        calibration_tokens: about how many tokens of them to use.
        seeds: how often to repeat a recipe whose passes read the seed, or calibration text whose sample depends on the seed.
        max_tokens: of each text, about this many tokens from its beginning; None for all of it.
        context: tokens of a window; by default 512, or the model's context where that is shorter.
        max_kl: the most damage that passes which search may do, in nats a token on held-out calibration text.
        device: what the interpreter and passes compute on, as in `compile_model`.
        output: a folder that keeps finished measurements: the same call again goes on where an interrupted one ended.

    Returns:
        A row for each model and recipe. A recipe that fails has its error there.

    Raises:
        MoecError: no such model or text, or a text is too short.
    """
    progress, place = progress or Progress(), on_device(device)
    checkpoints = [huggingface.resolve(m) for m in ([models] if isinstance(models, (str, Path)) else models)]
    texts = _listed([data] if isinstance(data, (str, Path)) else data, (".txt",))
    chosen = [_load(r) for r in _listed(recipes, (".yaml", ".yml"))]
    if not checkpoints or not texts:
        raise MoecError("compare needs at least one model and one text: add --data FILE")
    names = dict(zip(texts, _short_names(texts), strict=True))
    rows: list[Row] = []
    with _folder(output) as folder:
        for checkpoint, name in zip(checkpoints, _short_names(checkpoints), strict=True):
            bench = _Bench(checkpoint, name, names, folder, progress, context, max_tokens, calibration, calibration_tokens, max_kl)
            for index, (recipe, error) in enumerate(plan := [(NOTHING, ""), *((r, e) for r, e in chosen if r.steps or e)]):
                title = f"{name}, {recipe.name} ({index + 1} of {len(plan)})"
                with place:
                    rows.append(bench.row(recipe, seeds, title) if not error else Row(name, recipe.name, error=error))
        return Comparison(tuple(rows), tuple(names.values()))


def _listed(paths: Sequence[str | Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Files as they are, folders as their files of a kind."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.suffix in suffixes) if path.is_dir() else [path]
        if not inside:
            raise MoecError(f"{path}: the folder has no *{suffixes[0]} file")
        found += inside
    return list(dict.fromkeys(found))


def _load(recipe: Path) -> tuple[Recipe, str]:
    """A recipe, or its name and what is wrong with it."""
    try:
        return NOTHING if str(recipe) == NOTHING.name else load_recipe(recipe), ""
    except MoecError as error:
        return Recipe(recipe.stem, "", (), ()), str(error)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole of it where that is not its alone."""
    stems = [p.stem if p.suffix == ".txt" else p.absolute().name for p in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


@contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory(prefix="moec-compare-") as folder:
            yield Path(folder)
    else:
        Path(output).mkdir(parents=True, exist_ok=True)
        yield Path(output)


class _Surroundings(Context):
    """A context that remembers what was read of it."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("seed", "text", "_statistics"):
            object.__getattribute__(self, "__dict__").setdefault("read", set()).add(name)
        return super().__getattribute__(name)

    def renewed(self) -> None:
        """Forget what passes did and read, and every model but the reference."""
        self.journal = []
        self._statistics = {k: v for k, v in self._statistics.items() if v[0] is self.reference}
        vars(self)["read"] = set()


@cache
def _code() -> str:
    """A digest of the code that decides results, so that a changed pass is measured anew."""
    digest = hashlib.sha256(moec.__version__.encode())
    root = Path(__file__).parent
    for path in sorted([*root.rglob("*.py"), *(root.parent / "passes").rglob("*.py")]):
        if not {"cli", "backends"}.intersection(path.relative_to(root.parent).parts):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass
class _Bench:
    """One model on all texts."""

    checkpoint: Path
    name: str
    texts: dict[Path, str]
    folder: Path
    progress: Progress
    context: int | None
    max_tokens: int | None
    calibration: Files | None
    calibration_tokens: int
    max_kl: float | None
    references: dict[str, Reference] = field(default_factory=dict)
    contexts: dict[int, _Surroundings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = Model(*huggingface.load(self.checkpoint))
        length = window_length(self.context, int(self.model.graph.meta["context_length"]))
        tokenizer = load_tokenizer(self.checkpoint)
        self.windows = {name: read_windows(path, tokenizer, length, self.max_tokens) for path, name in self.texts.items()}
        digest = hashlib.sha256(self.model.digest().encode())
        for path in sorted(p for p in self.checkpoint.iterdir() if p.suffix in (".safetensors", ".json")):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
        self.digest = digest.hexdigest()

    def row(self, recipe: Recipe, seeds: int, title: str) -> Row:
        """One recipe, with as many seeds as make a difference."""
        runs: list[Run] = []
        try:
            for seed in range(seeds):
                if not runs or runs[0].random:
                    runs.append(self._run(recipe, seed, f"{title}, seed {seed}" if runs else title))
        except MoecError as error:
            return Row(self.name, recipe.name, recipe.description, recipe.source, error=str(error))
        except Exception as error:  # noqa: BLE001  # a broken method must not cost the others their results
            return Row(self.name, recipe.name, recipe.description, recipe.source, error=f"{type(error).__name__}: {error}")
        return Row(self.name, recipe.name, recipe.description, recipe.source, tuple(runs))

    def _run(self, recipe: Recipe, seed: int, title: str) -> Run:
        context = self._surroundings(seed)
        text = context.text.fingerprint() if context.text else None
        data = {name: hashlib.sha256(ids.numpy().tobytes()).hexdigest() for name, (ids, _) in self.windows.items()}
        key = json.dumps([_code(), self.digest, recipe.steps, seed, text, data, self.max_kl, self.context], default=str)
        file = self.folder / "runs" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        if file.is_file():
            return Run.from_json(json.loads(file.read_text()))
        with self.progress.step(title):
            started = time.monotonic()
            context.renewed()
            compiled = run_passes(self.model, recipe.passes, context)
            random, seconds = self._random(context, seed), time.monotonic() - started
            plan = make_plan(compiled.graph, recipe, get_target("cpu"), None)
            stored = as_stored(compiled)
            found = {name: self._reference(name, data[name])(stored, self.progress, f"evaluate on {name}") for name in self.windows}
            experts = [row for row in plan.rows if row.role == "experts"]
            run = Run(
                seed, random, plan.weight_bytes, plan.parameters, sum(r.bytes for r in experts), sum(r.parameters for r in experts),
                plan.bytes_per_token, round(seconds, 2), {**found, "pooled": pooled(list(found.values()))}, context.journal,
            )  # fmt: skip
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps({"model": self.name, "recipe": recipe.name, **run.to_json()}, indent=1, default=str))
        part.replace(file)
        return run

    def _reference(self, name: str, digest: str) -> Reference:
        if name not in self.references:
            file = self.folder / "references" / f"{hashlib.sha256((self.digest + digest).encode()).hexdigest()[:24]}.f32"
            self.references[name] = Reference(self.model, *self.windows[name], file, self.progress, f"reference on {name}")
        return self.references[name]

    def _surroundings(self, seed: int) -> _Surroundings:
        if seed not in self.contexts:
            text = None
            if self.calibration is not None:
                text = calibration_text(self.calibration, self.checkpoint, self.model, self.calibration_tokens, seed)
            file = self.folder / f"statistics-{self.digest[:16]}-{text.fingerprint()[:16]}.safetensors" if text else None
            self.contexts[seed] = _Surroundings(
                text, self.model, get_target("cpu"), self.max_kl, seed, self.folder / "work", file, self.progress
            )
        return self.contexts[seed]

    def _random(self, context: _Surroundings, seed: int) -> bool:
        """Whether the seed can have made a difference: it was read, or text was whose sample depends on it."""
        read = set(vars(context)["read"])
        if "seed" in read:
            return True
        if not read or context.text is None:
            return False
        other = self._surroundings(seed + 1).text
        return other is not None and other.fingerprint() != context.text.fingerprint()
