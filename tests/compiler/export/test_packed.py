"""Packed checkpoints, read by a decoder that was written from the layout's description alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.export import export_model
from moec.compiler.export.packed import PackedTensors
from moec.compiler.passes import make_pass
from moec.compiler.progress import Progress
from moec.compiler.stored import as_stored
from tests import tiny
from tests.compiler.export.test_export import writer

QUIET = Progress(quiet=True)


def decoded(parts: Sequence[Tensor], bits: int) -> Tensor:
    """The weight [N, K] of codes, scales and shape.

    A row's codes are one little-endian bit stream in 32-bit words, offset by half their range; scales are of equal groups of a row.
    """
    packed, scale, shape = parts
    n, k = shape.tolist()
    values = np.zeros((n, k))
    for row in range(n):
        stream = int.from_bytes(packed[row].numpy().tobytes(), "little")
        codes = [(stream >> bits * column) % (1 << bits) - (1 << bits - 1) for column in range(k)]
        factors = scale[row].double().numpy()
        values[row] = [code * factors[column * len(factors) // k] for column, code in enumerate(codes)]
    return torch.from_numpy(values).float()


def recipe(folder: Path, **options: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"passes: [{{quantize: {json.dumps(options)}}}]\n")
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Tensors with codes, tensors with their values, and the configuration, of experts in int4 and linear layers in int8."""
    folder = tmp_path_factory.mktemp("packed")
    chosen = recipe(folder, experts="int4_g32", linear="int8_channel", embedding="int8_g64")
    for name in ("values", "codes"):
        export_model(tiny.MODEL, folder / name, recipe=chosen, dtype="f16", packed=name == "codes", progress=QUIET)
    codes, values = (load_file(folder / name / "model.safetensors") for name in ("codes", "values"))
    return codes, values, json.loads((folder / "codes/config.json").read_text())["quantization_config"]


def test_codes_stand_for_the_values(exported: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]) -> None:
    codes, values, _ = exported
    packed = [name.removesuffix("_packed") for name in codes if name.endswith(".weight_packed")]
    assert len(packed) == 4 * (8 * 3 + 4)  # of each layer 8 experts of three matrices, and attention
    assert {n for n in codes if "weight_" not in n} == set(values) - set(packed)
    for name in (p for p in packed if ".layers.1." in p):
        bits = 4 if ".experts." in name else 8
        parts = [codes[f"{name}_{part}"] for part in ("packed", "scale", "shape")]
        assert parts[0].dtype == torch.int32
        assert parts[0].shape == (len(values[name]), values[name].shape[1] * bits // 32)
        assert parts[1].shape == (len(values[name]), values[name].shape[1] // 32 if bits == 4 else 1)
        torch.testing.assert_close(decoded(parts, bits), values[name].float(), rtol=2**-10, atol=1e-7)  # the values are float16


def test_the_configuration_says_what_is_packed(exported: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]) -> None:
    codes, _, config = exported
    assert (config["quant_method"], config["format"], config["quantization_status"]) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    groups = {group["weights"]["num_bits"]: group for group in config["config_groups"].values()}
    assert (groups[4]["weights"]["strategy"], groups[4]["weights"]["group_size"]) == ("group", 32)
    assert (groups[8]["weights"]["strategy"], groups[8]["weights"]["group_size"]) == ("channel", None)
    assert groups[4]["weights"]["symmetric"] and groups[4]["weights"]["type"] == "int"
    targets = {target for group in groups.values() for target in group["targets"]}
    assert targets == {name.removesuffix(".weight_packed") for name in codes if name.endswith(".weight_packed")}
    assert {"lm_head", "model.embed_tokens", "model.layers.3.mlp.gate"} <= set(config["ignore"])


def test_readers_of_the_layout_agree(exported: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    codes, _, config = exported
    schemes.QuantizationConfig.model_validate(config)
    for name, bits in (("model.layers.0.mlp.experts.3.down_proj", 4), ("model.layers.2.self_attn.q_proj", 8)):
        packed, scale, shape = (codes[f"{name}.weight_{part}"] for part in ("packed", "scale", "shape"))
        found = library.unpack_from_int32(packed, bits, torch.Size(shape.tolist())).float()
        factors = scale.float().repeat_interleave(found.shape[1] // scale.shape[1], 1)
        torch.testing.assert_close(found * factors, decoded((packed, scale, shape), bits))


def test_codes_that_a_quantiser_made_are_written(tmp_path: Path) -> None:
    source = tiny.model()
    model = make_pass("quantize", {"experts": "int4_g64", "method": "hqq"}).run(source, Context())
    made = writer(model, "f16", packed=True)
    made.write(tmp_path / "out", [tiny.MODEL], QUIET)
    tensors = load_file(tmp_path / "out/model.safetensors")
    parts = [tensors[f"model.layers.2.mlp.experts.5.down_proj.weight_{part}"] for part in ("packed", "scale", "shape")]
    expected = as_stored(model).load("model.layers.2.mlp.experts.down_proj", 5)
    torch.testing.assert_close(decoded(parts, 4), expected, rtol=1e-6, atol=0)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "model.layers.0.self_attn.q_proj" in config["ignore"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "bf16"}, "no expert or linear layer is quantised"),
        ({"experts": "int3_g32"}, "is int3_g32; the layout that is written has symmetric int4 and int8"),
        ({"experts": "ternary_g64"}, "is ternary_g64"),
        ({"linear": "int4_g32_asym"}, "is int4_g32_asym"),
        ({"experts": "int4_g32", "low_rank": {"rank": 2, "weighted": False}}, "have low-rank factors, which the layout has no place for"),
        ({"experts": "int4_g128"}, "has rows of 192 weights, no multiple of its groups of 128"),
    ],
)
def test_what_the_layout_cannot_say(options: dict[str, Any], message: str) -> None:
    model = make_pass("quantize", options).run(tiny.model(), Context())
    with pytest.raises(MoecError, match=f"export --packed: .*{message}"):
        PackedTensors(model, {}, torch.float16, "export")
