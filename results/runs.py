"""Two tables of the evaluated runs below a directory: a row for each run, and one for each setting.

    python results/runs.py results/longer

A setting's figures are the mean and the standard deviation over its seeds, and its linear accuracy
is that with RATE as the classifier's learning rate: chosen for all runs together, because what one
run chooses for itself adds noise. `python linear_eval.py RUN --cached --lrs 0.3 --json
RUN/result-lr-0.3.json` measures it where a run has chosen another.
"""
import argparse
import re
from collections import defaultdict

from table import changed_flags, common, evaluated_runs, in_words, protocol, read_log

RATE = 0.3
STATISTICS = "probe_top1 knn_top1 effective_rank".split()


def read(run, run_args, figures):
    """What result.json and the last line of log.jsonl say; `at_rate`, the accuracy at RATE; of the
    training, its precision and the minutes that it took."""
    log = read_log(run)
    figures = {**vars(run_args), **log.get(run_args.epochs, {}), **figures}
    figures["flags"] = f"batch {run_args.batch_size}, {changed_flags(run_args)}"
    figures["minutes"] = round(sum(entry.get("seconds", 0) for entry in log.values()) / 60)
    at_rate = run / f"result-lr-{RATE}.json"
    other = common.read_json(at_rate) if at_rate.exists() else figures
    fits = all(other.get(name) == figures.get(name) for name in ("epoch", "images"))
    ours, theirs = protocol(figures), protocol(other)
    fits = fits and ours | dict(lrs=None) == theirs | dict(lrs=None)
    figures["at_rate"] = other["linear_top1"] if fits and other["linear_lr"] == RATE else None
    return figures


def tables(root):
    """Both tables, as two lists of lines, and notes on runs that are left out."""
    evaluated, notes = evaluated_runs(root)
    runs = {run: read(run, *rest) for run, *rest in evaluated if "linear_top1" in rest[1]}
    names = [run.name for run in runs]
    statistics = "probe | kNN | effective rank |"
    each = [f"| run | linear | its rate | at {RATE} | {statistics} precision | minutes |"]
    each.append("|---" * 9 + "|")
    settings, flags_of = defaultdict(list), defaultdict(set)
    for run, figures in runs.items():
        name = run.name if names.count(run.name) == 1 else str(run.relative_to(root))
        values = [figures.get(name) for name in ("linear_top1", "at_rate", *STATISTICS)]
        words = [in_words([value]) for value in values]  # runs from before the probe have few
        cells = [name, words[0], figures["linear_lr"], *words[1:], figures["precision"]]
        each.append(f"| {' | '.join(map(str, cells))} | {figures['minutes']} |")
        # With dt_m = 1 the weight is 1: that is InfoNCE, with other roundings.
        setting = re.sub("dt-m-1$", "loss-infonce", re.sub(r"-seed\d+$", "", name))
        flags = figures["flags"].replace("dt-m 1.0", "loss infonce")
        settings[setting, flags].append(values[1:])
        flags_of[setting].add(flags)
    means = [f"| setting | runs | linear at {RATE} | {statistics}", "|---" * 6 + "|"]
    for (setting, flags), rows in sorted(settings.items()):
        words = map(in_words, zip(*rows))
        setting += f" ({flags})" if len(flags_of[setting]) > 1 else ""
        means.append(f"| {setting} | {len(rows)} | {' | '.join(words)} |")
    return each, means, notes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", default="results/longer", metavar="DIR")
    each, means, notes = tables(parser.parse_args().root)
    print("\n".join([*each, "", *means, "", *notes]).strip())


if __name__ == "__main__":
    common.launch(main)
