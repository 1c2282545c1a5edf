"""Markdown tables of all evaluated runs below a directory.

    python results/table.py runs/

First the published table and the one in miniature, where there are runs for it; then a row for each
other setting: what differs from the recipe, which is the scripts' defaults. A row's figures
are means over seeds. Runs that are left out, or in part, are named below the tables.
"""
import argparse
import json
import os
import re
import statistics
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import moco_v2  # noqa: E402
import simco  # noqa: E402
import simmoco  # noqa: E402

TITLES = dict(moco_v2="MoCo v2", simmoco="SimMoCo", simco="SimCo")
RECIPES = {x.__name__: vars(x.arguments().parse_args([])) for x in (moco_v2, simmoco, simco)}
# Flags that do not make another row: a table has columns for the batch size, and means over seeds.
IGNORED = (*common.MACHINE_FLAGS, "images", "method", "seed", "batch_size", "precision")
IGNORED += ("knn_every",)

BATCH_SIZES = (64, 128, 256, 512, 1024)
PUBLISHED = {  # by Zhang et al., arXiv 2203.17248
    "MoCo v2": "52.58 54.40 53.28 51.47 48.90".split(),
    "SimMoCo": "54.02 54.93 54.11 52.45 49.70".split(),
    "SimCo": "58.04 58.29 58.35 57.08 55.34".split(),
}
PROBE_NOTE = """
A dash marks what was not measured. The code of the published figures (Zhang et al., 2022) can
compute only one linear accuracy: that of an online probe, a linear classifier trained alongside the
network. Compare the published figures with our probe.
"""
MINIATURE = "subset 10000, epochs 60, width 16"  # as changed_flags writes it


def read_args(run):
    """The flags of a run, as a Namespace."""
    args = common.read_json(Path(run, "args.json"))
    common.require(args.get("method") in RECIPES, f"'{run}' is not a run of this project")
    return Namespace(**{"images": None, **args})


def changed_flags(run_args):
    """The flags that are not the recipe's, in words: "epochs 15, symmetric". And which images it
    was trained on, where runs of one directory have several datasets of the same name."""
    recipe, words = {**common.RETIRED, **RECIPES[run_args.method]}, []
    for name, value in vars(run_args).items():
        if name in recipe and name not in IGNORED and value != recipe[name]:
            words.append(f"{name.replace('_', '-')} {value}".removesuffix(" True"))
    if getattr(run_args, "which_images", None):
        words.append(run_args.which_images)
    return ", ".join(words)


def in_words(values):
    """Their mean, and their standard deviation if there are several; None stands for no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    note = f" (of {len(known)})" if len(known) < len(values) else ""
    return f"{statistics.mean(known):.2f}{spread}{note}"


def read_log(run):
    """The lines of log.jsonl, {epoch: dict}, without those that were cut short."""
    path, entries = Path(run, "log.jsonl"), {}
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            entries[entry["epoch"]] = entry
        except (ValueError, LookupError, TypeError):
            continue
    return entries


def run_directories(root):
    """The directories below `root` that have a result.json, sorted, also those that are linked."""
    found = {}
    for directory, children, files in os.walk(root, followlinks=True):
        place = os.path.realpath(directory)
        if place in found:
            children.clear()  # a link back
        else:
            found[place] = Path(directory) if "result.json" in files else None
    return sorted(filter(None, found.values()))


def evaluated_runs(root):
    """The evaluated runs below a directory, each one once: [(directory, flags, result)], with the
    log's last entry in `result`; and notes on what is left out, a list of str."""
    runs, first, notes, images = [], defaultdict(dict), [], defaultdict(set)
    for run in run_directories(root):
        path = run / "result.json"
        result = common.read_json(path)
        if not (run / "args.json").exists():
            notes.append(f"Not shown: {path}, without args.json.")
            continue
        run_args, log = read_args(run), read_log(run)
        # An earlier version's args.json has no images; its result may.
        run_args.images = run_args.images or result.get("images")
        # A run counts once, whatever its precision. Unknown images may be any.
        key = (run_args.method, run_args.batch_size, run_args.seed, changed_flags(run_args))
        twins = first[key] if "linear_top1" in result else {}
        if result.get("images") not in (None, run_args.images):
            notes.append(f"Not shown: {run}, evaluated on {result['images']}.")
        elif "epoch" in result and result["epoch"] != run_args.epochs:
            notes.append(f"Not shown: {run}, evaluated after epoch {result['epoch']}.")
        elif run_args.images in twins or None in twins or (twins and run_args.images is None):
            twin = [*twins.values()][0]
            notes.append(f"Not shown: {run}, of the same flags and seed as {twin}.")
        else:
            twins[run_args.images] = run
            if len(log) <= run_args.epochs:
                last = max(log, default=0)
                notes.append(f"Log with gaps: {run}, {len(log)} lines, the last of epoch {last}.")
            processes = re.search(r"(\d+) x ", getattr(run_args, "environment", "1 x "))
            result["processes"] = processes and processes[1]
            runs.append((run, run_args, {**log.get(run_args.epochs, {}), **result}))
            images[run_args.dataset].add(run_args.images)
    name_datasets(runs, images, notes)
    return runs, notes


