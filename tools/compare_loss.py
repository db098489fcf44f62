#!/usr/bin/env python3
"""How far the training losses of runs on the same tokens lie apart.

    tools/compare_loss.py BASE OTHER...

Each is a run folder of `parallax train` (or its metrics.jsonl). Differences are OTHER minus BASE, in nats a
token, step by step where both have logged one; runs logged with train.log_every = 1 show every step.
"""
import json
import os
import sys


def losses(run, kind):
    path = os.path.join(run, "metrics.jsonl") if os.path.isdir(run) else run
    with open(path) as file:
        records = [json.loads(line) for line in file]
    return {record["step"]: record["loss"] for record in records if record["kind"] == kind}


def row(base, other, kind):
    first, second = losses(base, kind), losses(other, kind)
    steps = sorted(first.keys() & second.keys())
    if not steps:
        sys.exit(f"compare_loss: {base} and {other} have no {kind} step in common")
    gaps = [second[step] - first[step] for step in steps]
    sizes = [abs(gap) for gap in gaps]
    last = gaps[-min(len(gaps), 20):]
    return [
        f"{len(steps)}", f"{first[steps[-1]]:.4f}", f"{second[steps[-1]]:.4f}", f"{max(sizes):.4f}",
        f"{sum(sizes) / len(sizes):.4f}", f"{sum(gaps) / len(gaps):+.4f}", f"{sum(last) / len(last):+.4f}"
    ]


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__.strip())
    base = sys.argv[1]
    head = ["run", "kind", "steps", "base ends", "ends", "max |gap|", "mean |gap|", "mean gap", "last 20"]
    rows = [[other, kind] + row(base, other, kind) for other in sys.argv[2:] for kind in ("train", "eval")]
    widths = [max(len(line[i]) for line in [head] + rows) for i in range(len(head))]
    for line in [head] + rows:
        print("  ".join(cell.rjust(width) if i > 1 else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(line, widths))))


if __name__ == "__main__":
    main()
