"""Linear evaluation: the frozen backbone, the wide layer, the protocol, and the tables."""
import json
from argparse import Namespace

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
    linear_eval.evaluate(backbone, common.draw_shapes(64, 16), args)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_two_processes_and_the_checkpoint_alone_give_the_same(tiny_run, run_script, fails_plainly):
    out, flags = tiny_run("simco"), [*QUICK, "--epochs", "10", "--batch-size", "16"]
    start_script(2, ROOT / "linear_eval.py", out, *flags)
    assert run_script(linear_eval, out, *flags, "--json", out / "one.json") == 0
    data = ["--dataset", "cifar10", "--data", read(out / "args.json")["data"], "--subset", 64]
    alone = ["--checkpoint", out / "checkpoint.pth", *data, *flags, "--json", out / "alone.json"]
    assert run_script(linear_eval, *alone) == 0
    one, two, other = (read(out / f"{name}.json") for name in ("one", "result", "alone"))
    assert one["held_out_top1"] == two["held_out_top1"]
    for key in ("linear_top1", "linear_top5", "knn_top1"):
        assert one[key] == other[key]
        assert one[key] == pytest.approx(two[key], abs=100 / 256)  # rounding may tip an image
    assert "alone.json' exists" in fails_plainly(linear_eval, *alone)
    assert read(out / "alone.json") == other


def test_wide_layer_is_the_single_classifiers():
    torch.manual_seed(0)
    features, labels, rates = torch.randn(96, 12), torch.randint(0, 5, (96,)), [0.01, 0.3, 2.0]
    flags = (labels, 5, 12, Namespace(epochs=9, batch_size=96, seed=1), torch.arange(96))
    wide = linear_eval.train_linear(lambda index, _: features[index], *flags, rates)
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


def test_learning_rate_is_chosen_on_held_out_images():
    """The images are noise: a classifier knows the labels of those that it was trained on only."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (400, 8, 8, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (400,))
    data = common.Dataset(images, labels, images, labels, list("0123456789"))
    backbone = nn.Flatten()
    backbone.num_features = 192
    args = linear_eval.arguments().parse_args(["run", *QUICK, "--cached", "--epochs", "100"])
    _, first = linear_eval.evaluate(backbone, data, args)
    assert max(first["held_out_top1"].values()) < 40  # of 40 images; chance is 10 %
    assert first["linear_top1"] == 100  # the last classifier was trained on all of them
    assert first["linear_lr"] in (0.1, 1)  # 15 % each, and 7.5 % at 10
    _, second = linear_eval.evaluate(backbone, data._replace(test_labels=(labels + 1) % 10), args)
    assert second["linear_top1"] < 10 and second["held_out_top1"] == first["held_out_top1"]


def write_result(root, method, flags, top1, epoch=200, cached=False, **more):
    """A run that was given `flags`, and its result."""
    args = METHODS[method].arguments().parse_args(flags.split())
    result = dict(linear_top1=top1, knn_top1=40.0, epoch=epoch, protocol=dict(cached=cached))
    out = root / str(len(list(root.iterdir())))
    out.mkdir()
    (out / "args.json").write_text(json.dumps(vars(args)))
    (out / "result.json").write_text(json.dumps({**result, **more}))
    return result


def test_tables(tmp_path, run_script, capsys):
    floor = write_result(tmp_path, "simco", "--dataset cifar10", 5.0)
    assert "published" not in linear_eval.table(tmp_path)  # those are of CIFAR-100
    write_result(tmp_path, "simco", "--seed 0", 58.0)
    write_result(tmp_path, "simco", "--seed 1 --out x --knn-every 7", 59.0)
    write_result(tmp_path, "moco_v2", "--batch-size 1024", 48.5)
    write_result(tmp_path, "simmoco", "", 99.0, epoch=100)
    write_result(tmp_path, "simmoco", "--epochs 2 --symmetric", 11.0, epoch=2, untrained=floor)
    write_result(tmp_path, "simco", "--dt-m 1", 57.0, cached=True)
    write_result(tmp_path, "simco", "--dt-m 1 --seed 1", 57.0)
    assert run_script(linear_eval, "--table", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| | batch 64 | batch 128 | batch 256 | batch 512 | batch 1024 |"
    assert lines[4] == "| MoCo v2 | – | – | – | – | 48.50 / 40.00 |"
    assert lines[8] == "| SimCo | – | – | 58.50 ± 0.71 / 40.00 ± 0.00 | – | – |"
    assert lines[15] == "| SimCo | dataset cifar10 | 256 | 5.00 | 40.00 | 1 |"
    assert lines[16] == "| SimCo | dt-m 1.0 | 256 | 57.00 ± 0.00 | 40.00 ± 0.00 | 2 |"
    assert lines[17] == "| SimMoCo | epochs 2, symmetric | 256 | 11.00 | 40.00 | 1 |"
    assert lines[18] == "| untrained | epochs 2, symmetric | 256 | 5.00 | 40.00 | 1 |"
    assert lines[20] == f"Not shown: {tmp_path}/4, evaluated after epoch 100."
    assert lines[21] == "Evaluated by several protocols: SimCo, batch 256, dt-m 1.0."


MISTAKES = {"": "which run", "run": "args.json", "run --dataset shapes": "dataset"}
MISTAKES |= {"run --checkpoint x": "checkpoint", "--checkpoint x": "--dataset"}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes(flags, fails_plainly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MISTAKES[flags] in fails_plainly(linear_eval, *flags.split())
