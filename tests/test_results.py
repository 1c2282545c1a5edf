"""results/: each number has its run, each run can be repeated (but for the authors' own), and the
scripts do what they say."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import eqco_table5
import experiments
import few_labels
import pytest
import studies
import table
import torch
from check_experiments import ORDERS, check
from conftest import METHODS, ROOT
from PIL import Image

import common
import linear_eval

PAGES = [ROOT / "README.md", *(ROOT / "results").glob("*.md")]
RUNS = sorted(path.parent for path in ROOT.glob("results/*/*/args.json"))
BENCHMARK = ROOT / "results" / "benchmark.md"
EXPERIMENTS = ROOT / "results" / "experiments.sh"
QUICK = "--epochs 2 --precision fp32 --device cpu --lrs 0.1 1 10".split()


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name}/{run.name}")
def test_every_result_is_of_a_finished_run_that_can_be_repeated(run, monkeypatch):
    args, log = read(run / "args.json"), (run / "log.jsonl").read_text().splitlines()
    monkeypatch.setattr("sys.argv", ["", "--config", str(run / "args.json")])
    if run.name == "simmoco-probe-both-seed0":  # what there is no flag for any more is refused
        with pytest.raises(SystemExit):
            common.parse_args(METHODS[args["method"]].arguments())
    else:
        again = vars(common.parse_args(METHODS[args["method"]].arguments()))
        for name in again.keys() - set(common.NO_FLAGS):
            assert again[name] == args[name], name
    assert [json.loads(line)["epoch"] for line in log] == list(range(args["epochs"] + 1))
    result = read(run / "result.json")
    assert result["epoch"] == args["epochs"]
    # Evaluated twice in the same precision: rounding moves less than a hundredth of the images.
    assert result["knn_top1"] == pytest.approx(json.loads(log[-1])["knn_top1"], abs=1)


def rows(text):
    """The rows of its tables."""
    return [line for line in text.splitlines() if line.startswith("|")]


def test_each_table_of_the_results_is_printed_by_its_command():
    page = (ROOT / "results" / "README.md").read_text()
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", page, re.MULTILINE))
    for name, lines in studies.tables().items():
        assert rows(sections.pop(name)) == lines, name
    # Nothing is left out but for a reason.
    perhaps = "Perhaps trained on other images: "  # those that have no fingerprint yet
    assert [note for note in studies.load()[1] if not note.startswith(perhaps)] == []
    assert [name for name in sections if rows(sections[name])] == ["Mechanisms and their flags"]


def test_eqco_table_5_is_within_what_the_page_says():
    """test_eqco has a short form of the command."""
    text = (ROOT / "results" / "eqco_table5.md").read_text()
    found = re.findall(r"([\d.]+) \(([\d.]+)\)", text)
    measured, published = torch.tensor([[float(x) for x in cell] for cell in found]).T
    assert published.tolist() == torch.tensor([*eqco_table5.PUBLISHED.values()]).flatten().tolist()
    assert (measured - published).abs().max() < 0.135  # "within 0.13"


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    page = rows(text)
    printed = rows(table.table(ROOT / "results").partition("**In miniature")[0])
    assert len(printed) == 8 and page[: len(printed)] == printed
    section = re.search("^## In miniature\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    tables = "\n".join(line for lines in studies.tables().values() for line in lines)
    figures = re.findall(r"\d\d\.\d\d(?: ± \d\.\d\d)?", section)
    assert len(figures) > 6 and [figure for figure in figures if figure not in tables] == []
    # On a CPU: what benchmark.py printed.
    cells = [line.strip("| ").split(" | ") for line in rows(BENCHMARK.read_text())]
    speed = {name: columns for name, *columns in cells if columns[:1] in (["256"], ["–"])}
    methods = [(f"{name}, conventional", f"{name}, bf16, eager") for name in reversed(METHODS)]
    for line, pair in zip(page[-4:], [("PIL, 2 DataLoader workers", "eager"), *methods]):
        slow, fast = (speed[name] for name in pair)
        assert line.strip("| ").split(" | ")[1:] == [slow[1], fast[1], fast[2]]


def test_the_stored_weights_are_those_of_the_readme():
    """CI also measures their kNN accuracy, which needs the images."""
    text = (ROOT / "README.md").read_text()
    section = re.search("^## Quick start\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    path = ROOT / re.search(r"^python linear_eval.py --checkpoint (\S+)", section, re.MULTILINE)[1]
    args, cached = read(path.parent / "args.json"), read(path.parent / "cached.json")
    backbone, _ = linear_eval.read_backbone(path)
    expected = (8 * args["width"], args["stem_padding"], False)
    assert (backbone.num_features, backbone.conv1.padding[0], backbone.is_guess) == expected
    assert all(tensor.isfinite().all() for tensor in backbone.state_dict().values())
    for name in ("linear_top1", "knn_top1"):
        assert f"{cached[name]:.2f}" in section


def test_one_learning_rate_of_the_linear_classifier_is_the_best_for_all_runs_together():
    for directory, rate in studies.RATES.items():
        results = [*map(read, ROOT.glob(f"results/{directory}/*/result.json"))]
        losses = [result["held_out_loss"] for result in results if "held_out_loss" in result]
        top1 = [result["held_out_top1"] for result in results if "held_out_top1" in result]
        assert len(losses) + len(top1) == len(results) > 25  # an earlier version has accuracies
        assert str(rate) == min(losses[0], key=lambda rate: sum(loss[rate] for loss in losses))
        assert str(rate) == max(top1[0], key=lambda rate: sum(run[rate] for run in top1))


def test_every_link_leads_somewhere_and_every_picture_is_shown():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)]*)\)", page.read_text()):
            path, _, heading = target.partition("#")
            linked = (page.parent / path) if path else page
            linked = linked / "README.md" if linked.is_dir() else linked
            assert linked.exists(), target
            if heading:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles]
                assert heading in anchors, target
    text = "".join(page.read_text() for page in PAGES)
    shown = set(re.findall(r"!\[[^]]*\]\((?:results/)?([^)]+)\)", text))
    assert shown == {path.name for path in ROOT.glob("results/*.[sp][vn]g")}


def test_the_experiments_have_the_outcomes_that_their_page_explains():
    found = experiments.outcomes(ROOT / "results" / "experiments.jsonl")
    assert check(found) == 12 * len(ORDERS)
    page = (ROOT / "results" / "experiments.md").read_text().splitlines()
    printed = experiments.table(found)
    assert len(printed) > 10 and not {*printed} - {*page}
    named = r"^[a-z,]+ (\S+) (?:simco|simmoco|moco_v2)\b"
    named = re.findall(named, EXPERIMENTS.read_text(), re.MULTILINE)
    assert named == [*dict.fromkeys(row["run"] for row in found)]


def test_experiments_sh(tmp_path):
    def run(name, flags):
        return subprocess.run(
            ["bash", EXPERIMENTS, name], capture_output=True, text=True, env=env | {"FLAGS": flags}
        )

    env = {**os.environ, "RUNS": f"{tmp_path}/runs", "DATA": f"{tmp_path}/data", "SEEDS": "3"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    assert run("vews", "").stderr.startswith("usage")
    short = "--epochs 1 --knn-every 1 --subset 64"
    done = run("views", short)
    assert done.returncode == 0, done.stderr
    same_colours, usual = experiments.outcomes(tmp_path / "runs")
    assert usual["seed"] == 3 and usual["loss"] != same_colours["loss"]
    assert "| same-colours | 1 |" in done.stdout and "color_jitter = lambda" in done.stdout
    failed = run("views", f"{short} --lr 3")  # other flags
    assert failed.returncode != 0 and "usual-seed3.log" in failed.stderr


STAND_IN = """#!/usr/bin/env bash
# A python3 that trains nothing, and fails where the flags have "dcl".
case "$*" in
  -c*) ;;
  *table.py*) echo tables ;;
  *dcl*) exit 1 ;;
  linear_eval.py*) printf '{\\n "epoch": 60\\n}' >"$2/result.json" ;;
  *) while [ "$1" != --out ]; do shift; done; mkdir "$2"
     printf '{\\n "epochs": 60\\n}' >"$2/args.json" ;;
