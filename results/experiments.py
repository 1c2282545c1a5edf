"""The table of experiments.md: a row for each run, over its seeds.

    python results/experiments.py runs/experiments [NAME ...]
    python results/experiments.py results/experiments.jsonl

In a directory, the runs are those in NAME-seedN. With --json FILE, their outcomes are appended to
FILE, one a line.
"""
import argparse
import json
import re
from pathlib import Path
from statistics import mean

from table import common, read_log

MEASURES = dict(loss="loss", positive="positive_similarity", negative="negative_similarity")


def outcomes(root, names=()):
    """What the finished runs below `root` came to: a list of dict, in the order of `names`."""
    if Path(root).is_file():
        found = [json.loads(line) for line in Path(root).read_text().splitlines()]
    else:
        found = []
        for path in sorted(Path(root).glob("*-seed*/args.json")):
            args, log = common.read_json(path), read_log(path.parent)
            if args["epochs"] in log:
                last = log[args["epochs"]]
                row = dict(run=re.sub("-seed.*", "", path.parent.name), seed=args["seed"])
                row |= {name: last[measure] for name, measure in MEASURES.items()}
                row |= dict(knn_before=log[0]["knn_top1"], knn=last["knn_top1"])
                found.append(row | {x: args[x] for x in ("precision", "environment")})
    names = [*names] or [*dict.fromkeys(row["run"] for row in found)]
    return sorted((x for x in found if x["run"] in names), key=lambda x: names.index(x["run"]))


def table(found):
    """Lines of Markdown: means over the runs of a name, and the range of kNN accuracies."""
    lines = [f"| run | runs | {' | '.join(MEASURES)} | kNN | from – to |", "|---" * 7 + "|"]
    for name in dict.fromkeys(row["run"] for row in found):
        rows = [row for row in found if row["run"] == name]
        means = " | ".join(f"{mean(row[x] for row in rows):.2f}" for x in MEASURES)
        knn = [row["knn"] for row in rows]
        words = f"{mean(knn):.0f} | {min(knn):.0f} – {max(knn):.0f}"
        lines.append(f"| {name} | {len(rows)} | {means} | {words} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", metavar="DIR or FILE")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    found = outcomes(args.root, args.names)
    if args.json:
        with open(args.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    print("\n".join(table(found)))


if __name__ == "__main__":
    common.launch(main)
