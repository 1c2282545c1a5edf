"""The tables of results/README.md, section by section, from the runs in results/.

    python results/studies.py

Figures are top-1 in percent, means and standard deviations over seeds. In miniature, linear
accuracy is that at one learning rate of the classifier for all runs of a directory (RATES), the
best for all of them together: what each run chooses for itself adds noise. Where one has chosen
another, `python linear_eval.py RUN --cached --lrs 0.3 --json RUN/result-lr-0.3.json` measures it.
"""
import argparse
import json
import statistics
from collections import defaultdict
from functools import cache
from itertools import combinations, product
from pathlib import Path

import table
from table import BATCH_SIZES, MINIATURE, PUBLISHED, common, in_words, protocol

RESULTS = Path(__file__).resolve().parent
RATES = dict(longer=0.3, small=0.1)
SHORT = MINIATURE.replace("60", "15")
MEASURES = dict(linear="linear", probe="probe", knn="kNN")

# Tables: {row: (method, batch size, flags other than those of MINIATURE or SHORT)}.
BY_LOSS = {
    "SimCo, dual temperature": ("SimCo", 256, ""),
    "SimCo, DCL": ("SimCo", 256, "loss dcl"),
    "SimCo, InfoNCE": ("SimCo", 256, "loss infonce"),
    "SimCo, InfoNCE as `--dt-m 1`": ("SimCo", 256, "dt-m 1.0"),
    "SimCo, InfoNCE, `--lr 0.06`": ("SimCo", 256, "lr 0.06, loss infonce"),
    "SimMoCo, dual temperature": ("SimMoCo", 256, ""),
    "SimMoCo, DCL": ("SimMoCo", 256, "loss dcl"),
    "SimMoCo, InfoNCE": ("SimMoCo", 256, "loss infonce"),
    "SimMoCo, InfoNCE, `--lr 0.06`": ("SimMoCo", 256, "lr 0.06, loss infonce"),
    "SimCo at 64, dual temperature": ("SimCo", 64, ""),
    "SimCo at 64, DCL": ("SimCo", 64, "loss dcl"),
    "SimCo at 64, InfoNCE": ("SimCo", 64, "loss infonce"),
    "SimCo at 64, InfoNCE, `--lr 0.06`": ("SimCo", 64, "lr 0.06, loss infonce"),
}
BY_VIEWS = {
    "SimCo": ("SimCo", 256, ""),
    "SimMoCo": ("SimMoCo", 256, ""),
    "SimMoCo, `--symmetric`": ("SimMoCo", 256, "symmetric"),
    "MoCo v2, `--symmetric --moco-k 4096`": ("MoCo v2", 256, "moco-k 4096, symmetric"),
}
IN_SHORT = {
    "MoCo v2, 65536 keys": ("MoCo v2", 256, ""),
    "MoCo v2, 4096 keys": ("MoCo v2", 256, "moco-k 4096"),
    "MoCo v2, 256 keys": ("MoCo v2", 256, "moco-k 256"),
    "SimMoCo": ("SimMoCo", 256, ""),
    "SimMoCo, `--symmetric`": ("SimMoCo", 256, "symmetric"),
    "SimMoCo, `--symmetric --moco-m 0`": ("SimMoCo", 256, "moco-m 0.0, symmetric"),
    "SimCo": ("SimCo", 256, ""),
}


def at_rate(run, result):
    """The linear accuracy of a run at the learning rate of RATES; None if it is not known."""
    rate = RATES.get(run.parent.name, result["linear_lr"])
    path = run / f"result-lr-{rate}.json"
    if result["linear_lr"] == rate:
        return result["linear_top1"]
    if not path.exists():
        return None
    other = common.read_json(path)
    right = other["linear_lr"] == rate and other["knn_top1"] == result["knn_top1"]
    right = right and protocol(other) | dict(lrs=None) == protocol(result) | dict(lrs=None)
    common.require(right, f"'{path}' is of another network, rate or protocol")
    return other["linear_top1"]


def as_key(method, batch_size, flags):
    """A setting, whatever the order of its flags."""
    return method, batch_size, frozenset(filter(None, flags.split(", ")))


