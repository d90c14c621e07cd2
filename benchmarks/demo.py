"""The first thing to try: compile a model for this machine, run a prompt, and compare with the original.

    python -m benchmarks.demo MODEL OUT.moec [--recipe int4] [--prompt TEXT] [--data FILE]

It prints the commands that it runs, and then one table: size, speed (128 tokens of prompt, 64 decoded, one sequence), and quality
on a text that the model was not trained on, beside the checkpoint as transformers runs it in bfloat16's values and float32 arithmetic.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parents[1] / "examples" / "data" / "prose_en.txt"
PROMPT_TOKENS = 128
NEW_TOKENS = 64
REPETITIONS = 5
EVALUATED_TOKENS = 4096


def moec(*arguments: str, show: bool = True) -> str:
    """Run a moec command and return what it prints; with `show`, print the command and pass its output on."""
    if show:
        print(f"\n$ moec {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "moec", *arguments], stdout=None if show else subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def measured(*arguments: str) -> dict[str, Any]:
    """The JSON object of a moec command."""
    result: dict[str, Any] = json.loads(moec(*arguments, "--json", show=False))
    return result


def original_decode_speed(model: str) -> float:
    """Tokens a second that transformers decodes, with its own key/value cache."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    speeds = []
    with torch.inference_mode():
        for _ in range(REPETITIONS + 1):
            state = network(torch.randint(network.config.vocab_size, (1, PROMPT_TOKENS)), use_cache=True)
            start = time.perf_counter()
            for _ in range(NEW_TOKENS):
                token = torch.randint(network.config.vocab_size, (1, 1))
                state = network(token, past_key_values=state.past_key_values, use_cache=True)
            speeds.append(NEW_TOKENS / (time.perf_counter() - start))
    return statistics.median(speeds[1:])


def main() -> None:
    """Compile, run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--data", default=str(TEXT))
    options = parser.parse_args()
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    moec("compile", options.model, "-o", options.out, "--recipe", options.recipe)
    moec("run", options.out, options.prompt, "-n", "64", "--temperature", "0.8", "--top-p", "0.9", "--seed", "1")
    print("\nmeasuring ...", flush=True)
    bench = measured("bench", options.out, "-p", str(PROMPT_TOKENS), "-n", str(NEW_TOKENS), "-r", str(REPETITIONS))
    text = ("--data", options.data, "--max-tokens", str(EVALUATED_TOKENS))
    quality = measured("eval", options.out, *text, "--reference", options.model)
    original = measured("eval", options.model, *text)
    original_bytes = sum(path.stat().st_size for path in Path(options.model).glob("*.safetensors"))
    speed = original_decode_speed(options.model)
    rows = [
        ("weights", f"{original_bytes / 1e6:.2f} MB", f"{bench['weight_bytes'] / 1e6:.2f} MB"),
        ("decode", f"{speed:.0f} tokens/s (transformers)", f"{bench['decode_tokens_per_s']:.0f} tokens/s"),
        ("perplexity", f"{original['perplexity']:.3f}", f"{quality['perplexity']:.3f}"),
        ("KL divergence from the original", "0", f"{quality['kl_divergence']:.4f} nats a token"),
        ("same best token as the original", "100 %", f"{100 * quality['top1_agreement']:.1f} %"),
    ]
    print(f"\n| | {options.model} | {options.out} |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
