"""results/ and README.md: each number has its run, and each run can be repeated."""
import json
import os
import re
import runpy
import subprocess

import pytest
from conftest import METHODS, ROOT

import common
import linear_eval

RUNS = sorted(path.parent for path in ROOT.glob("results/*/*/args.json"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name}/{run.name}")
def test_every_result_is_of_a_finished_run_that_can_be_repeated(run):
    older = dict(probe="query", cuda_graph="auto")  # a run from before these flags has none
    args = {**older, **json.loads((run / "args.json").read_text())}
    again = vars(METHODS[args["method"]].arguments().parse_args([f"@{run}/args.json"]))
    assert args.keys() == again.keys() | {"environment"}
    for name in again.keys() - set(common.MACHINE_FLAGS):
        assert again[name] == args[name], name
    log = [json.loads(line) for line in (run / "log.jsonl").open()]
    assert [entry["epoch"] for entry in log] == list(range(args["epochs"] + 1))
    result = json.loads((run / "result.json").read_text())
    assert result["epoch"] == args["epochs"]
    # Evaluated twice in the same precision: rounding moves less than a hundredth of the images.
    assert result["knn_top1"] == pytest.approx(log[-1]["knn_top1"], abs=1)


def test_the_tables_of_the_longer_runs_are_those_of_results_readme():
    script = runpy.run_path(str(ROOT / "results" / "runs.py"))
    each, means = script["tables"](ROOT / "results" / "longer")
    lines = (ROOT / "results" / "README.md").read_text().splitlines()
    missing = [line for line in each + means if line not in lines]
    assert len(each) > 2 and len(means) > 2 and not missing, missing


def test_the_rate_at_which_the_longer_runs_are_compared_is_the_best_for_all_of_them():
    script = runpy.run_path(str(ROOT / "results" / "runs.py"))
    results = [json.loads(path.read_text()) for path in ROOT.glob("results/longer/*/result.json")]
    losses = [r["held_out_loss"] for r in results if r["protocol"].get("chosen_by") == "loss"]
    assert len(losses) > 2
    assert min(losses[0], key=lambda rate: sum(x[rate] for x in losses)) == str(script["RATE"])


def test_the_tables_of_the_readme_are_those_of_results():
    lines = (ROOT / "README.md").read_text().splitlines()
    table = linear_eval.table(ROOT / "results").splitlines()
    assert RUNS and len(table) > 10
    missing = [line for line in table if line not in lines]
    assert not missing, missing


# A python3 that trains nothing, and fails where the flags have "dcl".
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  -c*) ;;
  *--table*) echo tables ;;
  *dcl*) exit 1 ;;
  linear_eval.py*) printf '{\\n "linear_top1": 1\\n}' >"$2/result.json" ;;
  *) while [ "$1" != --out ]; do shift; done; mkdir "$2" ;;
esac
"""


def test_table_sh_runs_what_is_missing_and_says_how_far_it_is(tmp_path):
    (tmp_path / "python3").write_text(STAND_IN)
    (tmp_path / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "JOBS": "1"}
    environment["RUNS"] = str(tmp_path / "runs")

    def run():
        command = ["bash", ROOT / "results" / "table.sh"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    first, second = run(), run()
    begun = set(re.findall(r"^(\S+) begins$", first.stdout, re.MULTILINE))
    present = {path.name for path in RUNS if path.parent.name == "longer"}
    assert present and present <= begun  # it would find these runs, and skip them
    failed = {name for name in begun if "dcl" in name}
    finished = {path.parent.name for path in tmp_path.glob("runs/*/result.json")}
    assert failed and finished == begun - failed
    assert first.stdout.startswith(f"0 of {len(begun)} runs are done\n")
    assert second.stdout.startswith(f"{len(finished)} of {len(begun)} runs are done\n")
    assert second.stdout.count(" begins") == len(failed)
    assert second.stderr.count("did not finish") == len(failed) and second.returncode != 0
    assert "tables" in second.stdout


def test_the_picture_of_accuracy_over_batch_size(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(ROOT / "results" / "batch_sizes.py"))
    command = ["batch_sizes.py", str(ROOT / "results"), "-o", str(tmp_path / "picture.svg")]
    monkeypatch.setattr("sys.argv", command)
    script["main"]()
    assert "<svg" in (tmp_path / "picture.svg").read_text()
