"""Two tables of the evaluated runs below a directory: a row for each run, and one for each setting.

    python results/runs.py results/longer

A setting's figures are the mean and the standard deviation over its seeds, and its linear accuracy
is that with RATE as the classifier's learning rate: chosen for all runs together, because what one
run chooses for itself adds noise. `python linear_eval.py RUN --cached --lrs 0.3 --json
RUN/result-lr-0.3.json` measures it where a run has chosen another.
"""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from table import in_words

RATE = 0.3
STATISTICS = "probe_top1 knn_top1 effective_rank".split()


def read(run):
    """What result.json and the last line of log.jsonl say; `at_rate`, the accuracy at RATE; of the
    training, its precision and the minutes that it took."""
    figures = json.loads((run / "result.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    figures.update(log[-1], precision=json.loads((run / "args.json").read_text())["precision"])
    figures["minutes"] = round(sum(entry.get("seconds", 0) for entry in log) / 60)
    at_rate = run / f"result-lr-{RATE}.json"
    other = json.loads(at_rate.read_text()) if at_rate.exists() else figures
    figures["at_rate"] = other["linear_top1"] if other["linear_lr"] == RATE else None
    return figures


def tables(root):
    """Both tables, as two lists of lines."""
    runs = {path.parent.name: read(path.parent) for path in sorted(root.rglob("result.json"))}
    statistics = "probe | kNN | effective rank |"
    each = [f"| run | linear | its rate | at {RATE} | {statistics} precision | minutes |"]
    each.append("|---" * 9 + "|")
    settings = defaultdict(list)
    for name, figures in runs.items():
        values = [figures.get(name) for name in ("linear_top1", "at_rate", *STATISTICS)]
        words = [in_words([value]) for value in values]  # runs from before the probe have few
        cells = [name, words[0], figures["linear_lr"], *words[1:], figures["precision"]]
        each.append(f"| {' | '.join(map(str, cells))} | {figures['minutes']} |")
        # With dt_m = 1 the weight is 1: that is InfoNCE, with other roundings.
        setting = re.sub("dt-m-1$", "loss-infonce", re.sub(r"-seed\d+$", "", name))
        settings[setting].append(values[1:])
    means = [f"| setting | runs | linear at {RATE} | {statistics}", "|---" * 6 + "|"]
    for setting, rows in sorted(settings.items()):
        words = map(in_words, zip(*rows))
        means.append(f"| {setting} | {len(rows)} | {' | '.join(words)} |")
    return each, means


if __name__ == "__main__":
    each, means = tables(Path(sys.argv[1] if len(sys.argv) > 1 else "results/longer"))
    print("\n".join([*each, "", *means]))
