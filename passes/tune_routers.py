"""Train the routers of a compressed model, and what else is cheap to store, against the reference's own next-token distribution.

    param @layers.0.gate.weight: f32[E, D]      the same parameter, other values; nothing else changes

    loss = mean over calibration tokens of KL(reference || model), or of -log p(next token)

Quantised experts, and those that take the place of removed ones, differ from the ones that their router was trained with. GEMQ
(https://arxiv.org/abs/2605.23078) tunes the routers alone on the text's next tokens; the reference's distribution says more with each token
and asks for no text that the model was trained on, but of a model for one domain that domain's text is the better teacher. Norms and the
scales of quantised experts can be tuned with them: the artifact's size does not change. Runs after the passes that choose formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.calibration.text import Text
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.gradients import Tape
from moec.compiler.model import Model
from moec.compiler.tuning import KINDS, Trained, trained
from moec.runtime.errors import unknown

LOSSES = ("kl", "text")


@dataclass(frozen=True)
class TuneRouters:
    """Train routers by distillation; without steps nothing changes.

    The result is kept only if the loss has become less on the held-out part of the calibration text.

    Args:
        steps: steps of Adam (https://arxiv.org/abs/1412.6980).
        what: `router`, `norm`, `scale`: what is trained.
        loss: `kl` to the reference, or `text`: the negative log-likelihood of the next tokens.
        windows: windows of calibration text in a step.
        rate: the step size of routers and norms at the start; it falls to a tenth along a cosine.
        scale_rate: that of scales, as a share of a weight's mean scale.
    """

    steps: int = 0
    what: Sequence[str] = ("router",)
    loss: str = "kl"
    windows: int = 4
    rate: float = 1e-3
    scale_rate: float = 1e-2

    def __post_init__(self) -> None:
        for kind in self.what if not isinstance(self.what, str) else (self.what,):
            if kind not in KINDS:
                raise unknown("kind for tune_routers to train", kind, KINDS)
        if isinstance(self.what, str) or not self.what:
            raise MoecError(f"tune_routers: what={self.what!r}: expected a list of {', '.join(KINDS)}")
        if self.loss not in LOSSES:
            raise unknown("loss of tune_routers", self.loss, LOSSES)
        if self.steps < 0 or self.windows < 1 or self.rate <= 0 or self.scale_rate <= 0:
            raise MoecError("tune_routers: steps must be at least 0, windows at least 1, and the rates above 0")

    def run(self, model: Model, context: Context) -> Model:
        if not self.steps:
            return model
        text, reference = context.need_text("tune_routers"), context.reference
        if reference is None:
            raise MoecError("tune_routers needs the model before the passes to learn from")
        found = trained(model, self.what)
        if not found.leaves:
            raise MoecError(f"tune_routers: the model has nothing of the kinds {', '.join(self.what)} to train at this place in the recipe")
        before = context.damage(model, "tune_routers")
        losses = self._train(found, Tape(reference.graph, reference.weights, keep=True), text, context)
        result = found.result()
        after = context.damage(result, "tune_routers")
        better = after.nll < before.nll if self.loss == "text" else after.kl_divergence < before.kl_divergence
        context.note(
            "tune_routers", trained=list(self.what), steps=self.steps, first_loss=losses[0], last_loss=losses[-1],
            loss=self.loss, heldout_kl_before=before.kl_divergence, heldout_kl_after=after.kl_divergence, heldout_nll_before=before.nll,
            heldout_nll_after=after.nll, kept=better,
        )  # fmt: skip
        return result if better else model

    def _train(self, found: Trained, reference: Tape, text: Text, context: Context) -> list[float]:
        """Train in place; the loss of each step."""
        tape = Tape(found.model.graph, found.model.weights, found.leaves, keep=True)
        optimiser = torch.optim.Adam(found.groups({"plain": self.rate, "scale": self.scale_rate}), betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.55 + 0.45 * math.cos(math.pi * step / self.steps))
        generator = torch.Generator("cpu").manual_seed(context.seed)
        order = torch.cat([torch.randperm(len(text.ids), generator=generator, device="cpu") for _ in range(self._epochs(text))])
        losses = []
        for step in context.progress.track(range(self.steps), "tune"):
            ids = text.ids[order[step * self.windows : (step + 1) * self.windows].to(text.ids.device)]
            batch = {"ids": ids, "positions": torch.arange(ids.shape[1]).expand(len(ids), -1)}
            truth = reference.logits([batch])[0].log_softmax(-1) if self.loss == "kl" else None

            def loss(_: int, outputs: tuple[Tensor, ...], ids: Tensor = ids, truth: Tensor | None = truth) -> Tensor:
                logp = outputs[0].log_softmax(-1)
                if truth is None:
                    return -logp[:, :-1].gather(-1, ids[:, 1:, None].to(logp.device)).mean()
                return (truth.exp() * (truth - logp)).sum(-1).mean()

            optimiser.zero_grad()
            losses += tape.backward([batch], loss)
            optimiser.step()
            schedule.step()
        return losses

    def _epochs(self, text: Text) -> int:
        return -(-self.steps * self.windows // len(text.ids))


PASS = TuneRouters
