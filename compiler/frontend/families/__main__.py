"""`python -m moec.compiler.frontend.families [--json] [NAMES]`: the table of families."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from dataclasses import asdict

from moec.compiler.frontend.families_table import TOLERANCE, check_families


def main() -> None:
    parser = argparse.ArgumentParser(description="Try every MoE family of transformers on a tiny random model.")
    parser.add_argument("names", nargs="*", help="model types (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    if not options.json:
        print(f"| family | traced | verified | max abs error (<= {TOLERANCE:g}) | router raised | ops | reason |")
        print("|---|---|---|---|---|---|---|")
    for row in check_families(options.names):
        rows.append(row)
        if not options.json:
            marks = ["yes" if mark else "-" for mark in (row.traced, row.verified)]
            ops = " ".join(f"{op}:{count}" for op, count in row.ops.items())
            raised = "yes" if row.raised else "-"
            print(f"| {row.name} | {marks[0]} | {marks[1]} | {row.error:.1e} | {raised} | {ops} | {row.reason} |", flush=True)
    if options.json:
        print(json.dumps({"tolerance": TOLERANCE, "families": [{**asdict(row), "ok": row.ok} for row in rows]}))
    else:
        print(f"\n{sum(row.ok for row in rows)} of {len(rows)} agree with eager execution")


if __name__ == "__main__":
    main()
