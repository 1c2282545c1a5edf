"""Accuracy over batch size: published (dashed) and measured, at full size and in miniature.

    pip install matplotlib
    python results/batch_sizes.py results -o results/batch_sizes.svg

A point is the mean over seeds, with a bar of one standard deviation if there are several. Both
panels have the same scale.
"""
import argparse
import statistics
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
from linear_eval import (  # noqa: E402
    BATCH_SIZES,
    MINIATURE_ROWS,
    PUBLISHED,
    RECIPE_ROWS,
    finished_runs,
)

COLOURS = {name: f"C{i}" for i, name in enumerate(MINIATURE_ROWS)}
PUBLISHED_STYLE = "^--"
STYLES = dict(probe_top1="s-", linear_top1="o:")


def draw_measured(axes, results, rows, measure):
    """A line over the batch size for each row of a table, see linear_eval.MINIATURE_ROWS."""
    for name, (flags, method) in rows.items():
        sizes, means, deviations = [], [], []
        for size in BATCH_SIZES:
            values = [row.get(measure) for row in results.get((flags, method, size), [])]
            values = [value for value in values if value is not None]
            if values:
                sizes.append(size)
                means.append(statistics.mean(values))
                deviations.append(statistics.stdev(values) if len(values) > 1 else 0)
        style = dict(fmt=STYLES[measure], color=COLOURS[name], markersize=4)
        axes.errorbar(sizes, means, deviations, **style)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="runs with their result.json are below it")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="an .svg or .png file")
    args = parser.parse_args()
    results, _ = finished_runs(args.directory)

    matplotlib.rcParams["svg.hashsalt"] = "batch_sizes"  # the same file every time
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.5), sharex=True, layout="constrained")
    left, right = panels
    for method, published in PUBLISHED.items():
        accuracies = [float(accuracy) for accuracy in published]
        left.plot(BATCH_SIZES, accuracies, PUBLISHED_STYLE, color=COLOURS[method], markersize=4)
    draw_measured(left, results, RECIPE_ROWS, "probe_top1")  # like the published figures
    for measure in STYLES:
        draw_measured(right, results, MINIATURE_ROWS, measure)
    left.set(title="full size: 200 epochs", ylabel="top-1 on the test set, percent")
    right.set(title="in miniature: 60 epochs")
    span = max(high - low for low, high in (axes.get_ylim() for axes in panels))
    for axes in panels:
        middle = sum(axes.get_ylim()) / 2
        axes.set(xlabel="batch size", xscale="log", ylim=(middle - span / 2, middle + span / 2))
        axes.set_xticks(BATCH_SIZES, BATCH_SIZES)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for name, colour in COLOURS.items():
        right.plot([], [], color=colour, label=name)
    styles = {"published (probe)": PUBLISHED_STYLE}
    styles |= {"measured, probe": STYLES["probe_top1"], "measured, linear": STYLES["linear_top1"]}
    for label, style in styles.items():
        right.plot([], [], style, color="grey", markersize=4, label=label)
    figure.legend(loc="outside lower center", ncols=4)
    metadata = {"Date": None} if args.out.endswith(".svg") else None
    figure.savefig(args.out, metadata=metadata)


if __name__ == "__main__":
    common.launch(main)
