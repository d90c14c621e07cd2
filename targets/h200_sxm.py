"""NVIDIA H200 SXM. The vendor states tensor peaks with sparsity; dense ones are half."""

from moec.targets import Target, cuda

TARGET = Target(
    name="h200-sxm",
    description="NVIDIA H200 SXM, 141 GB",
    kind="cuda",
    tvm=cuda("sm_90a", 232_448),
    multiprocessors=132,
    memory_bytes=141 * 10**9,
    mem_bw_gb_s=4800.0,
    peak_f32_tflops=67.0,
    peak_bf16_tflops=989.5,
    peak_int8_tops=1979.0,
    sources=("https://www.nvidia.com/en-us/data-center/h200/",),
)
