"""Which kernels an experts layer runs on a target, and with which options: what measured records say, or a default. Each choice says why.

A record of the same layer decides; where T was not measured, its nearest T does. Without one, the record of the most alike layer lends its
options, if they fit here (the same layer with other activations is an octave away); without that, options are defaults. Results that are
off by more than `Layer.most_error` are not chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, log2
from pathlib import Path

from moec.runtime.errors import MoecError
from moec.targets import Target
from moec.targets.kernels.cuda.expected import cost
from moec.targets.kernels.cuda.experts_layer import Layer, bits
from moec.targets.kernels.cuda.family import FAMILY, fingerprint
from moec.targets.kernels.cuda.space import MOST_DECODE, Options, default, fits, has_many, limits
from moec.targets.measured import Measurement, Record, read_records

FAR = 2.0
"""Octaves in T beyond which the kernels of many tokens are not chosen by a measurement."""

ALIKE = 4.0
"""Octaves in all the sizes of two layers together, within which options are lent."""


@dataclass(frozen=True)
class Choice:
    """What runs.

    Args:
        kernel: `decode`, the two kernels of a few tokens, or `prefill`, the four of many.
        options: of `DecodeSpec` or of `Shape`.
        us: microseconds, if this was measured for this T; those of two kernels alone are added up.
        why: where the options are from.
        measured: whether they are from a record of this layer.
    """

    kernel: str
    options: Options
    us: float | None
    why: str
    measured: bool


def choose(target: Target, layer: Layer, tokens: int, folders: Sequence[Path] | None = None, tvm: str | None = None) -> Choice:
    """What runs for T tokens of a layer.

    Args:
        target: the GPU.
        tokens: T.
        folders: of records; see `read_records`.
        tvm: the version that compiles; a record of another is used, and the choice says so.

    Raises:
        MoecError: the target has no kernels for so many tokens.
    """
    return _Chooser.of(target, layer, folders, tvm).choose(tokens)


def dispatch(
    target: Target, layer: Layer, most: int = 8192, folders: Sequence[Path] | None = None, tvm: str | None = None
) -> list[tuple[int | None, Choice]]:
    """(upper bound of T, what runs up to there): each T up to `MOST_DECODE`, then ranges; the last has no bound.

    Ranges end half between powers of 2. There are none on a target without the kernels of many tokens.

    Raises:
        MoecError: the target has no kernels for the layer.
    """
    chooser = _Chooser.of(target, layer, folders, tvm)
    found: list[tuple[int | None, Choice]] = [(tokens, chooser.choose(tokens)) for tokens in range(1, MOST_DECODE + 1)]
    if not chooser.many:
        return found
    tokens = 2 * MOST_DECODE
    while tokens <= most:
        choice = chooser.choose(tokens)
        if found[-1][0] != MOST_DECODE and found[-1][1].options == choice.options:
            found.pop()
        found.append((tokens * 3 // 2, choice))
        tokens *= 2
    return [*found[:-1], (None, found[-1][1])]


def takes_few(target: Target, layer: Layer, tokens: int) -> bool:
    """Whether the kernels of a few tokens can run T tokens of a layer."""
    return _Chooser.of(target, layer, (), None).few(tokens)


@dataclass(frozen=True)
class _Chooser:
    """What choices for a layer depend on."""

    target: str
    many: bool
    limit: int
    size: int
    clusters: bool
    layer: Layer
    records: Sequence[tuple[Layer, Record]]
    tvm: str | None

    @classmethod
    def of(cls, target: Target, layer: Layer, folders: Sequence[Path] | None, tvm: str | None) -> _Chooser:
        found = [record for record in read_records(target.name, folders) if record.operator == "experts"]
        known = [(Layer.from_json(record.layer), record) for record in found]
        return cls(target.name, has_many(target), *limits(target), layer, known, tvm)

    def few(self, tokens: int) -> bool:
        """Whether the kernels of a few tokens can run so many: there may be too many, or rows that are too wide."""
        return 1 <= tokens <= MOST_DECODE and self.fits("gate_up", tokens, default("gate_up", self.layer, tokens, self.limit))

    def choose(self, tokens: int) -> Choice:
        if not self.few(tokens):
            if not self.many:
                what = f"{tokens} tokens of {self.layer.d} {self.layer.dtype}"
                raise MoecError(f"target {self.target}: no CUDA kernels for the experts of {what} at a time; pass fewer tokens")
            return self.one(tokens, "prefill")
        parts = [self.one(tokens, kernel) for kernel in ("gate_up", "down")]
        us = sum(part.us or inf for part in parts)
        options = {name: value for part in parts for name, value in part.options.items()}
        why = parts[0].why if parts[0].why == parts[1].why else f"gate_up {parts[0].why}; down {parts[1].why}"
        few = Choice("decode", options, None if us == inf else us, why, all(part.measured for part in parts))
        many = self.one(tokens, "prefill") if self.many else few
        return many if many.us is not None and few.us is not None and many.us < few.us else few

    def one(self, tokens: int, kernel: str) -> Choice:
        """The choice for one kernel."""
        for other, record in self.records:
            if other == self.layer and (best := self.best(record.measurements, kernel, tokens)) is not None:
                age, options = _age(record, kernel, self.tvm), self.suited(best)
                if best.tokens == tokens:
                    return Choice(kernel, options, best.us, f"measured on {record.device}{age}", measured=True)
                return Choice(kernel, options, None, f"measured on {record.device} for T = {best.tokens}{age}", measured=True)
        for distance, other, record in sorted(((_distance(self.layer, o), o, r) for o, r in self.records), key=lambda entry: entry[0]):
            if kernel == "prefill" and self.layer.narrow and other.dtype != self.layer.dtype:
                continue  # it knows nothing of kernels that only these activations have
            best = self.best(record.measurements, kernel, tokens) if distance <= ALIKE else None
            if best is not None and (other.dtype == self.layer.dtype or best == _fastest(other, record.measurements, best)):
                why = f"lent by {other.name}, T = {best.tokens}, measured on {record.device}{_age(record, kernel, self.tvm)}"
                return Choice(kernel, self.suited(best), None, why, measured=False)
        options = default(kernel, self.layer, tokens, self.limit, self.size, self.clusters)
        return Choice(kernel, options, None, f"default: nothing like it was measured on {self.target}", measured=False)

    def best(self, measurements: Iterable[Measurement], kernel: str, tokens: int) -> Measurement | None:
        """The fastest of the measured T nearest to this one, of what fits and is right."""
        usable = [
            m for m in measurements
            if m.kernel == kernel and (m.error is None or m.error < self.layer.most_error) and self.fits(kernel, tokens, self.suited(m))
        ]  # fmt: skip
        if not usable:
            return None
        nearest = min({m.tokens for m in usable}, key=lambda t: (abs(log2(t / max(tokens, 1))), t))
        if kernel == "prefill" and abs(log2(nearest / max(tokens, 1))) > FAR:  # tiles for quite another number of tokens
            return None
        return min((m for m in usable if m.tokens == nearest), key=lambda m: m.us)

    def suited(self, measurement: Measurement) -> Options:
        """Options with what follows from this layer's activations."""
        rest = {"terms": self.layer.terms} if measurement.kernel == "prefill" else {}
        return dict(measurement.options) | rest

    def fits(self, kernel: str, tokens: int, options: Options) -> bool:
        """Whether the target can run them."""
        return fits(kernel, self.layer, tokens, options, self.limit, self.clusters)


