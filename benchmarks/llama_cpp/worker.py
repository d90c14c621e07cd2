"""Time one GGUF file with llama-cpp-python; prints one JSON object. Runs under llama.cpp's own Python.

    PEER_PYTHON -P benchmarks/llama_cpp/worker.py MODEL.gguf -p 128 -n 64 -t 2 -r 3

Like llama-bench it feeds random token ids and leaves out tokenisation and sampling; unlike it, decoding goes on after
the prompt. The first repetition warms up and is dropped. With --logits it feeds no random ids but those given, and
prints the logits of the last position.
"""

import argparse
import ctypes
import json
import random
import sys
import time
from typing import Any

import llama_cpp as lib  # type: ignore[import-not-found]  # lives in the environment of llama.cpp


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def keep_errors(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def decode(context: Any, tokens: list[int]) -> None:
    ids = (lib.llama_token * len(tokens))(*tokens)  # the batch only points at it
    if status := lib.llama_decode(context, lib.llama_batch_get_one(ids, len(tokens))):
        raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")


def run_once(context: Any, prompt: list[int], continuation: list[int]) -> dict[str, float]:
    lib.llama_memory_clear(lib.llama_get_memory(context), 1)  # 1: the data too
    start = time.perf_counter()
    decode(context, prompt)
    lib.llama_synchronize(context)
    middle = time.perf_counter()
    for token in continuation:
        decode(context, [token])
        lib.llama_get_logits_ith(context, -1)  # waits until they are computed
    end = time.perf_counter()
    return {
        "prefill_tokens_per_s": len(prompt) / (middle - start),
        "decode_tokens_per_s": len(continuation) / (end - middle),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=128)
    parser.add_argument("-n", "--new-tokens", type=int, default=64)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--logits", type=int, nargs="+", metavar="ID")
    options = parser.parse_args()

    lib.llama_log_set(keep_errors, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(options.model.encode(), lib.llama_model_default_params())
    if not model:
        print(f"llama.cpp cannot load {options.model}", file=sys.stderr)
        return 2
    settings = lib.llama_context_default_params()
    settings.n_ctx = len(options.logits or ()) + options.prompt_tokens + options.new_tokens
    settings.n_batch = settings.n_ubatch = max(512, options.prompt_tokens)
    settings.n_threads = settings.n_threads_batch = options.threads
    context = lib.llama_init_from_model(model, settings)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    if options.logits:
        decode(context, options.logits)
        print(json.dumps(lib.llama_get_logits_ith(context, -1)[:vocabulary]))
        return 0
    rng = random.Random(0)
    prompt = [rng.randrange(vocabulary) for _ in range(options.prompt_tokens)]
    continuation = [rng.randrange(vocabulary) for _ in range(options.new_tokens)]
    runs = [run_once(context, prompt, continuation) for _ in range(options.repetitions + 1)][1:]
    print(json.dumps({"system": lib.llama_print_system_info().decode(), "runs": runs}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
