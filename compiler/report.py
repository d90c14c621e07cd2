"""What `compare` found, as data, as a table and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec.compiler.damage import Distance
from moec.compiler.errors import MoecError

POOLED = "pooled"
"""The name of all texts taken together."""


@dataclass(frozen=True)
class Run:
    """One recipe with one seed: what it weighs and how far it is from the reference, by text and pooled."""

    seed: int
    random: bool
    weight_bytes: int
    parameters: int
    expert_bytes: int
    expert_parameters: int
    bytes_per_token: int
    seconds: float
    data: Mapping[str, Distance]
    journal: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "data": {name: d.to_json() for name, d in self.data.items()}}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Run:
        """What `to_json` made."""
        fields = {k: v for k, v in value.items() if k in Run.__dataclass_fields__}
        data = {n: Distance(**{k: v for k, v in d.items() if k != "perplexity"}) for n, d in value["data"].items()}
        return Run(**{**fields, "data": data})


@dataclass(frozen=True)
class Row:
    """One model with one recipe: its runs, one a seed, or the error."""

    model: str
    recipe: str
    description: str = ""
    source: str = ""
    runs: tuple[Run, ...] = ()
    error: str = ""

    def mean(self, figure: Callable[[Run], float]) -> float:
        """The mean over seeds."""
        return statistics.fmean(map(figure, self.runs))

    def deviation(self, figure: Callable[[Run], float]) -> float | None:
        """The sample standard deviation over seeds; None for a single run."""
        return statistics.stdev(map(figure, self.runs)) if len(self.runs) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Means over seeds, with `_std` beside each where there are several."""
        head = {"model": self.model, "recipe": self.recipe, "description": self.description, "source": self.source}
        if self.error:
            return {**head, "error": self.error}
        sizes: dict[str, Callable[[Run], float]] = {
            "weight_bytes": lambda r: r.weight_bytes,
            "expert_bytes": lambda r: r.expert_bytes,
            "parameters": lambda r: r.parameters,
            "bytes_per_token": lambda r: r.bytes_per_token,
            "bits_per_weight": bits_per_weight,
            "expert_bits": expert_bits,
            "seconds": lambda r: r.seconds,
        }
        names = ("perplexity", "nll", "kl_divergence", "top1_agreement")
        data = {
            text: {"tokens": distance.tokens, **self._figures({n: _on(text, n) for n in names})}
            for text, distance in self.runs[0].data.items()
        }
        return {**head, "seeds": len(self.runs), **self._figures(sizes), "data": data}

    def _figures(self, figures: Mapping[str, Callable[[Run], float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, figure in figures.items():
            found[name] = self.mean(figure)
            if (spread := self.deviation(figure)) is not None:
                found[f"{name}_std"] = spread
        return found


def bits_per_weight(run: Run) -> float:
    """Bits of a weight on average, scales and zero points included."""
    return 8 * run.weight_bytes / max(1, run.parameters)


def expert_bits(run: Run) -> float:
    """Bits of an expert's weight on average, scales and zero points included."""
    return 8 * run.expert_bytes / max(1, run.expert_parameters)


def _on(text: str, name: str) -> Callable[[Run], float]:
    def figure(run: Run) -> float:
        return float(getattr(run.data[text], name))

    return figure


kl_divergence, perplexity = _on(POOLED, "kl_divergence"), _on(POOLED, "perplexity")


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, the unchanged model first for each model."""

    rows: tuple[Row, ...]
    texts: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether a row has an error."""
        return any(row.error for row in self.rows)

    def on_front(self, row: Row) -> bool:
        """Whether no other row of the model is both smaller (or equal) and closer to the reference (or equal), and better in one."""
        if row.error:
            return False
        size, kl = row.mean(_bytes), row.mean(kl_divergence)
        others = [(r.mean(_bytes), r.mean(kl_divergence)) for r in self.rows if r.model == row.model and not r.error]
        return not any(s <= size and k <= kl and (s, k) != (size, kl) for s, k in others)

    def to_json(self) -> dict[str, Any]:
        return {"texts": list(self.texts), "rows": [{**row.to_json(), "pareto": self.on_front(row)} for row in self.rows]}

    def table(self) -> str:
        """A Markdown table: figures on all texts pooled, then the perplexity and KL divergence of each text where there are several."""
        each = self.texts if len(self.texts) > 1 else ()
        head = ["model", "recipe", "bytes", "of which experts", "size", "bits a weight", "bits of experts", "perplexity", "KL", "top-1"]
        head += [f"{name}: {figure}" for name in each for figure in ("perplexity", "KL")]
        lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
        for row in self.rows:
            name = f"**{row.recipe}**" if self.on_front(row) else row.recipe
            if row.error:
                lines.append([row.model, name, f"error: {row.error}".replace("|", "/"), *[""] * (len(head) - 3)])
                continue
            whole = next((r.mean(_bytes) for r in self.rows if r.model == row.model and not r.error), 1.0)
            cells = [
                row.model,
                name,
                f"{row.mean(_bytes):,.0f}",
                f"{row.mean(lambda r: r.expert_bytes):,.0f}",
                f"{row.mean(_bytes) / whole:.3f}",
            ]
            cells += [f"{row.mean(bits_per_weight):.2f}", f"{row.mean(expert_bits):.2f}"]
            cells += [_cell(row, perplexity, 3), _cell(row, kl_divergence, 4), _cell(row, _on(POOLED, "top1_agreement"), 4)]
            for text in each:
                cells += [_cell(row, _on(text, "perplexity"), 3), _cell(row, _on(text, "kl_divergence"), 4)]
            lines.append(cells)
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"{body}\n\n**Bold**: on the Pareto front of bytes and KL divergence. KL in nats a token; ± is the deviation over seeds.\n"

    def plot(self, file: str | Path) -> None:
        """Draw bytes against KL divergence and perplexity into an SVG, PNG or PDF file.

        Raises:
            MoecError: matplotlib is not installed, or the file cannot be written.
        """
        axes, figure = canvas(file)
        for number, model in enumerate(dict.fromkeys(row.model for row in self.rows)):
            rows = [row for row in self.rows if row.model == model and not row.error]
            _draw(axes[0], [r for r in rows if r.mean(kl_divergence) > 0], kl_divergence, self, f"C{number}", model)
            _draw(axes[1], rows, perplexity, self, f"C{number}", model)
        axes[0].set_ylabel("KL divergence, nats a token")
        axes[1].set_ylabel("perplexity")
        for axis in axes:
            axis.set_xlabel("weights, MB")
            axis.set_yscale("log")
            axis.margins(x=0.12)  # room for the names of the rightmost points
            axis.grid(alpha=0.3, which="both")
        for ticks in (axes[1].yaxis.set_major_formatter, axes[1].yaxis.set_minor_formatter):
            ticks("{x:g}")
        axes[1].legend()
        try:
            figure.savefig(file)
        except OSError as error:
            raise MoecError(f"cannot write {file}: {error.strerror or error}") from error


def _bytes(run: Run) -> float:
    return run.weight_bytes


def _cell(row: Row, figure: Callable[[Run], float], digits: int) -> str:
    spread = row.deviation(figure)
    return f"{row.mean(figure):.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def canvas(file: str | Path) -> tuple[Any, Any]:
    """Two empty axes and their figure, for a file of this name.

    Raises:
        MoecError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MoecError(f"a plot needs the package {error.name}: pip install 'moec[report]', or leave --plot out") from error
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    if Path(file).suffix.removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise MoecError(f"--plot {file}: expected a name that ends in .svg, .png or .pdf")
    return figure.subplots(1, 2), figure


def _draw(axis: Any, rows: Sequence[Row], figure: Callable[[Run], float], found: Comparison, colour: str, label: str) -> None:
    points = [(row.mean(_bytes) / 1e6, row.mean(figure), row.deviation(figure) or 0.0) for row in rows]
    axis.errorbar(
        [p[0] for p in points], [p[1] for p in points], yerr=[min(p[2], 0.999 * p[1]) for p in points],
        fmt="o", color=colour, label=label, markersize=4, capsize=2,
    )  # fmt: skip
    front = sorted(p for p, row in zip(points, rows, strict=True) if found.on_front(row))
    axis.plot([p[0] for p in front], [p[1] for p in front], color=colour, alpha=0.6, linewidth=1)
    for (x, y, _), row in zip(points, rows, strict=True):
        if math.isfinite(y):
            axis.annotate(row.recipe, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
