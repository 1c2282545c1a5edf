"""The mechanisms that flags exchange: losses and BatchNorm."""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import METHODS, ROOT, TINY

import common
import moco_v2


@pytest.mark.parametrize("method, flags, message", [
    ("simco", "--alpha 64", "--alpha is for --loss eqco, and this is --loss dual"),
    ("moco_v2", "--loss eqco", "--loss eqco needs --alpha"),
    ("moco_v2", "--dt-m 3", "--dt-m is for --loss dual, and this is --loss infonce"),
    ("simmoco", "--num-negatives 32", "a batch of 32 has 31 for each query at most"),
    ("simmoco", "--num-negatives 0", "must be a whole number of at least 1"),
    ("simco", "--bn-splits 5", "a process's 32 images make no 5 equal groups of two or more"),
    ("moco_v2", "--bn-splits 32", "make no 32 equal groups of two or more"),
    ("simmoco", "--sync-bn --bn-splits 2", "choose one of them"),
])  # fmt: skip
def test_flags_that_make_no_sense_are_refused(method, flags, message, fails_plainly, tmp_path):
    assert message in fails_plainly(METHODS[method], *TINY, "--out", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


def test_flags_that_make_no_sense_on_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    for flags, message in (("--sync-bn", "GPUs only"), ("--bn-splits 16", "a process's 16 images make no 16 equal groups")):
        with pytest.raises(common.UserError, match=message):
            common.resolve(moco_v2.arguments().parse_args([*TINY, *flags.split()]))


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


def step(module, x):
    """Forward and backward pass: output and all gradients."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, module.weight.grad, module.bias.grad]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_split_batchnorm_is_a_batchnorm_for_each_group(splits, memory_format):
    torch.manual_seed(0)
    split, groups = common.SplitBatchNorm(6, splits), [nn.BatchNorm2d(6) for _ in range(splits)]
    for _ in range(3):  # running statistics: of three steps, those of the groups averaged after each
        x = torch.randn(16, 6, 5, 5) * torch.rand(16, 6, 1, 1) + torch.randn(16, 6, 1, 1)
        x = x.contiguous(memory_format=memory_format)
        with torch.no_grad():
            split.weight.uniform_(0.5, 1.5), split.bias.uniform_(-1, 1)
        for group in groups:
            group.load_state_dict(split.state_dict())
        ours = step(split, x)
        if splits == 1:
            assert all(map(torch.equal, ours, step(groups[0], x)))
        else:
            weights = torch.linspace(-1, 2, x.numel()).view(x.shape).chunk(splits)
            leaf = x.clone().requires_grad_()
            outputs = [group(part) for group, part in zip(groups, leaf.chunk(splits))]
            sum((output * weight).sum() for output, weight in zip(outputs, weights)).backward()
            theirs = [sum(getattr(group, name).grad for group in groups) for name in ("weight", "bias")]
            for a, b in zip(ours, [torch.cat(outputs).detach(), leaf.grad, *theirs]):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            for group in groups:
                group.zero_grad()
        for name in ("running_mean", "running_var"):
            statistic = torch.stack([getattr(group, name) for group in groups]).mean(dim=0)
            assert torch.equal(getattr(split, name), statistic)
    assert split.num_batches_tracked == 3 and split.state_dict().keys() == groups[0].state_dict().keys()
    whole = nn.BatchNorm2d(6).eval()  # evaluation knows no groups
    whole.load_state_dict(split.state_dict())
    assert torch.equal(split.eval()(x), whole(x))


def test_flags_choose_the_batchnorm():
    def norms(*flags):
        encoder = common.build_encoder(moco_v2.arguments().parse_args(["--width", "1", *flags]))
        return {type(module) for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}

    assert norms() == {nn.BatchNorm2d} and norms("--sync-bn") == {nn.BatchNorm2d}  # one process: all images there are
    assert norms("--head-bn") == {nn.BatchNorm2d, nn.BatchNorm1d}
    assert norms("--head-bn", "--bn-splits", "2") == {common.SplitBatchNorm}


def guessed_groups(model, groups, shuffled, seed):
    """Guess for each key of a batch which group its query was normalised with, by the most similar group of queries, when
    its image tells nothing: all images are noise of their own in both views, but for the last one of each group, which has
    one strong colour in both and is left out of the guessing. Returns the share guessed right."""
    generator = torch.Generator().manual_seed(seed)
    size, (view1, view2) = 8, torch.randn(2, 8 * groups, 3, 16, 16, generator=generator)
    view1[size - 1 :: size] = view2[size - 1 :: size] = 20 * torch.randn(groups, 3, 1, 1, generator=generator)
    order = torch.randperm(8 * groups, generator=generator) if shuffled else None
    with torch.no_grad():
        q, k = (x.view(groups, size, -1)[:, :-1] for x in model(view1, view2, order))  # GxSxC
    similarity = torch.einsum("gic,hjc->gihj", k, q)
    for g in range(groups):  # its own query is no help
        similarity[g, :, g].diagonal().zero_()
    count = (similarity != 0).sum(dim=3)
    guess = (similarity.sum(dim=3) / count).argmax(dim=2)  # GxS
    return (guess == torch.arange(groups)[:, None]).double().mean().item()


def test_shared_batch_statistics_tell_which_keys_belong_to_which_queries():
    """The leak that MoCo shuffles against: an image in a group moves the group's statistics, and with them all others."""
    groups = 8
    torch.manual_seed(0)
    args = moco_v2.arguments().parse_args(["--width", "8", "--moco-k", "8", "--bn-splits", str(groups)])
    model = moco_v2.MoCo(args).train()
    leaking, shuffled = (
        sum(guessed_groups(model, groups, shuffle, seed) for seed in range(10)) / 10 for shuffle in (False, True)
    )
    print(f"keys whose group was guessed: {leaking:.3f} without shuffling, {shuffled:.3f} with; by chance {1 / groups:.3f}")
    assert leaking > 0.5
    # 80 groups of keys, each guessed together at worst: 1 / 8 and five standard deviations of 80 such guesses
    assert shuffled < 1 / groups + 5 * (7 / 64 / 80) ** 0.5


@pytest.mark.parametrize("method, flags", [
    ("moco_v2", "--moco-k 50 --symmetric"),
    ("simmoco", "--loss eqco --alpha 64 --num-negatives 5"),
])  # fmt: skip
def test_two_processes_are_two_groups_on_one(method, flags, tmp_path):
    """One step with --bn-splits 2 and on two processes: shuffled keys, sampled negatives, BatchNorm, all in training."""
    environment, command = {**os.environ, "OMP_NUM_THREADS": "1"}, [ROOT / f"{method}.py", *TINY, *flags.split()]
    command += ["--subset", "63", "--epochs", "1", "--out"]  # 63 images: one batch of 32
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([sys.executable, *command, tmp_path / "one", "--bn-splits", "2"], check=True, env=environment)
    subprocess.run([sys.executable, *torchrun, *command, tmp_path / "two"], check=True, env=environment)
    one, two = (common.load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    for key, value in one["optimizer"]["state"].items():  # after one step the momentum is the gradient
        gradient, other = (x["momentum_buffer"] for x in (value, two["optimizer"]["state"][key]))
        assert (gradient - other).abs().max() <= 1e-3 * gradient.abs().max(), key
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():  # running statistics, queue and bank too
        torch.testing.assert_close(value, two["model"][name], rtol=1e-4, atol=1e-5)
