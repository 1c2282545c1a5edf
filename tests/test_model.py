"""The network against torchvision's, and the kNN classifier against its definition."""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision

import common
import simco


def torchvision_resnet18(stem_padding):
    model = torchvision.models.resnet18(weights=None)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, stem_padding, bias=False)
    model.maxpool, model.fc = nn.Identity(), nn.Identity()
    return model


@pytest.mark.parametrize("stem_padding, map_size", [(1, 32), (2, 34)])
def test_full_width_backbone_loads_into_torchvision_and_computes_the_same(stem_padding, map_size):
    ours, theirs = common.resnet18(64, stem_padding), torchvision_resnet18(stem_padding)
    theirs.load_state_dict(ours.state_dict())  # strict: every name and shape
    x = torch.randn(4, 3, 32, 32)
    assert ours.conv1(x).shape[2:] == (map_size, map_size)
    for mode in (True, False):  # training (batch statistics) and evaluation (running ones)
        ours.train(mode), theirs.train(mode)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    for name, buffer in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)


def test_initialisation_is_torchvisions_but_for_the_stem():
    torch.manual_seed(0)
    ours, theirs = common.resnet18(), torchvision_resnet18(2)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        if a.dim() == 4:  # the standard deviation of n normal draws has a relative spread of 1 / sqrt(2 n)
            assert a.std() == pytest.approx(b.std().item(), rel=10 / (2 * a.numel()) ** 0.5), name
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("width", [1, 8])
def test_width_scales_every_layer(width):
    encoder = common.Encoder(width, stem_padding=2, dim=16)
    x = torch.randn(3, 3, 32, 32)
    assert encoder.backbone(x).shape == (3, 8 * width)
    embedding = encoder(x)
    assert embedding.shape == (3, 16) and embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


def plain_knn(features, bank, labels, num_classes, k, temperature):
    predictions = []
    for feature in features:
        similarity = bank @ feature / np.linalg.norm(bank, axis=1) / np.linalg.norm(feature)
        votes = np.zeros(num_classes)
        for neighbour in np.argsort(-similarity)[:k]:
            votes[labels[neighbour]] += np.exp(similarity[neighbour] / temperature)
        predictions.append(votes.argmax())
    return predictions


@pytest.mark.parametrize("k", [1, 20, 200, 1000])  # the last: more neighbours than there are
def test_knn_agrees_with_its_definition(k, monkeypatch):
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, 300)
    bank, features = random.normal(size=(300, 16)) + labels[:, None] * 0.1, random.normal(size=(50, 16)) * 3
    expected = plain_knn(features, bank, labels, 5, k, 0.1)
    tensors = torch.tensor(features), torch.tensor(bank), torch.tensor(labels)
    assert common.knn_predict(*tensors, 5, k=k, temperature=0.1).tolist() == expected


def test_knn_holds_few_similarities_at_once(monkeypatch):
    """A bank of 2**20 rows: 32 queries at a time."""
    sizes = []
    original = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, *a, **k: sizes.append(self.numel()) or original(self, *a, **k))
    bank = torch.randn(2**20, 2)
    common.knn_predict(torch.randn(70, 2), bank, torch.zeros(2**20, dtype=torch.long), 2)
    assert max(sizes) <= 2**25 and len(sizes) == 3


def test_features_are_of_the_eval_mode_and_leave_the_backbone_alone():
    data = common.draw_shapes(100, 10)
    args = common.argument_parser("simco", "").parse_args(["--precision", "fp32", "--device", "cpu"])
    backbone = common.resnet18(2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = common.extract_features(backbone, data.train_images, args, batch_size=33)
    assert backbone.training and all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    normalize = torchvision.transforms.Normalize(common.MEAN, common.STD)
    images = normalize(common.to_float(data.train_images))
    torch.testing.assert_close(features, backbone.eval()(images), rtol=1e-4, atol=1e-5)


def test_knn_monitor_on_perfect_features():
    data = common.draw_shapes(300, 50)

    class Oracle(nn.Module):  # looks labels up by image
        num_features = 10

        def forward(self, x):
            table = {image.numpy().tobytes(): label for images, labels in
                     ((data.train_images, data.train_labels), (data.test_images, data.test_labels))
                     for image, label in zip(common.normalize(common.to_float(images)), labels)}  # fmt: skip
            return torch.nn.functional.one_hot(torch.stack([table[image.numpy().tobytes()] for image in x]), 10).float()

    args = common.argument_parser("simco", "").parse_args(["--precision", "fp32", "--device", "cpu"])
    assert common.knn_accuracy(Oracle(), data, args) == 100


def test_learning_rate_is_that_of_the_authors_library():
    """Lightning Bolts' LinearWarmupCosineAnnealingLR, stepped per epoch: its recursion, written out."""
    import math

    args = simco.arguments().parse_args(["--batch-size", "512"])
    common.resolve(args)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    base, start, warmup, total = 0.06, 0.003, 10, 200
    expected = start
    for epoch in range(total):
        if 0 < epoch < warmup:
            expected += (base - start) / (warmup - 1)
        elif epoch == warmup:
            expected = base
        elif epoch > warmup:
            phase = math.pi / (total - warmup)
            expected *= (1 + math.cos(phase * (epoch - warmup))) / (1 + math.cos(phase * (epoch - warmup - 1)))
        assert common.adjust_learning_rate(optimizer, epoch, args) == pytest.approx(expected, rel=1e-9)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)


def test_step_schedule_divides_by_ten_twice():
    args = simco.arguments().parse_args(["--schedule", "step", "--epochs", "35", "--warmup-epochs", "2"])
    common.resolve(args)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    rates = [common.adjust_learning_rate(optimizer, epoch, args) for epoch in range(35)]
    assert rates[:2] == [0.003, 0.03]  # the warm-up
    assert rates[2:] == pytest.approx([0.03] * 19 + [0.003] * 7 + [0.0003] * 7)
