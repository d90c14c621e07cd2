"""Checkpoints as they lie on disk: per-expert and fused names, shards, element types, and everything that can be wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.frontend import tiny_models
from moec.compiler.frontend.families_table import difference
from moec.compiler.frontend.huggingface import load
from moec.compiler.frontend.tensors import Tensors
from moec.compiler.frontend.tiny_models import tiny_model
from moec.compiler.model import Model
from moec.compiler.stored import as_stored
from moec.passes.quantize import Quantize

TINY = Path(__file__).parents[3] / "examples" / "models" / "tiny-moe"


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models of families have two layers."""
    monkeypatch.setattr(tiny_models, "LAYERS", 2)


@pytest.mark.usefixtures("two_layers")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx"])
def test_a_saved_family_loads_as_it_was(name: str, tmp_path: Path) -> None:
    """Saving turns fused parameters into the names that hub checkpoints have; loading must undo it, expert by expert."""
    _, model = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    graph, weights = load(tmp_path)
    assert difference(model, graph, weights) < 1e-4
    for node in graph.nodes:
        if node.op == "experts":
            for stacked in node.inputs[3:5]:
                whole = weights.load(stacked)
                assert all(torch.equal(weights.load(stacked, e), whole[e]) for e in range(whole.shape[0]))


@pytest.mark.usefixtures("two_layers")
def test_one_expert_reads_only_its_own_tensors(tmp_path: Path) -> None:
    _, model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    graph, weights = load(tmp_path)
    tensors: Any = weights.stored.tensors  # type: ignore[attr-defined]
    read: list[str] = []
    original = tensors.read
    tensors.read = lambda name, row=None: (read.append(name), original(name, row))[1]
    name = next(n.inputs[3] for n in graph.nodes if n.op == "experts")
    weights.load(name, expert=3)
    assert len(read) == 2 and all(".experts.3." in name for name in read)  # gate and up


