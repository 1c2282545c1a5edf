"""Linear evaluation: the frozen backbone, the wide layer, the protocol, and the tables."""
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import METHODS, ROOT, start_script

import common
import linear_eval

QUICK = "--epochs 2 --precision fp32 --device cpu --lrs 0.1 1 10".split()


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", METHODS)
def test_evaluates_the_checkpoint_and_the_untrained_network(method, tiny_run, run_script):
    out = tiny_run(method, "--seed", "5")
    for flags in (["--cached", "--untrained"], ["--cached"], []):
        assert run_script(linear_eval, out, *QUICK, *flags) == 0
    result, log = read(out / "result.json"), (out / "log.jsonl").read_text().splitlines()
    assert (result["epoch"], result["untrained"]["epoch"]) == (2, 0)
    assert result["protocol"]["held_out"] == 6 and not result["protocol"]["cached"]
    assert 0 <= result["linear_top1"] <= result["linear_top5"] <= 100
    assert result["untrained"]["knn_top1"] == json.loads(log[0])["knn_top1"]
    assert result["knn_top1"] == json.loads(log[-1])["knn_top1"]
    names = {"metadata.tsv", "sprite.png", "tensors.tsv"}
    assert {path.name for path in (out / "00000" / "test_features").iterdir()} == names


