"""The processor of this machine. Its bandwidth is not looked up but measured, by `moec bench`."""

import platform

from moec.runtime.host import cpu_features, cpu_name, memory_bytes
from moec.targets import Target, llvm

# x86-64 micro-architecture levels: https://gitlab.com/x86-psABIs/x86-64-ABI
LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    ("x86-64-v2", {"sse4_2", "ssse3", "popcnt"}),
)

# Beyond the level: the name in /proc/cpuinfo -> LLVM's.
EXTRAS = {
    "avx512_vnni": "avx512vnni",
    "avx512vbmi": "avx512vbmi",
    "avx512_bf16": "avx512bf16",
    "avx_vnni": "avxvnni",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "asimdhp": "fullfp16",
    "bf16": "bf16",
}


def describe_host(machine: str, features: frozenset[str]) -> tuple[str, tuple[str, ...]]:
    """TVM's target for a processor, and the instruction sets that code for it may use."""
    extras = tuple(name for name in EXTRAS if name in features)
    mattr = [f"+{EXTRAS[name]}" for name in extras]
    if machine in ("x86_64", "AMD64"):
        level, needed = next(((name, set(flags)) for name, flags in LEVELS if flags <= features), ("x86-64", set()))
        # LLVM halves vectors on this level unless told otherwise.
        wide = ["-prefer-256-bit"] if level == "x86-64-v4" else []
        return llvm(level, mattr + wide), (*sorted(needed), *extras)
    return llvm("generic", ["+neon", *mattr]), ("asimd", *extras)


_TVM, _FEATURES = describe_host(platform.machine(), cpu_features())

TARGET = Target(
    name="cpu",
    description=f"this machine: {cpu_name()}",
    kind="cpu",
    tvm=_TVM,
    memory_bytes=memory_bytes(),
    features=_FEATURES,
)
