"""Linear evaluation: the frozen backbone, the wide layer, and the protocol."""
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import METHODS, ROOT, drawn, start_script

import common
import linear_eval

QUICK = "--epochs 2 --precision fp32 --device cpu --lrs 0.1 1 10".split()


def read(path):
    return json.loads(path.read_text())


def evaluate(backbone, data, *flags):
    return linear_eval.evaluate(backbone, data, linear_eval.arguments().parse_args(["run", *flags]))


@pytest.mark.parametrize("method", METHODS)
def test_evaluates_the_checkpoint_and_the_untrained_network(method, tiny_run, run_script):
    out = tiny_run(method, "--seed", "5")
    for flags in (["--cached", "--untrained"], ["--cached"], []):
        assert run_script(linear_eval, out, *QUICK, *flags) == 0
    result, log = read(out / "result.json"), (out / "log.jsonl").read_text().splitlines()
    assert (result["epoch"], result["untrained"]["epoch"]) == (2, 0)
    assert result["untrained"]["protocol"]["cached"] and not result["protocol"]["cached"]
    assert 0 <= result["linear_top1"] <= result["linear_top5"] <= 100
    assert result["untrained"]["knn_top1"] == json.loads(log[0])["knn_top1"]
    assert result["knn_top1"] == json.loads(log[-1])["knn_top1"]


def test_two_processes_and_the_checkpoint_alone_give_the_same(tiny_run, run_script, fails_plainly):
    out, flags = tiny_run("simco"), [*QUICK, "--epochs", "10", "--batch-size", "16"]
    start_script(2, ROOT / "linear_eval.py", out, *flags)
    assert run_script(linear_eval, out, *flags, "--json", out / "one.json") == 0
    data = ["--dataset", "cifar10", "--data", read(out / "args.json")["data"], "--subset", 64]
    alone = ["--checkpoint", out / "checkpoint.pth", *data, *flags, "--json", out / "alone.json"]
    assert run_script(linear_eval, *alone) == 0
    one, two, other = (read(out / f"{name}.json") for name in ("one", "result", "alone"))
    assert one["held_out_loss"] == pytest.approx(two["held_out_loss"], rel=1e-4)
    for key in ("linear_top1", "linear_top5", "knn_top1"):
        assert one[key] == other[key]
        assert one[key] == pytest.approx(two[key], abs=100 / 256)  # rounding may tip an image
    assert "alone.json' exists" in fails_plainly(linear_eval, *alone)
    assert read(out / "alone.json") == other


@pytest.mark.parametrize("ignored", [0, 20])
def test_wide_layer_is_the_single_classifiers(ignored):
    """Each classifier against one by the plain formula. Two of four leave some images out."""
    torch.manual_seed(0)
    features, labels, orders = torch.randn(96, 12), torch.randint(0, 5, (96,)), []
    data = common.Dataset(features, labels, features, labels, list("abcde"))
    rates, ignores = [0.1, 2.0, 0.1, 2.0], torch.zeros(96, 4, dtype=torch.bool)
    ignores[:ignored, :2] = True

    def features_of(index, generator):
        orders.append(index)
        return features[index]

    args = Namespace(epochs=3, batch_size=32, seed=1)
    wide = linear_eval.train_linear(features_of, 12, torch.arange(96), data, rates, args, ignores)
    assert [sorted(order.tolist()) for order in orders] == [list(range(96))] * 3
    for i, (weight, rate) in enumerate(zip(wide.weight.split(5), rates)):
        alone = nn.Linear(12, 5)
        nn.init.zeros_(alone.weight)
        nn.init.zeros_(alone.bias)
        optimizer = torch.optim.SGD(alone.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        for batch in torch.cat(orders).split(32):
            rows = batch[~ignores[batch, i]]
            optimizer.zero_grad()
            F.cross_entropy(alone(features[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight, alone.weight.detach())  # float32, the same formula


def test_backbone_stays_as_it_is_and_sees_crops_as_precise_as_in_training():
    """Not one number of it moves, and in bf16, too, the crops are float32."""
    backbone, crops = common.resnet18(8).train(), []
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.register_forward_pre_hook(lambda _, views: crops.append(views[0]))
    for flags in ([], ["--precision", "bf16"], ["--cached"]):
        evaluate(backbone, drawn(64, 16), *QUICK, *flags)
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, before[name]), name
    # Features of all train and test images, then, if not --cached, an epoch's crops, twice.
    assert [len(views) for views in crops] == [64, 16, 64, 64] * 2 + [64, 16]
    assert all(map(torch.equal, crops[:4], crops[4:8])) and not torch.equal(crops[2], crops[3])


def test_learning_rate_is_chosen_on_held_out_images():
    """The images are noise: a classifier knows the labels of those that it was trained on only."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (400, 8, 8, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (400,))
    data = common.Dataset(images, labels, images, labels, list("0123456789"))
    backbone = nn.Flatten()
    backbone.num_features = 192
    first = evaluate(backbone, data, *QUICK, "--cached", "--epochs", "100")
    held_out_loss = first["held_out_loss"]
    assert min(held_out_loss.values()) > 0.95 * math.log(10)  # of noise nothing can be known
    assert held_out_loss[str(float(first["linear_lr"]))] == min(held_out_loss.values())
    assert first["linear_top1"] == 100  # the last classifier was trained on all of them
    data = data._replace(test_labels=(labels + 1) % 10)
    second = evaluate(backbone, data, *QUICK, "--cached", "--epochs", "100")
    assert second["linear_top1"] < 10 and second["held_out_loss"] == held_out_loss


def test_calibrated_losses():
    """Of three classifiers: one, the same but ten times as sure, and one that knows less."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 6), torch.randn(200, 6)
    labels = (x @ weight.T + torch.randn(200, 5)).argmax(dim=1)
    heads = nn.Linear(6, 15, bias=False).requires_grad_(False)
    heads.weight.copy_(torch.cat([weight, 10 * weight, weight + torch.randn(5, 6)]))
    expected = []
    for logits in np.split((x.double() @ heads.weight.T.double()).numpy(), 3, axis=1):
        scaled = [logits / t for t in 10 ** np.linspace(-1, 3, 81)]
        losses = [np.logaddexp.reduce(z, axis=1) - z[np.arange(200), labels] for z in scaled]
        expected.append(min(loss.mean() for loss in losses))
    ours = linear_eval.calibrated_losses(heads, x, labels, 5)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert ours[0] == pytest.approx(ours[1], rel=1e-5) and ours[2] > ours[0]


MISTAKES = {"": "which run", "run": "args.json", "--checkpoint x": "--dataset"}
MISTAKES |= {"run --checkpoint x --stem-padding 1": "drop checkpoint, stem-padding"}
MISTAKES |= {"run --export x --json y": "drop --json", "--checkpoint x --export .": "'.' exists"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes(flags, fails_plainly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MISTAKES[flags] in fails_plainly(linear_eval, *flags.split())
