#!/usr/bin/env python3
"""How far the training losses of runs on the same tokens lie apart.

    tools/compare_loss.py BASE OTHER... [--svg FILE]

Each is a run folder of `parallax train` (or its metrics.jsonl). Differences are OTHER minus BASE, in nats a
token, step by step where both have logged one; runs logged with train.log_every = 1 show every step. The
picture has the training losses above and the differences below.
"""
import argparse
import json
import os
import sys

COLOURS = ["#555555", "#d0752c", "#2c6fd0", "#3a9d5d", "#a03c9b"]
WIDTH, HEIGHT, LEFT, GAP = 640, 150, 60, 26


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


def name_of(run):
    return os.path.basename(os.path.normpath(run)).removesuffix(".jsonl")


# One set of axes at height `top` with a line for each named {step: value}.
def panel(top, title, lines):
    steps = [step for _, _, points in lines for step in points]
    values = [value for _, _, points in lines for value in points.values()]
    low, high = min(values), max(values)

    def place(step, value):
        x = LEFT + (WIDTH - LEFT - 10) * (step - min(steps)) / max(max(steps) - min(steps), 1)
        return f"{x:.1f},{top + HEIGHT * (high - value) / ((high - low) or 1):.1f}"

    parts = [f'<text x="{LEFT}" y="{top - 8}">{title}, steps {min(steps)} to {max(steps)}</text>',
             f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - 10}" height="{HEIGHT}" fill="none" stroke="#bbb"/>']
    marks = [low, high] + ([0.0] if low < 0 < high else [])
    for value in marks:
        y = top + HEIGHT * (high - value) / ((high - low) or 1)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    if 0.0 in marks:
        parts.append(f'<path d="M{place(min(steps), 0)}L{place(max(steps), 0)}" stroke="#bbb"/>')
    for _, colour, points in lines:
        path = " ".join(place(step, value) for step, value in sorted(points.items()))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
    return parts


def picture(base, others):
    first = losses(base, "train")
    curves = [(name_of(run), colour, losses(run, "train")) for run, colour in zip([base] + others, COLOURS)]
    gaps = [(name, colour, {step: points[step] - first[step] for step in points if step in first})
            for name, colour, points in curves[1:]]
    parts = panel(GAP, "training loss, nats a token", curves)
    parts += panel(HEIGHT + 2.5 * GAP, f"difference from {name_of(base)}", gaps)
    legend = 2 * HEIGHT + 3.5 * GAP
    for i, (name, colour, _) in enumerate(curves):
        parts.append(f'<text x="{LEFT + 190 * i}" y="{legend}" fill="{colour}">{name}</text>')
    size = f'width="{WIDTH}" height="{legend + 10}" font-family="sans-serif" font-size="12"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' \
           f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("others", nargs="+")
    parser.add_argument("--svg", help="write a picture to this file")
    options = parser.parse_args()
    head = ["run", "kind", "steps", "base ends", "ends", "max |gap|", "mean |gap|", "mean gap", "last 20"]
    rows = [[name_of(other), kind] + row(options.base, other, kind)
            for other in options.others for kind in ("train", "eval")]
    widths = [max(len(line[i]) for line in [head] + rows) for i in range(len(head))]
    for line in [head] + rows:
        print("  ".join(cell.rjust(width) if i > 1 else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(line, widths))))
    if options.svg:
        with open(options.svg, "w") as file:
            file.write(picture(options.base, options.others))


if __name__ == "__main__":
    main()
