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
from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, argument, store, when
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.matrices import Projection
from moec.targets.kernels.cuda.projections import ProjectionsKernel, ProjectionsSpec
from moec.targets.kernels.cuda.projections_columns import TOKENS
from moec.targets.kernels.cuda.router import Router
from moec.targets.kernels.cuda.skip import skip_slots
from moec.targets.kernels.cuda.warp import warp_from
from moec.targets.kernels.specs import NormSpec, RouterSpec, SkipSpec

MOST_BYTES = 256  # of weights that a lane has under way: 64 registers of the 128 that 16 warps leave it


MOST_TOGETHER = max(TOKENS)  # tokens of a block
MOST_TURNS = 2  # blocks of threads for each multiprocessor
MOST_BLOCKS = 16  # blocks of 128 columns of all tokens of a warp, which reads as many at once as registers allow


@dataclass(frozen=True)
class RoutingSpec:
    """The kernel of a layer.

    Args:
        product: the row's part and the product with the router's weights.
        router, skip: what becomes of the logits; `skip` has no counts.
        tokens: T, None for any number up to `SEMAPHORES`; of several, `product.tokens` share a block of threads (`routing_tokens`).
        terms: of bfloat16, as which the normalised rows are a result too, of several tokens; 0 if they are not.
    """

    product: ProjectionsSpec
    router: RouterSpec
    skip: SkipSpec | None = None
    tokens: int | None = 1
    terms: int = 0

    def __post_init__(self) -> None:
        assert not self.terms or (self.product.written and self.tokens != 1), self
        assert self.product.tokens <= self.product.warps, self  # a warp finishes each

    def takes(self, most: int, multiprocessors: int) -> bool:
        """Whether so many tokens run at once or in one turn more; other kernels, which read weights less often, should have more."""
        return most == 1 or (most <= SEMAPHORES and self.product.grid * ceil_div(most, self.product.tokens) <= MOST_TURNS * multiprocessors)

    @classmethod
    def of(
        cls, gate: Projection, gpu: Gpu, norm: NormSpec | None, router: RouterSpec, skip: SkipSpec | None = None,
        written: bool = True, tokens: int | None = 1, most: int = 1,
    ) -> RoutingSpec:  # fmt: skip
        """The kernel with options that suit the shapes: all of a block's weights are under way, if they are not too many.

        A token alone in its blocks waits for the fewest numbers; where so many blocks do not run at once, tokens share the weights.

        Args:
            most: the most tokens, where T is any number.
        """
        product = ProjectionsSpec.of([gate], gpu.multiprocessors, norm, written and norm is not None)
        assert product.outputs <= WARP
        share = ceil_div(gate.layout.blocks, product.splits)
        lane_bytes = share * gate.layout.block_words // 8
        product, limit = replace(product, unroll=min(lane_bytes, MOST_BYTES)), min(MOST_TOGETHER, MOST_BLOCKS // share, product.warps)
        while 2 * product.tokens <= limit and product.grid * ceil_div(tokens or most, product.tokens) > gpu.multiprocessors:
            more = replace(product, tokens=2 * product.tokens)
            if 4 * more.words > gpu.shared_bytes:
                break
            product = more
        return cls(product, router, skip, tokens)


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
        choose(self._step, self._router, self.outs[0], self._bias, (self._weights, self._ids), 0, lane)


def choose(
    spec: RoutingSpec, router: Router, logits: Buffer, bias: Buffer | None, outs: tuple[Buffer, Buffer], token: Expr, lane: Expr
) -> None:  # fmt: skip
    """Write the weights and ids of a token, of which a warp sees all logits [T, E]."""
    weights, ids = outs
    weight, which = router.run(lambda i: logits[token, i], bias, lane)
    if spec.skip is None:
        with when(lane < spec.router.top_k):
            store(weights, weight, token, lane)
            store(ids, T.cast(which, "int64"), token, lane)
        return
    slots = range(spec.router.top_k)
    own = [T.Bind(T.cast(warp_from(which, k, "int32"), "int64")) for k in slots]
    found = skip_slots(spec.skip, [warp_from(weight, k, "float32") for k in slots], own)
    with when(lane == 0):
        for k in slots:
            store(weights, found[0][k], token, k)
            store(ids, found[1][k], token, k)


def routing_step_func(spec: RoutingSpec) -> tirx.PrimFunc:
    """PrimFunc ([router bias [E]], semaphores int32, x f32 [1, D], ..., [sum], [row], logits [1, E], weights [1, K], ids int64 [1, K]).

    In the middle are the parameters of `projections`.
    """
    return _RoutingStep(spec).build("routing_step")
