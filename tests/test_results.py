"""results/ and README.md: each number has its run, and each run can be repeated."""
import json
import math
import os
import re
import runpy
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT
from PIL import Image

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


def test_the_tables_of_the_readmes_are_those_of_results():
    pages = (ROOT / "README.md", ROOT / "results" / "README.md")
    lines = [line for page in pages for line in page.read_text().splitlines()]
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


def figures_script():
    pytest.importorskip("matplotlib")
    return SimpleNamespace(**runpy.run_path(str(ROOT / "results" / "figures.py")))


def test_all_pictures_of_the_readmes_are_made_by_the_script(tmp_path, tiny_run, run_script):
    script, run = figures_script(), tiny_run("simco")
    script.__name__ = "figures"
    assert run_script(script, "--out", tmp_path) == 0
    assert run_script(script, run, "--out", tmp_path) == 0
    for path in tmp_path.glob("*.svg"):
        assert path.read_text().count("<svg") == 1
    with Image.open(tmp_path / "neighbours.png") as image:
        assert image.size == (1000, 640)
    made = {path.name for path in tmp_path.glob("*.[sp][vn]g")}
    committed = {path.name for path in ROOT.glob("results/*.[sp][vn]g")} - {"tensorboard.png"}
    assert made == committed
    text = (ROOT / "README.md").read_text() + (ROOT / "results" / "README.md").read_text()
    shown = re.findall(r"!\[[^]]*\]\((?:results/)?([^)]+)\)", text)
    assert set(shown) == committed | {"tensorboard.png"}


def test_the_words_under_a_view_are_in_the_order_of_its_operations():
    choices = common.draw_choices(500, 32, torch.Generator().manual_seed(0))
    is_jittered = (choices.factor != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1)
    view = choices.rows((is_jittered & choices.grayscale).nonzero()[:1, 0])
    names = ["brightness", "contrast", "saturation", "hue"]
    expected = [names[operation] for operation in view.operations[0].tolist()]
    for augmentation, words in (("v2", [*expected, "gray"]), ("v1", ["gray", *expected])):
        text = figures_script().describe(view, augmentation)
        assert re.findall("gray|brightness|contrast|saturation|hue", text) == words
        assert text.startswith(f"crop {view.width.item()}×{view.height.item()} at ")


def test_the_picture_of_the_losses_shows_the_gradients_by_their_formula():
    axes = figures_script().losses().axes[0]
    for line in axes.lines:
        p, length = line.get_data()
        m = np.log((1 - p) / p)  # log-odds against the positive at T
        # With 255 equal negatives, dt_m divides all of the log-odds but log 255.
        known = re.search(r"dt_m = (\d+)", line.get_label())
        m_beta = np.log(255) + (m - np.log(255)) / float(known[1]) if known else -math.inf
        expected = 1 / (1 + np.exp(-m_beta)) if known else np.ones_like(p)
        np.testing.assert_allclose(length, expected, rtol=1e-9)
    assert len(axes.lines) == 6


def test_every_link_within_the_project_leads_somewhere():
    for page in (ROOT / "README.md", ROOT / "results" / "README.md"):
        text = page.read_text()
        for target in re.findall(r"\]\((?!http)([^)]*)\)", text):
            path, _, heading = target.partition("#")
            linked = (page.parent / path) if path else page
            linked = linked / "README.md" if linked.is_dir() else linked
            assert linked.exists(), target
            if heading:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles]
                assert heading in anchors, target