esac
"""


def test_table_sh_runs_what_is_missing_and_says_how_far_it_is(tmp_path):
    (tmp_path / "python3").write_text(STAND_IN)
    (tmp_path / "python3").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNS": f"{tmp_path}/runs"}
    command = dict(args=["bash", ROOT / "results" / "table.sh"], capture_output=True, text=True)
    first, second = (subprocess.run(**command, env=env | {"JOBS": "1"}) for _ in range(2))
    begun = set(re.findall(r"^(\S+) begins$", first.stdout, re.MULTILINE))
    assert f"There are {len(begun)} runs" in Path(command["args"][1]).read_text()
    assert f"({len(begun)}, each of" in (ROOT / "README.md").read_text()
    present = {path.name for path in RUNS if path.parent.name == "longer"}
    assert present - begun == {"simmoco-probe-both-seed0"}  # of an earlier version
    failed = {name for name in begun if "dcl" in name}
    assert first.stdout.startswith(f"0 of {len(begun)} runs are done\n")
    assert second.stdout.startswith(f"{len(begun - failed)} of {len(begun)} runs are done\n")
    assert set(re.findall(r"^(\S+) begins$", second.stdout, re.MULTILINE)) == failed != set()
    assert second.stderr.count("did not finish") == len(failed) and second.returncode != 0
    assert "tables" in second.stdout


LINES = """
| SimCo | – | – | 58.50 ± 0.71 / 57.00 ± 0.00 / 40.00 ± 0.00 | – | – |
| MoCo v2 | 22.00 / 21.00 / 40.00 |
| SimCo | dataset cifar10 | 256 | 5.00 | 4.00 | 40.00 | 1 |
| SimCo | dt-m 1.0 | 256 | 57.50 ± 0.71 | 56.00 (of 1) | 40.00 ± 0.00 | 2 |
| SimMoCo | epochs 2, symmetric | 256 | 11.00 | – | 40.00 | 1 |
| untrained | epochs 2, symmetric | 256 | 5.00 | – | 40.00 | 1 |
Evaluated by several protocols: SimCo, batch 256, dt-m 1.0.
"""


def add_run(root, name, flags, top1, probe=None, epoch=200, **more):
    """A run in a new directory, given `flags`: its last log line, and its result."""
    root.mkdir(exist_ok=True)
    out = root / str(len(list(root.iterdir())))
    out.mkdir()
    args = vars(METHODS[name].arguments().parse_args(flags.split()))
    (out / "args.json").write_text(json.dumps(args))
    entry = dict(epoch=args["epochs"]) | ({} if probe is None else dict(probe_top1=probe))
    (out / "log.jsonl").write_text(json.dumps(entry))
    result = dict(linear_top1=top1, knn_top1=40.0, epoch=epoch, protocol={}) | more
    (out / "result.json").write_text(json.dumps(result))
    return result


def test_table(tmp_path, fails_plainly):
    def add(*run, **more):
        return add_run(tmp_path, *run, **more)

    floor = add("simco", "--dataset cifar10", 5.0, 4.0)
    assert "published" not in table.table(tmp_path)
    add("simco", "", 58.0, 57.0)
    add("simco", "--seed 1 --out x --knn-every 7", 59.0, 57.0)
    add("simmoco", "", 99.0, epoch=100)
    add("simmoco", "--epochs 2 --symmetric", 11.0, epoch=2, untrained=floor)
    add("simco", "--dt-m 1", 57.0, 56.0, protocol=dict(cached=True))
    add("simco", "--dt-m 1 --seed 1", 58.0)
    flags = "--subset 10000 --epochs 60 --width 16 --batch-size 128"
    add("moco_v2", flags, 22.0, 21.0, epoch=60)
    printed = table.table(tmp_path)
    assert not set(LINES.splitlines()) - set(printed.splitlines()) and "published" in printed
    assert "99.00" not in printed and f"Not shown: {tmp_path}/3, evaluated after" in printed
    path = tmp_path / "3" / "args.json"
    path.write_text(path.read_text()[:50])
    for flags in ([METHODS["simmoco"], "--config", path], [linear_eval, path.parent]):
        assert f"'{path}' is damaged" in fails_plainly(*flags)
    with pytest.raises(SystemExit):
        table.table(tmp_path)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that adds a run of SimCo below tmp_path, and one for the cells of its setting."""
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    flags = "--subset 10000 --epochs 60 --width 16"

    def add(seed, more_flags="", protocol=(), directory="longer", **more):
        protocol = dict(epochs=100, batch_size=256, seed=0, cached=True) | dict(protocol)
        more = dict(epoch=60, protocol=protocol, linear_lr=0.3) | more
        run = f"{flags} --seed {seed} {more_flags}"
        return add_run(tmp_path / directory, "simco", run, 30.0, 27.0, **more)

    def cells():
        studies.load.cache_clear()
        return studies.in_cells("SimCo", 256, studies.MINIATURE)

    yield add, cells
    studies.load.cache_clear()


