"""results/ and README.md: each figure has its run, each run can be started again, and the tables say the same."""
import json
from pathlib import Path

import pytest
from conftest import METHODS, ROOT

import common
import linear_eval

RUNS = sorted(path.parent for path in (ROOT / "results").rglob("args.json"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_result_is_a_finished_run_that_can_be_repeated(run):
    args = json.loads((run / "args.json").read_text())
    again = vars(METHODS[args["method"]].arguments().parse_args(["--like", str(run)]))
    assert {key: args[key] for key in again if key not in common.MACHINE_FLAGS} == {
        key: value for key, value in again.items() if key not in common.MACHINE_FLAGS
    }
    assert args.keys() - again.keys() == {"environment"}
    assert not Path(args["data"]).is_absolute() and not Path(args["out"]).is_absolute()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == list(range(args["epochs"] + 1))
    result = json.loads((run / "result.json").read_text())
    assert result["epoch"] == args["epochs"]
    # Measured anew for the result, in the same precision; a hundredth of the test images is more than rounding moves.
    assert result["knn_top1"] == pytest.approx(log[-1]["knn_top1"], abs=1)


def test_the_tables_of_the_readme_are_those_of_results():
    readme = (ROOT / "README.md").read_text()
    tables = linear_eval.table(ROOT / "results").split("\n\n**")
    for table in ("**" + table.removeprefix("**").strip() for table in tables):
        assert table in readme, table
    section = readme.partition("## Results")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert set(rows) == {line for table in tables for line in table.splitlines() if line.startswith("|")}
