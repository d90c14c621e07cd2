"""Do two artifacts of one model agree? The same recipe compiled for a processor and for a GPU, say (there with
`--kv-cache-dtype float32`, which processors have).

    python -m benchmarks.two_artifacts FIRST SECOND --data TEXT [--prompts 20] [--prompt-tokens 32] [-n 64] [--tie 1e-3] [--json]

Both go through the same text: first in one call, then token by token, and the logits of the second are compared with those of the first
(largest difference, over the largest logit; share of positions with the same best token). Then both continue prompts from the text
greedily. A difference counts only if the two best logits of the first differ by more than `--tie` where the tokens part. It needs
neither the checkpoint nor a compiler.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec import runtime
from moec.runtime.errors import MoecError
from moec.runtime.session import Session

Logits = NDArray[np.float32]


def read(session: Session, ids: Sequence[int], steps: int) -> Logits:
    """Logits [len(ids), V] of a text, the last `steps` of them token by token."""
    with session.sequence() as sequence:
        many = sequence.prefill(ids[: len(ids) - steps], all_logits=True)
        return np.concatenate([many, *(sequence.decode(token).reshape(1, -1) for token in ids[len(ids) - steps :])])


def compare(first: Session, second: Session, ids: Sequence[int], steps: int) -> dict[str, float]:
    """How far the logits of two artifacts are apart."""
    a, b = (read(session, ids, steps) for session in (first, second))
    same = a.argmax(-1) == b.argmax(-1)
    return {"largest_difference": float(np.abs(a - b).max() / np.abs(a).max()), "same_best": float(same.mean())}


def margin(session: Session, ids: Sequence[int]) -> float:
    """The difference between the two best logits after these tokens."""
    best = np.sort(read(session, ids, 0)[-1])[-2:]
    return float(best[1] - best[0])


def spread(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """`count` pieces of `length` tokens, spread evenly over a text."""
    starts = np.linspace(0, max(0, len(ids) - length - 1), count).astype(int)
    return [list(ids[start : start + length]) for start in starts]


def partings(
    prompts: Sequence[list[int]], wanted: Sequence[list[int]], found: Sequence[list[int]], margin: Callable[[list[int]], float], tie: float
) -> dict[str, Any]:  # fmt: skip
    """How many continuations are the same, and where the others part.

    Args:
        margin: the difference between the two best logits after some tokens, by what continued as wanted.
        tie: margins that do not count.
    """
    same, ties, different = 0, 0, []
    for number, (prompt, a, b) in enumerate(zip(prompts, wanted, found, strict=True)):
        if a == b:
            same += 1
            continue
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        gap = margin(prompt + a[:at])
        ties += gap <= tie
        if gap > tie:
            different.append({"prompt": number, "token": at, "margin": gap})
    return {"same": same, "parted_at_ties": ties, "different": different}


def greedy(session: Session, prompts: Sequence[list[int]], n: int) -> list[list[int]]:
    """A session's greedy continuations."""
    return [[t.id for t in session.generate(prompt, max_new_tokens=n, ignore_eos=True)] for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--tie", type=float, default=1e-3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        with runtime.load(args.first) as first, runtime.load(args.second) as second:
            ids = first.encode(args.data.read_text(), special=False)
            length = min(512, len(ids), *(session.executor.context_length for session in (first, second)))
            prompts = spread(ids, args.prompts, args.prompt_tokens)
            found: dict[str, Any] = {**compare(first, second, ids[:length], min(16, length // 2))}
            wanted, other = (greedy(session, prompts, args.n) for session in (first, second))
            found |= {"prompts": len(prompts), "tokens": args.n}
            found |= partings(prompts, wanted, other, lambda tokens: margin(first, tokens), args.tie)
    except MoecError as error:
        parser.exit(2, f"{error}\n")
    if args.json:
        print(json.dumps(found))
        return
    difference, best = found["largest_difference"], found["same_best"]
    print(f"logits: largest difference {difference:.1e} of the largest, the same best token at {best:.2%}")
    print(f"continued: {found['same']} of {found['prompts']} the same for {args.n} tokens, {found['parted_at_ties']} part at ties")
    for row in found["different"]:
        print(f"prompt {row['prompt']} parts at token {row['token']}, where the best two logits differ by {row['margin']:.4f}")


if __name__ == "__main__":
    main()
