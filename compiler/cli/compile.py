"""`moec compile`: checkpoint -> artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.compiler.cli.common import DeviceOption, JsonOption, format_size, import_extra, print_json


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or a hub name that is in the local cache.")],
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="OUT.moec", help="The artifact to write.")] = None,
    target: Annotated[str, typer.Option(metavar="NAME|FILE", help="The hardware: see `moec targets`.")] = "cpu",
    backend: Annotated[str, typer.Option(metavar="tvm|onnx", help="What lowers the model.")] = "tvm",
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="What to do to the model: a file, or int4, int8, ...")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="The most that weights may take, such as 12GiB.")] = None,
    latency: Annotated[float | None, typer.Option(metavar="MS", help="The longest that decoding a token may take.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="The most KL divergence, in nats a token on held-out calibration text.")
    ] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Text that passes look at, or a folder of *.txt; repeatable.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="About how many tokens of it.")] = 1 << 16,
    statistics: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keeps what calibration measured: read if it is there, written if not.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of everything that is random.")] = 0,
    device: DeviceOption = None,
    resume: Annotated[bool, typer.Option(help="Keep what an interrupted run of the same work finished.")] = True,
    portable: Annotated[bool, typer.Option("--portable", help="ONNX backend: standard operators only.")] = False,
    activations: Annotated[
        str,
        typer.Option(
            metavar="float|int8|float16|bfloat16|fp8",
            help="Of products. TVM on GPUs: float (16 bits or more), or for prompts bfloat16, or fp8 with weights in it. ONNX Runtime: on a"
            " CPU float, or int8, about 1 % off; on a GPU float16 (as float says), or bfloat16.",
        ),
    ] = "float",
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(metavar="bfloat16|float32", help="What keys and values are kept in: bfloat16 on GPUs unless told, float32 on CPUs."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and its sizes; write nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Compile a model for one piece of hardware.

    Without a recipe or a budget nothing about the model changes: every weight keeps its value.
    """
    pipeline = import_extra("moec.compiler.pipeline", "compile")
    plan = pipeline.compile_model(
        model,
        output,
        target=target,
        backend=backend,
        recipe=recipe,
        memory=memory,
        latency=latency,
        max_kl=max_kl,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        statistics=statistics,
        seed=seed,
        device=device,
        resume=resume,
        dry_run=dry_run,
        portable=portable,
        activations=activations,
        kv_cache_dtype=kv_cache_dtype,
    )
    if json:
        print_json(plan.to_json())
        return
    print(f"{plan.model}: {plan.parameters:,} parameters, {plan.active_parameters:,} active a token, {plan.layers} layers")
    for row in plan.rows:
        print(
            f"  {row.role:<10} {row.format:<12} {row.tensors:>5} tensors {row.parameters:>17,} parameters"
            f" {format_size(row.bytes):>11} {row.bits_per_weight:6.2f} bits a weight"
        )
    print(f"weights {format_size(plan.weight_bytes)}, read a token {format_size(plan.bytes_per_token)}", end="")
    print(f", key/value cache {format_size(plan.cache_bytes_per_token)} a token in {plan.cache_dtype}")
    print("operations: " + ", ".join(f"{count} {op}" for op, count in plan.ops.items()))
    if output is not None and not dry_run:
        print(f"written to {output}")
