"""A run from start to end: what it writes, that an interruption leaves no trace in it, and several processes."""
import json
import signal
import subprocess
import sys

import distributed_worker
import pytest
import torch
from conftest import METHODS, ROOT, TINY, start_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import moco_v2
import simco


def weights(out):
    return common.load_checkpoint(out / "checkpoint.pth")


def same_state(a, b):
    """Whether two checkpoints agree in every bit: weights, buffers, optimiser."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_writes(method, tiny_run, capsys):
    out = tiny_run(method, "--seed", "3")
    args = json.loads((out / "args.json").read_text())
    assert args["method"] == method and args["seed"] == 3 and args["precision"] == "fp32" and args["environment"]["torch"]
    log = log_of(out)
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    assert log[0]["loss"] is None and 0 <= log[0]["knn_top1"] <= 100
    contrast = {"positive_similarity", "negative_similarity", "positive_ranks_first"}
    contrast |= {"dual_temperature_weight"} if method != "moco_v2" else set()
    for entry in log[1:]:
        assert entry.keys() == {"epoch", "loss", "lr", "knn_top1", "images_per_second", "seconds"} | contrast
        assert entry["loss"] > 0 and entry["seconds"] > 0
    assert log[1]["lr"] == pytest.approx(0.03 * 32 / 256)
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("epoch")]) == 3 and "fp32" in printed[0]

    board = EventAccumulator(str(out), size_guidance={"images": 0})
    board.Reload()
    scalars = set(board.Tags()["scalars"])
    assert {"train/loss", "train/lr", "knn/top1", "speed/images_per_second"} < scalars
    assert {name for name in scalars if name.startswith("contrast/")} == {f"contrast/{name}" for name in contrast}
    for name in contrast:
        values = [entry[name] for entry in log[1:]]
        assert [event.value for event in board.Scalars(f"contrast/{name}")] == values
        assert all(-1 <= value <= 1 for value in values) or (name == "dual_temperature_weight" and min(values) > 0)
    assert set(board.Tags()["histograms"]) == {"similarity/positive", "similarity/negative"}
    assert board.Tags()["images"] == ["two views of each image"]
    assert [event.step for event in board.Scalars("knn/top1")] == [0, 1, 2]


def test_defaults_are_the_recipe():
    """papers.md, section 2: a script without flags is the table's batch-256 cell."""
    for method, module in METHODS.items():
        args = module.arguments().parse_args([])
        common.resolve(args)
        recipe = dict(dataset="cifar100", epochs=200, batch_size=256, lr=0.03, warmup_epochs=10, weight_decay=5e-4,
                      momentum=0.9, width=64, stem_padding=2, moco_dim=128, moco_t=0.1)  # fmt: skip
        own = dict(simco=dict(dt_m=10), simmoco=dict(moco_m=0.99, dt_m=10), moco_v2=dict(moco_m=0.99, moco_k=65536))
        recipe.update(own[method])
        assert {key: value for key, value in vars(args).items() if key in recipe} == recipe
        assert args.out == f"runs/{method}-cifar100-bs256-seed0"


def test_same_seed_same_bits_other_seed_other_weights(run_script, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_script(simco, *TINY, "--out", tmp_path / name, "--seed", seed) == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same_state(a, b) and not same_state(a["model"], c["model"])


def test_args_json_alone_repeats_a_run(tiny_run, run_script, fails_plainly, tmp_path):
    out = tiny_run("moco_v2", "--v1", "--moco-k", "40", "--seed", "3")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "args.json").write_text((out / "args.json").read_text())
    for name, flags in (("same", []), ("other", ["--seed", "4"])):
        assert run_script(moco_v2, "--like", tmp_path / "copy", *flags, "--device", "cpu", "--out", tmp_path / name) == 0
    assert same_state(weights(out), weights(tmp_path / "same"))
    assert not same_state(weights(out), weights(tmp_path / "other"))
    assert "was written by moco_v2.py, and this is simco.py" in fails_plainly(simco, "--like", out, "--out", tmp_path / "x")
    assert "cannot read" in fails_plainly(simco, "--like", tmp_path, "--out", tmp_path / "x")


