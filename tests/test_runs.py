"""A run from start to end: what it writes, what an interruption leaves, and several processes."""
import itertools
import json
import random
import re
import resource
import subprocess
import sys
import time

import distributed_worker
import pytest
import torch
from conftest import METHODS, ROOT, TINY, start_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import simco


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return common.load_checkpoint(out / "checkpoint.pth")


def assert_same_bits(a, b):
    """Of two run directories: weights, buffers and momenta, and what the log says of learning."""
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=0)
    for ours, theirs in zip(log_of(a), log_of(b), strict=True):
        for name in ours.keys() - {"images_per_second", "seconds"}:
            assert ours[name] == theirs[name], name


@pytest.fixture
def interrupted_run(run_script, tmp_path, monkeypatch):
    """interrupted_run(step, method, *flags): a TINY run, stopped by Ctrl-C in that step."""

    def run(step, method, *flags):
        record, steps = common.Run.record, itertools.count(1)

        def record_or_stop(*what):
            if next(steps) == step:
                raise KeyboardInterrupt
            record(*what)

        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "record", record_or_stop)
            flags = [*TINY, *flags, "--out", tmp_path / "interrupted"]
            assert run_script(METHODS[method], *flags) == 130
        return tmp_path / "interrupted"

    return run


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_writes(method, tiny_run, capsys):
    out = tiny_run(method, "--seed", "3")
    assert capsys.readouterr().out.count("\nepoch ") == 3
    args, log = json.loads((out / "args.json").read_text()), log_of(out)
    assert args["method"] == method and args["seed"] == 3 and args["precision"] == "fp32"
    assert "seed" in args["changed"].split() and "lr" not in args["changed"].split()
    assert torch.__version__ in args["environment"]
    names = {"epoch", "loss", "lr", "knn_top1", "images_per_second", "seconds"}
    names |= {"positive_similarity", "negative_similarity", "positive_ranks_first"}
    names |= {"dual_temperature_weight"} if method != "moco_v2" else set()
    features = {"alignment", "uniformity", "effective_rank", "feature_std"}
    names |= {"probe_top1"}
    assert [entry["epoch"] for entry in log] == [0, 1, 2] and log[0]["loss"] is None
    assert log[0]["knn_top1"] >= 0 and log[0]["probe_top1"] >= 0
    assert log[1].keys() == names and log[1]["knn_top1"] is log[1]["probe_top1"] is None
    names |= features  # those, too, are measured now and then
    assert log[2].keys() == names
    board = EventAccumulator(str(out)).Reload()
    curves = {tag.split("/")[1]: board.Scalars(tag) for tag in board.Tags()["scalars"]}
    assert curves.keys() == names - {"epoch", "seconds"}
    for name, events in curves.items():
        assert events[-1].value == pytest.approx(log[2][name])
    histograms = {f"similarity/{name}" for name in names if "_similarity" in name}
    assert set(board.Tags()["histograms"]) == histograms
    assert board.Tags()["images"] == ["first and second views"]


def test_defaults_are_the_recipe():
    """A script without flags is the batch-256 cell of the results table."""
    recipe = "dataset=cifar100 epochs=200 batch_size=256 lr=0.03 momentum=0.9 weight_decay=0.0005"
    recipe += " warmup_epochs=None width=64 stem_padding=2 moco_dim=128 moco_t=0.1 "
    own = dict(moco_v2="moco_m=0.99 moco_k=65536", simmoco="moco_m=0.99 dt_m=10.0")
    own["simco"] = "dt_m=10.0"
    for method, flags in own.items():
        args = vars(METHODS[method].arguments().parse_args([]))
        assert {f"{name}={args[name]}" for name in args} >= set((recipe + flags).split())
        assert args["changed"] == ""


