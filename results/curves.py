"""Learning curves: the kNN accuracy of runs over their epochs, from their args.json and log.jsonl.

    pip install matplotlib
    python results/curves.py results/small -o results/small.svg      # the methods and their symmetric variants
    python results/curves.py runs --all -o curves.png                # every run below a directory

A line is a run; runs that differ in the seed alone have one colour.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from linear_eval import TITLES, read_run_args, settings  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--all", action="store_true", help="runs with other flags too, not only the methods as they are")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="an .svg or .png file")
    args = parser.parse_args()

    matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same file every time
    figure, axes = plt.subplots(figsize=(8, 4.5))
    styles = {}
    for path in sorted(args.directory.rglob("log.jsonl")):
        run_args = read_run_args(path.parent)
        own = settings(run_args)[1]
        if not args.all and own not in ("", "symmetric"):
            continue
        log = [json.loads(line) for line in path.read_text().splitlines()]
        points = [(entry["epoch"], entry["knn_top1"]) for entry in log if entry["knn_top1"] is not None]
        name = TITLES[run_args["method"]] + (f" ({own})" if own else "")
        label = None if name in styles else name
        colour = styles.setdefault(name, f"C{len(styles)}")
        axes.plot(*zip(*points), "o--" if "symmetric" in own else "o-", markersize=3, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="kNN top-1 on the test set, percent")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, bbox_inches="tight", metadata={"Date": None} if args.out.endswith(".svg") else None)


if __name__ == "__main__":
    main()
