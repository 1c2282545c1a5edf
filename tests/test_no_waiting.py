"""Nothing in a training step waits for the device: on a GPU the host must run ahead, or the GPU idles."""
import pytest
import torch
from conftest import METHODS
from torch.utils._python_dispatch import TorchDispatchMode

import common

aten = torch.ops.aten
# What needs a value on the host: .item(), float(), bool(), `if tensor`, printing; and results whose size is in the data.
WAITS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}


class NoWaiting(TorchDispatchMode):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        by_mask = operation.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # The loss on the progress bar is read from the host's own memory, where it arrives when it arrives.
        of_the_bar = args and args[0] is self.run.shown_loss
        if (operation.overloadpacket in WAITS or by_mask) and not of_the_bar:
            raise AssertionError(f"{operation} in the training loop waits for the device")
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def watch_the_loop(monkeypatch):
    """From the first batch of an epoch (before it, the epoch's plan goes to the device) to its last, no step may wait."""
    watched = []
    views = common.Run.views

    def watched_views(run, *where):
        batches = views(run, *where)
        first = next(batches)
        watched.append(run)
        if run.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield first
                yield from batches
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            with NoWaiting(run):
                yield first
                yield from batches

    monkeypatch.setattr(common.Run, "views", watched_views)
    return watched


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_steps_do_not_wait(method, device, watch_the_loop, tiny_run):
    tiny_run(method, "--device", device, "--compile", "off", "--subset", "128")
    assert len(watch_the_loop) == 2  # epochs


@pytest.mark.parametrize("wait", [
    lambda loss: loss.item(),
    lambda loss: float(loss) if loss > 0 else 0,
    lambda loss: torch.arange(4)[torch.arange(4) > 1],
    lambda loss: torch.ones(3).nonzero(),
])  # fmt: skip
def test_the_watch_sees_a_wait(wait, watch_the_loop, tiny_run, monkeypatch):
    record = common.Run.record
    monkeypatch.setattr(common.Run, "record", lambda run, loss, *rest: (wait(loss), record(run, loss, *rest)))
    with pytest.raises(AssertionError, match="waits for the device"):
        tiny_run("simco")
