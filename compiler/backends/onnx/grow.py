"""The model that makes room in caches of a GPU, which never leave it: an array with zeros behind it on each axis.

inputs    cache [slots, HK, capacity, d / 2], two 16-bit numbers as one float32, whose bits are kept; pads [8], as of `Pad`
outputs   grown
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

OPSET = 18
IR_VERSION = 8


def grow_model() -> onnx.ModelProto:
    """The model."""
    cache = helper.make_tensor_value_info("cache", TensorProto.FLOAT, ["S", "H", "C", "D"])
    pads = helper.make_tensor_value_info("pads", TensorProto.INT64, [8])
    grown = helper.make_tensor_value_info("grown", TensorProto.FLOAT, ["S2", "H2", "C2", "D2"])
    node = helper.make_node("Pad", ["cache", "pads"], ["grown"], "Pad", mode="constant")
    graph = helper.make_graph([node], "grow", [cache, pads], [grown])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="moec")
    model.ir_version = IR_VERSION
    return model
