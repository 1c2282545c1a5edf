"""Linear evaluation: the frozen backbone, the wide layer, the protocol, and the table."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import METHODS, ROOT, TINY, start_script

import common
import linear_eval

QUICK = ["--epochs", "2", "--precision", "fp32", "--device", "cpu", "--lrs", "0.1", "1", "10"]


@pytest.mark.parametrize("flags", [[], ["--cached"]])
@pytest.mark.parametrize("method", METHODS)
def test_evaluates_a_run_and_moves_nothing_of_it(method, flags, tiny_run, run_script, monkeypatch, capsys):
    out = tiny_run(method)
    checkpoint = (out / "checkpoint.pth").read_bytes()
    backbones = []
    load = linear_eval.load_backbone
    monkeypatch.setattr(linear_eval, "load_backbone", lambda *args: backbones.append(load(*args)) or backbones[-1])
    assert run_script(linear_eval, out, *QUICK, *flags) == 0
    assert (out / "checkpoint.pth").read_bytes() == checkpoint
    saved, prefix = torch.load(out / "checkpoint.pth")["model"], "encoder." if method == "simco" else "encoder_q."
    assert not backbones[0].training and len(backbones[0].state_dict()) == 120
    for name, value in backbones[0].state_dict().items():  # after the evaluation: not one number moved
        assert torch.equal(value, saved[f"{prefix}backbone.{name}"])
    result = json.loads((out / "result.json").read_text())
    assert result["epoch"] == 2 and result["protocol"]["cached"] == bool(flags) and result["protocol"]["held_out"] == 6
    assert result["linear_lr"] in (0.1, 1, 10) and set(result["held_out_top1"]) == {"0.1", "1.0", "10.0"}
    assert 0 <= result["linear_top1"] <= result["linear_top5"] <= 100
    last_knn = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["knn_top1"]
    assert result["knn_top1"] == pytest.approx(last_knn)
    projector = out / "00000" / "test_features"
    assert {path.name for path in projector.iterdir()} == {"metadata.tsv", "sprite.png", "tensors.tsv"}
    assert len((projector / "metadata.tsv").read_text().split()) == 256


def test_two_machines_train_and_evaluate_like_one_process(all_shapes, run_script, tmp_path):
    """From the first command to the result, with BatchNorm over the same two halves of the batch."""
    flags = [*TINY, "--epochs", "1", "--out"]
    assert run_script(METHODS["simmoco"], *flags, tmp_path / "one", "--bn-splits", "2") == 0
    assert run_script(linear_eval, tmp_path / "one", *QUICK) == 0
    start_script("two machines", ROOT / "simmoco.py", *flags, tmp_path / "two")
    assert start_script("two machines", ROOT / "linear_eval.py", tmp_path / "two", *QUICK).count("linear top-1") == 1
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["linear_lr"] == two["linear_lr"] and one["held_out_top1"] == two["held_out_top1"]
    for key in ("linear_top1", "linear_top5", "knn_top1"):
        assert one[key] == pytest.approx(two[key], abs=3 * 100 / 1024)  # rounding may tip a test image or three


def test_untrained_is_the_network_before_its_first_step(tiny_run, run_script):
    out = tiny_run("moco_v2", "--seed", "5")
    assert run_script(linear_eval, out, *QUICK, "--cached", "--untrained") == 0
    assert run_script(linear_eval, out, *QUICK, "--cached") == 0
    result = json.loads((out / "result.json").read_text())
    first_knn = json.loads((out / "log.jsonl").read_text().splitlines()[0])["knn_top1"]
    assert result["untrained"]["knn_top1"] == pytest.approx(first_knn) and result["untrained"]["epoch"] == 0
    assert "linear_top1" in result


def test_wide_layer_is_the_single_classifiers():
    """Each part of the wide layer, trained with the others, against a classifier trained alone with that learning rate."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(96, 12, generator=generator), torch.randint(0, 5, (96,), generator=generator)
    args = SimpleNamespace(epochs=3, batch_size=32, seed=1)
    rates = [0.01, 0.3, 2.0]
    wide = linear_eval.train_linear(lambda i, g: features[i], labels, torch.arange(96), 5, 12, rates, args)
    for number, rate in enumerate(rates):
        alone = nn.Linear(12, 5)
        nn.init.zeros_(alone.weight), nn.init.zeros_(alone.bias)
        optimizer = torch.optim.SGD(alone.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        order = torch.Generator().manual_seed(1)
        for _ in range(3):
            for batch in torch.randperm(96, generator=order).split(32):
                optimizer.zero_grad()
                F.cross_entropy(alone(features[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
        rows = slice(5 * number, 5 * number + 5)
        torch.testing.assert_close(wide.weight[rows], alone.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wide.bias[rows], alone.bias, rtol=1e-4, atol=1e-5)


def test_learning_rate_is_chosen_without_the_test_set(monkeypatch):
    """Another test set, another result, but the same choice; and the held-out images are not trained on."""
    data = common.draw_shapes(300, 100)
    args = linear_eval.arguments().parse_args(["x", *QUICK, "--cached", "--epochs", "30"])

    class Pixels(nn.Module):
        num_features = 192

        def forward(self, x):
            return F.adaptive_avg_pool2d(x, 8).flatten(1)

    backbone, trained_on = Pixels().eval(), []
    train = linear_eval.train_linear
    monkeypatch.setattr(linear_eval, "train_linear", lambda *a: trained_on.append(a[2]) or train(*a))
    first, _ = linear_eval.evaluate(backbone, data, args)
    spoiled = common.dataclasses.replace(data, test_labels=(data.test_labels + 1) % 10)
    second, _ = linear_eval.evaluate(backbone, spoiled, args)
    assert first["linear_lr"] == second["linear_lr"] and first["held_out_top1"] == second["held_out_top1"]
    assert first["linear_top1"] != second["linear_top1"]
    assert len(trained_on[0]) == 270 and len(trained_on[1]) == 300


def test_accuracies_against_a_plain_count():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(2000, 6, generator=generator), torch.randint(0, 7, (2000,), generator=generator)
    heads = nn.Linear(6, 3 * 7)
    for top in (1, 5, 9):
        measured = linear_eval.accuracies(heads, features, labels, 7, top)
        for number in range(3):
            logits = features @ heads.weight[7 * number : 7 * number + 7].T + heads.bias[7 * number : 7 * number + 7]
            ranking = logits.argsort(dim=1, descending=True)[:, :top].tolist()
            plain = 100 * sum(label in best for label, best in zip(labels.tolist(), ranking)) / 2000
            assert measured[number] == pytest.approx(plain, abs=1e-4)


def write_result(root, method, top1, knn=40.0, epoch=None, untrained=None, **flags):
    args = METHODS[method].arguments().parse_args([])
    common.resolve(args)
    for key, value in flags.items():
        setattr(args, key, value)
    out = root / f"{method}-{len(list(root.iterdir()))}"
    out.mkdir()
    (out / "args.json").write_text(json.dumps({**vars(args), "environment": {}}))
    result = dict(linear_top1=top1, knn_top1=knn, epoch=args.epochs if epoch is None else epoch, protocol={})
    if untrained:
        result["untrained"] = dict(linear_top1=untrained, knn_top1=10.0, protocol={})
    (out / "result.json").write_text(json.dumps(result))


def test_table(tmp_path):
    write_result(tmp_path, "simco", 58.0, seed=0)
    write_result(tmp_path, "simco", 59.0, seed=1)
    write_result(tmp_path, "moco_v2", 48.5, batch_size=1024)
    write_result(tmp_path, "simco", 57.0, dt_m=1.0)
    write_result(tmp_path, "simmoco", 11.0, epochs=2, subset=10000, untrained=5.0)
    write_result(tmp_path, "simmoco", 99.0, epoch=100)
    lines = linear_eval.table(tmp_path).splitlines()
    assert "| | batch 64 | batch 128 | batch 256 | batch 512 | batch 1024 |" in lines
    assert "| SimCo | – | – | 58.50 ± 0.71 / 40.00 ± 0.00 | – | – |" in lines  # sample standard deviation of two
    assert "| SimCo, published | 58.04 | 58.29 | 58.35 | 57.08 | 55.34 |" in lines
    assert "| SimCo (dt-m 1.0) | – | – | 57.00 / 40.00 | – | – |" in lines
    assert "| MoCo v2 | – | – | – | – | 48.50 / 40.00 |" in lines
    assert "| SimMoCo | – | – | – | – | – |" in lines  # not finished: not in the table, but named
    assert any("epoch 100 of 200" in line for line in lines) and "99.00" not in "\n".join(lines)
    small = lines[lines.index("**epochs 2, subset 10000** (top-1 in percent on the test set: linear / kNN)") :]
    assert "| SimMoCo | 11.00 / 40.00 |" in small and "| untrained | 5.00 / 10.00 |" in small
    assert "published" not in "\n".join(small)


def test_table_shows_what_there_is_to_compare_with(tmp_path, fails_plainly):
    """The published figures stand above any runs on CIFAR-100, and above no others."""
    assert "no finished result.json" in fails_plainly(linear_eval, "--table", tmp_path)
    write_result(tmp_path, "simco", 50.0, dataset="cifar10")
    assert "published" not in linear_eval.table(tmp_path)
    write_result(tmp_path, "simco", 50.0, epochs=2)
    assert "| MoCo v2, published | 52.58 |" in linear_eval.table(tmp_path)
