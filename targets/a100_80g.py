"""NVIDIA A100 SXM with 80 GB."""

from moec.targets import Target, cuda

TARGET = Target(
    name="a100-80g",
    description="NVIDIA A100 SXM, 80 GB",
    kind="cuda",
    tvm=cuda("sm_80", 166_912),
    multiprocessors=108,
    memory_bytes=80 * 10**9,
    mem_bw_gb_s=2039.0,
    peak_f32_tflops=19.5,
    peak_bf16_tflops=312.0,
    peak_int8_tops=624.0,
    sources=("https://www.nvidia.com/en-us/data-center/a100/",),
)