@cache
def load():
    """The evaluated runs of RESULTS, by setting: {as_key(...): [figures of a run, dict]}; and notes
    on those that are left out, a list of str."""
    (evaluated, notes), settings = table.evaluated_runs(RESULTS), defaultdict(list)
    protocols = defaultdict(set)
    for run, args, figures in evaluated:
        if "linear_top1" in figures:
            figures |= dict(knn=figures["knn_top1"], probe=figures.get("probe_top1"))
            figures |= dict(linear=at_rate(run, figures), log=table.read_log(run), run=run)
            key = as_key(table.TITLES[args.method], args.batch_size, table.changed_flags(args))
            settings[key].append(figures)
            names = ("epochs", "batch_size", "cached", "seed")  # those of all versions
            protocols[run.parent].add(tuple(figures["protocol"][name] for name in names))
    for directory, found in protocols.items():
        common.require(len(found) == 1, f"'{directory}' has runs of several protocols: {found}")
    for key, runs in settings.items():  # as each directory has its own learning rate
        same = len({figures["run"].parent for figures in runs}) == 1
        common.require(same, f"there are runs of {key} in several directories")
    return settings, notes


def runs_of(method, batch_size, flags):
    """The figures of the runs of a setting, a list of dict; empty if there is none."""
    return load()[0].get(as_key(method, batch_size, flags), [])


def in_cells(*setting):
    """The cells of MEASURES, list of str."""
    runs = runs_of(*setting)
    common.require(runs, f"there is no run of {setting}")
    return [in_words([figures[name] for figures in runs]) for name in MEASURES]


def markdown(header, rows):
    """The lines of a table."""
    first, *others = (f"| {' | '.join(row)} |" for row in [header, *rows])
    return [first, "|---" * len(header) + "|", *others]


def by_setting(common_flags, settings):
    """One of the tables above."""
    rows = []
    for name, (method, batch_size, flags) in settings.items():
        setting = method, batch_size, f"{common_flags}, {flags}"
        rows.append([name, str(len(runs_of(*setting))), *in_cells(*setting)])
    return markdown(["", "runs", *MEASURES.values()], rows)


def authors():
    """The authors' code beside ours. What was trained by theirs, outside this repository, is in
    authors.jsonl."""
    theirs, rows = defaultdict(list), []
    for line in (RESULTS / "authors.jsonl").read_text().splitlines():
        run = json.loads(line)
        theirs[table.TITLES[run["method"]], run["epochs"]].append(run)
    for (method, epochs), runs in theirs.items():
        flags, directory = {60: (MINIATURE, "longer"), 15: (SHORT, "small")}[epochs]
        same = all(run["linear_lr"] == RATES[directory] for run in runs)
        common.require(same, "authors.jsonl has another learning rate of the classifier")
        name = f"{method}, {epochs} epochs"
        cells = [in_words([run[f"{measure}_top1"] for run in runs]) for measure in MEASURES]
        rows.append([name, "theirs", str(len(runs)), *cells])
        count = str(len(runs_of(method, 256, flags)))
        rows.append([name, "ours", count, *in_cells(method, 256, flags)])
    return markdown(["", "code", "runs", *MEASURES.values()], rows)


def cached_top1(figures):
    """The linear accuracy without crops of a run with all images, from cached.json."""
    cached = common.read_json(figures["run"] / "cached.json")
    wrong = any(cached[name] != figures[name] for name in ("epoch", "images"))
    wrong = wrong or not cached["protocol"]["cached"] or figures["protocol"]["cached"]
    common.require(not wrong, f"'{figures['run']}/cached.json' does not fit to result.json")
    return cached["linear_top1"]


