"""Any x86-64 processor with AVX2 and FMA (Haswell of 2013, Zen, and later)."""

from moec.targets import Target, llvm

TARGET = Target(
    name="x86-64-v3",
    description="x86-64 with AVX2",
    kind="cpu",
    tvm=llvm("x86-64-v3", mtriple="x86_64-unknown-linux-gnu"),
    features=(
        "avx2",
        "bmi1",
        "bmi2",
        "f16c",
        "fma",
        "movbe",
    ),
    sources=("https://gitlab.com/x86-psABIs/x86-64-ABI",),
)
