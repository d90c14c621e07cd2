"""`moec bench`: how fast an artifact runs, beside what the machine's memory allows."""

from __future__ import annotations

import time
from itertools import product
from typing import Annotated, Any

import typer

from moec.compiler.cli.common import ArtifactArgument, JsonOption, format_size, parse_list, print_json
from moec.runtime.errors import MoecError
from moec.runtime.host import available_cores, cpu_name
from moec.runtime.manifest import Manifest
from moec.runtime.measure import Sample, measure_speed, peak_memory_bytes, read_bandwidth, reset_peak_memory
from moec.runtime.session import load


def command(
    artifact: ArtifactArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="N,...", help="Tokens of a prompt.")] = "128",
    new: Annotated[str, typer.Option("--new", "-n", metavar="N,...", help="Tokens to decode.")] = "64",
    batch: Annotated[str, typer.Option("--batch", "-b", metavar="N,...", help="Sequences at once.")] = "1",
    threads: Annotated[str | None, typer.Option("--threads", "-t", metavar="N,...", help="Threads; all cores unless given.")] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Runs that count, after one to warm up.")] = 5,
    json: JsonOption = False,
) -> None:
    """Measure speed and memory for every combination of the lists, and print one table.

    Tokens are random; tokenising and sampling are not part of it. Peak memory includes the part of mapped weight files that was
    read. The roofline fraction is decoded tokens a second times the weight bytes that a token reads, over the read bandwidth that
    this run measured with as many threads (for a GPU, over the bandwidth in its datasheet); for one sequence only. Experts are those
    that ran for a decoded token in a layer, counted where they ran; a model that skips experts reads so much less, which the
    roofline takes into account (the ONNX backend does not count).
    """
    lists = [
        parse_list(threads, "-t") if threads is not None else [available_cores()],
        parse_list(prompt, "-p"),
        parse_list(new, "-n"),
        parse_list(batch, "-b"),
    ]
    results: list[dict[str, Any]] = []
    for count in lists[0]:
        results += _bench(artifact, count, list(product(*lists[1:])), repetitions)
    if json:
        print_json({"artifact": artifact, "cpu": cpu_name(), "results": results, **(results[0] if len(results) == 1 else {})})
    else:
        _print_table(results)


def _bench(artifact: str, threads: int, cases: list[tuple[int, ...]], repetitions: int) -> list[dict[str, Any]]:
    """The results of all cases with a number of threads, each a flat object."""
    reset_peak_memory()
    results: list[dict[str, Any]] = []
    start = time.perf_counter()
    with load(artifact, threads=threads, max_sequences=max(batch for _, _, batch in cases)) as session:
        load_ms = 1e3 * (time.perf_counter() - start)
        manifest = session.artifact.manifest
        stated = float(manifest.target.get("mem_bw_gb_s") or 0) if manifest.target.get("kind") == "cuda" else 0.0
        for prompt, new, batch in cases:
            if prompt + new > session.executor.context_length:
                raise MoecError(f"-p {prompt} -n {new}: more than the context of {session.executor.context_length} tokens")
            speed = measure_speed(session, prompt, new, batch, repetitions)
            results.append(
                {
                    "prompt_tokens": prompt,
                    "new_tokens": new,
                    "batch": batch,
                    "threads": threads,
                    "repetitions": repetitions,
                    **_flat("prefill_tokens_per_s", speed.prefill_tokens_per_s),
                    **_flat("decode_tokens_per_s", speed.decode_tokens_per_s),
                    **_flat("time_to_first_token_ms", speed.time_to_first_token_ms),
                    "load_ms": load_ms,
                    "peak_memory_bytes": peak_memory_bytes(),
                    "weight_bytes": manifest.weight_bytes,
                    "bytes_per_token": bytes_per_token(manifest),
                    "experts_per_token": speed.experts_per_token,
                    "skipped_bytes_per_token": speed.skipped_bytes_per_token,
                }
            )
    bandwidth = 1e9 * stated or read_bandwidth(threads)
    for result in results:
        read = result["bytes_per_token"]
        known = read is not None and result["batch"] == 1
        result["read_bandwidth_bytes_per_s"] = bandwidth
        ran = read - result["skipped_bytes_per_token"] if known else 0
        result["roofline_fraction"] = result["decode_tokens_per_s"] * ran / bandwidth if known else None
    return results


def bytes_per_token(manifest: Manifest) -> int | None:
    """Weight bytes that decoding a token reads, as the compiler stated them."""
    sizes = manifest.raw.get("sizes")
    value = sizes.get("bytes_per_token") if isinstance(sizes, dict) else None
    return value if isinstance(value, int) else None


def _flat(name: str, sample: Sample) -> dict[str, float]:
    return {name: sample.mean, f"{name}_sd": sample.sd}


def _print_table(results: list[dict[str, Any]]) -> None:
    columns = ["threads", "prompt", "new", "batch", "prefill tok/s", "decode tok/s", "first token ms", "load ms", "peak memory"]
    columns += ["experts", "roofline"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---:|" * len(columns))
    for result in results:
        cells = [str(result[key]) for key in ("threads", "prompt_tokens", "new_tokens", "batch")]
        measured = ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_ms")
        cells += [str(Sample(result[key], result[f"{key}_sd"])) for key in measured]
        cells += [f"{result['load_ms']:.0f}", format_size(result["peak_memory_bytes"])]
        cells.append("" if result["experts_per_token"] is None else f"{result['experts_per_token']:.2f}")
        cells.append("" if result["roofline_fraction"] is None else f"{100 * result['roofline_fraction']:.0f} %")
        print("| " + " | ".join(cells) + " |")
    first = results[0]
    read = first["bytes_per_token"]
    print(f"\nweights {format_size(first['weight_bytes'])}", end="")
    print("" if read is None else f", a token reads {format_size(read)}", end="")
    bandwidths = {r["threads"]: r["read_bandwidth_bytes_per_s"] for r in results}
    print("; memory reads at " + ", ".join(f"{b / 1e9:.1f} GB/s ({t} threads)" for t, b in bandwidths.items()))