def test_finished_run_says_so_and_does_nothing(tiny_run, run_script, capsys):
    out = tiny_run("simco")
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert run_script(simco, *TINY, "--out", out) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_ends_with_the_same_bits(method, run_script, tmp_path, monkeypatch):
    flags = [*TINY, "--epochs", "4"] + (["--moco-k", "40"] if method == "moco_v2" else [])
    assert run_script(METHODS[method], *flags, "--out", tmp_path / "whole") == 0
    # Interrupted in the middle of the third epoch, and once more after an epoch was logged but before it was saved.
    steps, record, write = iter(range(100)), common.Run.record, common.write_atomically
    with monkeypatch.context() as patch:

        def interrupt_at_step_5(self, *what):
            if next(steps) == 5:
                raise KeyboardInterrupt
            record(self, *what)

        patch.setattr(common.Run, "record", interrupt_at_step_5)
        assert run_script(METHODS[method], *flags, "--out", tmp_path / "parts") == 130
    assert weights(tmp_path / "parts")["epoch"] == 2
    with monkeypatch.context() as patch:

        def interrupt_the_save(path, *what):
            if path.name == "checkpoint.pth":
                path.with_name("checkpoint.pth.tmp").write_bytes(b"half a checkpoint")
                raise KeyboardInterrupt
            write(path, *what)

        patch.setattr(common, "write_atomically", interrupt_the_save)
        assert run_script(METHODS[method], *flags, "--out", tmp_path / "parts") == 130
    assert weights(tmp_path / "parts")["epoch"] == 2 and log_of(tmp_path / "parts")[-1]["epoch"] > 2
    with open(tmp_path / "parts" / "log.jsonl", "a") as file:
        file.write('{"epoch": 5, "lo')  # a line cut short by a crash
    assert run_script(METHODS[method], *flags, "--out", tmp_path / "parts") == 0
    assert same_state(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    timeless = [
        [{key: entry[key] for key in ("epoch", "loss", "lr", "knn_top1")} for entry in log_of(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_killed_run_ends_with_the_same_bits(tmp_path):
    """A real process, killed without warning."""

    def start(out):
        command = [sys.executable, ROOT / "simmoco.py", *TINY, "--epochs", "12", "--out", out]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole, parts = start(tmp_path / "whole"), start(tmp_path / "parts")
    for line in parts.stdout:
        if line.startswith("epoch   3"):
            break
    parts.send_signal(signal.SIGKILL)
    assert parts.wait() == -signal.SIGKILL
    assert 2 <= weights(tmp_path / "parts")["epoch"] < 12
    again = start(tmp_path / "parts")
    assert "going on after epoch" in again.communicate()[0] and again.returncode == 0
    whole.communicate()
    assert same_state(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_loss_that_is_not_finite_stops_the_run(run_script, tmp_path, capsys):
    flags = [*TINY, "--lr", "1e30", "--out", tmp_path / "run"]
    assert run_script(simco, *flags) == 2
    error = capsys.readouterr().err
    assert "loss became nan" in error and "lr" in error and "fp32" in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.parametrize("where", [4, "two machines"])
def test_processes_compute_the_gradient_of_one(where, tmp_path):
    """The same global batch on several processes as on one, all methods: loss, gradients and queue. BatchNorm is in eval
    mode, where its statistics do not depend on how the batch is split."""
    start_script(where, ROOT / "tests" / "distributed_worker.py", tmp_path)
    one_process, parts = distributed_worker.compute_all(), [torch.load(path) for path in sorted(tmp_path.iterdir())]
    assert len(parts) == (2 if where == "two machines" else where)
    for method in METHODS:
        one, shares = one_process[method], [part[method] for part in parts]
        assert torch.equal(one["views"], torch.cat([share["views"] for share in shares], dim=1))
        loss = sum(share["loss"] for share in shares) / len(shares)
        torch.testing.assert_close(loss, one["loss"], rtol=1e-5, atol=0)
        for share in shares:
            for name, gradient in one["gradients"].items():
                # 1e-5 of the largest entry: small entries are differences of large ones, and inherit their rounding
                tolerance = 1e-5 * gradient.abs().max().item()
                assert (share["gradients"][name] - gradient).abs().max() <= tolerance, name
        if method == "moco_v2":
            assert all(torch.equal(share["queue"], shares[0]["queue"]) for share in shares)
            torch.testing.assert_close(shares[0]["queue"], one["queue"], rtol=1e-5, atol=1e-6)
