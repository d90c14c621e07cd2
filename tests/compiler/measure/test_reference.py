"""The reference on the kernels' layout: it reads weights as the layout unpacks them, and computes what the experts op means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.compiler.measure import reference
from moec.compiler.measure.layer import expected_result, random_tokens, random_weights, relative_error, split_terms
from moec.runtime.formats import get_format
from moec.runtime.formats.fp8 import Fp8Format
from moec.runtime.formats.int import IntFormat
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.layout import FragmentLayout

MIXED = ("int2_g64", "int3_g32_asym", "int8_g128", "bf16", "int4_channel", "int5_g256_asym", "fp8_channel", "fp8_block128")


def values(layout: FragmentLayout, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """A matrix by what the layout and the format say."""
    if layout.coded is None:
        return (layout.untile_values(arrays).astype(np.uint32) << 16).view(np.float32)
    found = get_format(layout.format)
    assert isinstance(found, IntFormat | Fp8Format)
    return found.dequantize(*layout.untile(arrays))


@pytest.mark.parametrize(("n", "k"), [(16, 128), (40, 264), (520, 392)])
def test_matrices_are_what_the_layout_says(n: int, k: int) -> None:
    layer = Layer(8, 2, k, n, MIXED, MIXED, gated=False)
    weights = random_weights(layer, 3, device="cpu")
    stack: Stack = layer.layout.gate_up
    for expert, name in enumerate(MIXED):
        index, place = stack.table()[expert].tolist()
        layout = stack.classes[index]
        own = {key.removesuffix(f"_{index}"): t[place] for key, t in weights.gate_up.items() if key.endswith(f"_{index}")}
        arrays = {key: (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy() for key, t in own.items()}
        unsigned = {key: a.view(np.uint16 if key == "values" else np.uint32 if key == "codes" else a.dtype) for key, a in arrays.items()}
        expected = values(layout, unsigned)
        assert layout.format == name
        np.testing.assert_allclose(reference.matrix(stack, weights.gate_up, expert).numpy(), expected, rtol=1e-6)
        if layout.integer is not None:
            q = reference.matrix_codes(stack, weights.gate_up, expert)
            codes, scale, zero = layout.untile(unsigned)
            np.testing.assert_array_equal(q.codes.numpy(), codes)
            np.testing.assert_array_equal(q.scale.numpy(), scale)
            if q.zero is not None:
                np.testing.assert_array_equal(q.zero.numpy(), zero)


@pytest.mark.parametrize("widths", [(), (16, 8, 40, 32, 24)])
@pytest.mark.parametrize(
    "formats", [("int4_g64", "int3_g32_asym"), (("fp8_channel", "bf16", "fp8_block128", "int8_g128", "bf16"), "fp8_channel")]
)
def test_a_layer_is_what_the_op_means(widths: tuple[int, ...], formats: tuple[str | tuple[str, ...], str]) -> None:
    """Against a loop over tokens and slots on gate and up rows in their plain order."""
    layer = Layer(5, 2, 264, 40, *formats, widths=widths)
    weights, tokens = random_weights(layer, 1, biases=True, device="cpu"), random_tokens(layer, 7, 2, device="cpu")
    tokens.ids[0, 0], tokens.ids[1, 1] = -1, 5
    assert weights.biases is not None
    layout = layer.layout
    expected = torch.zeros(7, 264, dtype=torch.float64)
    for t in range(7):
        for s in range(2):
            e = int(tokens.ids[t, s])
            if not 0 <= e < 5:
                continue
            rows = reference.matrix(layout.gate_up, weights.gate_up, e)
            own = layout.of(e)
            assert (len(rows), own.f) == (own.gate_up.n, widths[e] if widths else 40)
            up = torch.from_numpy(own.deinterleave(rows.numpy()))
            bias = torch.from_numpy(own.deinterleave(weights.biases[0][e, : len(rows)].numpy()[:, None]))[:, 0].double()
            gate, value = (up @ tokens.x[t].double() + bias).chunk(2)
            hidden = gate * torch.sigmoid(gate) * value
            y = reference.matrix(layout.down, weights.down, e) @ hidden + weights.biases[1][e].double()
            expected[t] += tokens.routing_weights[t, s].double() * y
    assert relative_error(expected_result(weights, tokens), expected) < 1e-12
    assert weights.nbytes(torch.tensor([[1, 2]])) == sum(s.nbytes(e) for s in (layout.gate_up, layout.down) for e in (1, 2))


@pytest.mark.parametrize("activation", [*reference.ACTIVATIONS, "clamped_swiglu"])
def test_every_activation_of_the_kernels_has_a_meaning(activation: str) -> None:
    layer = Layer(3, 1, 128, 24, "bf16", "bf16")
    weights, tokens = random_weights(layer, 1, device="cpu"), random_tokens(layer, 4, 2, device="cpu")
    assert expected_result(weights, tokens, activation).isfinite().all()
    if activation in ("relu", "relu_squared"):
        h = torch.tensor([[-1.0] * 8 + [2.0] * 8], dtype=torch.float64)
        assert (reference.activate(Layer(1, 1, 128, 8, "bf16", "bf16").layout, h, activation) == 0).all()


def test_terms_add_up_to_what_is_split() -> None:
    x = torch.randn(5, 16)
    parts = split_terms(x, 2).view(torch.bfloat16).float()
    assert relative_error(parts.sum(0), x.double()) < 2**-15
    assert relative_error(parts[0], x.double()) > 2**-12


def test_routings_are_as_asked() -> None:
    layer = Layer(16, 4, 128, 8, "bf16", "bf16")
    uniform, zipf = (random_tokens(layer, 4096, 0, skew, device="cpu").ids for skew in ("uniform", "zipf"))
    counts = [np.sort(np.bincount(ids.flatten().numpy(), minlength=16)) for ids in (uniform, zipf)]
    assert counts[0][-1] < 1.2 * counts[0][0]
    assert counts[1][-1] > 3 * counts[1][0]
    assert all(len(set(row)) == 4 for row in zipf[:50].tolist())
    half = random_tokens(layer, 8, 0, skipped=0.5, device="cpu").ids
    assert (half[:, 2:] == -1).all() and (half[:, :2] >= 0).all()
    assert random_tokens(layer, 0, 0, device="cpu").ids.shape == (0, 4)
