"""What passes may need besides the model: calibration text, statistics of it, a measure of damage, the target, a seed.

Everything expensive is made when it is first asked for and kept: the statistics of a model, the reference's logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec.compiler.calibration.statistics import Statistics
from moec.compiler.calibration.text import Text
from moec.compiler.damage import Damage, Distance
from moec.compiler.errors import MoecError
from moec.compiler.model import Model
from moec.compiler.progress import Progress
from moec.targets import Target


@dataclass
class Context:
    """The surroundings of a run of passes.

    Args:
        text: windows of calibration tokens; None where no text was given.
        reference: the model before any pass, which damage is measured against.
        target: the hardware, for what its kernels like.
        max_kl: the most damage that a pass may do, in nats a token on the held-out part of the text.
        seed: of everything that is random.
        work: a folder for what long work keeps to resume from; None keeps nothing.
        statistics_file: statistics of `reference` measured earlier.
        journal: what passes did, in order, as data; the artifact records it.
    """

    text: Text | None = None
    reference: Model | None = None
    target: Target | None = None
    max_kl: float | None = None
    seed: int = 0
    work: Path | None = None
    statistics_file: Path | None = None
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))
    journal: list[dict[str, Any]] = field(default_factory=list)
    _statistics: dict[int, tuple[Model, Statistics]] = field(default_factory=dict)
    _damage: Damage | None = None

    def need_text(self, what: str) -> Text:
        """The calibration text.

        Raises:
            MoecError: none was given; the message says what needs it.
        """
        if self.text is None:
            raise MoecError(f"{what} needs calibration text: add --calibration FILE")
        return self.text

    def statistics(self, model: Model, what: str) -> Statistics:
        """What the experts of a model do on the calibration text.

        Args:
            what: who asks, for the error where there is no text.

        Raises:
            MoecError: no text was given, or the statistics file is of another model or text.
        """
        if (found := self._statistics.get(id(model))) is not None:
            return found[1]
        from moec.compiler.calibration.collect import collect, load_or_collect

        text = self.need_text(what)
        if model is self.reference and self.statistics_file is not None:
            measured = load_or_collect(model, text, self.statistics_file, self.progress)
        else:
            measured = collect(model, text, self.progress)
        self._statistics[id(model)] = (model, measured)
        return measured

    def damage(self, model: Model, what: str) -> Distance:
        """How far a model is from the reference on the held-out part of the calibration text.

        Raises:
            MoecError: there is no text or no reference.
        """
        if self._damage is None:
            text = self.need_text(what)
            if self.reference is None:
                raise MoecError(f"{what} needs the model before the passes to compare with")
            self._damage = Damage(self.reference, text.heldout)
        return self._damage(model)

    def note(self, what: str, **facts: Any) -> None:
        """Record what a pass did."""
        self.journal.append({"pass": what, **facts})
