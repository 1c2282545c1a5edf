"""python tests/check_experiments.py DIR or FILE, as results/experiments.py: fails unless the runs
there have the outcomes that results/experiments.md explains, on each machine and with each seed."""
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))

import experiments  # noqa: E402

ORDERS = """
same-colours < before < usual
tiny-alpha < negatives-1
tiny-alpha < negatives-31
tiny-alpha < momentum-0.9999 < momentum-0
momentum-0.9999 < momentum-0.95
queue-65536 < queue-1024-momentum-0 < queue-1024
tiny-alpha < uniformity
""".split("\n")[1:-1]  # of kNN accuracies, where all runs of a line are there


def check(found):
    """How many orders there were to check."""
    machines, checked = defaultdict(dict), 0
    for row in found:
        figures = machines[row["precision"], row["environment"], row["seed"]]
        figures |= {row["run"]: row, "before": dict(knn=row["knn_before"])}
    for machine, rows in machines.items():
        for order in ORDERS:
            names = order.split(" < ")
            if rows.keys() >= {*names}:
                accuracies = [rows[name]["knn"] for name in names]
                assert accuracies == sorted(set(accuracies)), (*machine, order, accuracies)
                checked += 1
        if rows.keys() >= {"usual", "same-colours"}:
            assert rows["same-colours"]["loss"] < rows["usual"]["loss"], machine
        if rows.keys() >= {"alignment", "tiny-alpha"}:
            assert rows["alignment"]["negative"] > 0.99 > 0.1 > rows["tiny-alpha"]["negative"]
    return checked


if __name__ == "__main__":
    orders = check(experiments.outcomes(sys.argv[1]))
    print(f"{orders} outcomes are as experiments.md says")
    sys.exit(orders == 0)
