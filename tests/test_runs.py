"""A run from start to end: what it writes, what an interruption leaves, and several processes."""
import json
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import METHODS, ROOT, TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import moco_v2
import simco
import simmoco


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return torch.load(out / "checkpoint.pth")


def contents(out):
    return {path: path.read_bytes() for path in out.iterdir()}


def assert_same_bits(a, b):
    """Of two run directories: weights, buffers and momenta, and what the log says of learning."""
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=0)
    for ours, theirs in zip(log_of(a), log_of(b), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"images_per_second", "seconds"}:
            assert ours[name] == theirs[name], name


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_writes(method, tiny_run, capsys):
    out = tiny_run(method, "--seed", "3")
    printed = capsys.readouterr().out
    assert "CUDA graph off" in printed.splitlines()[0] and printed.count("\nepoch ") == 3
    args, log = common.read_json(out / "args.json"), log_of(out)
    assert (args["method"], args["seed"]) == (method, 3) and "torch 2" in args["environment"]
    names = {"epoch", "loss", "lr", "images_per_second", "seconds"}
    names |= {"positive_similarity", "negative_similarity", "positive_ranks_first"}
    names |= {"dual_temperature_weight"} if method != "moco_v2" else set()
    evaluated = {"knn_top1", "probe_top1", "effective_rank"}
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    assert log[0].keys() == evaluated | {"epoch", "seconds"}
    assert log[1].keys() == names and log[2].keys() == names | evaluated
    board = EventAccumulator(str(out)).Reload()
    for name in names | evaluated - {"epoch", "seconds"}:
        assert board.Scalars(name)[-1].value == pytest.approx(log[2][name])
    # A finished run is left as it is.
    before = contents(out)
    tiny_run(method, "--seed", "3")
    assert "is finished" in capsys.readouterr().out and contents(out) == before


