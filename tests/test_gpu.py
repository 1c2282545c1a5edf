"""Steps as CUDA graphs: their logic, without a GPU. On one, see gpu_check.py."""
import contextlib
from types import SimpleNamespace

import pytest
import torch

import common


@pytest.mark.parametrize("fails", [False, True])
def test_a_graphed_step_computes_each_batch(fails, monkeypatch, capsys):
    """Also if it cannot be recorded: then it runs as it is."""
    seen, outputs = [], []

    def step(batch):
        seen.append(batch)
        return batch.view1.sum(), batch.labels + 1

    def record(graph, stream):
        if fails:
            raise RuntimeError("operation not permitted\nmore lines")
        return contextlib.nullcontext()

    def replay():  # without CUDA: the step runs once more, into the same memory
        for mine, new in zip(graphed.outputs, step(graphed.batch)):
            mine.copy_(new)

    graphed = common.CUDAGraph(step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", record)
    for i in range(6):
        view = torch.full((2, 3, 4, 4), float(i))
        batch = common.Batch(view, view, torch.arange(2), torch.tensor([i, i]), None, None)
        outputs.append(graphed(batch))
        assert outputs[i][0] == view.sum() and outputs[i][1].tolist() == [i + 1, i + 1]
        assert i > 2 or seen[i] is batch
    assert (outputs[3][0] is outputs[5][0]) != fails  # the same memory
    assert all((batch is graphed.batch) != fails for batch in seen[4:])
    message = "no CUDA graph, so slower: operation not permitted\n"
    assert capsys.readouterr().out == message * fails
