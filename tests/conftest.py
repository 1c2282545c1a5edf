"""Shared by the tests: the scripts are importable from anywhere, run in this process, and tiny."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import moco_v2  # noqa: E402
import simco  # noqa: E402
import simmoco  # noqa: E402

METHODS = {"moco_v2": moco_v2, "simmoco": simmoco, "simco": simco}
# A run of a few seconds: drawn images, a very narrow network, fp32 so that it is the same on every machine.
TINY = "--dataset shapes --subset 64 --batch-size 32 --width 2 --moco-dim 8 --epochs 2 --precision fp32 --device cpu".split()


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: takes minutes; runs only if asked for, by -m soak")
    config.option.markexpr = config.option.markexpr or "not soak"


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


torch.set_num_threads(2)  # so that sums are taken in the same order wherever the suite runs
