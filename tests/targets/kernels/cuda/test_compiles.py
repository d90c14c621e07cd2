"""Every kernel compiles to machine code of the GPUs that it is for, without one; the options' needs are what the kernels take."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tvm import IRModule

from moec.compiler.cuda_code import cuda_compiler, machine_code
from moec.compiler.measure.build import generate, kernel_functions
from moec.compiler.measure.cases import Case
from moec.targets import Target, get_target
from moec.targets.kernels.cuda import tuned
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.linear import LinearSpec, prefill_func, split_func
from moec.targets.kernels.cuda.matrices import Projection
from moec.targets.kernels.cuda.projections import ProjectionsSpec, projections_func
from moec.targets.kernels.cuda.space import candidates, default, limits, needs
from tests.targets.kernels.cuda.packed import MULTIPROCESSORS

# A format of each kind in one kernel: every width of the planes, symmetric and not, groups within a block, of a block and of a row.
UP = ("int2_g64", "int3_g32_asym", "int8_g128", "bf16")
DOWN = ("int4_g64", "int8_channel_asym", "bf16", "int6_g128")
FP8 = Layer(4, 2, 264, 200, ("fp8_block128", "fp8_channel", "int4_g128", "bf16"), "fp8_block128")
RAGGED = Layer(4, 2, 264, 200, ("int4_g64", "fp8_block128", "bf16", "int4_g64"), "int3_g32_asym", widths=(40, 200, 8, 136))
MIXED = Layer(4, 2, 264, 200, UP, DOWN)
WIDE = Layer(4, 2, 264, 200, "int3_g32", "int4_g64", "float32")
NARROW = Layer(4, 2, 264, 200, ("fp8_block128", "fp8_channel", "fp8_channel", "fp8_block128"), "fp8_block128", "fp8")
PLAIN = Layer(3, 1, 128, 72, "int4_g128", "int4_g128", gated=False)
GATED = Layer(64, 8, 2048, 1024, "int4_g128", "int4_g128")

needs_compiler = pytest.mark.skipif(cuda_compiler() is None, reason="neither nvcc nor NVRTC is installed")


def case(kernel: str, layer: Layer, tokens: int, activation: str = "silu", biases: bool = False) -> Case:
    return Case.of(kernel, layer, default(kernel, layer, tokens), tokens, activation=activation, biases=biases)


SMALL = case("decode", Layer(4, 2, 264, 200, ("int3_g32_asym", "bf16", "bf16", "bf16"), "int4_g64"), 3, biases=True)
FOR_HOPPER = [
    case("decode", MIXED, 3, "clamped_swiglu", biases=True),
    case("decode", WIDE, 1, "gelu"),
    case("decode", PLAIN, 8, "relu_squared"),
    case("prefill", MIXED, 8, "clamped_swiglu", biases=True),
    case("prefill", WIDE, 4),
    case("prefill", PLAIN, 96, "quick_gelu"),
    Case.of("prefill", PLAIN, {**default("prefill", PLAIN, 96), "tiles": 2, "exact": 0, "residency": 1, "cluster": 2}),
    case("decode", FP8, 2),
    case("prefill", FP8, 32),
    case("decode", RAGGED, 3, biases=True),
    case("prefill", RAGGED, 24, biases=True),
    *(
        Case.of("prefill", NARROW, options, biases=True)
        for options in candidates("prefill", NARROW, 256)
        if options.get("chunk") and (options["tokens"], options["cluster"]) in ((64, 2), (128, 1))
    ),
]


def arch_of(target: Target) -> str:
    return str(json.loads(target.tvm)["arch"])


@cache
def compiler() -> str:
    found = cuda_compiler()
    assert found is not None
    return found


def entries(code: bytes) -> set[str]:
    """The names of the kernels in machine code."""
    assert code[:4] == b"\x7fELF"
    return {name.decode() for name in re.findall(rb"\.text\.([A-Za-z0-9_]+)", code)}


@needs_compiler
@pytest.mark.parametrize("target", ["a100-80g", "l4"])
def test_decode_kernels_compile_for_several_architectures(target: str) -> None:
    """The kernels of few tokens use nothing that came after compute capability 8.0, or do without it there."""
    _, source = generate(SMALL, get_target(target))
    assert entries(machine_code(source, arch_of(get_target(target)), compiler())) >= {"gate_up_kernel", "down_kernel"}


@needs_compiler
@pytest.mark.parametrize("name", ["a100-80g", "rtx-4090", "rtx-5090"])
def test_kernels_of_many_tokens_compile_for_several_architectures(name: str) -> None:
    target = get_target(name)
    for layer in (replace(WIDE, dtype="bfloat16"), MIXED if name == "a100-80g" else WIDE):  # of many formats it takes long
        wanted = Case.of("prefill", layer, default("prefill", layer, 2048, *limits(target)), activation="clamped_swiglu", biases=True)
        _, source = generate(wanted, target)
        assert {f"{kernel}_kernel" for kernel in wanted.functions} <= entries(machine_code(source, arch_of(target), compiler()))


@needs_compiler
@pytest.mark.parametrize("wanted", FOR_HOPPER, ids=lambda c: f"{c.kernel}-{c.layer.formats[:9]}-{c.layer.dtype}")
def test_kernels_compile_for_hopper(wanted: Case) -> None:
    executable, source = generate(wanted, get_target("h100"))
    assert {f"{name}_kernel" for name in wanted.functions} <= entries(machine_code(source, arch_of(get_target("h100")), compiler()))
    assert executable is not None


@pytest.mark.skipif(cuda_compiler() != "nvcc", reason="nvcc says what its assembler thinks of the products")
@pytest.mark.parametrize(("layer", "options"), [
    (GATED, {"tokens": 128, "tiles": 2, "stages": 4, "cluster": 2}),
    (GATED, {"tokens": 128, "tiles": 2, "stages": 6, "cluster": 4, "groups": 1, "residency": 2, "halved": 1}),
    (GATED, {"tokens": 256, "tiles": 1, "stages": 6, "cluster": 4, "halved": 1}),
    (replace(GATED, gate_up="bf16", down="bf16"), {"tokens": 256, "tiles": 1, "stages": 6, "cluster": 4, "halved": 1}),
    (NARROW, {"tokens": 64, "tiles": 2, "stages": 4, "cluster": 2, "ring": 3, "chunk": 64, "buffers": 2}),
])  # fmt: skip
def test_products_overlap(layer: Layer, options: dict[str, int], tmp_path: Path) -> None:
    """The assembler waits for each product where it cannot show that nothing else writes their registers meanwhile."""
    rest = {"terms": 1, "exact": 0, "residency": 1, "depth": 2, "batch": 1, "multiprocessors": 132}
    _, source = generate(Case.of("prefill", layer, rest | options), get_target("h100"))
    (tmp_path / "kernels.cu").write_text(source)
    command = ["nvcc", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "kernels.cubin"), str(tmp_path / "kernels.cu")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "gate_up_kernel" in said
    assert "serialized" not in said


@needs_compiler
def test_blocks_that_are_to_fit_on_a_multiprocessor_limit_registers() -> None:
    wanted = Case.of("gate_up", PLAIN, {**default("gate_up", PLAIN, 1), "residency": 3}, 1)
    assert "__launch_bounds__(256, 3) gate_up_kernel(" in generate(wanted, get_target("h100"))[1]


def test_linear_layers_compile() -> None:
    import tvm
    from tvm.target import Target as TvmTarget

    from moec.targets.kernels.cuda.pipeline import NAME

    spec = LinearSpec(FragmentLayout(1000, 520, "int4_g64_asym"), bias=True)
    one, eight = (ProjectionsSpec.of([Projection(spec.layout, bias=True)], MULTIPROCESSORS, tokens=t) for t in (1, 8))
    functions = {"one": projections_func(one), "eight": projections_func(eight), "many": prefill_func(spec), "split": split_func(520)}
    target = get_target("h100")
    module = IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    found = tvm.compile(module, TvmTarget(json.loads(target.tvm), host="llvm"), tir_pipeline=NAME).mod.imports
    (source,) = (str(part.inspect_source()) for part in found if part.kind == "cuda")
    assert {f"{name}_kernel" for name in functions} <= entries(machine_code(source, arch_of(target), compiler()))


def shape_of(function: Any) -> tuple[int, int]:
    """Threads of a block and bytes of its shared memory, as the function's text has them."""
    text = function.script()
    (threads,) = set(re.findall(r'launch_thread\("threadIdx.x", (\d+)\)', text))
    (words,) = re.findall(r'alloc_buffer\(\((\d+),\), "uint32", scope="shared.dyn"', text)
    return int(threads), 4 * int(words)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("layer", [MIXED, WIDE, PLAIN, RAGGED, Layer(64, 8, 2048, 1024, "int4_g128", "int4_g128")])