def with_all_images():
    """The runs of the recipe; and at width 16, where other work beside it blurred the speed."""
    rows = []
    for flags, method in product(("", "width 16"), PUBLISHED):
        for size, published in zip(BATCH_SIZES, PUBLISHED[method]):
            for figures in runs_of(method, size, flags):
                log = figures["log"].values()
                speed = statistics.median(x["images_per_second"] for x in log if x["epoch"])
                top1 = figures["linear"], cached_top1(figures), figures["probe"], figures["knn"]
                linear, cached, probe, knn = (f"{x:.2f}" for x in top1)
                row = [method, str(size), linear, cached, probe, published, knn, f"{speed:.0f}"]
                if flags:
                    row[0], row[5], row[7] = f"{method}, {flags}", "–", "–"
                rows.append(row)
    header = ["", "batch", "linear", "linear, `--cached`", "probe", "published", "kNN"]
    return markdown([*header, "images/s"], rows)


def by_batch_size():
    """The miniature, three by three."""
    sizes, rows = (64, 256, 1024), []
    for method in PUBLISHED:
        cells = [" / ".join(in_cells(method, size, MINIATURE)) for size in sizes]
        rows.append([method, *cells])
    return markdown(["batch size", *map(str, sizes)], rows)


def distances():
    """How far the probe is below linear accuracy on cached features."""
    columns = (
        ("540", 1024, MINIATURE),
        ("585", 256, SHORT),
        ("2340", 64, SHORT),
        ("2340", 256, MINIATURE),
        ("9360", 64, MINIATURE),
        ("full size: 9600", 1024, ""),
        ("full size: 39 000", 256, ""),
    )
    rows = [["batch size", *(str(size) for _, size, _ in columns)]]
    for method in PUBLISHED:
        cells = []
        for _, size, flags in columns:
            values = []
            for figures in runs_of(method, size, flags):
                linear = figures["linear"] if flags else cached_top1(figures)
                known = None not in (linear, figures["probe"])
                values.append(linear - figures["probe"] if known else None)
            cells.append(in_words(values))
        rows.append([method, *cells])
    return markdown(["steps", *(steps for steps, _, _ in columns)], rows)


def noise():
    """How far seeds of one setting are apart, pooled over the settings that have several."""
    rows = []
    for epochs in (60, 15):
        groups = [x for (*_, flags), x in load()[0].items() if f"epochs {epochs}" in flags]
        deviations, largest = [], []
        for name in ("linear_top1", *MEASURES):
            several = [[run[name] for run in runs if run[name] is not None] for runs in groups]
            several = [values for values in several if len(values) > 1]
            if not several:
                deviations.append("–")
                largest.append("–")
                continue
            freedom = sum(len(values) - 1 for values in several)
            squares = sum((len(x) - 1) * statistics.variance(x) for x in several)
            pairs = [abs(a - b) for values in several for a, b in combinations(values, 2)]
            deviations.append(f"{(squares / freedom) ** 0.5:.2f} ({len(several)})")
            largest.append(f"{max(pairs):.2f}")
        rows.append([f"{epochs} epochs: standard deviation (settings)", *deviations])
        rows.append([f"{epochs} epochs: largest difference of two", *largest])
    return markdown(["", "linear, as chosen", "linear, one rate", "probe", "kNN"], rows)


def few_labels():
    """What results/few_labels.py has measured."""
    run = RESULTS / "longer" / "simco-seed2"
    top1 = common.read_json(run / "result.json")["labels_per_class"]
    rows = []
    for count, trained in top1["trained"].items():
        rows.append([count, in_words(trained), in_words(top1["untrained"][count])])
    return markdown(["images of each class", "trained", "untrained"], rows)


def tables():
    """{section: lines of Markdown}."""
    return {
        "Which method wins?": with_all_images(),
        "Which batch size?": by_batch_size(),
        "Is dual temperature worth it?": by_setting(MINIATURE, BY_LOSS),
        "Is SimCo better because it trains on two views?": by_setting(MINIATURE, BY_VIEWS),
        "How far apart are probe and linear accuracy?": distances(),
        "What decides in a short run?": by_setting(SHORT, IN_SHORT),
        "How much do seeds differ?": noise(),
        "Is it the authors' method?": authors(),
        "How many labels are enough?": few_labels(),
    }


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("\n".join(f"## {name}\n\n" + "\n".join(x) + "\n" for name, x in tables().items()))
    print("\n".join(load()[1]))


if __name__ == "__main__":
    common.launch(main)
