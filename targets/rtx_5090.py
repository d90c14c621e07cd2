"""NVIDIA GeForce RTX 5090. bf16 is the peak with 32-bit accumulation."""

from moec.targets import Target, cuda

TARGET = Target(
    name="rtx-5090",
    description="NVIDIA GeForce RTX 5090, 32 GB",
    kind="cuda",
    tvm=cuda("sm_120a", 101_376),
    multiprocessors=170,
    memory_bytes=32 * 10**9,
    mem_bw_gb_s=1792.0,
    peak_f32_tflops=104.8,
    peak_bf16_tflops=209.5,
    peak_int8_tops=838.0,
    sources=("https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",),
)