def test_args_json_repeats_a_run(tiny_run, run_script, fails_plainly, capsys):
    moco, flags = METHODS["moco_v2"], "--moco-k 40 --head linear --symmetric --seed 3".split()
    out = tiny_run("moco_v2", *flags)
    flags = [f"@{out}/args.json", *TINY[2:4], "--device", "cpu", "--out"]  # with its --data
    same, other = out.with_name("same"), out.with_name("other")
    assert run_script(moco, *flags, same) == run_script(moco, *flags, other, "--seed", "4") == 0
    assert_same_bits(out, same)
    assert log_of(out)[-1]["loss"] != log_of(other)[-1]["loss"]

    before = {path: path.read_bytes() for path in out.iterdir()}
    assert run_script(moco, *flags, out) == 0 and "is finished" in capsys.readouterr().out
    error = fails_plainly(moco, *flags, out, "--lr", "0.5", "--width", "3")
    assert "lr 0.03 (now 0.5), width 2 (now 3)" in error
    assert "method moco_v2 (now simco)" in fails_plainly(simco, *TINY, "--out", out)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    "command",
    [
        "moco_v2 --moco-k 40 --bn-splits 4 --symmetric",
        "moco_v2 --memory-bank --moco-k 20",
        "simmoco --num-negatives 5 --loss eqco --alpha 64 --head-bn",
        "simco --num-negatives 5",
    ],
)
def test_interrupted_run_ends_with_the_same_bits(command, tiny_run, interrupted_run, monkeypatch):
    method, *flags = [*command.split(), "--epochs", "4"]
    whole = tiny_run(method, *flags)
    out = interrupted_run(6, method, *flags)  # in the third epoch
    assert weights(out)["epoch"] == 1 and len(log_of(out)) == 3  # one checkpoint a minute
    monkeypatch.setattr(common, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    interrupted_run(6, method, *flags)  # begins with the second epoch: in the fourth
    assert weights(out)["epoch"] == 3
    # As a crash leaves them: an epoch that is logged but not saved, and files cut short.
    with open(out / "log.jsonl", "a") as file:
        file.write('{"epoch": 4, "loss": 1}\n{"epoch": 5, "lo')
    (out / "checkpoint.pth.tmp").write_bytes(b"half a checkpoint")
    torch.manual_seed(99)  # the global generator has no part in it
    tiny_run(method, *flags, "--out", out)
    assert_same_bits(whole, out)


def test_a_run_from_before_the_probe(tiny_run, interrupted_run, fails_plainly):
    """Its directory does not mention a probe. It resumes without one, if that is asked for."""
    flags = ["--epochs", "4", "--probe", "off"]
    whole, out = tiny_run("simco", *flags), interrupted_run(6, "simco", *flags)
    args = json.loads((out / "args.json").read_text())
    assert args.pop("probe") == "off"
    (out / "args.json").write_text(json.dumps(args))
    before = {path: path.read_bytes() for path in out.iterdir()}
    error = fails_plainly(simco, *TINY, "--epochs", "4", "--out", out)
    assert "probe off (now query)" in error
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    tiny_run("simco", *flags, "--out", out)
    assert_same_bits(whole, out)


def test_a_run_of_a_gpu_resumes_without_one(tiny_run, interrupted_run):
    """The fused SGD, and its learning rate on the device, are not the CPU's."""
    whole, out = tiny_run("simco", "--epochs", "4"), interrupted_run(6, "simco", "--epochs", "4")
    checkpoint = weights(out)
    for optimizer in (checkpoint["optimizer"], checkpoint["probe"]["optimizer"]):
        optimizer["param_groups"][0].update(fused=True, lr=torch.tensor(0.5))
    torch.save(checkpoint, out / "checkpoint.pth")
    assert_same_bits(tiny_run("simco", "--epochs", "4", "--out", out), whole)


def start(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_starts_at_once_and_a_kill(tmp_path, tiny_run, run_script, fails_plainly):
    flags = [*TINY, "--epochs", "9", "--out", tmp_path / "killed"]
    process = start("simmoco.py", *flags)
    while not process.stdout.readline().startswith("epoch 2/9"):
        assert process.poll() is None
    assert "another process is training" in fails_plainly(METHODS["simmoco"], *flags)
    process.kill()
    process.communicate()
    assert weights(tmp_path / "killed")["epoch"] == 1
    assert run_script(METHODS["simmoco"], *flags) == 0
    assert_same_bits(tiny_run("simmoco", "--epochs", "9"), tmp_path / "killed")


@pytest.mark.soak
def test_twenty_kills(tmp_path):
    """At random moments, also during a save: there is always something to resume from."""
    chance, code = random.Random(0), "import common, moco_v2; common.launch(moco_v2.main)"
    code = code.replace("; ", "; common.SECONDS_BETWEEN_CHECKPOINTS = 0; ")
    command = ["-c", code, *TINY, "--subset", "256", "--moco-k", "4096", "--epochs", "40", "--out"]
    start(*command, tmp_path / "whole").communicate()
    for _ in range(20):
        process = start(*command, tmp_path / "killed")
        process.stdout.readline()  # it has read its checkpoint
        time.sleep(chance.uniform(0, 2))
        process.kill()
        process.communicate()
    start(*command, tmp_path / "killed").communicate()
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


def test_loss_that_is_not_finite(fails_plainly, tmp_path):
    error = fails_plainly(simco, *TINY, "--lr", "1e18", "--out", tmp_path)
    assert "loss became nan" in error and "--lr" in error and "fp32" in error
    assert not (tmp_path / "checkpoint.pth").exists()


def test_full_disk_and_damaged_checkpoint(interrupted_run, fails_plainly):
    out = interrupted_run(4, "moco_v2")
    path, limits = out / "checkpoint.pth", resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # the queue is larger
    try:
        error = fails_plainly(METHODS["moco_v2"], *TINY, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in error and "MB are free" in error and path.read_bytes() == whole
    assert not (out / "checkpoint.pth.tmp").exists()

    others, log = [], (out / "log.jsonl").read_bytes()
    for other in ({"epoch": 1, "model": {}, "optimizer": {}}, {"epoch": 1}, torch.zeros(3)):
        torch.save(other, path)
        others.append(path.read_bytes())
    for damaged in (*others, whole[:-1000], b"", b"hello"):
        path.write_bytes(damaged)
        assert f"'{path}' is " in fails_plainly(METHODS["moco_v2"], *TINY, "--out", out)
        assert path.read_bytes() == damaged and (out / "log.jsonl").read_bytes() == log


def test_out_that_cannot_be_used(fails_plainly, tmp_path):
    assert "/proc/run" in fails_plainly(simco, *TINY, "--out", "/proc/run")
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        assert "neither empty nor a run" in fails_plainly(simco, *TINY, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_processes_compute_the_gradient_of_one(tmp_path):
    """The global batch is the same as on one: views, loss, gradients, queue, and the probe."""
    start_script("two machines", ROOT / "tests" / "distributed_worker.py", tmp_path)
    parts = [torch.load(path) for path in sorted(tmp_path.iterdir())]
    assert len(parts) == 4
    for method, one in distributed_worker.compute_all().items():
        shares = [part[method] for part in parts]
        assert torch.equal(one["views"], torch.cat([share["views"] for share in shares], dim=1))
        loss = sum(share["loss"] for share in shares) / len(shares)
        torch.testing.assert_close(loss, one["loss"], rtol=1e-5, atol=0)
        for share in shares:
            for name, gradient in one["gradients"].items():
                # Small entries are differences of large ones, and inherit their rounding.
                error = (share["gradients"][name] - gradient).abs().max()
                assert error <= 1e-5 * gradient.abs().max(), name
            for name in ("queue", "probe"):
                torch.testing.assert_close(share[name], one[name], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(share[name], shares[0][name], rtol=0, atol=0)


DIES_ONCE = """
import os, pathlib, common, simco
end_epoch, died = common.Run.end_epoch, pathlib.Path(__file__ + ".died")
def end_or_die(run, epoch):
    if epoch == 2 and common.rank() == 1 and not died.exists():
        died.touch()
        os.kill(os.getpid(), 9)
    end_epoch(run, epoch)
common.Run.end_epoch = end_or_die
common.launch(simco.main)
"""


def test_torchrun_restarts_a_run_when_a_process_dies(tmp_path, monkeypatch):
    """It dies in the third epoch, and the checkpoint is of the first: the second is repeated."""
    script, out = tmp_path / "script.py", tmp_path / "run"
    script.write_text(DIES_ONCE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    printed = start_script(2, script, *TINY, "--epochs", "3", "--out", out, restarts=1)
    assert "resumed after epoch 1" in printed
    first, again = re.findall(r"epoch 2/3  loss +(\S+)", printed)
    assert first == again and [entry["epoch"] for entry in log_of(out)] == [0, 1, 2, 3]
