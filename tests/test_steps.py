"""The real steps of each script against the papers' pseudocode, written out plainly."""
import copy
import json
import math

import pytest
import torch
from conftest import METHODS, TINY
from distributed_worker import MODELS

import common
import moco_v2


def plain_similarities(q, k, queue=None):
    """Cosine similarities of the positives, Nx1, and of the negatives, NxK."""
    positive = (q * k).sum(dim=1, keepdim=True)
    if queue is not None:
        return positive, q @ queue.T
    other_images = ~torch.eye(len(q), dtype=torch.bool)
    return positive, (q @ k.T)[other_images].view(len(q), -1)


def plain_weight(positive, negative, args):
    """The DT paper: (1 - p_beta) / (1 - p_alpha), by a softmax at both temperatures."""
    s = torch.cat([positive, negative], dim=1)
    p_alpha = (s / args.moco_t).softmax(dim=1)[:, 0]
    p_beta = (s / (args.moco_t * args.dt_m)).softmax(dim=1)[:, 0]
    return ((1 - p_beta) / (1 - p_alpha)).detach()


def plain_loss(positive, negative, args):
    if args.loss == "dcl":  # the DCL paper: no positive in the denominator
        return ((negative / args.moco_t).exp().sum(dim=1).log() - positive / args.moco_t).mean()
    weight = plain_weight(positive, negative, args) if args.loss == "dual" else 1
    if args.loss == "eqco":  # the EqCo paper: a margin on the positive
        positive = positive - args.moco_t * math.log(args.alpha / negative.shape[1])
    s = torch.cat([positive, negative], dim=1)
    return -(weight * (s / args.moco_t).log_softmax(dim=1)[:, 0]).mean()


def plain_sgd(parameters, velocities, loss, epoch, args):
    """SGD as PyTorch defines it, with a cosine schedule: there is no warm-up in so short a run."""
    lr = 0.03 * 32 / 256 * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, velocity, gradient in zip(parameters, velocities, gradients):
            velocity.mul_(0.9).add_(gradient + 5e-4 * parameter)
            parameter.sub_(lr * velocity)


def assert_same_state(model, state, queue):
    """float32 rounds to 6e-8, and a step sums some thousand numbers."""
    for name, value in model.state_dict().items():
        if not name.startswith("queue"):
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
    if queue is not None:
        oldest_first = state["queue"].roll(-state["queue_ptr"].item(), dims=0)
        torch.testing.assert_close(oldest_first, queue, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method, flags",
    [
        ("simco", ""),
        ("simco", "--dt-m 3 --moco-t 0.2"),
        ("simco", "--loss infonce"),
        ("simco", "--loss dcl"),
        ("simmoco", ""),
        ("simmoco", "--symmetric --moco-m 0.5"),
        ("simmoco", "--loss eqco --alpha 256"),
        ("moco_v2", "--moco-k 100"),  # 32 keys a step do not divide it
        ("moco_v2", "--moco-k 20 --moco-m 0.5"),  # the batch is larger than the queue
        ("moco_v2", "--moco-k 100 --symmetric"),
    ],
)
def test_steps_agree_with_the_pseudocode(method, flags, tiny_run, monkeypatch):
    """Each step begins with the script's own weights, as training amplifies rounding."""
    batches, models, states = common.batches, [], []

    def batches_and_states(*what):
        for batch in batches(*what):
            states.append(copy.deepcopy(models[0].state_dict()))
            yield batch

    monkeypatch.setattr(common, "parallelize", lambda model, args: models.append(model) or model)
    monkeypatch.setattr(common, "batches", batches_and_states)
    out = tiny_run(method, *flags.split())
    log = [json.loads(line) for line in (out / "log.jsonl").open()]

    args = METHODS[method].arguments().parse_args([*TINY, *flags.split()])
    data = common.load_data(args, torch.device("cpu"))
    torch.manual_seed(args.seed)
    model = getattr(METHODS[method], MODELS[method])(args).train()
    model.to(memory_format=torch.channels_last)
    f_q = model.encoder if method == "simco" else model.encoder_q
    parameters = list(f_q.parameters())
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    queue = model.queue.clone() if method == "moco_v2" else None
    for epoch in range(args.epochs):
        losses = []
        for batch in batches(data, epoch, args):
            assert_same_state(model, states[0], queue)
            model.load_state_dict(states.pop(0))
            if method == "simco":
                q, k = f_q(batch.view1), f_q(batch.view2)
                queries_and_keys = [(q, k), (k, q)]
            else:
                q, k = f_q(batch.view1), model.encoder_k(batch.view2).detach()
                queries_and_keys = [(q, k)]
                if args.symmetric:
                    q2, k1 = f_q(batch.view2), model.encoder_k(batch.view1).detach()
                    queries_and_keys.append((q2, k1))
            similarities = [plain_similarities(*pair, queue) for pair in queries_and_keys]
            loss = sum(plain_loss(*pair, args) for pair in similarities) / len(similarities)
            plain_sgd(parameters, velocities, loss, epoch, args)
            losses.append(loss.item())
            if method != "simco":
                with torch.no_grad():
                    for key, query in zip(model.encoder_k.parameters(), parameters):
                        key.copy_(args.moco_m * key + (1 - args.moco_m) * query)
            if method == "moco_v2":  # first in, first out
                queue = torch.cat([queue, *(k for _, k in queries_and_keys)])[-args.moco_k :]

        # The loss is of all steps. The statistics are of the last one, and of the queue that its
        # loss saw: a key is not yet a negative of itself.
        positive, negative = similarities[0]
        expected = dict(loss=sum(losses) / len(losses), positive_similarity=positive.mean().item())
        expected["negative_similarity"] = negative.mean().item()
        expected["positive_ranks_first"] = (positive > negative).all(dim=1).float().mean().item()
        if args.loss == "dual":
            weight = plain_weight(positive, negative, args)
            expected["dual_temperature_weight"] = weight.mean().item()
        logged = {name: log[epoch + 1][name] for name in expected}
        assert logged == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert_same_state(model, common.load_checkpoint(out / "checkpoint.pth")["model"], queue)


@pytest.mark.parametrize("size, batch", [(12, 4), (12, 5), (7, 7), (5, 12), (1, 3)])
def test_queue_is_first_in_first_out(size, batch):
    flags = ["--moco-k", str(size), "--moco-dim", "3", "--width", "1"]
    model = moco_v2.MoCo(moco_v2.arguments().parse_args(flags))
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(size))
    expected = model.queue.clone()
    for _ in range(9):
        keys = torch.randn(batch, 3)
        model.dequeue_and_enqueue(keys)
        expected = torch.cat([expected, keys])[-size:]
        assert torch.equal(model.queue.roll(-model.queue_ptr.item(), dims=0), expected)