def name_datasets(runs, images, notes):
    """Give the flags of each run an attribute which_images: a str where there are several datasets
    of its name, None elsewhere. images: {name: set of fingerprints}. Adds to the notes."""
    unknown = []
    for run, run_args, _ in runs:
        known = images[run_args.dataset] - {None}
        run_args.which_images = None
        if len(known) > 1:
            run_args.which_images = f"images: {run_args.images or 'unknown'}"
        elif known and run_args.images is None:
            unknown.append(run)
    if unknown:
        text = f"{len(unknown)} of an earlier version, such as {unknown[0].name}"
        notes.append(f"Perhaps trained on other images: {text}.")


def finished_runs(root):
    """The results of the evaluated runs below a directory, {(flags, method, batch size): list of
    dict}, sorted, and notes on those that are left out, a list of str."""
    (runs, notes), results, seen = evaluated_runs(root), defaultdict(list), set()
    for _, run_args, result in runs:
        flags, size = changed_flags(run_args), run_args.batch_size
        start = (flags, "untrained", size)
        if "untrained" in result and (*start, run_args.seed) not in seen:
            seen.add((*start, run_args.seed))  # methods have the same start
            results[start].append(result["untrained"])
        if "linear_top1" in result:
            results[flags, TITLES[run_args.method], size].append(result)
    common.require(results, f"no evaluated run below '{root}'; python linear_eval.py RUN_DIR first")
    return dict(sorted(results.items())), notes


def protocol(result):
    """How a result was evaluated. An earlier version has the learning rates as keys only."""
    return dict(result.get("protocol", {}), lrs=[*result.get("held_out_loss", [])])


def table_by_batch_size(heading, rows):
    """Markdown, without empty columns. rows: {name: the cells, one for each of BATCH_SIZES}."""
    columns = [[f"batch {size}" for size in BATCH_SIZES], *rows.values()]
    columns = [column for column in zip(*columns) if set(column[1:]) != {"–"}]
    header, *lines = zip(["", *rows], *columns)
    text = f"**{heading}** (test top-1 in percent: linear / probe / kNN)\n\n"
    text += f"| {' | '.join(header)} |\n" + "|---" * len(header) + "|\n"
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(root):
    """All tables, and the notes."""
    results, notes = finished_runs(root)
    figures, tables = {}, []
    for (flags, method, size), rows in results.items():
        names = ("linear_top1", "probe_top1", "knn_top1")
        figures[flags, method, size] = [in_words([row.get(name) for row in rows]) for name in names]
        if len({str(protocol(row)) for row in rows}) > 1:
            notes.append(f"Evaluated by several protocols: {method}, batch {size}, {flags}.")
        if len({row.get("processes") for row in rows}) > 1:  # BatchNorm is per process
            notes.append(f"On several numbers of processes: {method}, batch {size}, {flags}.")

    def cells(flags, method):
        return [" / ".join(figures.pop((flags, method, size), ["–"])) for size in BATCH_SIZES]

    recipe = {method: cells("", method) for method in PUBLISHED}
    miniature = {method: cells(MINIATURE, method) for method in PUBLISHED}
    if any(cell != "–" for row in recipe.values() for cell in row):
        rows = {}
        for method, published in PUBLISHED.items():
            rows |= {method: recipe[method], f"{method}, published": published}
        title = "CIFAR-100, ResNet-18, 200 epochs"
        tables.append(table_by_batch_size(title, rows) + PROBE_NOTE)
    if any(cell != "–" for row in miniature.values() for cell in row):
        title = f"In miniature: {MINIATURE}; linear at the rate that each run chose"
        tables.append(table_by_batch_size(title, miniature))
    if figures:  # all that is in neither table
        text = "**Other settings** (top-1 in percent on the test set)\n\n"
        text += "| method | flags | batch | linear | probe | kNN | seeds |\n" + "|---" * 7 + "|\n"
        for (flags, method, size), words in figures.items():
            seeds = len(results[flags, method, size])
            text += f"| {method} | {flags} | {size} | {' | '.join(words)} | {seeds} |\n"
        tables.append(text)
    return "\n".join([*tables, *notes]).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", default="runs", metavar="DIR", help="default: runs")
    print(table(parser.parse_args().root))


if __name__ == "__main__":
    common.launch(main)
