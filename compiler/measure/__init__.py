"""Measuring the experts kernels on a GPU: libraries of kernels are built where there is a compiler, checked and timed where there is a GPU.

The two may be one machine or two: `device`, `layer` and `reference` need torch and `tvm_ffi` only, and `build` writes beside the
libraries what they need of TVM's runtime.
"""
