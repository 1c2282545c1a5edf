"""Steps as CUDA graphs: their logic, without a GPU, and on one what they compute."""
import contextlib

import gpu_check
import pytest
import torch
from conftest import METHODS, TINY
from test_no_waiting import NEEDS_GPU
from test_runs import log_of

import common
import simco


class Recording:
    """A torch.cuda.CUDAGraph without CUDA: the step runs once more, into the same memory."""

    def replay(self):
        for mine, new in zip(self.graphed.outputs, self.graphed.step(self.graphed.batch)):
            mine.copy_(new)


@pytest.fixture
def graphed_step(monkeypatch):
    """A step that sums up its batch, as a CUDAGraph, and the list of the batches that it saw."""
    args, seen = simco.arguments().parse_args([]), []
    probe = common.Probe(args, common.resnet18(1), 10, torch.device("cpu"))

    def step(batch):
        seen.append(batch)
        return batch.view1.sum(), batch.labels + 1

    graphed = common.CUDAGraph(step, probe)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(Recording, "graphed", graphed, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return graphed, seen


def some_batches(count):
    for i in range(count):
        view = torch.full((2, 3, 4, 4), float(i))
        yield common.Batch(view, view, torch.arange(2), torch.tensor([i, i]), None, None)


def assert_sums(batch, outputs):
    assert outputs[0] == batch.view1.sum() and torch.equal(outputs[1], batch.labels + 1)


def test_a_graph_computes_each_batch(graphed_step, monkeypatch):
    graphed, seen = graphed_step
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    outputs = []
    for batch in some_batches(6):
        outputs.append(graphed(batch))
        assert_sums(batch, outputs[-1])
    assert all(outputs[3][i] is outputs[5][i] for i in (0, 1))  # the same memory
    assert [batch.view1[0, 0, 0, 0].item() for batch in seen[:3]] == [0, 1, 2]
    assert all(batch is graphed.batch for batch in seen[3:])


def test_a_step_that_cannot_be_recorded_runs_as_it_is(graphed_step, monkeypatch, capsys):
    graphed, seen = graphed_step

    def fail(graph, stream):
        graphed.probe.features.append("a part of what was recorded")
        raise RuntimeError("operation not permitted\nmore lines")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    for batch in some_batches(6):
        assert_sums(batch, graphed(batch))
    assert capsys.readouterr().out == "no CUDA graph, so slower: operation not permitted\n"
    assert len(seen) == 6 and graphed.probe.features == []


def test_flag_where_there_is_no_gpu(tiny_run, fails_plainly):
    args = common.read_json(tiny_run("simco") / "args.json")
    assert args["cuda_graph"] == "off"  # of "auto"
    assert "--cuda-graph on needs" in fails_plainly(simco, *TINY, "--cuda-graph", "on")


@NEEDS_GPU
@pytest.mark.parametrize("method", METHODS)
def test_a_graphed_run_computes_the_same(method, tiny_run, tmp_path):
    """The same kernels, so what remains is the rounding of float32, amplified in 16 steps."""
    flags = "--device cuda --compile off --subset 256 --cuda-graph".split()
    eager, graphed = (
        tiny_run(method, *flags, how, "--out", tmp_path / how) for how in ("off", "on")
    )
    for name in ("loss", "positive_similarity"):
        ours, theirs = ([entry[name] for entry in log_of(out)[1:]] for out in (graphed, eager))
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.soak
def test_gpu_check_finds_a_mistake():
    """On the CPU: the flags as they are, and a learning rate that is 1 % off."""
    places = {"right": "--device cpu", "wrong": "--device cpu --lr 0.0303"}
    lines, verdict = gpu_check.compare_steps("moco_v2", places)
    assert not verdict and "DIFFERS" not in lines[2] and lines[3].endswith("DIFFERS"), lines
