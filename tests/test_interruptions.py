"""What happens to a run happens to runs: signals, kills, full disks, damaged files, two starts at once. None of it may cost
more than it must, or leave a trace in the weights."""
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import METHODS, ROOT, TINY, start_script
from test_runs import log_of, same_state, weights

import common
import moco_v2
import simco

FLAGS = [*TINY, "--subset", "128", "--epochs", "3", "--knn-every", "3"]  # four steps an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of FLAGS with SimCo, not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["simco", *FLAGS, "--out", str(out)])
        simco.main()
    return weights(out)


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(step, number): from now on, the process gets that signal during that step (counted from 0 here)."""

    def at(step, number):
        steps, record = iter(range(10**6)), common.Run.record

        def with_signal(*what):
            if next(steps) == step:
                os.kill(os.getpid(), number)
            record(*what)

        monkeypatch.setattr(common.Run, "record", with_signal)

    yield at


@pytest.mark.parametrize("method, number, step", [
    ("moco_v2", signal.SIGTERM, 5), ("simmoco", signal.SIGUSR1, 0), ("simco", signal.SIGINT, 7),
])  # fmt: skip
def test_a_signal_stops_after_the_step_and_nothing_is_lost(method, number, step, signal_at, run_script, tmp_path, capsys):
    flags = [*FLAGS] + (["--moco-k", "100"] if method == "moco_v2" else [])
    assert run_script(METHODS[method], *flags, "--out", tmp_path / "whole") == 0
    signal_at(step, number)
    assert run_script(METHODS[method], *flags, "--out", tmp_path / "parts") == 128 + number
    assert f"saved after step {step % 4 + 1} of epoch {step // 4 + 1}" in capsys.readouterr().err
    state = weights(tmp_path / "parts")
    assert (state["epoch"], state["step"]) == (step // 4, step % 4 + 1)
    assert run_script(METHODS[method], *flags, "--out", tmp_path / "parts") == 0
    assert f"going on after epoch {step // 4}, step {step % 4 + 1}" in capsys.readouterr().out
    assert same_state(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_second_signal_stops_at_once(run_script, tmp_path, monkeypatch):
    def twice(run, *what):
        os.kill(os.getpid(), signal.SIGINT)
        while not run.signal:  # two that come at the same moment are one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)  # which the signal ends

    monkeypatch.setattr(common.Run, "record", twice)
    assert run_script(simco, *FLAGS, "--out", tmp_path / "run") == 130
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.fixture
def interrupted(signal_at, run_script, tmp_path, monkeypatch):
    """A run that was stopped in its third epoch, so that there are two checkpoints."""
    with monkeypatch.context():
        signal_at(9, signal.SIGTERM)
        assert run_script(simco, *FLAGS, "--out", tmp_path / "run") == 143
    monkeypatch.undo()
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncated", "empty", "object", "gone"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(damage, interrupted, run_script, whole, capsys):
    checkpoint = interrupted / "checkpoint.pth"
    if damage == "gone":
        checkpoint.unlink()
    elif damage == "object":
        torch.save({**torch.load(checkpoint), "epoch": random.Random(0)}, checkpoint)
    else:
        checkpoint.write_bytes(checkpoint.read_bytes()[: 5000 * (damage == "truncated")])
    assert run_script(simco, *FLAGS, "--out", interrupted) == 0
    output = capsys.readouterr()
    assert "going on after epoch 2\n" in output.out
    assert damage == "gone" or ("note: " in output.err and "going on from the one before it" in output.err)
    assert same_state(whole, weights(interrupted))


def test_two_damaged_checkpoints_are_an_error(interrupted, run_script, capsys):
    for name in ("checkpoint.pth", "checkpoint.previous.pth"):
        (interrupted / name).write_bytes(b"PK")
    assert run_script(simco, *FLAGS, "--out", interrupted) == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert (interrupted / "checkpoint.previous.pth").read_bytes() == b"PK"


def test_a_damaged_checkpoint_never_replaces_the_good_one(interrupted, run_script, whole, monkeypatch):
    """Killed in the middle of the first save after a damaged one was found: the good one must still be there."""
    (interrupted / "checkpoint.pth").write_bytes(b"PK")
    replace, moved = os.replace, []

    def killed_between_the_two_renames(source, target):
        replace(source, target)
        moved.append(str(target))
        if str(target).endswith("checkpoint.previous.pth"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed_between_the_two_renames)
    assert run_script(simco, *FLAGS, "--out", interrupted) == 130
    monkeypatch.undo()
    assert any(target.endswith("previous.pth") for target in moved)
    assert run_script(simco, *FLAGS, "--out", interrupted) == 0
    assert same_state(whole, weights(interrupted))


def test_full_disk(run_script, fails_plainly, signal_at, tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk: the queue makes a checkpoint larger than it."""
    flags = [*FLAGS, "--moco-k", "65536", "--out", tmp_path / "run"]
    signal_at(5, signal.SIGTERM)
    assert run_script(moco_v2, *flags) == 143
    monkeypatch.undo()
    before = weights(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        error = fails_plainly(moco_v2, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint.pth" in error and "MB needed" in error and "MB free" in error
    assert same_state(before, weights(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint.pth.tmp").exists()


def test_directory_that_cannot_be_written(fails_plainly):
    assert "cannot write to --out '/proc/run'" in fails_plainly(simco, *TINY, "--out", "/proc/run")


def start(*arguments, **popen):
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, **popen)


def test_two_starts_at_once(tmp_path):
    command = [ROOT / "simco.py", *TINY, "--epochs", "1000", "--out", tmp_path / "run"]
    first = start(*command, stdout=subprocess.PIPE)
    while not first.stdout.readline().startswith("epoch   1"):
        pass
    second = start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, error = second.communicate()
    assert second.returncode == 2 and "another process is training in" in error and error.count("\n") == 1
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 143 and weights(tmp_path / "run")["epoch"] >= 1


def test_torchrun_trains_one_run_and_restarts_it_when_a_process_dies(tmp_path):
    script = tmp_path / "dies_once.py"
    script.write_text(f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import common, simco
record, views = common.Run.record, common.Run.views
marker = pathlib.Path(sys.argv[sys.argv.index("--out") + 1] + ".died")
def dies_once(run, *what):
    if run.num_steps - run.steps_left == 2 and run.epoch == 1 and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    record(run, *what)
def views_of(run, data, epoch):
    run.epoch = epoch
    return views(run, data, epoch)
common.Run.record, common.Run.views = dies_once, views_of
common.launch(simco.main)
""")
    (tmp_path / "whole.died").touch()
    printed = {out: start_script(2, script, *FLAGS, "--out", tmp_path / out, restarts=3) for out in ("whole", "parts")}
    assert printed["whole"].count("epoch   3/3") == 1 and "on 2 processes" in printed["whole"]  # one log of both
    assert [entry["epoch"] for entry in log_of(tmp_path / "whole")] == [0, 1, 2, 3]
    assert (tmp_path / "parts.died").exists() and "going on after epoch 1" in printed["parts"]
    assert same_state(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    with pytest.raises(AssertionError, match=r"error: .*epochs 3 \(now 4\)"):
        start_script(2, ROOT / "simco.py", *FLAGS, "--epochs", "4", "--out", tmp_path / "whole")


@pytest.mark.soak
def test_forty_kills(tmp_path):
    """Twenty SIGKILLs and twenty SIGTERMs at random moments, also during saves, each followed by a restart: there is always
    something to go on from, and in the end there are the same bits."""
    chance = random.Random(0)
    signals = chance.sample([signal.SIGKILL, signal.SIGTERM] * 20, 40)
    command = [ROOT / "moco_v2.py", *TINY, "--subset", "256", "--moco-k", "4096", "--epochs", "60", "--out"]
    assert start(*command, tmp_path / "whole", stdout=subprocess.DEVNULL).wait() == 0
    for number in signals:
        process = start(*command, tmp_path / "parts", stdout=subprocess.PIPE)
        process.stdout.readline()  # it has read its checkpoint
        time.sleep(chance.uniform(0, 1))
        process.send_signal(number)
        process.communicate()
        assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert start(*command, tmp_path / "parts", stdout=subprocess.DEVNULL).wait() == 0
    assert same_state(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
