"""A line for each evaluated run below a directory: its accuracies, and statistics of its features.

    python results/runs.py results/longer
"""
import json
import sys
from pathlib import Path

NAMES = "linear_top1 probe_top1 knn_top1 alignment uniformity effective_rank".split()


def table(root):
    lines = ["| run | linear | probe | kNN | alignment | uniformity | effective rank |"]
    lines.append("|---" * 7 + "|")
    for path in sorted(Path(root).rglob("result.json")):
        last = (path.parent / "log.jsonl").read_text().splitlines()[-1]
        figures = {**json.loads(path.read_text()), **json.loads(last)}
        values = [figures.get(name) for name in NAMES]  # runs from before the probe have no more
        words = ["–" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {path.parent.name} | {' | '.join(words)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(sys.argv[1])))
