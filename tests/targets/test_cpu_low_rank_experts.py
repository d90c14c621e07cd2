"""The CPU kernels of experts with low-rank factors, beside whole matrices and in their place, against float64 arithmetic."""

from __future__ import annotations

import pytest

from moec.targets.kernels.cpu import ExpertActivation, ExpertsLayout
from moec.targets.kernels.cpu.experts_layout import Factors
from tests.targets.test_cpu_experts import check_experts

LAYOUTS = {
    "corrected": ExpertsLayout(
        5, 70, 50, "int2_g32", "int3_g32", True, Factors(8, "int8_channel", "int8_channel"), Factors(40, "int4_g32", "int8_g32")
    ),
    "ternary and binary": ExpertsLayout(
        5, 70, 50, "ternary_g32", "binary_g32", True, Factors(8, "int8_channel", "int8_channel"), Factors(24, "ternary_channel", "int4_g32")
    ),
    "nothing else": ExpertsLayout(5, 70, 50, "zero", "zero", True, Factors(17, "bf16", "bf16"), Factors(16, "f32", "f16")),
    "up alone": ExpertsLayout(5, 70, 50, "zero", "int4_g32_asym", True, Factors(33, "int8_channel", "int4_g32_asym")),
    "down alone": ExpertsLayout(5, 70, 50, "f32", "zero", True, None, Factors(1, "f32", "f32")),
    "not gated": ExpertsLayout(5, 70, 50, "bf16", "f32", False, Factors(20, "f32", "bf16"), Factors(3, "bf16", "f32")),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("biased", [True, False])
def test_one_token(name: str, biased: bool) -> None:
    check_experts(LAYOUTS[name], [1], static=True, top_k=3, biased=biased, activation=ExpertActivation("gelu"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_number_of_tokens(name: str) -> None:
    check_experts(LAYOUTS[name], [1, 2, 3, 7, 33], biased=name == "up alone")


def test_more_tokens_than_a_block() -> None:
    check_experts(LAYOUTS["nothing else"], [600])


def test_bytes() -> None:
    layout = LAYOUTS["nothing else"]
    assert layout.nbytes() == 5 * 2 * (128 * 17 + 32 * 70 + 80 * 16 * 2 + 16 * 50)
