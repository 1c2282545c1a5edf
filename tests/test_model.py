"""The network against torchvision's, evaluation against its definition, and the learning rate."""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from conftest import drawn

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


ENCODERS = {  # by flags: all kinds of BatchNorm, and of layers in the head
    "--head mlp": ({nn.BatchNorm2d}, {nn.Linear, nn.ReLU}),
    "--head linear": ({nn.BatchNorm2d}, {nn.Linear}),
    "--head-bn --sync-bn": ({nn.BatchNorm2d, nn.BatchNorm1d}, None),
    "--head-bn --bn-splits 3": ({common.SplitBatchNorm}, None),
}


@pytest.mark.parametrize("flags", ENCODERS)
def test_encoder(flags):
    flags, (norms, head) = [*flags.split(), "--width=16", "--moco-dim=24"], ENCODERS[flags]
    encoder = common.Encoder(simco.arguments().parse_args(flags))
    x = common.to_float(drawn(3, 1).train_images)
    q, features = encoder.eval()(x)
    assert features.shape == (3, 128) and q.shape == (3, 24)
    assert torch.equal(features, encoder.backbone(x)) and not features.requires_grad
    torch.testing.assert_close(q.norm(dim=1), torch.ones(3))  # float32
    assert {type(x) for x in encoder.modules() if hasattr(x, "running_mean")} == norms
    assert head in (None, {type(x) for x in encoder.head.modules()} - {nn.Sequential})


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


@pytest.mark.parametrize("dimensions", [1, 3, 12])
def test_effective_rank_agrees_with_numpy(dimensions):
    random = np.random.default_rng(0)
    x = random.normal(size=(60, dimensions)) @ random.normal(size=(dimensions, 12))
    singular_values = np.linalg.svd(x, compute_uv=False)
    p = singular_values / singular_values.sum() + 1e-7
    # A Gram matrix has squared singular values: those near 0 keep half of the digits of float64.
    expected = pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-6)
    assert common.effective_rank(torch.from_numpy(x)) == expected


def test_features_are_of_the_eval_mode_and_leave_the_backbone_alone():
    images, backbone = drawn(1100, 10).train_images, common.resnet18(8).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = common.extract_features(backbone, images, ARGS)  # in two chunks
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
    normalize = torchvision.transforms.Normalize(common.MEAN, common.STD)
    expected = backbone.eval()(normalize(images.permute(0, 3, 1, 2) / 255))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_learning_rates_of_encoder_and_probe():
    def rates(*flags):
        args = simco.arguments().parse_args(["--device", "cpu", *flags])
        optimizer, _ = common.build_optimizer(nn.Linear(1, 1), nn.Linear(1, 1), args)
        for epoch in range(args.epochs):
            returned = common.adjust_learning_rate(optimizer, epoch, args)
            encoder, probe = (float(group["lr"]) for group in optimizer.param_groups)
            assert encoder == returned
            yield encoder, probe
            optimizer.param_groups[0]["lr"] = torch.tensor(9.0).double()  # as on a GPU

    # Lightning Bolts' LinearWarmupCosineAnnealingLR, stepped per epoch.
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(190) / 190))
    expected = [[*np.linspace(0.003, peak, 10), *peak * cosine] for peak in (0.06, 0.3)]
    np.testing.assert_allclose([*zip(*rates("--batch-size", "512"))], expected, rtol=1e-9)
    steps = rates("--schedule", "step", "--epochs", "35", "--warmup-epochs", "2")
    expected = [[0.003, *[x] * 20, *[x / 10] * 7, *[x / 100] * 7] for x in (0.03, 0.3)]
    np.testing.assert_allclose([*zip(*steps)], expected, rtol=1e-9)