def test_what_was_read_of_a_mapped_file_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is opened anew after so many bytes, and tensors that were read before keep their values."""
    whole = load_file(TINY / "model.safetensors")
    monkeypatch.setattr("moec.compiler.frontend.tensors._READ_BYTES", 1000)
    tensors, opened = Tensors(TINY), list[Path]()
    monkeypatch.setattr("moec.compiler.frontend.tensors.safe_open", lambda file, **kw: (opened.append(file), safe_open(file, **kw))[1])
    found = {name: tensors.read(name) for name in tensors.names()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert sum(value.nbytes > 1000 for value in whole.values()) - 1 <= len(opened) <= len(whole)


def _copy(folder: Path) -> Path:
    """The small model with two of its layers, which takes half as long to trace."""
    shutil.copytree(TINY, folder / "model")
    _config(folder / "model", num_hidden_layers=2)
    _tensors(folder / "model", lambda tensors: [tensors.pop(n) for n in list(tensors) if ".layers.2." in n or ".layers.3." in n])
    return folder / "model"


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _index(folder: Path, shard: str) -> None:
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))


def _to_fp8(folder: Path, size: int, **changes: Any) -> dict[str, torch.Tensor]:
    """Make the matrices of a checkpoint's layers fp8 with a scale for each block of `size` by `size`; the values that they stand for."""
    found: dict[str, torch.Tensor] = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            weight = tensors[name].float()
            n, k = weight.shape
            padded = torch.nn.functional.pad(weight, (0, -k % size, 0, -n % size))
            blocks = padded.view(padded.shape[0] // size, size, padded.shape[1] // size, size)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            found[name] = (codes.float() * scale[:, None, :, None]).view(padded.shape)[:n, :k]
            tensors[name], tensors[f"{name}_scale_inv"] = codes.view(padded.shape)[:n, :k].contiguous(), scale

    _tensors(folder, change)
    _config(
        folder, quantization_config={"quant_method": "fp8", "weight_block_size": [size, size], "activation_scheme": "dynamic"} | changes
    )
    return found


@pytest.mark.parametrize("size", [128, 96])
def test_fp8_weights_are_the_values_that_they_stand_for(size: int, tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    expected = _to_fp8(folder, size)
    graph, weights = load(folder)
    down = next(name for name in graph.params if name.endswith("experts.down_proj"))
    assert graph.params[down].format == "f32"
    layer = down.removesuffix("experts.down_proj")
    for expert in (0, 3):
        assert torch.equal(weights.load(down, expert), expected[f"{layer}experts.{expert}.down_proj.weight"])
        both = [expected[f"{layer}experts.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(weights.load(down.replace("down_proj", "gate_up_proj"), expert), torch.cat(both))
    assert torch.equal(weights.load("model.layers.0.self_attn.q_proj.weight"), expected["model.layers.0.self_attn.q_proj.weight"])
    if size == 128:
        model = as_stored(Quantize(experts="fp8_block128", linear="fp8_block128").run(Model(graph, weights), Context()))
        for name in (down, "model.layers.0.self_attn.q_proj.weight"):
            assert torch.equal(model.load(name), weights.load(name)), "kept as they are"


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.q_proj.weight"]


def _drop_scales(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if n.endswith("down_proj.weight_scale_inv")]:
        del tensors[name]


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(7, dtype=torch.bfloat16)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, found a list"),
    "no model type": (lambda f: _config(f, model_type=None), "expected a model_type"),
    "unknown model type": (lambda f: _config(f, model_type="olmoee"), "did you mean 'olmoe'"),
    "remote code": (lambda f: _config(f, model_type="mine", auto_map={"AutoModel": "evil.Model"}), "never run"),
    "no language model": (lambda f: _config(f, model_type="vit"), "no causal language model"),
    "quantised": (lambda f: _config(f, quantization_config={"quant_method": "fp8"}), r"already quantised \(fp8\)"),
    "quantised in int": (lambda f: _to_fp8(f, 128, quant_method="gptq"), r"already quantised \(gptq\)"),
    "no scales": (lambda f: (_to_fp8(f, 128), _tensors(f, _drop_scales)), r"down_proj.weight .* has the scales None, expected \[\d, \d\]"),
    "other blocks": (lambda f: _to_fp8(f, 128, weight_block_size=[64, 128]), r"has the scales \[\d, \d\], expected \[\d, \d\]"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "can run code"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "truncated or damaged"),
    "missing shard": (lambda f: _index(f, "model-00002.safetensors"), "the shard model-00002.safetensors is missing"),
    "shard outside": (lambda f: _index(f, "../model.safetensors"), "not a .* file of this folder"),
    "missing tensor": (lambda f: _tensors(f, _drop), "no tensor for model.layers.1.self_attn.q_proj.weight"),
    "wrong shape": (lambda f: _tensors(f, _reshape), r"model.norm.weight has the shape \[7\], expected \[192\]"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    damage, message = CASES[case]
    damage(folder)
    with pytest.raises(MoecError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_no_such_folder() -> None:
    with pytest.raises(MoecError, match="no such folder"):
        load("/nowhere/at/all")


def test_nan_is_found_when_a_weight_is_read(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    _tensors(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(5, torch.nan))
    _, weights = load(folder)
    with pytest.raises(MoecError, match=r"model.norm.weight has a value that is NaN or infinite, at \[5\]"):
        weights.load("model.norm.weight")


def test_keys_that_choose_code_are_ignored(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    _config(folder, auto_map={"AutoConfig": "evil.Config"}, _attn_implementation="flash", trust_remote_code=True)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    load(folder)


def test_a_folder_without_weights_gives_the_graph(tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    graph, weights = load(tmp_path)
    assert graph.meta["layers"] == 4 and graph.params["model.norm.weight"].format == "bf16"
    with pytest.raises(MoecError, match="no weights in this folder"):
        weights.load("model.norm.weight")
