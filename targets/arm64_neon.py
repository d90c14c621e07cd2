"""Any 64-bit Arm processor on Linux (Armv8-A with Advanced SIMD, as on Raspberry Pi 4 and Graviton)."""

from moec.targets import Target, llvm

TARGET = Target(
    name="arm64-neon",
    description="64-bit Arm with NEON",
    kind="cpu",
    tvm=llvm("generic", ["+neon"], mtriple="aarch64-unknown-linux-gnu"),
    features=("asimd",),
    sources=("https://developer.arm.com/documentation/ddi0487/latest/",),
)
