"""What the tests share. The scripts run in this process, on a tiny dataset, for about a second."""
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # sums then have the same order everywhere
torch.set_num_threads(1)
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # for --max-restarts, see README

import common  # noqa: E402
import moco_v2  # noqa: E402
import simco  # noqa: E402
import simmoco  # noqa: E402

METHODS = {"moco_v2": moco_v2, "simmoco": simmoco, "simco": simco}
# A few drawn images. To draw all of --dataset shapes takes longer than a tiny run.
DATA = tempfile.TemporaryDirectory()  # removed when this process ends
np.savez(f"{DATA.name}/cifar10.npz", **common.draw_shapes(256, 256)._asdict())
TINY = f"--dataset cifar10 --data {DATA.name} --subset 64 --batch-size 32 --epochs 2".split()
TINY += "--width 2 --moco-dim 8 --precision fp32 --device cpu".split()  # fp32: the same everywhere


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
    """fails_plainly(module, *flags): expect exit code 2 and one line on stderr, and return it."""

    def run(module, *flags):
        capsys.readouterr()
        code, error = run_script(module, *flags), capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


@pytest.fixture
def tiny_run(run_script, tmp_path):
    """tiny_run(method, *flags): train a TINY run, and return its directory."""

    def run(method, *flags):
        assert run_script(METHODS[method], *TINY, "--out", tmp_path / method, *flags) == 0
        return tmp_path / method

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
