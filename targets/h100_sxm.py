"""NVIDIA H100 SXM. The vendor states tensor peaks with sparsity; dense ones are half."""

from moec.targets import Target, cuda

TARGET = Target(
    name="h100-sxm",
    description="NVIDIA H100 SXM, 80 GB",
    kind="cuda",
    tvm=cuda("sm_90a", 232_448),
    multiprocessors=132,
    memory_bytes=80 * 10**9,
    mem_bw_gb_s=3350.0,
    peak_f32_tflops=67.0,
    peak_bf16_tflops=989.5,
    peak_int8_tops=1979.0,
    sources=("https://www.nvidia.com/en-us/data-center/h100/",),
)
