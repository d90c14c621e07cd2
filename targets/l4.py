"""NVIDIA L4. The vendor states tensor peaks with sparsity; dense ones are half."""

from moec.targets import Target, cuda

TARGET = Target(
    name="l4",
    description="NVIDIA L4, 24 GB",
    kind="cuda",
    tvm=cuda("sm_89", 101_376),
    multiprocessors=58,
    memory_bytes=24 * 10**9,
    mem_bw_gb_s=300.0,
    peak_f32_tflops=30.3,
    peak_bf16_tflops=121.0,
    peak_int8_tops=242.5,
    sources=("https://www.nvidia.com/en-us/data-center/l4/",),
)
