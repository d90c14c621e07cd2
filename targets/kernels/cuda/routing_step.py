"""From a token's hidden state to its experts in one kernel: [residual addition,] [normalisation,] the router's product, router[, skip].

    sum = x + residual,   row = norm(sum),   logits = row @ W^T (+ b),   weights, ids = skip(router(logits))

The product is that of `projections`: a block has 16 of the experts, whose weights are all under way before the kernel waits, and normalises
the row for itself. A warp of each block adds the products up and writes its logits; that of the block which is the last to arrive reads all
of them, and chooses, while the others write the row. So few blocks pay one arrival in place of two launches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.arrival import SEMAPHORES, last_warp
from moec.targets.kernels.cuda.emit import WARP, Expr, argument, store, when
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.projections import Projection, ProjectionsKernel, ProjectionsSpec
from moec.targets.kernels.cuda.router import Router
from moec.targets.kernels.cuda.skip import skip_slots
from moec.targets.kernels.cuda.warp import warp_from
from moec.targets.kernels.specs import NormSpec, RouterSpec, SkipSpec

MOST_BYTES = 256  # of weights that a lane has under way: 64 registers of the 128 that 16 warps leave it


@dataclass(frozen=True)
class RoutingSpec:
    """The kernel of a layer.

    Args:
        product: the row's part and the product with the router's weights.
        router, skip: what becomes of the logits; `skip` has no counts.
    """

    product: ProjectionsSpec
    router: RouterSpec
    skip: SkipSpec | None = None

    @classmethod
    def of(
        cls, gate: Projection, multiprocessors: int, norm: NormSpec | None, router: RouterSpec, skip: SkipSpec | None = None,
        written: bool = True,
    ) -> RoutingSpec:  # fmt: skip
        """The kernel with options that suit the shapes: all of a block's weights are under way, if they are not too many."""
        product = ProjectionsSpec.of([gate], multiprocessors, norm, written and norm is not None)
        assert product.outputs <= WARP
        lane_bytes = ceil_div(gate.layout.blocks, product.splits) * gate.layout.block_words // 8
        return cls(replace(product, unroll=min(lane_bytes, MOST_BYTES)), router, skip)


class _RoutingStep(ProjectionsKernel):
    def __init__(self, spec: RoutingSpec) -> None:
        super().__init__(spec.product)
        self._step, self._router = spec, Router(spec.router)

    def arguments(self) -> None:
        self._bias = argument("router_bias", (self._step.router.experts,), "float32") if self._step.router.bias else None
        self._semaphores = argument("semaphores", (SEMAPHORES,), "int32")
        super().arguments()
        shape = (1, self._step.router.top_k)
        self._weights, self._ids = argument("weights", shape, "float32"), argument("ids", shape, "int64")

    def then(self, thread: Expr) -> None:
        """Choose, if the block is the last one: its first warp, which has written the logits as those of other blocks have."""
        with when(thread < WARP):
            last = last_warp(self._semaphores, 0, self.grid)
            with when(last != 0):
                self._choose(thread)

    def _choose(self, lane: Expr) -> None:
        """What one warp does with the logits."""
        weight, which = self._router.run(lambda i: self.outs[0][0, i], self._bias, lane)
        if self._step.skip is None:
            with when(lane < self._step.router.top_k):
                store(self._weights, weight, 0, lane)
                store(self._ids, T.cast(which, "int64"), 0, lane)
            return
        slots = range(self._step.router.top_k)
        ids = [T.Bind(T.cast(warp_from(which, k, "int32"), "int64")) for k in slots]
        found = skip_slots(self._step.skip, [warp_from(weight, k, "float32") for k in slots], ids)
        with when(lane == 0):
            for k in slots:
                store(self._weights, found[0][k], 0, k)
                store(self._ids, found[1][k], 0, k)


def routing_step_func(spec: RoutingSpec) -> tirx.PrimFunc:
    """PrimFunc ([router bias [E]], semaphores int32, x f32 [1, D], ..., [sum], [row], logits [1, E], weights [1, K], ids int64 [1, K]).

    In the middle are the parameters of `projections`.
    """
    return _RoutingStep(spec).build("routing_step")
