"""Exported checkpoints: transformers computes from them what the interpreter computes from the changed model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from moec.compiler.errors import MoecError
from moec.compiler.export import checkpoint, export_model
from moec.compiler.export.checkpoint import CheckpointWriter
from moec.compiler.export.configuration import configure, difference, layer_sizes
from moec.compiler.frontend import huggingface
from moec.compiler.frontend.model import graph_of
from moec.compiler.interpreter import Interpreter
from moec.compiler.layers import keep_experts, moe_layers
from moec.compiler.model import Model
from moec.compiler.passes import run_passes
from moec.compiler.progress import Progress
from moec.compiler.recipe import load_recipe
from moec.compiler.stored import as_stored
from tests import tiny

MODEL = tiny.MODEL
QUIET = Progress(quiet=True)


def pruned(model: Model, keep: Callable[[int], list[int]]) -> Model:
    for index in range(len(moe_layers(model.graph))):
        model = keep_experts(model, moe_layers(model.graph)[index], keep(index), "test")
    return model


def writer(model: Model, dtype: str | None = None, packed: bool = False) -> CheckpointWriter:
    source = tiny.model()
    stored = source.weights.stored  # type: ignore[attr-defined]
    return CheckpointWriter(model, source.graph, stored, source.weights, huggingface.config_of(MODEL), dtype, "export", packed)


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    return Interpreter(model.graph, model.weights)(ids=ids, positions=torch.arange(ids.shape[1]).expand(len(ids), -1))[0]


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        result: torch.Tensor = loaded(ids).logits
    return result


def test_a_pruned_model_is_what_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(tiny.model(), lambda index: [e for e in range(8) if e not in (index, 5 + index % 2)])
    model = run_passes(model, load_recipe("int4").passes)
    made = writer(model, "f32")
    assert made.made.changes == {("num_experts",): 6}
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1_500_000)
    made.write(tmp_path / "out", [MODEL], QUIET)
    ids = torch.randint(0, 4096, (2, 33), generator=torch.Generator().manual_seed(0))
    expected = logits(as_stored(model), ids)
    assert (transformers_logits(tmp_path / "out", ids) - expected).abs().max() < 1e-4
    assert (logits(tiny.model(), ids) - expected).abs().max() > 0.1
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < files
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f for f in files if f.endswith(".safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    assert "model.layers.1.mlp.experts.5.up_proj.weight" in index["weight_map"]  # the hub's names
    assert sum((tmp_path / "out" / f).stat().st_size for f in set(index["weight_map"].values())) == pytest.approx(
        index["metadata"]["total_size"], rel=0.01
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    assert not (tmp_path / "out.part").exists()


def test_an_unchanged_model_keeps_its_bits(tmp_path: Path) -> None:
    writer(tiny.model()).write(tmp_path / "out", [MODEL], QUIET)
    old, new = (load_file(f / "model.safetensors") for f in (MODEL, tmp_path / "out"))
    assert set(old) == set(new)
    assert all(torch.equal(value, new[name]) for name, value in old.items())


def test_other_families_name_their_keys_otherwise() -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_local_experts=6, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    module: Any = AutoModelForCausalLM.from_config(config)
    model = Model(*graph_of(module))
    smaller = pruned(model, lambda _: [0, 2, 3, 5])
    router = moe_layers(smaller.graph)[0].router
    assert configure(config, model.graph, smaller.graph, "export").changes == {("num_local_experts",): 4}
    changed = smaller.graph.with_nodes(replace(n, attrs={**n.attrs, "normalize": None}) if n is router else n for n in smaller.graph.nodes)
    with pytest.raises(MoecError, match="transformers' mixtral cannot express what the recipe made .*router: normalize is None"):
        configure(config, model.graph, changed, "export")


def test_what_a_configuration_cannot_say(tmp_path: Path) -> None:
    mixed = pruned(tiny.model(), lambda index: list(range(6 + index % 2)))
    with pytest.raises(MoecError, match="the MoE layers have 6, 7, 6, 7 as their experts, and a configuration"):
        writer(mixed)
    assert layer_sizes(tiny.model().graph, "x") == {"experts": 8, "width": moe_layers(tiny.model().graph)[0].width, "top_k": 2}
    assert difference(tiny.model().graph, tiny.model().graph) is None
    (tmp_path / "there").mkdir()
    with pytest.raises(MoecError, match="exists already"):
        export_model(MODEL, tmp_path / "there")
    with pytest.raises(MoecError, match="--packed: no expert or linear layer is quantised"):
        export_model(MODEL, tmp_path / "a", packed=True, progress=QUIET)
    with pytest.raises(MoecError, match="unknown dtype 'int4'"):
        export_model(MODEL, tmp_path / "a", dtype="int4")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
