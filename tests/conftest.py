"""What the tests share. The scripts run in this process, on a tiny dataset, for about a second."""
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that the tests start, too: sums
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # have the same order in all of them
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # for --max-restarts, see README

import prepare  # noqa: E402

import common  # noqa: E402
import moco_v2  # noqa: E402
import simco  # noqa: E402
import simmoco  # noqa: E402

METHODS = {"moco_v2": moco_v2, "simmoco": simmoco, "simco": simco}
MODELS = {"moco_v2": moco_v2.MoCo, "simmoco": simmoco.SimMoCo, "simco": simco.SimCo}
DATA = tempfile.TemporaryDirectory()  # removed when this process ends
np.savez(f"{DATA.name}/cifar10.npz", **prepare.draw_shapes(256, 256, size=16))
TINY = f"--dataset cifar10 --data {DATA.name} --subset 64 --batch-size 32 --epochs 2".split()
TINY += "--width 8 --moco-dim 8 --precision fp32 --device cpu".split()  # fp32: the same everywhere


def drawn(train, test, size=16):
    """Drawn shapes as a common.Dataset."""
    *arrays, classes = prepare.draw_shapes(train, test, size).values()
    return common.Dataset(*map(torch.from_numpy, arrays), classes.tolist())


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: takes minutes; runs only if asked for, by -m soak")
    config.option.markexpr = config.option.markexpr or "not soak"


@pytest.fixture
def run_script(monkeypatch):
    """run_script(module, *flags): run `python module.py flags` here, and return its exit code."""

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            common.launch(module.main)
            sys.exit(0)
        return stop.value.code or 0

    return run


@pytest.fixture
def fails_plainly(run_script, capsys):
    """fails_plainly(module, *flags): expect exit code 2 and one line on stderr, before which
    argparse may say how the script is used, and return the line."""

    def run(module, *flags):
        capsys.readouterr()
        code, error = run_script(module, *flags), capsys.readouterr().err
        line = re.fullmatch(r"(?:usage: (?:.*\n)+?\w+: )?(error: .*\n)", error)
        assert code == 2 and line, error
        return line[1]

    return run


@pytest.fixture
def tiny_run(run_script, tmp_path):
    """tiny_run(method, *flags): train a TINY run, and return its directory."""

    def run(method, *flags, out=None):
        out = out or tmp_path / method
        assert run_script(METHODS[method], *TINY, "--out", out, *flags) == 0
        return out

    return run


@pytest.fixture
def interrupted_run(run_script, tmp_path):
    """interrupted_run(epochs, method, *flags): a TINY run, stopped by Ctrl-C in the next epoch."""

    def run(epochs, method, *flags):
        out, stop = tmp_path / "interrupted", [None] * epochs + [KeyboardInterrupt]
        with mock.patch("common.average_batchnorm", side_effect=stop):  # of one process: nothing
            assert run_script(METHODS[method], *TINY, *flags, "--out", out) == 130
        return out

    return run


def launchers(where, restarts=0):
    """Commands, run at the same time, to start a script on `where` processes, or on "two machines"
    with two processes each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}"]
    if where != "two machines":
        return [[*torchrun, "--standalone", f"--nproc_per_node={where}"]]
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
    agent = "--nnodes=2 --nproc_per_node=2 --rdzv-backend=c10d --rdzv-id=test".split()
    return [[*torchrun, *agent, "--local-addr=localhost", endpoint]] * 2


def start_script(where, *command, restarts=0):
    """Launch a script `where` (see `launchers`), wait for exit code 0, return what it printed."""
    commands = [[*launcher, *map(str, command)] for launcher in launchers(where, restarts)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = [subprocess.Popen(command, **pipes) for command in commands]
    printed = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(printed)
    return "".join(printed)
