"""Accuracy over batch size: measured (solid) beside published (dashed), full size beside miniature.

    pip install matplotlib
    python results/batch_sizes.py results -o results/batch_sizes.svg

A point is the mean over seeds, with bars of one standard deviation. Both panels have the same
scale, so that slopes can be compared.
"""
import argparse
import statistics
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from linear_eval import MINIATURE, PUBLISHED, SHORT_QUEUE, SIZES, finished_runs  # noqa: E402

MEASURES = dict(linear_top1="o-", probe_top1="s:")  # linear accuracy solid, the probe dotted
COLOURS = {title: f"C{i}" for i, title in enumerate((*PUBLISHED, f"MoCo v2, {SHORT_QUEUE}"))}


def draw_measured(axes, results, flags, title, label):
    """Lines over the batch size, of the runs of one method with these flags."""
    for name, style in MEASURES.items():
        sizes, means, deviations = [], [], []
        for size in SIZES:
            rows = results.get((flags, title, size), [])
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                sizes.append(size)
                means.append(statistics.mean(values))
                deviations.append(statistics.stdev(values) if len(values) > 1 else 0)
        colour, text = COLOURS[label], label if name == "linear_top1" else None
        axes.errorbar(sizes, means, deviations, fmt=style, color=colour, markersize=4, label=text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="an .svg or .png file")
    args = parser.parse_args()
    results, _ = finished_runs(args.directory)

    matplotlib.rcParams["svg.hashsalt"] = "batch_sizes"  # the same file every time
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained")
    for title, published in PUBLISHED.items():
        figures = [float(figure) for figure in published]
        panels[0].plot(SIZES, figures, "^--", color=COLOURS[title], markersize=4)
        draw_measured(panels[0], results, "", title, title)
        draw_measured(panels[1], results, MINIATURE, title, title)
    short = f"{MINIATURE}, {SHORT_QUEUE}"
    draw_measured(panels[1], results, short, "MoCo v2", f"MoCo v2, {SHORT_QUEUE}")
    panels[0].set(title="200 epochs, as published", ylabel="top-1 on the test set, percent")
    panels[1].set(title=MINIATURE)
    span = max(axes.get_ylim()[1] - axes.get_ylim()[0] for axes in panels)
    for axes in panels:
        middle = sum(axes.get_ylim()) / 2
        axes.set(xlabel="batch size", xscale="log", ylim=(middle - span / 2, middle + span / 2))
        axes.set_xticks(SIZES, SIZES)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = panels[1].get_legend_handles_labels()
    for style, label in (("^--", "published (probe)"), ("o-", "linear"), ("s:", "probe")):
        handles += axes.plot([], [], style, color="grey", markersize=4)
        labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    metadata = {"Date": None} if args.out.endswith(".svg") else None
    figure.savefig(args.out, metadata=metadata)


if __name__ == "__main__":
    main()