@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_needs_are_what_the_kernels_take(kernel: str, layer: Layer, tokens: int) -> None:
    for options in candidates(kernel, layer, tokens)[::5]:
        function = kernel_functions(Case.of(kernel, layer, options, tokens))[kernel]
        assert needs(kernel, layer, tokens, options) == shape_of(function)


@pytest.mark.parametrize("layer", [MIXED, WIDE, PLAIN, NARROW])
def test_needs_of_many_tokens_are_the_larger_kernel_s(layer: Layer) -> None:
    for options in candidates("prefill", layer, 256)[::4]:
        functions = kernel_functions(Case.of("prefill", layer, options))
        taken = [shape_of(functions[name]) for name in ("gate_up", "down")]
        assert needs("prefill", layer, 256, options)[0] == taken[0][0] == taken[1][0]
        assert needs("prefill", layer, 256, options)[1] >= max(shared for _, shared in taken) > 0


def test_device_functions_hide_none_of_another_file() -> None:
    """Each guard around device functions occurs once: what stands behind a second one of the name would be left out."""
    folder = Path(tuned.__file__).parent
    names = [name for path in folder.glob("*.py") for name in re.findall(r"#define (MOEC_\w+)$", path.read_text(), re.MULTILINE)]
    assert sorted(set(names)) == sorted(names)
