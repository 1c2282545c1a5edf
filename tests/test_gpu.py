"""CUDA graphs, fp16 and the GPU check: their logic, without a GPU. On one, see gpu_check.py."""
import contextlib
import re
from types import SimpleNamespace
from unittest import mock

import gpu_check
import pytest
import torch
from conftest import METHODS, TINY
from test_runs import weights

import common
import linear_eval


def fake_graph(monkeypatch, replay=None):
    """Let a step be "recorded" without CUDA: it runs."""

    @contextlib.contextmanager
    def record(graph, stream):
        try:
            yield
        except ValueError:  # a capture that was spoilt; as torch.cuda.graph, which cannot end it
            raise RuntimeError("operation failed due to a previous error during capture") from None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", record)


def test_a_graphed_step_computes_each_batch(monkeypatch):
    seen, outputs = [], []

    def step(batch):
        seen.append(batch)
        return batch.view1.sum(), batch.labels + 1

    def replay():  # the step runs once more, into the same memory
        for mine, new in zip(graphed.outputs, step(graphed.batch)):
            mine.copy_(new)

    fake_graph(monkeypatch, replay)
    graphed = common.CUDAGraph(step)
    for i in range(6):
        view = torch.full((2, 3, 4, 4), float(i))
        batch = common.Batch(view, view, torch.arange(2), torch.tensor([i, i]), None, None)
        outputs.append(graphed(batch))
        assert outputs[i][0] == view.sum() and outputs[i][1].tolist() == [i + 1, i + 1]
        assert i > 2 or seen[i] is batch
    assert outputs[3][0] is outputs[5][0]  # the same memory
    assert all(batch is graphed.batch for batch in seen[4:])


@pytest.mark.parametrize("cause", [ValueError("not permitted\nmore"), RuntimeError("memory")])
def test_a_step_that_cannot_be_recorded(cause, monkeypatch, capsys):
    """It ends the run: optimizer, scaler and allocator may be left in the middle of the step."""
    fake_graph(monkeypatch)
    step = mock.Mock(side_effect=[1, 2, 3, cause])
    graphed = common.CUDAGraph(step)
    batch = common.Batch(*[None] * 6)
    assert [graphed(batch) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(SystemExit) as stop:
        graphed(batch)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--cuda-graph off" in error and repr(cause) in error


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="before 2.3, on GPUs only")
@pytest.mark.parametrize("method", [*METHODS])
def test_scaled_gradients(method, tiny_run, interrupted_run, monkeypatch):
    """In float32 a power of two scales without rounding. The scale grows at every second step."""
    plain = tiny_run(method)
    scaler = torch.amp.GradScaler
    options = dict(device="cpu", init_scale=2.0**10, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda enabled: scaler(**options))
    monkeypatch.setattr(common, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    out = interrupted_run(1, method)
    assert weights(out)["scaler"]["scale"] == 2**11
    ours, theirs = weights(plain), weights(tiny_run(method, out=out))
    assert ours.pop("scaler") == {} and theirs.pop("scaler")["scale"] == 2**12
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="before 2.3, on GPUs only")
def test_steps_that_overflow_are_skipped(tiny_run, fails_plainly, tmp_path, monkeypatch):
    """All four. Then the encoder is as it began, except that BatchNorm has its statistics."""
    scaler = torch.amp.GradScaler
    options = dict(device="cpu", init_scale=3e38, backoff_factor=0.999)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda enabled: scaler(**options))
    after = weights(tiny_run("simco"))
    before = linear_eval.untrained(seed=0, width=8, stem_padding=2).state_dict()
    for name, tensor in before.items():
        is_statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, after["model"][f"encoder.backbone.{name}"]) != is_statistic
    assert after["scaler"]["scale"] == pytest.approx(3e38 * 0.999**4) and not after["momenta"]
    # After 17 skipped steps the scale is below 1.
    options["backoff_factor"] = 1e-39
    error = fails_plainly(METHODS["simco"], *TINY, "--out", tmp_path / "skips")
    assert "overflow in fp16" in error and not (tmp_path / "skips" / "checkpoint.pth").exists()


@pytest.mark.parametrize("script", [*METHODS.values(), linear_eval])
def test_fp16_needs_a_gpu(script, fails_plainly):
    flags = ["--checkpoint", "x", "--dataset", "x"] if script is linear_eval else TINY
    where = ["--device", "cpu"]
    assert "fp16 needs a GPU" in fails_plainly(script, *flags, *where, "--precision", "fp16")


@pytest.mark.parametrize("capability, precision", [(9, "bf16"), (8, "bf16"), (7, "fp16")])
def test_precision_of_a_gpu(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 5))
    args = SimpleNamespace(device="auto", precision="auto")
    common.init_device(args)
    assert (args.device, args.precision) == ("cuda", precision)


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(common, "WORLD_SIZE", 3)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit):
        common.init_device(SimpleNamespace(device="cuda", precision="auto"))
    assert capsys.readouterr().err == "error: more processes than GPUs (LOCAL_RANK 2)\n"


def test_the_gpu_check_finds_a_mistake(capsys):
    flags = "--device cpu --compile off"
    mistakes = ["--lr 0.0301", "--weight-decay 0.00055", "--moco-t 0.1001"]
    assert not gpu_check.compare_steps("moco_v2", {x: f"{flags} {x}" for x in ["", *mistakes]})
    lines = capsys.readouterr().out.splitlines()
    right, *wrong = (float(re.search(r": ([\d.]+) of", line)[1]) for line in lines)
    assert right == 0 and min(wrong) > 2 and len(wrong) == 3


@pytest.mark.parametrize("broken", ["nothing", "steps", "compare_steps", "train", "losses"])
def test_the_gpu_check_ends_with_a_verdict(broken, monkeypatch, capsys):
    def compare_steps(method):
        common.require(broken != "compare_steps", method)
        return broken != "steps"

    def train(folder, name, flags=""):
        assert broken != "train"
        return (1.1 if broken == "losses" and name == "eager" else 1.0), name

    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "compare_steps", compare_steps)
    monkeypatch.setattr(gpu_check, "train", train)
    with pytest.raises(SystemExit) as stop:
        gpu_check.main()
    good = "The GPU computes what the CPU computes."
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict == (good if broken == "nothing" else "SOMETHING IS WRONG.")
    assert stop.value.code == (broken != "nothing")
