"""Exact match on questions, by greedy generation with compiled artifacts.

    python -m benchmarks.task_accuracy ARTIFACT... --task QUESTIONS.jsonl [-n 100] [--max-new-tokens 160] [--threads N]

Each line of the task has `prompt` and `answer`. The answer is what follows "Answer:" in what the model writes (or all of it where the
prompt ends there), up to the end of the line; both are compared without spaces around them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moec import runtime

MARK = "Answer:"


def answer_of(prompt: str, written: str) -> str | None:
    r"""The answer in a text, or None.

    >>> answer_of("Q: 1 + 1?\nReasoning:", " 1 and 1 are 2.\nAnswer: 2\n\nQ:")
    '2'
    >>> answer_of("Q: 1 + 1?\nAnswer:", " 2\n"), answer_of("Q", "?")
    ('2', None)
    """
    whole = written if prompt.rstrip().endswith(MARK) else written.partition(MARK)[2]
    return whole.strip().partition("\n")[0].strip() or None


def accuracy(artifact: Path, questions: list[dict[str, str]], max_new_tokens: int, threads: int | None) -> tuple[int, int]:
    """How many are answered, and how many rightly."""
    texts = [""] * len(questions)
    with runtime.load(artifact, threads=threads) as session:
        prompts = [q["prompt"] for q in questions]
        for token in session.generate(prompts, max_new_tokens=max_new_tokens, stop="\n\n"):
            texts[token.index] += token.text
    found = [answer_of(q["prompt"], text) for q, text in zip(questions, texts, strict=True)]
    return sum(f is not None for f in found), sum(f == str(q["answer"]).strip() for f, q in zip(found, questions, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("-n", type=int, default=100, help="questions, from the beginning of the file")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    questions = [json.loads(line) for line in args.task.read_text().splitlines()[: args.n]]
    print("| artifact | weights MB | answered | exact match |\n|---|---|---|---|")
    for artifact in args.artifacts:
        answered, right = accuracy(artifact, questions, args.max_new_tokens, args.threads)
        size = sum(p.stat().st_size for p in (artifact / "weights").rglob("*") if p.is_file())
        print(f"| {artifact.name} | {size / 1e6:.1f} | {answered} / {len(questions)} | {right} / {len(questions)} |", flush=True)


if __name__ == "__main__":
    main()