def test_studies_pool_the_seeds_of_a_setting_at_one_learning_rate(study, tmp_path):
    add, cells = study
    with pytest.raises(SystemExit):
        cells()
    stored = add(0, linear_lr=0.1)
    assert cells() == ["–", "27.00", "40.00"]
    other = tmp_path / "longer" / "0" / "result-lr-0.3.json"
    right = stored | dict(linear_top1=31.0, linear_lr=0.3)
    other.write_text(json.dumps(right))
    add(1)
    add(1)  # counts once
    add(2, "--loss dcl")
    assert cells() == ["30.50 ± 0.71", "27.00 ± 0.00", "40.00 ± 0.00"]
    for wrong in (dict(linear_lr=1.0), dict(knn_top1=39.0), dict(protocol=dict(cached=False))):
        other.write_text(json.dumps(right | wrong))  # another rate, network or protocol
        with pytest.raises(SystemExit):
            cells()


@pytest.mark.parametrize("wrong", ["epochs", "batch_size", "cached", "seed"])
def test_studies_compare_only_what_was_evaluated_alike(study, wrong):
    add, cells = study
    add(0)
    assert cells() == ["30.00", "27.00", "40.00"]
    add(1, "--loss dcl", protocol={wrong: 7})  # in another setting
    with pytest.raises(SystemExit):
        cells()


