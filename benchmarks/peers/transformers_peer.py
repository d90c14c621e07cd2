"""Hugging Face transformers on the CPU, with the fastest settings that a short trial finds.

Tried: float32 and bfloat16 weights; experts implementations eager, batched_mm and grouped_mm; sdpa and eager attention;
decoding plain with a growing cache, or compiled with a static one. Prefill is never compiled (one graph per prompt
length costs more than it saves) and may use another experts implementation than decode: a live model can switch.
The dtype is the one that answers the whole request soonest. What would not fit in memory is skipped with a line.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from benchmarks.peers import PeerUnavailableError, Speed

DTYPES = (torch.float32, torch.bfloat16)
EXPERTS = ("grouped_mm", "eager", "batched_mm")
ATTENTIONS = ("sdpa", "eager")
GATHER_LIMIT = 2**30  # batched_mm copies K experts' weights for every token; above this many bytes it is not tried


@dataclass(frozen=True)
class Setting:
    """How one phase runs."""

    experts: str
    attention: str = "sdpa"
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.experts} experts, {self.attention} attention{', compiled, static cache' * self.compiled}"


@dataclass(frozen=True)
class Plan:
    """The whole request: which dtype, and a setting for each phase."""

    dtype: torch.dtype
    prefill: Setting
    decode: Setting


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the checkpoint's weights once loaded (files hold 2 bytes a weight)."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) * dtype.itemsize // 2


def gathered_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """What batched_mm copies in one layer: gate and up of every chosen expert of every token."""
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    return int(tokens * config.num_experts_per_tok * 2 * width * config.hidden_size * dtype.itemsize)


class Runner:
    """A loaded model and one fixed request of random token ids."""

    def __init__(self, folder: Path, dtype: torch.dtype, prompt_tokens: int, new_tokens: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.requires_grad_(requires_grad=False).train(mode=False)
        for parameter in self.model.parameters():  # some still lie in the mapped file, whose pages the kernel may drop
            parameter.data = parameter.data.clone()
        self.config = self.model.config
        ids = torch.randint(self.config.vocab_size, (1, prompt_tokens + new_tokens), generator=torch.Generator().manual_seed(0))
        self.prompt, self.continuation = ids[:, :prompt_tokens], torch.chunk(ids[:, prompt_tokens:], new_tokens, dim=1)
        self.positions = torch.arange(prompt_tokens, ids.shape[1])[:, None, None].unbind()  # made before the clock runs
        self.total = ids.shape[1]
        self.compiled: dict[Setting, Callable[..., Any]] = {}

    def use(self, setting: Setting) -> Any:
        """Switch the model; returns its forward, compiled where the setting says so."""
        self.model.set_experts_implementation(setting.experts)
        self.model.set_attn_implementation(setting.attention)
        if not setting.compiled:
            return self.model
        if setting not in self.compiled:
            torch.compiler.reset()  # otherwise Dynamo counts every setting as one more recompilation of the same code
            self.compiled = {setting: torch.compile(self.model.forward, dynamic=False)}
        return self.compiled[setting]

    @torch.inference_mode()
    def run(self, prefill: Setting, decode: Setting) -> Speed:
        cache = StaticCache(self.config, self.total) if decode.compiled else DynamicCache(config=self.config)
        step = partial(self.use(prefill), past_key_values=cache, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        step(input_ids=self.prompt)
        prefill_s = time.perf_counter() - start
        step = partial(self.use(decode), past_key_values=cache, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for token, position in zip(self.continuation, self.positions, strict=True):
            step(input_ids=token, position_ids=position)
        decode_s = time.perf_counter() - start
        return Speed(self.prompt.shape[1] / prefill_s, len(self.continuation) / decode_s)


def best_of(runner: Runner, prefill: Setting, decode: Setting) -> Speed:
    """The better of two runs after a warm-up, phase by phase."""
    runs = [runner.run(prefill, decode) for _ in range(3)][1:]
    return Speed(max(r.prefill_tokens_per_s for r in runs), max(r.decode_tokens_per_s for r in runs))


def trials(runner: Runner, dtype: torch.dtype) -> Iterator[tuple[str, Setting, float]]:
    """(phase, setting, tokens/s) of everything that fits."""
    tokens = runner.prompt.shape[1]
    gathers = gathered_bytes(runner.config, tokens, dtype)
    plain = Setting("grouped_mm")
    for experts, attention in product(EXPERTS, ATTENTIONS):
        setting = Setting(experts, attention)
        if experts == "batched_mm" and gathers > GATHER_LIMIT:
            print(f"skipped: prefill with batched_mm would gather {gathers / 2**30:.1f} GiB a layer", file=sys.stderr)
            yield "decode", setting, best_of(runner, plain, setting).decode_tokens_per_s
        else:
            speed = best_of(runner, setting, setting)
            yield "prefill", setting, speed.prefill_tokens_per_s
            yield "decode", setting, speed.decode_tokens_per_s
    for experts in EXPERTS:
        setting = Setting(experts, compiled=True)
        yield "decode", setting, best_of(runner, plain, setting).decode_tokens_per_s


def search(folder: Path, prompt_tokens: int, new_tokens: int) -> Plan:
    """The plan whose request of prompt_tokens + new_tokens takes least time."""
    plans: list[tuple[float, Plan]] = []
    for dtype in DTYPES:
        needed, available = weight_bytes(folder, dtype) * 11 // 10, available_memory()
        if needed > available:
            print(f"skipped: {dtype} needs {needed / 2**30:.1f} of {available / 2**30:.1f} GiB", file=sys.stderr)
            continue
        runner = Runner(folder, dtype, prompt_tokens, new_tokens)
        best: dict[str, tuple[float, Setting]] = {}
        for phase, setting, rate in trials(runner, dtype):
            print(f"{dtype}, {phase}, {setting}: {rate:.1f} tokens/s", file=sys.stderr)
            if rate > best.get(phase, (0.0, setting))[0]:
                best[phase] = (rate, setting)
        (prefill_rate, prefill), (decode_rate, decode) = best["prefill"], best["decode"]
        plans.append((prompt_tokens / prefill_rate + new_tokens / decode_rate, Plan(dtype, prefill, decode)))
        del runner
        gc.collect()
    if not plans:
        raise PeerUnavailableError(f"transformers: {folder} does not fit in memory in any of {DTYPES}")
    return min(plans, key=lambda plan: plan[0])[1]


def measure(model: Path, prompt_tokens: int, new_tokens: int, threads: int, repetitions: int, plan: Plan | None = None) -> list[Speed]:
    """Searches the fastest plan first, unless one is given."""
    config = json.loads((model / "config.json").read_text())
    if "num_experts_per_tok" not in config:
        raise PeerUnavailableError(f"transformers: {model} is no Mixture-of-Experts checkpoint (no num_experts_per_tok)")
    torch.set_num_threads(threads)
    plan = plan or search(model, prompt_tokens, new_tokens)
    print(f"fastest: {plan.dtype}; prefill {plan.prefill}; decode {plan.decode}", file=sys.stderr)
    runner = Runner(model, plan.dtype, prompt_tokens, new_tokens)
    return [runner.run(plan.prefill, plan.decode) for _ in range(repetitions + 1)][1:]
