"""`moec run`: complete a prompt."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from moec.compiler.cli.common import ArtifactArgument, JsonOption, ThreadsOption, print_json
from moec.runtime import Token, load


def command(
    artifact: ArtifactArgument,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="The most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, metavar="X", help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, metavar="N", help="Sample among the N likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, metavar="X", help="Sample among the likeliest that sum to X.")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0, max=1, metavar="X", help="Drop what is less likely than X of the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    threads: ThreadsOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of the artifact first.")] = False,
    json: JsonOption = False,
) -> None:
    """Complete a prompt, streaming the text."""
    text = sys.stdin.read() if prompt == "-" else prompt
    start = time.perf_counter()
    with load(artifact, threads=threads, max_sequences=1, verify=verify) as session:
        loaded = time.perf_counter()
        ids = session.chat_ids([{"role": "user", "content": text}]) if chat else session.encode(text)
        stream = session.generate(
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop or (),
            ignore_eos=ignore_eos,
        )
        tokens: list[Token] = []
        times: list[float] = []
        for token in stream:
            tokens.append(token)
            times.append(time.perf_counter())
            if not json:
                print(token.text, end="", flush=True)
    if not json:
        print()
        return
    spent = times[-1] - times[0]
    print_json(
        {
            "prompt": text,
            "text": "".join(token.text for token in tokens),
            "tokens": [token.id for token in tokens],
            "logprobs": [token.logprob for token in tokens],
            "finish_reason": tokens[-1].finish_reason,
            "prompt_tokens": len(ids),
            "load_ms": 1e3 * (loaded - start),
            "time_to_first_token_ms": 1e3 * (times[0] - loaded),
            "decode_tokens_per_s": (len(tokens) - 1) / spent if spent > 0 and len(tokens) > 1 else None,
        }
    )