def test_studies_pool_no_runs_of_several_directories(study):
    add, cells = study
    add(0)
    add(1, directory="other")  # which has no learning rate for all
    with pytest.raises(SystemExit):
        cells()


@pytest.mark.parametrize("wrong", ["epoch", "images", "protocol"])
def test_cached_accuracy_is_of_the_same_network(tmp_path, wrong):
    cached = dict(epoch=200, images="x", protocol=dict(cached=True), linear_top1=61.0)
    (tmp_path / "cached.json").write_text(json.dumps(cached))
    figures = dict(run=tmp_path, epoch=200, images="x", protocol=dict(cached=False))
    assert studies.cached_top1(figures) == 61.0
    (tmp_path / "cached.json").write_text(json.dumps(cached | {wrong: figures["protocol"]}))
    with pytest.raises(SystemExit):
        studies.cached_top1(figures)


def test_few_labels(tiny_run, run_script, fails_plainly, capsys, monkeypatch):
    out, seen, train = tiny_run("simco"), [], linear_eval.train_linear

    def watched_train(features_of, width, index, data, rates, *others):
        seen.append((index.tolist(), data.train_labels[index].bincount().tolist(), rates))
        return train(features_of, width, index, data, rates, *others)

    assert run_script(linear_eval, out, *QUICK) == 0
    before = read(out / "result.json")
    monkeypatch.setattr(linear_eval, "train_linear", watched_train)
    assert run_script(few_labels, out, *QUICK, "--labels-per-class", 2, "all") == 0
    result, lines = read(out / "result.json"), capsys.readouterr().out.splitlines()
    few = result.pop("labels_per_class")
    assert result == before  # nothing else changes
    for network, calls in (("trained", seen[:11]), ("untrained", seen[11:])):
        assert calls[0][2] == [0.1, 1.0, 10.0] * 2  # chooses the rate that all draws have
        assert all(rates == calls[1][2] and len(rates) == 1 for _, _, rates in calls[1:])
        assert all(counts == [2] * 10 for _, counts, _ in calls[1:6])
        assert len({tuple(sorted(index)) for index, _, _ in calls[1:6]}) == 5
        assert all(sorted(index) == list(range(64)) for index, _, _ in calls[6:])
        assert len(calls) == 11 and [len(few[network][x]) for x in ("2", "all")] == [5, 5]
    for flags, kept in (([], ["1", "2", "all"]), (["--seed", "1"], ["1"])):  # as comparable
        assert run_script(few_labels, out, *QUICK, "--labels-per-class", 1, *flags) == 0
        assert sorted(read(out / "result.json")["labels_per_class"]["trained"]) == kept
    words = [table.in_words(few[network]["2"]) for network in ("trained", "untrained")]
    assert ["2", *" ".join(words).split()] in [line.split() for line in lines]
    for count, message in ((7, "there is a class of 6"), (0, "not from 1"), ("some", "invalid")):
        assert message in fails_plainly(few_labels, out, *QUICK, "--labels-per-class", count)


def test_pictures(tmp_path, tiny_run, run_script):
    pytest.importorskip("matplotlib")
    import figures

    run = tiny_run("simco")
    for flags in (["--out", tmp_path], [run, "--out", tmp_path]):
        assert run_script(figures, *flags) == 0
    made = {path.name for path in tmp_path.glob("*.[sp][vn]g")}
    assert made == {path.name for path in ROOT.glob("results/*.[sp][vn]g")}
    with Image.open(tmp_path / "neighbours.png") as image:
        assert image.size == (1000, 640)
    names = {"metadata.tsv", "sprite.png", "tensors.tsv"}  # for TensorBoard's projector
    assert {path.name for path in (run / "00000" / "test_features").iterdir()} == names
    # Of two classes, with features on a circle, the nearest training images are known.
    angles, labels = torch.tensor([0.0, 0.1, 0.2, 2.0, 2.1]), torch.tensor([0, 0, 1, 1, 1])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    images = torch.zeros(5, 8, 8, 3, dtype=torch.uint8)
    data = common.Dataset(images, labels, images[:2], torch.tensor([1, 0]), ["a", "b"])
    test = 3 * train[[4, 0]]  # only the direction matters
    picture, rows, percent = figures.picture_of_neighbours(train, test, data, count=2, k=3)
    assert rows.tolist() == [0, 1]  # the second test image, then the first
    assert percent == pytest.approx(100 * 5 / 6)  # labels 0 0 1 and 1 1 1
    is_green = picture[1, 1::13, 1::13] > picture[0, 1::13, 1::13]  # at the corners of frames
    assert is_green.tolist() == [[False, True, True, False], [False, True, True, True]]
