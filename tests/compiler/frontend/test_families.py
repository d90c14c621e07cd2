"""A fast subset of the table of families, and the vocabulary of graphs in normal form.

`python -m moec.compiler.frontend.families` runs all of them.
"""

from __future__ import annotations

import pytest

from moec.compiler.core_aten import CORE_ATEN
from moec.compiler.frontend import tiny_models
from moec.compiler.frontend.families_table import check_family
from moec.compiler.frontend.tiny_models import families, tiny_model
from moec.compiler.ops import OPS
from moec.runtime.errors import MoecError

# one for each mechanism: groups and bias, expert biases and sinks and windows, chunks and input scaling, computed weights,
# mixture of attention heads, recurrence, short convolution, queries that choose their keys, a method that is a loop
SUBSET = ("deepseek_v3", "gpt_oss", "llama4_text", "dbrx", "jetmoe", "qwen3_next", "lfm2_moe", "ernie4_5_moe", "deepseek_v32", "minimax")


@pytest.mark.parametrize("name", SUBSET)
def test_family_agrees_with_eager_execution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "LAYERS", 2)  # of each of these families two layers have all the nodes that four have
    row = check_family(name).row
    assert row.ok, row.reason or f"differs by {row.error}"
    assert not row.reason  # every op that is not semantic is a core one
    # Llama 4 chooses one expert; a tiny model that chooses two is two calls, the second of which no router describes
    assert row.raised or name == "llama4_text"


def test_families_are_discovered() -> None:
    required = {
        "mixtral", "olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "phimoe", "granitemoe",
        "granitemoeshared", "gpt_oss", "glm4_moe", "ernie4_5_moe", "minimax_m2", "lfm2_moe", "afmoe", "dots1", "hunyuan_v1_moe",
        "jetmoe", "llama4_text", "dbrx",
    }  # fmt: skip
    assert required <= families().keys()


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(MoecError, match="did you mean 'mixtral'"):
        tiny_model("mixtrall")


def test_core_operators_exist() -> None:
    from moec.compiler.aten import overload

    assert all(overload(op) for op in CORE_ATEN)
    assert not OPS.keys() & CORE_ATEN.keys()
