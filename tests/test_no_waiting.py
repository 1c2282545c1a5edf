"""No training step waits for the device: the host must run ahead, or a GPU idles."""
import pytest
import torch
from conftest import METHODS
from torch.utils._python_dispatch import TorchDispatchMode

import common

aten = torch.ops.aten
# The host needs a value, as for .item() and `if tensor`, or the size of a result.
WAITS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal}
WAITS |= {aten.nonzero, aten.masked_select, aten._unique2}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
WHERE = ("cuda --cuda-graph off", "cuda", "cuda --precision fp16")
WHERE = ["cpu"] + [pytest.param(flags, marks=NEEDS_GPU) for flags in WHERE]


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, masks = operation.overloadpacket, []
        if name in (aten.index, aten.index_put, aten.index_put_):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        assert name not in WAITS and not masks, f"{operation} waits for the device"
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch):
    """Watch the steps of each epoch. `batches` may wait before its first batch, to draw params."""
    batches = common.batches

    def watched_batches(data, epoch, args):
        remaining = batches(data, epoch, args)
        first = next(remaining)
        if args.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with NoWaiting():
                yield first
                yield from remaining
        finally:
            if args.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(common, "batches", watched_batches)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("method", METHODS)
def test_steps_do_not_wait(method, where, watch, tiny_run, monkeypatch):
    """With a graph the fourth of eight steps is recorded, which fails where it would wait."""
    if "fp16" in where:  # on a stand-in that computes nothing, the scale is anything
        monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda _: 1.0)
    tiny_run(method, *f"--device {where} --subset 128 --compile off".split())


def test_the_watch_sees_a_wait(watch, tiny_run, monkeypatch):
    one = torch.ones(3)
    for wait in (one.sum().item, one.nonzero, lambda: one[one > 0], lambda: float(one[0])):
        monkeypatch.setattr(common.Log, "add", lambda *_, wait=wait: wait())
        with pytest.raises(AssertionError, match="waits for the device"):
            tiny_run("simco")