def test_defaults_are_the_recipe():
    """A script without flags is the batch-256 cell of the results table."""
    recipe = "dataset=cifar100 epochs=200 batch_size=256 lr=0.03 momentum=0.9 weight_decay=0.0005"
    recipe += " warmup_epochs=None width=64 stem_padding=2 moco_dim=128 moco_t=0.1 "
    own = ("loss=infonce moco_m=0.99 moco_k=65536", "loss=dual moco_m=0.99 dt_m=10.0", "dt_m=10.0")
    for script, flags in zip((moco_v2, simmoco, simco), own):
        args = vars(script.arguments().parse_args([]))
        assert {f"{name}={args[name]}" for name in args} >= set((recipe + flags).split())


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
    out = interrupted_run(2, method, *flags)
    assert weights(out)["epoch"] == 1 and len(log_of(out)) == 3  # one checkpoint a minute
    monkeypatch.setattr(common, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    interrupted_run(2, method, *flags)  # of which the second is repeated
    assert weights(out)["epoch"] == 3
    # Of the optimizer there is nothing that another device would do otherwise, as a fused step.
    assert weights(out).keys() == {"epoch", "stem_padding", "scaler", "model", "probe", "momenta"}
    assert {x for state in weights(out)["momenta"].values() for x in state} == {"momentum_buffer"}
    # As a crash leaves them: an epoch that is logged but not saved, and files cut short.
    with open(out / "log.jsonl", "a") as file:
        file.write('{"epoch": 4, "loss": 1}\n{"epoch": 5, "lo')
    (out / "checkpoint.pth.tmp").write_bytes(b"half a checkpoint")
    torch.manual_seed(99)  # the global generator has no part in it
    tiny_run(method, *flags, out=out)
    assert_same_bits(whole, out)


# What makes a script wait, so that it can be interrupted, when it has trained an epoch.
WAITS = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # even where it is ignored, as by nohup
write = common.Log.write
def write_and_wait(log, epoch, *others):
    write(log, epoch, *others)
    if epoch == 2:
        time.sleep(99)
common.Log.write = write_and_wait
"""


def start(change, script, *flags):
    code = f"import common, runpy\n{change}\nrunpy.run_path('{script}', run_name='__main__')"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, **pipes)


def test_two_starts_at_once_a_kill_and_ctrl_c(tmp_path, tiny_run, fails_plainly):
    out = tmp_path / "killed"
    flags = [*TINY, "--epochs", "4", "--out", out]
    for number in (signal.SIGKILL, signal.SIGINT):
        process = start(WAITS, "simmoco.py", *flags)
        while not process.stdout.readline().startswith("epoch 2/4"):
            assert process.poll() is None
        assert "another process is training" in fails_plainly(simmoco, *flags)
        process.send_signal(number)
        error = process.communicate()[1]
        assert weights(out)["epoch"] == 1
    assert process.returncode == 130
    assert error == "\ninterrupted; to resume, run the same command again\n"
    tiny_run("simmoco", "--epochs", "4", out=out)
    assert_same_bits(tiny_run("simmoco", "--epochs", "4"), out)


@pytest.mark.soak
def test_twenty_kills(tmp_path):
    """At random moments, also during a save: there is always something to resume from."""
    change, chance = "common.SECONDS_BETWEEN_CHECKPOINTS = -1", random.Random(0)
    flags = [*TINY, "--epochs", "300", "--out"]
    for _ in range(20):
        process = start(change, "moco_v2.py", *flags, tmp_path / "killed")
        process.stdout.readline()  # it reads its checkpoint
        time.sleep(chance.uniform(0, 1))
        process.kill()
        process.communicate()
    assert weights(tmp_path / "killed")["epoch"] < 300
    for out in ("killed", "whole"):
        start(change, "moco_v2.py", *flags, tmp_path / out).communicate()
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("subset", [64, 32])
def test_loss_that_is_not_finite(subset, fails_plainly, tmp_path):
    """With one step per epoch the features are not finite before the loss is."""
    flags = f"--lr 1e9 --weight-decay 1e9 --knn-every 1 --subset {subset}".split()
    error = fails_plainly(simco, *TINY, *flags, "--out", tmp_path)
    if subset == 32:
        assert "a weight, statistic or feature is NaN or infinite" in error
    else:
        assert "loss became nan" in error and "--lr" in error and "fp32" in error
    assert not (tmp_path / "checkpoint.pth").exists()


def test_full_disk_and_damaged_files(interrupted_run, fails_plainly):
    out = interrupted_run(1, "moco_v2")
    path, flags = out / "checkpoint.pth", [*TINY, "--out", out]
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # the queue is larger
    try:
        error = fails_plainly(moco_v2, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in error and "a full disk?" in error and path.read_bytes() == whole
    assert not list(out.glob("*.tmp"))

    damaged = [(path, content) for content in (whole[:-1000], b"", b"hello")]
    foreign = dict(model={}, optimizer={}), dict(epoch=1), torch.zeros(3)
    for content in (*foreign, dict(torch.load(path), model={})):
        torch.save(content, path)
        damaged.append((path, path.read_bytes()))
    path.write_bytes(whole)
    for text in (b'{"method": "mo', b"", b"[1, 2]", b"\xff"):
        damaged.append((out / "args.json", text))
    for file, content in damaged:
        before = contents(out)
        file.write_bytes(content)
        assert str(file) in fails_plainly(moco_v2, *flags)
        assert contents(out) == {**before, file: content}
        file.write_bytes(before[file])


def test_out_that_cannot_be_used(tiny_run, fails_plainly, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in ("/proc/run", tmp_path, tmp_path / "notes.txt", tmp_path / "notes.txt" / "run"):
        assert str(out) in fails_plainly(simco, *TINY, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    before = contents(tiny_run("simmoco"))
    flags = [*TINY, "--out", tmp_path / "simmoco"]
    error = fails_plainly(simmoco, *flags, "--lr", "0.5", "--width", "16")
    assert "lr 0.03 (now 0.5), width 8 (now 16)" in error
    assert "method simmoco (now simco)" in fails_plainly(simco, *flags)
    assert contents(tmp_path / "simmoco") == before
