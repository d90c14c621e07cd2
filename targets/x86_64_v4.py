"""Any x86-64 processor with AVX-512 F, BW, CD, DQ and VL (Skylake-SP of 2017, Zen 4, and later)."""

from moec.targets import Target, llvm

TARGET = Target(
    name="x86-64-v4",
    description="x86-64 with AVX-512",
    kind="cpu",
    tvm=llvm("x86-64-v4", ["-prefer-256-bit"], mtriple="x86_64-unknown-linux-gnu"),
    features=(
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512f",
        "avx512vl",
    ),
    sources=("https://gitlab.com/x86-psABIs/x86-64-ABI",),
)
