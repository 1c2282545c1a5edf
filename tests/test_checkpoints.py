"""Checkpoints of others: for each layout, the features must be those of the network that its code would build."""
import argparse
import json
import shlex
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torchvision

import linear_eval

QUICK = "--cached --epochs 2 --precision fp32 --device cpu --lrs 0.1 1 10".split()


def network(stem_padding):
    """torchvision's resnet18 with the CIFAR stem, as the other projects build it, and BatchNorm statistics of its own."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=16)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, stem_padding, bias=False)
    model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in zip((module.running_mean, module.running_var, module.weight.data), (-0.1, 0.5, 0.5)):
                tensor.uniform_(low, low + 1)
    return model.eval()


def prefixed(prefix, module):
    return {prefix + key: value for key, value in module.state_dict().items()}


def headless(model):
    model.fc = nn.Identity()
    return model


def moco():
    model = network(1)
    state = {**prefixed("module.encoder_q.", model), **prefixed("module.encoder_k.", network(1))}
    state |= {"module.queue": torch.randn(16, 32), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    checkpoint = dict(epoch=2, arch="resnet18", state_dict=state, optimizer=dict(state={}, param_groups=[]))
    return checkpoint, headless(model), ("MoCo's code", 1, "encoder_k, queue, queue_ptr, encoder_q.fc")


def moco_demo():
    model = network(1)
    children = [child for name, child in model.named_children() if name != "maxpool"]
    net = nn.Sequential(*children[:-1], nn.Flatten(1), children[-1])
    state = {**prefixed("encoder_q.net.", net), **prefixed("encoder_k.net.", net), "queue": torch.randn(16, 32)}
    told = ("MoCo's CIFAR demo", 1, "encoder_k.net, queue, encoder_q.net.9")
    return dict(epoch=2, state_dict=state), headless(model), told


def solo_learn(name="backbone"):
    model = headless(network(2))
    state = {**prefixed(f"{name}.", model), **prefixed("classifier.", nn.Linear(512, 10))}
    state |= {**prefixed("projector.", nn.Linear(512, 8)), **prefixed(f"momentum_{name}.", model)}
    checkpoint = {"epoch": 2, "state_dict": state, "hyper_parameters": {"lr": 0.3}, "pytorch-lightning_version": "1.5"}
    return checkpoint, model, ("solo-learn", 2, f"classifier, projector, momentum_{name}")


def dual_temperature():
    return solo_learn("encoder")


def lightly_named():
    model = headless(network(1))
    state = {**prefixed("backbone.", model), **prefixed("projection_head.layers.0.", nn.Linear(512, 8))}
    return dict(state_dict=state), model, ("lightly", 1, "projection_head")


def lightly_sequential():
    """nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]): ReLU and max-pooling count."""
    model = headless(network(1))
    state = prefixed("backbone.", nn.Sequential(*list(model.children())[:-1]))
    assert "backbone.4.0.conv1.weight" in state
    return dict(state_dict=state), model, ("lightly", 1, "nothing")


def lightly_resnet_generator():
    """lightly.models.ResNetGenerator("resnet-18", num_splits=8) in an nn.Sequential, as in its CIFAR-10 benchmark: children
    conv1, bn1, layer1..4, so without the ReLU that its own forward() puts after bn1; BatchNorm statistics by split."""
    model = headless(network(1))
    stages = [getattr(model, name) for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")]
    state = {}
    for key, value in prefixed("backbone.", nn.Sequential(*stages)).items():
        if "running_" in key:  # eight rows with the mean that the network has, exactly: all numbers are eighths
            rounded = (value * 8).round() / 8
            value.copy_(rounded)
            value = torch.cat([rounded + step / 8 for step in (-3, 3, -2, 2, -1, 1, 0, 0)])
        state[key.replace(".downsample.", ".shortcut.")] = value
    model.relu = nn.Identity()  # in torchvision's ResNet this is the stem's alone
    state |= prefixed("projection_head.", nn.Linear(512, 8))
    return dict(state_dict=state), model, ("lightly", 1, "projection_head")


def plain():
    model = network(1)
    return model.state_dict(), headless(model), ("torchvision", 1, "fc")


LAYOUTS = [moco, moco_demo, solo_learn, dual_temperature, lightly_named, lightly_sequential, lightly_resnet_generator, plain]


@pytest.fixture
def saved(tmp_path):
    def save(checkpoint, name="other.pth"):
        torch.save(checkpoint, tmp_path / name)
        return tmp_path / name

    return save


@torch.no_grad()
def assert_same_network(ours, theirs):
    x = torch.randn(2, 3, 16, 16)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
    # The same operations but for the order of the mean's sum over 4 or 9 pixels; the features are about 1.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_those_of_the_other_network(layout, saved, capsys):
    checkpoint, theirs, (origin, stem_padding, left_out) = layout()
    path = saved(checkpoint)
    assert_same_network(linear_eval.load_foreign_backbone(path, None), theirs)
    no_relu = " and no ReLU after it" if layout is lightly_resnet_generator else ""
    said = f"layout of {origin}, width 64, stem padding {stem_padding}{no_relu}; left out: {left_out}\n"
    assert capsys.readouterr().out == f"{path}: {said}"


def test_stem_padding_and_relu_matter(saved):
    """Otherwise the test above would show nothing."""
    checkpoint, theirs, _ = lightly_resnet_generator()
    for change in (dict(conv1=nn.Conv2d(3, 64, 3, 1, 2, bias=False)), dict(relu=nn.ReLU())):
        other = headless(network(1))
        other.relu = nn.Identity()
        for name, module in change.items():
            setattr(other, name, module)
        other.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 3, 16, 16)
        assert not torch.allclose(other.eval()(x), theirs(x), rtol=1e-2)
    assert linear_eval.load_foreign_backbone(saved(checkpoint), 2).conv1.padding == (2, 2)  # the flag wins


def test_narrow_networks_and_old_checkpoints_without_batch_counters(saved):
    state = linear_eval.common.resnet18(4, 1).state_dict()
    state = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    assert linear_eval.load_foreign_backbone(saved(state), None).num_features == 32


def test_a_run_of_this_project_tells_its_stem_padding(tiny_run, saved):
    out = tiny_run("moco_v2", "--stem-padding", "1", "--epochs", "1")
    assert linear_eval.load_foreign_backbone(out / "checkpoint.pth", None).conv1.padding == (1, 1)
    moved = saved(torch.load(out / "checkpoint.pth"))
    assert linear_eval.load_foreign_backbone(moved, None).conv1.padding == (2, 2)  # the default of the scripts


def resnet50():
    return torchvision.models.resnet50().state_dict()


def resnet34():
    model = torchvision.models.resnet34()
    model.conv1 = nn.Conv2d(3, 64, 3, bias=False)
    return model.state_dict()


REFUSED = {
    "ImageNet stem": (lambda: torchvision.models.resnet18().state_dict(), ["conv1.weight is 64x3x7x7, not 64x3x3x3\n"]),
    "ResNet-50": (resnet50, ["no ResNet-18", "layer1.0.conv1.weight is 64x64x1x1, not 64x64x3x3", "more"]),
    "ResNet-34": (resnet34, ["no ResNet-18", "layer1.2.conv1.weight has no place"]),
    "unknown key": (lambda: {**network(1).state_dict(), "layer5.weight": torch.zeros(1)}, ["layer5.weight has no place"]),
    "unknown prefix": (lambda: prefixed("trunk.", network(1)), ["'encoder_q.'", "but trunk.conv1.weight"]),
    "a part is missing": (
        lambda: {key: value for key, value in network(1).state_dict().items() if key != "layer3.1.bn2.bias"},
        ["layer3.1.bn2.bias is missing"],
    ),
    "a tensor": (lambda: torch.zeros(3), ["no tensors"]),
    "no weights": (lambda: dict(epoch=3), ["no tensors"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_named(case, saved, fails_plainly):
    make, words = REFUSED[case]
    error = fails_plainly(linear_eval, "--checkpoint", saved(make()), "--dataset", "shapes")
    assert all(word in error for word in words), error


def test_pickled_objects_are_refused_with_the_way_out(saved, fails_plainly, tmp_path):
    checkpoint, theirs, _ = solo_learn()
    checkpoint["hyper_parameters"] = argparse.Namespace(lr=0.3)
    path = saved(checkpoint, "it's.ckpt")
    error = fails_plainly(linear_eval, "--checkpoint", path, "--dataset", "shapes")
    assert "argparse.Namespace" in error
    command = shlex.split(error[error.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True)  # it does what it promises
    assert_same_network(linear_eval.load_foreign_backbone(tmp_path / "it's.weights.pth", None), theirs)


def test_export_loads_into_torchvision(saved, run_script, fails_plainly, tmp_path, capsys):
    checkpoint, theirs, _ = moco_demo()
    path, exported = saved(checkpoint), tmp_path / "backbone.pth"
    assert run_script(linear_eval, "--checkpoint", path, "--export", exported) == 0
    assert "conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), maxpool = fc = nn.Identity()" in capsys.readouterr().out
    model = headless(network(1))
    for tensor in model.state_dict().values():
        tensor.zero_()
    model.load_state_dict(torch.load(exported))  # strict: every name and shape
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), theirs(x))
    before = exported.read_bytes()
    error = fails_plainly(linear_eval, "--checkpoint", path, "--export", exported)
    assert "exists" in error and exported.read_bytes() == before
    assert "no directory" in fails_plainly(linear_eval, "--checkpoint", path, "--export", tmp_path / "nowhere" / "x.pth")


def test_export_of_a_run_and_its_evaluation_are_the_runs_own(tiny_run, run_script, fails_plainly, tmp_path, capsys):
    out, exported, told = tiny_run("simco", "--epochs", "1"), tmp_path / "backbone.pth", tmp_path / "other.json"
    files = sorted(out.iterdir())
    assert run_script(linear_eval, out, "--export", exported) == 0
    assert sorted(out.iterdir()) == files  # nothing was evaluated
    assert capsys.readouterr().out.endswith(f"wrote {exported}; torchvision has no resnet18 as narrow or wide\n")
    assert run_script(linear_eval, out, *QUICK) == 0
    flags = ["--checkpoint", exported, "--dataset", "shapes", "--subset", 64, "--stem-padding", 2, *QUICK]
    assert run_script(linear_eval, *flags, "--json", told) == 0
    own, other = json.loads((out / "result.json").read_text()), json.loads(told.read_text())
    for key in ("linear_top1", "linear_top5", "knn_top1", "linear_lr", "held_out_top1", "protocol"):
        assert own[key] == other[key]
    assert other["checkpoint"] == str(exported) and other["stem_padding"] == 2 and other["dataset"] == "shapes"
    assert "exists" in fails_plainly(linear_eval, *flags, "--json", told)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "which run"),
        (["run", "--checkpoint", "x", "--dataset", "shapes"], "which run"),
        (["run", "--dataset", "shapes", "--stem-padding", "1"], "--dataset, --stem-padding"),
        (["--checkpoint", "x"], "--dataset"),
        (["--checkpoint", "x", "--dataset", "shapes", "--untrained"], "--untrained"),
        (["--checkpoint", "x", "--dataset", "shapes"], "No such file"),
        (["--checkpoint", ".", "--dataset", "shapes"], "directory"),
    ],
)
def test_flags_that_do_not_go_together(flags, words, fails_plainly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails_plainly(linear_eval, *flags)
