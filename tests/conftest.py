"""Shared by the tests: the scripts are importable from anywhere, run in this process, and tiny."""
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# One thread each, for the processes that tests start too: sums are then taken in the same order everywhere, and on two
# cores two such processes get more done than one with two threads.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A shell lets what it starts in the background ignore Ctrl-C, and all that this starts in its turn.
signal.signal(signal.SIGINT, signal.default_int_handler)

import common  # noqa: E402
import moco_v2  # noqa: E402
import simco  # noqa: E402
import simmoco  # noqa: E402

# Drawing them anew, and kNN on all test images, would be two thirds of the time of a tiny run.
draw_shapes, ALL_SHAPES = common.draw_shapes, common.draw_shapes()
FEW_SHAPES = dataclasses.replace(
    ALL_SHAPES, test_images=ALL_SHAPES.test_images[:256], test_labels=ALL_SHAPES.test_labels[:256]
)
common.draw_shapes = lambda *sizes: draw_shapes(*sizes) if sizes else FEW_SHAPES
METHODS = {"moco_v2": moco_v2, "simmoco": simmoco, "simco": simco}
# A run of a few seconds: drawn images, a very narrow network, fp32 so that it is the same on every machine.
TINY = "--dataset shapes --subset 64 --batch-size 32 --width 2 --moco-dim 8 --epochs 2 --precision fp32 --device cpu".split()


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: takes minutes; runs only if asked for, by -m soak")
    config.option.markexpr = config.option.markexpr or "not soak"


@pytest.fixture
def all_shapes(monkeypatch):
    """The whole test set for what runs in this process, as other processes have it."""
    monkeypatch.setattr(common, "draw_shapes", lambda: ALL_SHAPES)


@pytest.fixture
def run_script(monkeypatch):
    """run_script(module, *flags): what `python module.py flags` does, in this process; returns the exit code."""

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        try:
            common.launch(module.main)
        except SystemExit as stop:
            return stop.code
        return 0

    return run


@pytest.fixture
def fails_plainly(run_script, capsys):
    """fails_plainly(module, *flags): asserts exit code 2 and one plain line on stderr, and returns that line."""

    def run(module, *flags):
        capsys.readouterr()
        code = run_script(module, *flags)
        output = capsys.readouterr()
        assert code == 2
        assert output.err.startswith("error: ") and output.err.count("\n") == 1, output.err
        return output.err

    return run


@pytest.fixture
def tiny_run(run_script, tmp_path):
    """tiny_run(method, *flags): trains a TINY run and returns its directory."""

    def run(method, *flags):
        out = tmp_path / method
        assert run_script(METHODS[method], *TINY, "--out", out, *flags) == 0
        return out

    return run


def batches(args, epoch):
    """The views of a TINY run's epoch, recomputed from its flags: a list of (view1, view2)."""
    data = common.draw_shapes().subset(args["subset"])
    plan = common.draw_epoch_plan(args["subset"], args["batch_size"], 32, args["seed"], epoch)
    result = []
    for begin in range(0, len(plan.index), args["batch_size"]):
        batch = plan.rows(slice(begin, begin + args["batch_size"]))
        images = data.train_images[batch.index]
        result.append([common.augment(images, *(field[:, view] for field in batch[1:])) for view in (0, 1)])
    return result


def launchers(where, restarts=0):
    """How `where` starts a script: a list of commands to be started together. 2, 4: so many processes, by torchrun;
    "two machines": two agents of torchrun, a process each, which know of each other only an address."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}"]
    if where == "two machines":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        agent = "--nnodes=2 --nproc_per_node=1 --rdzv-backend=c10d --rdzv-id=test --local-addr=localhost".split()
        return [[*torchrun, *agent, f"--rdzv-endpoint={address}"]] * 2
    return [[*torchrun, "--standalone", f"--nproc_per_node={where}"]]


def start_script(where, *command, restarts=0):
    """Start a script `where` (see `launchers`), wait for it, and return what it printed. Exit codes other than 0 fail."""
    command = list(map(str, command))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes = [subprocess.Popen([*launcher, *command], **pipes) for launcher in launchers(where, restarts)]
    printed = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(printed)
    return "".join(printed)