def _fastest(layer: Layer, measurements: Iterable[Measurement], like: Measurement) -> Measurement:
    """The fastest of a kernel and T, whether it could run here or not: what it gave is worth little where others were far better."""
    alike = (m for m in measurements if (m.kernel, m.tokens) == (like.kernel, like.tokens))
    same = (m for m in alike if m.error is None or m.error < layer.most_error)
    return min(same, key=lambda m: m.us)


def _distance(a: Layer, b: Layer) -> float:
    """How unlike two layers are: octaves between their sizes."""
    if a.gated != b.gated:
        return inf
    sizes = zip((a.experts, a.top_k, a.d, a.f, bits(a)), (b.experts, b.top_k, b.d, b.f, bits(b)), strict=True)
    return sum(abs(log2(x / y)) for x, y in sizes) + (a.dtype != b.dtype)


def _age(record: Record, kernel: str, tvm: str | None) -> str:
    """What is not as it was when the record was made."""
    family = FAMILY[kernel]
    notes = [] if record.kernels.get(family) == fingerprint(family) else ["an earlier version of the kernels"]
    notes += [] if tvm is None or tvm == record.tvm else [f"TVM {record.tvm}"]
    return f" with {' and '.join(notes)}" if notes else ""


def order(records: Iterable[Record], kernel: str, layer: Layer, tokens: int, options: Sequence[Options]) -> list[Options]:
    """Candidates, the most promising first.

    Those of many tokens are ordered by what they should cost, others by what they gave for other layers: the mean of time over the least
    time of its layer and T. What was never measured counts as half again as slow as the best, and keeps its order.
    """
    if kernel == "prefill":
        return sorted(options, key=lambda candidate: cost(layer.experts, layer.top_k, tokens, candidate))
    ratios: dict[tuple[tuple[str, int], ...], list[float]] = {}
    for record in records:
        groups: dict[int, list[Measurement]] = {}
        for m in record.measurements:
            if m.kernel == kernel:
                groups.setdefault(m.tokens, []).append(m)
        if groups:
            nearest = min(groups, key=lambda t: abs(log2(t / max(tokens, 1))))
            least = min(m.us for m in groups[nearest])
            for m in groups[nearest]:
                ratios.setdefault(m.options, []).append(m.us / least)

    def rank(candidate: Options) -> float:
        found = ratios.get(tuple(sorted(candidate.items())))
        return 1.5 if found is None else sum(found) / len(found)

    return sorted(options, key=rank)
