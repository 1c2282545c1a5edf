"""Learning curves: the kNN accuracy of runs over their epochs.

    pip install matplotlib
    python results/curves.py results/small -o results/small.svg    # methods, symmetric variants
    python results/curves.py runs --all -o curves.png              # every run below a directory

A line is a run. Runs that differ in the seed alone have one colour.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from linear_eval import TITLES, changed_flags, read_args  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("directory", type=Path)
    add("--all", action="store_true", help="not only the methods as they are, and symmetric")
    add("-o", "--out", required=True, metavar="FILE", help="an .svg or .png file")
    args = parser.parse_args()

    runs = {}  # directory: (title, list of flags)
    for path in sorted(log.parent for log in args.directory.rglob("log.jsonl")):
        run_args = read_args(path)
        runs[path] = TITLES[run_args.method], changed_flags(run_args).split(", ")
    common_flags = set.intersection(*(set(flags) for _, flags in runs.values()))

    matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same file every time
    figure, axes = plt.subplots(figsize=(8, 4.5))
    colours = {}
    for path, (title, flags) in runs.items():
        own = ", ".join(flag for flag in flags if flag not in common_flags)
        if not args.all and own not in ("", "symmetric"):
            continue
        log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        measured = [entry for entry in log if entry["knn_top1"] is not None]
        epochs, accuracy = zip(*((entry["epoch"], entry["knn_top1"]) for entry in measured))
        name = f"{title} ({own})" if own else title
        label = None if name in colours else name
        colour = colours.setdefault(name, f"C{len(colours)}")
        style = "o--" if "symmetric" in own else "o-"
        axes.plot(epochs, accuracy, style, markersize=3, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="kNN top-1 on the test set, percent")
    axes.grid(alpha=0.3)
    axes.legend()
    metadata = {"Date": None} if args.out.endswith(".svg") else None
    figure.savefig(args.out, bbox_inches="tight", metadata=metadata)


if __name__ == "__main__":
    main()
