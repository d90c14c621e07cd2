"""A layer of mixed formats: one node a combination of formats, the same function, every expert stored once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moec.compiler.backends.onnx import OnnxBackend  # noqa: F401  # the backend has to be installed
from moec.compiler.context import Context
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.packed import integer_format
from moec.compiler.passes import run_passes
from moec.compiler.plan import param_bytes
from moec.compiler.quantization import QuantizedWeights
from moec.compiler.quantizers import get_quantizer
from moec.compiler.split_experts import split_experts, uniform_experts
from moec.compiler.verify import verify
from moec.compiler.weights import packed_of
from moec.passes.quantize import Quantize
from tests import graphs
from tests.compiler.backends.tvm_model import TvmModel
from tests.onnx_model import build

UP, DOWN = "layers.0.experts.up", "layers.0.experts.down"
MIXED = ("int2_g32", "int4_g32", "int4_g32", "f32", "int3_g32", "int2_g32"), ("int4_g32", "int4_g32", "int4_g32", "f32", "int4_g32", "int4_g32")


def mixed(seed: int = 0) -> Model:
    """A layer whose experts have four combinations of formats."""
    model = graphs.model(seed)
    params = [replace(model.graph.params[name], format=formats) for name, formats in zip((UP, DOWN), MIXED, strict=True)]
    graph = model.graph.with_params(params)
    return Model(graph, QuantizedWeights(model.weights, graph, {name: get_quantizer("rtn") for name in (UP, DOWN)}))


def tokens(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "positions": torch.arange(9).expand(2, -1)}
