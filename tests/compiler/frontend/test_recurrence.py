"""What stands for a recurrence computes what transformers' own loops compute; what computes something else is refused."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import moec.compiler.frontend.trace  # noqa: F401  # makes the operators
from moec.compiler.frontend.recurrence import REPLACED, without_loops
from moec.runtime.errors import MoecError

WHERE = {
    "torch_chunk_gated_delta_rule": "qwen3_next",
    "chunk_kimi_delta_attention": "kimi_linear",
    "mamba2_chunk_scan": "nemotron_h",
    "mamba_selective_scan": "jamba",
}


@pytest.mark.parametrize("name", REPLACED)
def test_replacement_computes_the_same(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{WHERE[name]}.modeling_{WHERE[name]}")
    replacement, trials = REPLACED[name]
    for arguments, named in trials():
        with torch.no_grad():
            expected, found = (f(*arguments, **named) for f in (getattr(module, name), replacement))
        expected, found = (x[0] if isinstance(x, tuple) else x for x in (expected, found))
        assert float(expected.std()) > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_function_that_only_has_the_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states * 2

    module = ModuleType("somewhere")
    monkeypatch.setattr(module, "mamba2_chunk_scan", other, raising=False)
    monkeypatch.setitem(sys.modules, nn.Identity.__module__, module)
    with (
        pytest.raises(MoecError, match="somewhere.mamba2_chunk_scan is not the recurrence that its name says"),
        without_loops(nn.Identity()),
    ):
        pass
    assert module.mamba2_chunk_scan is other
