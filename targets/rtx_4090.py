"""NVIDIA GeForce RTX 4090. bf16 is the peak with 32-bit accumulation."""

from moec.targets import Target, cuda

TARGET = Target(
    name="rtx-4090",
    description="NVIDIA GeForce RTX 4090, 24 GB",
    kind="cuda",
    tvm=cuda("sm_89", 101_376),
    multiprocessors=128,
    memory_bytes=24 * 10**9,
    mem_bw_gb_s=1008.0,
    peak_f32_tflops=82.6,
    peak_bf16_tflops=165.2,
    peak_int8_tops=660.6,
    sources=("https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",),
)
