"""From a torch module on the meta device to an exported ATen program that already speaks MoE.

Transformers' own extension points carry the meaning across: an experts implementation, an attention implementation and a mask
implementation of ours are registered while a model is traced; they emit the custom operators `moec::experts` and
`moec::attention`. No model family is named here.
"""

from __future__ import annotations

import contextlib
import re
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.frontend.activation import Activation, recognise
from moec.compiler.frontend.layout import Layout
from moec.compiler.frontend.masks import attention_under, mask_interface, merged
from moec.compiler.ops import experts
from moec.compiler.ops_attention import linear_attention


@torch.library.custom_op("moec::experts", mutates_args=())
def experts_op(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    limit: float,
    transposed: bool,
    interleaved: bool,
) -> Tensor:
    """The traced form of `moec.compiler.ops.experts`: weights as the module keeps them.

    Args:
        transposed: up is [E, D, 2F] and down [E, F, D] instead of [E, 2F, D] and [E, D, F].
        interleaved: gate and up rows alternate instead of gate rows first.
    """
    up = Layout(transposed, interleaved).apply(up, True)
    if up_bias is not None:
        up_bias = Layout(interleaved=interleaved).apply(up_bias, True)
    down = Layout(transposed).apply(down, True)
    return experts(x, ids, weights, up, down, up_bias, down_bias, activation=activation, gated=gated, limit=limit)


