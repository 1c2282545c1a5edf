"""The online probe, and the statistics of features that are logged beside it."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS, TINY
from test_runs import log_of

import common

METRICS = ("alignment", "uniformity", "effective_rank", "feature_std")


@pytest.mark.parametrize(
    "command",
    [
        "simco",
        "simmoco --bn-splits 4",
        "moco_v2 --moco-k 40",
        "moco_v2 --moco-k 40 --symmetric",
        "moco_v2 --memory-bank --moco-k 20",
    ],
)
def test_the_method_does_not_notice_the_probe(command, tiny_run, tmp_path):
    """Weights, BatchNorm's statistics, momenta, queue, losses, kNN: the same bits without it."""
    method, *flags = command.split()
    states, logs = {}, {}
    for probe in ("off", "query", "both"):
        out = tmp_path / probe
        tiny_run(method, *flags, "--probe", probe, "--out", out)
        states[probe], logs[probe] = common.load_checkpoint(out / "checkpoint.pth"), log_of(out)
    learnt = {probe: states[probe].pop("probe", None) for probe in states}
    assert learnt["off"] is None and logs["off"][-1]["probe_top1"] is None
    weights = [learnt[probe]["classifier"]["weight"] for probe in ("query", "both")]
    one_view = method != "simco" and "--symmetric" not in flags
    assert torch.equal(*weights) != one_view
    for probe in ("query", "both"):
        torch.testing.assert_close(states[probe], states["off"], rtol=0, atol=0)
        for ours, without in zip(logs[probe], logs["off"], strict=True):
            assert ours.keys() == without.keys()
            for name in ours.keys() - {"probe_top1", "images_per_second", "seconds"}:
                assert ours[name] == without[name], name


@pytest.mark.parametrize(
    "command, num_views",
    [
        ("simco", 2),
        ("simmoco", 1),
        ("simmoco --probe both", 2),
        ("moco_v2 --moco-k 40 --symmetric", 2),
        ("moco_v2 --memory-bank --moco-k 20 --probe both", 2),
    ],
)
def test_the_probe_learns_as_described(command, num_views, tiny_run, monkeypatch):
    """The authors' probe, written out: a linear classifier of the query encoder's features."""
    steps, step = [], common.Probe.step

    def watched_step(probe, batch):
        steps.append(copy.deepcopy((probe.backbone.state_dict(), probe.classifier, batch[:-1])))
        step(probe, batch)

    monkeypatch.setattr(common.Probe, "step", watched_step)
    method, *flags = [*command.split(), "--epochs", "5", "--warmup-epochs", "2"]
    out = tiny_run(method, *flags)
    lrs = [0.003, 0.3, *(0.15 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3))]
    assert len(steps) == 2 * len(lrs)

    parameters = list(steps[0][1].parameters())
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    backbone = common.resnet18(width=2).train()
    data = common.load_data(METHODS[method].arguments().parse_args(TINY), torch.device("cpu"))
    for i, (state, _, batch) in enumerate(steps):
        backbone.load_state_dict(state)
        losses = []
        for view in (batch[0], batch[1])[:num_views]:  # each a pass of its own, for BatchNorm
            logits = F.linear(backbone(view).detach(), *parameters)
            losses.append(F.cross_entropy(logits, data.train_labels[batch[2]]))
        gradients = torch.autograd.grad(sum(losses) / num_views, parameters)
        with torch.no_grad():
            for parameter, velocity, gradient in zip(parameters, velocities, gradients):
                velocity.mul_(0.9).add_(gradient)
                parameter.sub_(lrs[i // 2] * velocity)
    checkpoint = common.load_checkpoint(out / "checkpoint.pth")
    for ours, name in zip(parameters, ("weight", "bias")):  # ten steps in float32
        expected = checkpoint["probe"]["classifier"][name]
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-5, atol=1e-6)

    encoder = "encoder." if method == "simco" else "encoder_q."
    names = [name for name in checkpoint["model"] if name.startswith(f"{encoder}backbone.")]
    state = {name.split("backbone.")[1]: checkpoint["model"][name] for name in names}
    backbone.load_state_dict(state)
    images = common.normalize(common.to_float(data.test_images))
    predicted = F.linear(backbone.eval()(images), *parameters).argmax(dim=1)
    top1 = 100 * (predicted == data.test_labels).double().mean().item()
    assert log_of(out)[-1]["probe_top1"] == pytest.approx(top1, abs=100 / 256)  # a tie at most


def test_a_probe_that_there_is_not(fails_plainly):
    error = fails_plainly(METHODS["simco"], "--probe", "linear")
    assert "'linear'" in error and "query" in error and "both" in error


def features(kind):
    """float64 [60, 12]: random, all in one direction, or in three directions."""
    random = np.random.default_rng(0)
    x = random.standard_normal((60, 12))
    flat = x[:, :3] @ random.standard_normal((3, 12))
    return dict(random=x, point=x[:, :1] * np.ones(12), flat=flat)[kind]


@pytest.mark.parametrize("kind", ["random", "point", "flat"])
def test_metrics_agree_with_numpy(kind):
    x = features(kind)
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, x + 0.1))
    squares = np.array([np.sum((a - b) ** 2) for i, a in enumerate(x) for b in x[:i]])
    singular_values = np.linalg.svd(x, compute_uv=False)
    p = singular_values / singular_values.sum() + 1e-7
    expected = [np.mean(np.sum((x - y) ** 2, axis=1)), np.log(np.mean(np.exp(-2 * squares)))]
    expected.append(np.exp(-np.sum(p * np.log(p))))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    ours = [common.alignment(x, y), common.uniformity(x), common.effective_rank(x)]
    # A Gram matrix has squared singular values: those near 0 keep half of the digits of float64.
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-12)


def test_rank_of_features_that_are_not_finite():
    assert common.effective_rank(torch.full((4, 3), torch.nan)).isnan()


def test_metrics_of_a_run(tiny_run):
    """They are of the backbone's features, in eval mode, and say when a network has collapsed."""
    log = log_of(tiny_run("simco"))
    for entry in (log[0], log[-1]):
        assert 0 < entry["alignment"] < 4 and -8 < entry["uniformity"] < 0
        assert 1 < entry["effective_rank"] < 16 and 0 < entry["feature_std"] < 1 / 16**0.5
    args = METHODS["simco"].arguments().parse_args(TINY)
    data, backbone = common.load_data(args, torch.device("cpu")), common.resnet18(width=2)
    collapsed = torch.nn.Sequential(backbone)
    collapsed.num_features = 16
    collapsed.register_forward_hook(lambda module, images, x: torch.ones_like(x))
    probe = common.Probe(args, collapsed, 10, torch.device("cpu"))
    entry = common.monitor(collapsed, probe, data, args)
    values = [entry[name] for name in METRICS]
    np.testing.assert_allclose(values, [0, 0, 1, 0], atol=1e-4)  # RankMe adds 1e-7 to each p
