"""The mechanisms that flags exchange: losses, BatchNorm, MoCo v1, the memory bank. Each does what its paper says, learns,
resumes bit by bit, and is the same on one process and on two."""
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import METHODS, ROOT, TINY, batches, start_script
from test_steps import cross_entropy_with_positive_first, plain_sgd

import common
import linear_eval
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
    ("moco_v2", "--memory-bank --symmetric", "--memory-bank has no --symmetric"),
    ("moco_v2", "--memory-bank --moco-k 33", "only 32 images are not in the batch"),
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
    ("moco_v2", "--memory-bank --moco-k 20"),
])  # fmt: skip
def test_two_processes_are_two_groups_on_one(method, flags, run_script, tmp_path):
    """One step with --bn-splits 2 and on two processes: shuffled keys, sampled negatives, BatchNorm, all in training."""
    flags = [*TINY, *flags.split(), "--subset", "63", "--epochs", "1"]  # one batch of 32, and negatives for the bank
    assert run_script(METHODS[method], *flags, "--out", tmp_path / "one", "--bn-splits", "2") == 0
    start_script(2, ROOT / f"{method}.py", *flags, "--out", tmp_path / "two")
    one, two = (common.load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    for key, value in one["optimizer"]["state"].items():  # after one step the momentum is the gradient
        gradient, other = (x["momentum_buffer"] for x in (value, two["optimizer"]["state"][key]))
        assert (gradient - other).abs().max() <= 1e-3 * gradient.abs().max(), key
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():  # running statistics, queue and bank too
        torch.testing.assert_close(value, two["model"][name], rtol=1e-4, atol=1e-5)


# -- MoCo v1 and the memory bank ---------------------------------------------------------------------------------------


def test_v1_sets_defaults_that_other_flags_overrule(tiny_run):
    out = tiny_run("moco_v2", "--v1", "--moco-k", "64", "--moco-t", "0.2")
    args = json.loads((out / "args.json").read_text())
    given = dict(v1=True, head="linear", moco_t=0.2, moco_m=0.999, schedule="step", augmentation="v1", moco_k=64)
    assert {key: args[key] for key in given} == given
    saved = common.load_checkpoint(out / "checkpoint.pth")["model"]
    assert [name[10:] for name in saved if name.startswith("encoder_q.head")] == ["head.0.weight", "head.0.bias"]
    assert vars(moco_v2.arguments().parse_args(["--memory-bank"])).items() >= dict(moco_k=4096, moco_m=0.5, v1=False).items()


def test_memory_bank_is_a_key_for_each_image(tiny_run):
    """Two epochs against plain Python: a list of keys by image; the negatives are those of images outside of the batch."""
    out = tiny_run("moco_v2", "--memory-bank", "--moco-k", "20")
    args = json.loads((out / "args.json").read_text())
    torch.manual_seed(args["seed"])
    args_now = moco_v2.arguments().parse_args([])
    vars(args_now).update(args)
    model = moco_v2.MemoryBank(args_now, None, 64).to(memory_format=torch.channels_last).train()
    bank, encoder = list(model.bank.clone()), model.encoder_q
    parameters = list(encoder.parameters())
    velocities, losses = [torch.zeros_like(parameter) for parameter in parameters], []
    for epoch in range(2):
        index = common.draw_epoch_plan(64, 32, 32, args["seed"], epoch).index.tolist()
        for step, (view1, _) in enumerate(batches(args, epoch)):
            images = index[32 * step : 32 * step + 32]
            state = common.np.random.SeedSequence([args["seed"], epoch, step + 1]).generate_state(1, common.np.uint64)
            generator = torch.Generator().manual_seed(int(state[0]))
            torch.rand(32, generator=generator)  # the order for shuffling
            chances = torch.rand(64, generator=generator).tolist()
            others = sorted(set(range(64)) - set(images), key=lambda image: -chances[image])[:20]
            q, k = encoder(view1), torch.stack([bank[image] for image in images])
            negative = q @ torch.stack([bank[image] for image in others]).T
            loss = cross_entropy_with_positive_first((q * k).sum(dim=1, keepdim=True), negative, args["moco_t"]).mean()
            for image, query in zip(images, q.detach()):
                bank[image] = F.normalize(0.5 * bank[image] + 0.5 * query, dim=0)
            lr = common.adjust_learning_rate(torch.optim.SGD(parameters, 1.0), epoch, args_now)
            plain_sgd(parameters, velocities, torch.autograd.grad(loss, parameters), lr, 0.9, 5e-4)
            losses.append(loss.item())
    logged = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    assert logged == pytest.approx([(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2], rel=1e-5)
    saved = common.load_checkpoint(out / "checkpoint.pth")["model"]
    torch.testing.assert_close(saved["bank"], torch.stack(bank), rtol=1e-3, atol=1e-4)


# -- each of them, as a run --------------------------------------------------------------------------------------------

# About as few steps as it takes; most settings were found by trial: they show that the mechanism can learn, not that it does
# with any setting. What helps is --head-bn: a new network gives much the same query for all images (mean cosine: 0.9), and
# where all keys are alike there is little to learn from. BatchNorm in the head spreads them (mean cosine: 0.0).
MECHANISMS = {
    "end-to-end": ("simco", "--loss infonce --head-bn --lr 0.3 --epochs 4 --subset 1024"),
    "queue": ("moco_v2", "--moco-k 1024 --lr 0.3 --epochs 3"),
    "memory bank": ("moco_v2", "--memory-bank --head-bn --moco-k 512 --lr 0.3 --epochs 12 --subset 1024"),
    "SiMo": (
        "simmoco",
        "--loss eqco --alpha 256 --num-negatives 16 --head-bn --moco-m 0.9 --lr 0.03 --epochs 4 --subset 2048",
    ),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_learns_shapes(name, all_shapes, run_script, tmp_path):
    method, flags = MECHANISMS[name]
    recipe = "--dataset shapes --width 8 --stem-padding 1 --batch-size 64 --precision fp32 --device cpu"
    assert run_script(METHODS[method], *recipe.split(), "--knn-every", "99", *flags.split(), "--out", tmp_path / "run") == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    untrained, trained = log[0]["knn_top1"], log[-1]["knn_top1"]
    print(f"{name}: kNN {untrained:.2f} % -> {trained:.2f} %")
    assert trained > untrained + 5


@pytest.mark.parametrize("method, flags", [
    ("moco_v2", "--memory-bank --moco-k 20"),
    ("moco_v2", "--v1 --moco-k 40 --bn-splits 4 --symmetric"),
    ("simmoco", "--loss eqco --alpha 64 --num-negatives 5 --head-bn --bn-splits 2"),
    ("simco", "--num-negatives 5"),
])  # fmt: skip
def test_interrupted_run_ends_with_the_same_bits(method, flags, run_script, tmp_path, monkeypatch):
    """Sampled negatives, shuffles and draws from the bank depend on (seed, epoch, step) alone."""
    flags = [*TINY, "--epochs", "3", *flags.split(), "--out"]
    assert run_script(METHODS[method], *flags, tmp_path / "whole") == 0
    steps, record = iter(range(100)), common.Run.record

    def interrupt_at_step_3(self, *what):
        if next(steps) == 3:
            raise KeyboardInterrupt
        record(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "record", interrupt_at_step_3)
        assert run_script(METHODS[method], *flags, tmp_path / "parts") == 130
    torch.manual_seed(99)  # the global generator has no part in it
    assert run_script(METHODS[method], *flags, tmp_path / "parts") == 0
    whole, parts = (common.load_checkpoint(tmp_path / name / "checkpoint.pth")["model"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_linear_eval_names_the_mechanism(run_script, tiny_run):
    out = tiny_run("moco_v2", "--memory-bank", "--moco-k", "20", "--bn-splits", "2")
    quick = "--cached --epochs 1 --lrs 1 --precision fp32 --device cpu"
    assert run_script(linear_eval, out, *quick.split()) == 0
    assert "| MoCo v2 (bn-splits 2, memory-bank, moco-k 20) |" in linear_eval.table(out)

    def words(method, *flags):
        return linear_eval.settings(vars(METHODS[method].arguments().parse_args(flags)))

    assert words("simmoco", "--loss", "eqco", "--alpha", "256", "--head-bn") == ("", "alpha 256.0, head-bn, loss eqco")
    assert words("moco_v2", "--v1") == ("", "v1") and words("moco_v2", "--v1", "--moco-t", "0.2") == ("moco-t 0.2", "v1")
    for method, module in METHODS.items():  # args.json of before there were these flags
        then = {*vars(common.argument_parser(method, "").parse_args([])), "moco_m", "moco_k", "dt_m"}
        old = {key: value for key, value in vars(module.arguments().parse_args([])).items() if key in then}
        assert linear_eval.settings(old) == ("", "")