@experts_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("moec::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, causal: bool, window: int, chunk: int, softcap: float
) -> Tensor:
    """The traced form of `moec.compiler.ops.attention`: q, k, v are [B, H, T, d], the result is [B, T, H, dv]."""
    raise NotImplementedError("moec::attention exists to be traced")


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("moec::linear_attention", mutates_args=())
def linear_attention_op(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> Tensor:
    """The traced form of `moec.compiler.ops.linear_attention`."""
    return linear_attention(q, k, v, decay, beta)


@linear_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


_ACTIVATIONS: weakref.WeakKeyDictionary[torch.nn.Module, Activation] = weakref.WeakKeyDictionary()


def _recognise(module: Any) -> None:
    """Find the activation of an experts module, before tracing (numbers cannot be looked at while tracing)."""
    if not hasattr(module, "has_gate"):
        function = next((f for n in ("act_fn", "activation_fn", "activation") if callable(f := getattr(module, n, None))), None)
        if function is not None:
            with contextlib.suppress(MoecError):  # it is used only if a replacement method asks for it

                def gate(x: Tensor) -> Tensor:
                    first, second = x.chunk(2, -1)
                    return function(first) * second  # type: ignore[no-any-return]

                _ACTIVATIONS[module] = recognise(gate, True, False, module)
        return
    if getattr(module, "has_post_expert_norm", False):
        raise MoecError(f"{type(module).__name__}: a norm after each expert is not supported")
    apply = module._apply_gate if module.has_gate else module.act_fn
    _ACTIVATIONS[module] = recognise(apply, module.has_gate, module.has_gate and not module.is_concatenated, module)


def activation_of(module: Any) -> Activation:
    """The activation of an experts module: that of its own gating function, or of `act_fn(gate) * up`."""
    if module not in _ACTIVATIONS:
        raise MoecError(f"{type(module).__name__}: the activation of its experts is not one that can be compiled")
    return _ACTIVATIONS[module]


def _experts(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Transformers' experts interface: hidden [N, D], ids and weights [N, K] -> [N, D]."""
    gated, found = bool(module.has_gate), activation_of(module)
    interleaved = gated and not module.is_concatenated
    name = "gate_up_proj" if gated else "up_proj"
    biases = (getattr(module, f"{name}_bias"), module.down_proj_bias) if getattr(module, "has_bias", False) else (None, None)
    return torch.ops.moec.experts(  # type: ignore[no-any-return]
        hidden, ids.long(), weights, getattr(module, name), module.down_proj, *biases,
        found.activation, gated, found.limit, bool(module.is_transposed), interleaved,
    )  # fmt: skip


_NO_PART = ("position_ids", "cache_position")
"""Tensors that models hand on to attention functions, which do not use them."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None, **kwargs: Any
) -> Any:
    """Transformers' attention interface: query, key, value [B, H, T, d] -> ([B, T, H, dv], no weights)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window, softcap = int(kwargs.pop("sliding_window", None) or 0), float(kwargs.pop("softcap", None) or 0.0)
    sinks, bias = kwargs.pop("s_aux", None), kwargs.pop("position_bias", None)
    computed = isinstance(attention_mask, Tensor)  # then it says what indices of keys say, too
    others = {n: o for n, o in kwargs.items() if isinstance(o, Tensor) and n not in _NO_PART}
    for name in (n for n, other in others.items() if other.is_floating_point() or not computed):
        raise MoecError(f"{type(module).__name__}: attention with {name} is not supported")
    if computed or bias is not None:
        mask = attention_mask
        if not computed:
            mask = merged(mask, bool(causal), window).tensor(query.shape[2], key.shape[2], query.device)
        return attention_under(query, key, value, mask, bias, sinks, scale, softcap), None
    seen = merged(attention_mask, bool(causal), window)
    return torch.ops.moec.attention(query, key, value, sinks, scale, seen.causal, seen.window, seen.chunk, softcap), None


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    """While this lasts, transformers has our experts as `moec`, and our attention and masks as `sdpa`.

    Some models look at the name: for `sdpa` those whose queries choose their keys say so in the mask.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("moec", _experts)
    before = [
        (ALL_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS["sdpa"]),
        (ALL_MASK_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]),
    ]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", mask_interface)
    try:
        yield
    finally:
        for interface, original in before:
            interface.register("sdpa", original)


@contextlib.contextmanager
def implementations(model: Any) -> Iterator[None]:
    """While this lasts, the model's experts and attention are ours."""
    for module in model.modules():
        _recognise(module)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(c, getattr(c, "_attn_implementation", None), getattr(c, "_experts_implementation", None)) for c in configs.values()]
    try:
        for config in configs.values():
            config._attn_implementation, config._experts_implementation = "sdpa", "moec"
        with _registered():
            yield
    finally:
        for config, attention, experts in before:
            config._attn_implementation, config._experts_implementation = attention, experts


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits


def export_language_model(model: Any) -> torch.export.ExportedProgram:
    """Export a causal language model as a program from `ids` and `positions` [B, T] to logits [B, T, V]."""
    from moec.compiler.frontend.families import replaced
    from moec.compiler.frontend.recurrence import without_loops

    device = next(model.parameters()).device
    example = torch.zeros(3, 7, dtype=torch.long, device=device)
    shape = {0: torch.export.Dim("B", min=1, max=1 << 20), 1: torch.export.Dim("T", min=2, max=1 << 30)}
    with implementations(model), replaced(model), without_loops(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return export(_Logits(model), (example, example.clone()), (shape, shape))


_DEPENDS = ("Constraints violated", "Cannot create Dim", "Specializations unexpectedly required")
"""How torch begins to say that a program is not the same for all sizes."""


def export(module: torch.nn.Module, examples: tuple[Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    """`torch.export`, with every condition on symbolic sizes that it assumed checked to hold for all of them.

    Raises:
        MoecError: the program depends on a size, for instance in the number of turns of a loop.
    """
    program: torch.export.ExportedProgram
    try:
        program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
    except (torch._dynamo.exc.UserError, AssertionError) as error:
        if not str(error).startswith(_DEPENDS):
            raise
        # some conditions are true of all sizes, but torch cannot see it: let it assume them, and try them here; others only
        # ask whether a size is 1 or 0, which changes no value
        with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # torch adds it while running
            try:
                program = torch.export.export(
                    module, examples, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
                )
            except (torch._dynamo.exc.UserError, AssertionError) as last:
                if not str(last).startswith(_DEPENDS):
                    raise
                guard = re.search(r"generated guard (.*)", str(last))
                condition = guard[1].rstrip(".") if guard else str(last).splitlines()[0]
                condition = re.sub(r"L\['\w+'\]\.size\(\)\[(\d)\]", lambda m: "BT"[int(m[1])], condition)
                raise MoecError(f"the model computes something else when {condition} does not hold; it cannot be one graph") from last
        _check_assumptions(program)
    decomposed: torch.export.ExportedProgram = program.run_decompositions({})
    return decomposed


def _check_assumptions(program: torch.export.ExportedProgram) -> None:
    for fx in program.graph.nodes:
        if str(fx.target).startswith("aten._assert_scalar") and isinstance(fx.args[0], torch.fx.Node):
            condition = fx.args[0].meta["val"]
            expression = condition.node.expr if isinstance(condition, torch.SymBool) else condition
            symbols = sorted(getattr(expression, "free_symbols", ()), key=str)
            for value in (*range(1, 70), 127, 128, 129, 1000, 4096):
                held = expression.subs({s: value + 3 * i for i, s in enumerate(symbols)}) if symbols else expression
                if not bool(held):
                    raise MoecError(f"the model computes something else when {expression} does not hold; it cannot be one graph")
