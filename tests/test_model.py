"""The network against torchvision's, kNN against its definition, and the learning rate."""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision

import common
import simco

ARGS = simco.arguments().parse_args("--precision fp32 --device cpu".split())


@pytest.mark.parametrize("stem_padding", [1, 2])
def test_backbone_is_torchvisions_but_for_the_stem(stem_padding):
    ours, theirs = common.resnet18(64, stem_padding), torchvision.models.resnet18(weights=None)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, stem_padding, bias=False)
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        if a.dim() == 4:  # the spread of the standard deviation of n draws is 1 / sqrt(2 n)
            assert a.std() == pytest.approx(b.std().item(), rel=10 / (2 * a.numel()) ** 0.5), name
        else:
            assert torch.equal(a, b), name
    theirs.load_state_dict(ours.state_dict())  # strict: every name and shape
    x = torch.randn(4, 3, 32, 32)
    for is_training in (True, False):
        output, expected = ours.train(is_training)(x), theirs.train(is_training)(x)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("width", [1, 8])
def test_width_scales_every_layer(width):
    encoder, x = common.Encoder(width, stem_padding=2, dim=16), torch.randn(3, 3, 32, 32)
    assert encoder.backbone(x).shape == (3, 8 * width)
    assert encoder(x).shape == (3, 16)
    torch.testing.assert_close(encoder(x).norm(dim=1), torch.ones(3))  # float32


@pytest.mark.parametrize("k", [1, 20, 200, 1000])  # the last: more neighbours than there are
def test_knn_agrees_with_its_definition(k):
    random = np.random.default_rng(0)
    labels, features = random.integers(0, 5, 300), random.normal(size=(50, 16)) * 3
    bank, expected = random.normal(size=(300, 16)) + labels[:, None] * 0.1, []
    for feature in features:
        cosine = bank @ feature / np.linalg.norm(bank, axis=1) / np.linalg.norm(feature)
        nearest = np.argsort(-cosine)[:k]
        votes = np.bincount(labels[nearest], weights=np.exp(cosine[nearest] / 0.1))
        expected.append(votes.argmax())
    tensors = map(torch.tensor, (features, bank, labels))
    assert common.knn_predict(*tensors, 5, k=k, temperature=0.1).tolist() == expected


def test_knn_holds_few_similarities_at_once(monkeypatch):
    sizes, topk = [], torch.Tensor.topk

    def watched_topk(similarity, *args, **kwargs):
        sizes.append(len(similarity))
        return topk(similarity, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", watched_topk)
    common.knn_predict(torch.ones(70, 2), torch.ones(2**20, 2), torch.zeros(2**20).long(), 2)
    assert sizes == [32, 32, 6]


def test_monitor_counts_right_predictions():
    train, test = torch.arange(300) % 10, torch.arange(50) % 10
    images = [255 * nn.functional.one_hot(x, 48).view(-1, 4, 4, 3).byte() for x in (train, test)]
    test[:5] = 9 - test[:5]  # wrong
    data = common.Dataset(images[0], train, images[1], test, list("abcdefghij"))
    backbone = nn.Flatten()
    backbone.num_features = 48
    probe = common.Probe(ARGS, backbone, 10, torch.device("cpu"))
    prototypes = common.extract_features(backbone, data.train_images[:10], ARGS)
    probe.classifier.load_state_dict(dict(weight=prototypes, bias=torch.zeros(10)))
    measured = common.monitor(backbone, probe, data, ARGS)
    assert (measured["knn_top1"], measured["probe_top1"]) == (90, 90)


def test_features_are_of_the_eval_mode_and_leave_the_backbone_alone():
    images, backbone = common.draw_shapes(1100, 10).train_images, common.resnet18(2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = common.extract_features(backbone, images, ARGS)  # in two chunks
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
    assert backbone.training
    normalize = torchvision.transforms.Normalize(common.MEAN, common.STD)
    expected = backbone.eval()(normalize(images.permute(0, 3, 1, 2) / 255))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_fp32_means_that_convolutions_do_not_round_to_tf32():
    for precision in ("bf16", "fp32"):
        flags = ["--precision", precision, "--device", "cpu"]
        common.choose_hardware(simco.arguments().parse_args(flags))
        assert torch.backends.cudnn.allow_tf32 == (precision == "bf16")


def test_learning_rate():
    def rates(*flags):
        args, parameter = simco.arguments().parse_args(flags), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([parameter], 1.0)
        for epoch in range(args.epochs):
            common.adjust_learning_rate(optimizer, epoch, args)
            yield optimizer.param_groups[0]["lr"]

    # Lightning Bolts' LinearWarmupCosineAnnealingLR, stepped per epoch.
    cosine = 0.03 * (1 + np.cos(np.pi * np.arange(190) / 190))
    expected = [*np.linspace(0.003, 0.06, 10), *cosine]
    assert list(rates("--batch-size", "512")) == pytest.approx(expected, rel=1e-9)
    steps = rates("--schedule", "step", "--epochs", "35", "--warmup-epochs", "2")
    assert list(steps) == pytest.approx([0.003, *[0.03] * 20, *[0.003] * 7, *[0.0003] * 7])
