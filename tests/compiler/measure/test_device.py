"""Which stream the kernels that are timed run on. No GPU is needed to see."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from types import SimpleNamespace

from moec.runtime.ffi import tvm_ffi  # as the command line does: before torch, and without it
import torch

from moec.compiler.measure.device import torch_stream

device = tvm_ffi.device("cuda:0")
torch.cuda.current_stream = lambda: SimpleNamespace(device=torch.device("cuda:0"), cuda_stream=4242)
before = tvm_ffi.get_raw_stream(device)
with torch_stream(tvm_ffi):
    print(tvm_ffi.get_raw_stream(device))
print(tvm_ffi.get_raw_stream(device) == before)
with torch_stream(None):
    print(tvm_ffi.get_raw_stream(device) == before)
"""


def test_the_kernels_of_tvm_run_on_torchs_stream() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4242", "True", "True"], done.stderr