@pytest.mark.parametrize("flags", [[], ["--cached"]])
def test_not_one_number_of_the_backbone_moves(flags):
    backbone = common.resnet18(2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    args = linear_eval.arguments().parse_args(["run", *QUICK, *flags])
    data = common.draw_shapes(64, 16)
    linear_eval.evaluate(backbone, data, linear_eval.extract_features(backbone, data, args), args)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_picture_of_neighbours():
    # Of two classes, with features on a circle: the nearest training images are known.
    angles = torch.tensor([0.0, 0.1, 0.2, 2.0, 2.1])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    test = 3 * train[[4, 0]]  # only the direction matters
    labels = torch.tensor([0, 0, 1, 1, 1])
    gray = torch.full((5, 8, 8, 3), 51, dtype=torch.uint8)
    data = common.Dataset(gray, labels, gray[:2], torch.tensor([1, 0]), ["a", "b"])
    features = data._replace(train_images=train, test_images=test)
    picture, rows, percent = linear_eval.picture_of_neighbours(features, data, count=2, k=3)
    assert rows.tolist() == [0, 1]  # the second test image, then the first
    assert percent == pytest.approx(100 * 5 / 6)  # labels 0 0 1 and 1 1 1
    side = 8 + 2 * 2 + 1
    assert picture.shape == (3, 1 + 2 * side, 1 + 4 * side)
    is_green = picture[1, 1::side, 1::side] > picture[0, 1::side, 1::side]  # corners of frames
    assert is_green.tolist() == [[False, True, True, False], [False, True, True, True]]
    assert (picture[:, 3::side, 3::side] == 0.2).all()


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


def test_wide_layer_is_the_single_classifiers():
    torch.manual_seed(0)
    features, labels, rates = torch.randn(96, 12), torch.randint(0, 5, (96,)), [0.01, 0.3, 2.0]
    data = common.Dataset(features, labels, features, labels, list("abcde"))
    args = Namespace(epochs=9, batch_size=96, seed=1)
    wide = linear_eval.train_linear(data, torch.arange(96), rates, args)
    for weight, rate in zip(wide.weight.split(5), rates):
        alone = nn.Linear(12, 5)
        nn.init.zeros_(alone.weight)
        nn.init.zeros_(alone.bias)
        optimizer = torch.optim.SGD(alone.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        for _ in range(9):
            optimizer.zero_grad()
            F.cross_entropy(alone(features), labels).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight, alone.weight.detach())  # float32, the same formula


def test_ignored_images_teach_the_other_half_only():
    """Twenty of 96 images, in batches of 32: each classifier against one by the plain formula."""
    torch.manual_seed(0)
    features, labels, ignored = torch.randn(96, 12), torch.randint(0, 5, (96,)), torch.arange(20)
    data = common.Dataset(features, labels, features, labels, list("abcde"))
    args, orders = Namespace(epochs=3, batch_size=32, seed=1), []

    def features_of(index, generator):
        orders.append(index)
        return features[index]

    rates = [0.1, 1.0, 0.1, 1.0]
    wide = linear_eval.train_linear(data, torch.arange(96), rates, args, features_of, ignored)
    assert [sorted(order.tolist()) for order in orders] == [list(range(96))] * 3
    for i, (weight, rate) in enumerate(zip(wide.weight.split(5), rates)):
        alone = nn.Linear(12, 5)
        nn.init.zeros_(alone.weight)
        nn.init.zeros_(alone.bias)
        optimizer = torch.optim.SGD(alone.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        for batch in torch.cat(orders).split(32):
            rows = batch[batch >= 20] if i < 2 else batch
            optimizer.zero_grad()
            F.cross_entropy(alone(features[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight, alone.weight.detach())  # float32, the same formula


def test_crops_are_shared_and_as_precise_as_in_training(monkeypatch):
    """One pass over the crops, which are float32 in bf16 too, and no grid but on the crops."""
    passes, crops, train = [], {}, linear_eval.train_linear
    data, backbone = common.draw_shapes(64, 16), common.resnet18(1)
    for precision in ("fp32", "bf16"):
        flags = ["run", *QUICK, "--epochs", "1", "--precision", precision]
        args, seen = linear_eval.arguments().parse_args(flags), []

        def watched_train(features, index, rates, *others):
            passes.append((len(index), list(rates)))
            return train(features, index, rates, *others)

        monkeypatch.setattr(linear_eval, "train_linear", watched_train)
        hook = backbone.register_forward_pre_hook(lambda _, views, seen=seen: seen.append(views))
        features = linear_eval.extract_features(backbone, data, args)
        linear_eval.evaluate(backbone, data, features, args)
        hook.remove()
        crops[precision] = seen[-1][0]
    assert passes == [(64, [0.1, 1.0, 10.0] * 2)] * 2
    assert crops["fp32"].shape == (64, 3, 32, 32) and torch.equal(crops["fp32"], crops["bf16"])


def test_learning_rate_is_chosen_on_held_out_images():
    """The images are noise: a classifier knows the labels of those that it was trained on only."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (400, 8, 8, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (400,))
    data = common.Dataset(images, labels, images, labels, list("0123456789"))
    backbone = nn.Flatten()
    backbone.num_features = 192
    args = linear_eval.arguments().parse_args(["run", *QUICK, "--cached", "--epochs", "100"])
    features = linear_eval.extract_features(backbone, data, args)
    first = linear_eval.evaluate(backbone, data, features, args)
    held_out_loss = first["held_out_loss"]
    assert min(held_out_loss.values()) > 0.95 * math.log(10)  # of noise nothing can be known
    assert held_out_loss[str(float(first["linear_lr"]))] == min(held_out_loss.values())
    assert first["linear_top1"] == 100  # the last classifier was trained on all of them
    data = data._replace(test_labels=(labels + 1) % 10)
    second = linear_eval.evaluate(backbone, data, features, args)
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


def test_few_labels(tiny_run, run_script, fails_plainly, capsys, monkeypatch):
    out, flags, seen = tiny_run("simco"), [*QUICK, "--labels-per-class", "2", "5", "all"], []
    train = linear_eval.train_linear

    def watched_train(features, index, rates, args):
        seen.append((features.train_labels[index], index, rates))
        return train(features, index, rates, args)

    assert run_script(linear_eval, out, *QUICK) == 0
    before = read(out / "result.json")
    monkeypatch.setattr(linear_eval, "train_linear", watched_train)
    assert run_script(linear_eval, out, *flags) == 0
    result, lines = read(out / "result.json"), capsys.readouterr().out.splitlines()[-4:]
    few = result.pop("labels_per_class")
    assert result == before  # nothing else changes
    for i, network in enumerate(("trained", "untrained")):
        mine = seen[17 * i : 17 * (i + 1)]  # two choose the learning rate, and 3 x 5 draws
        rate = mine[1][2]
        for (labels, index, rates), count in zip(mine[2:], [2] * 5 + [5] * 5 + [None] * 5):
            assert rates == rate and len(index.unique()) == len(index)
            assert len(index) == 64 if count is None else (labels.bincount() == count).all()
        assert len({tuple(index.sort().values.tolist()) for _, index, _ in mine[2:7]}) == 5
        for line, count in zip(lines[1:], ("2", "5", "all")):
            top1 = few[network][count]
            words = f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}"
            assert len(top1) == 5 and line.split()[0] == count
            assert " ".join(line.split()[1 + 3 * i : 4 + 3 * i]) == words
    for count in (0, 7, "some"):  # 64 images of 10 classes: the rarest has 6
        message = fails_plainly(linear_eval, out, *QUICK, "--labels-per-class", count)
        assert "labels-per-class" in message and read(out / "result.json")["epoch"] == 2


def write_result(root, method, flags, top1, epoch=200, cached=False, probe=None, **more):
    """A run that was given `flags`, its last log line, and its result."""
    args = METHODS[method].arguments().parse_args(flags.split())
    result = dict(linear_top1=top1, knn_top1=40.0, epoch=epoch, protocol=dict(cached=cached))
    out = root / str(len(list(root.iterdir())))
    out.mkdir()
    (out / "args.json").write_text(json.dumps(vars(args)))
    if probe is not None:
        (out / "log.jsonl").write_text('{"probe_top1": 1.0}\n{"probe_top1": %s}\n' % probe)
    (out / "result.json").write_text(json.dumps({**result, **more}))
    return result


TABLES = """\
**CIFAR-100, ResNet-18, 200 epochs** (test top-1 in percent: linear / probe / kNN)

| | batch 64 | batch 128 | batch 256 | batch 512 | batch 1024 |
|---|---|---|---|---|---|
| MoCo v2 | – | – | – | – | 48.50 / – / 40.00 |
| MoCo v2, published (probe) | 52.58 | 54.40 | 53.28 | 51.47 | 48.90 |
| SimMoCo | – | – | – | – | – |
| SimMoCo, published (probe) | 54.02 | 54.93 | 54.11 | 52.45 | 49.70 |
| SimCo | – | – | 58.50 ± 0.71 / 57.00 ± 0.00 / 40.00 ± 0.00 | – | – |
| SimCo, published (probe) | 58.04 | 58.29 | 58.35 | 57.08 | 55.34 |

A dash marks what was not measured. The published figures (Zhang et al., 2022) are of an online
probe, a linear classifier trained alongside the network. Compare them with our probe only.

**In miniature: subset 10000, epochs 60, width 16** (test top-1 in percent: linear / probe / kNN)

| | batch 64 | batch 128 | batch 256 | batch 512 | batch 1024 |
|---|---|---|---|---|---|
| MoCo v2 | – | – | – | – | – |
| SimMoCo | – | – | – | – | – |
| SimCo | 30.50 ± 0.71 / 27.00 ± 0.00 / 40.00 ± 0.00 | – | – | – | – |
| MoCo v2, moco-k 13107 | – | 22.00 / – / 40.00 | – | – | – |

**Other settings** (top-1 in percent on the test set)

| method | flags | batch | linear | probe | kNN | seeds |
|---|---|---|---|---|---|---|
| SimCo | dataset cifar10 | 256 | 5.00 | – | 40.00 | 1 |
| SimCo | dt-m 1.0 | 256 | 57.00 ± 0.00 | 56.00 (of 1) | 40.00 ± 0.00 | 2 |
| SimMoCo | epochs 2, symmetric | 256 | 11.00 | – | 40.00 | 1 |
| untrained | epochs 2, symmetric | 256 | 5.00 | – | 40.00 | 1 |
| SimCo | subset 10000, epochs 60, width 16 | 32 | 20.00 | – | 40.00 | 1 |
| MoCo v2 | subset 10000, epochs 60, width 16, moco-k 4096 | 128 | 23.00 | – | 40.00 | 1 |

Not shown: {root}/4, evaluated after epoch 100.
Evaluated by several protocols: SimCo, batch 256, dt-m 1.0.
"""


def test_tables(tmp_path, run_script, capsys):
    write_result(tmp_path, "simco", "", 58.0, probe=57.0)
    assert "Other settings" not in linear_eval.table(tmp_path)
    write_result(tmp_path, "simco", "--seed 1 --out x --knn-every 7", 59.0, probe=57.0)
    write_result(tmp_path, "moco_v2", "--batch-size 1024", 48.5)
    floor = write_result(tmp_path, "simco", "--dataset cifar10", 5.0)
    write_result(tmp_path, "simmoco", "", 99.0, epoch=100)
    write_result(tmp_path, "simmoco", "--epochs 2 --symmetric", 11.0, epoch=2, untrained=floor)
    write_result(tmp_path, "simco", "--dt-m 1", 57.0, cached=True, probe=56.0)
    write_result(tmp_path, "simco", "--dt-m 1 --seed 1", 57.0)
    small = "--subset 10000 --epochs 60 --width 16 --batch-size"
    write_result(tmp_path, "simco", f"{small} 32", 20.0, epoch=60)  # no column of the table
    write_result(tmp_path, "moco_v2", f"{small} 128 --moco-k 4096", 23.0, epoch=60)  # no row
    assert "In miniature" not in linear_eval.table(tmp_path)
    write_result(tmp_path, "simco", f"{small} 64", 30.0, epoch=60, probe=27.0)
    write_result(tmp_path, "simco", f"{small} 64 --seed 1", 31.0, epoch=60, probe=27.0)
    write_result(tmp_path, "moco_v2", f"{small} 128 --moco-k 13107", 22.0, epoch=60)
    assert run_script(linear_eval, "--table", tmp_path) == 0
    assert capsys.readouterr().out == TABLES.format(root=tmp_path)


def test_the_published_table_is_for_cifar100(tmp_path):
    write_result(tmp_path, "simco", "--dataset cifar10", 5.0)
    assert "published" not in linear_eval.table(tmp_path)


MISTAKES = {"": "which run", "run": "args.json", "run --dataset shapes": "dataset"}
MISTAKES |= {"run --checkpoint x": "checkpoint", "--checkpoint x": "--dataset"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes(flags, fails_plainly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MISTAKES[flags] in fails_plainly(linear_eval, *flags.split())
