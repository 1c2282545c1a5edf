"""Two steps of each script, as it really runs, against the same steps written out plainly from the papers' pseudocode."""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS, batches

import common
import moco_v2


def start_state(method, args):
    """The model of a script before its first step."""
    torch.manual_seed(args["seed"])
    name = {"moco_v2": "MoCo", "simmoco": "SimMoCo", "simco": "SimCo"}[method]
    namespace = METHODS[method].arguments().parse_args([])
    for key, value in args.items():
        setattr(namespace, key, value)
    return getattr(METHODS[method], name)(namespace).to(memory_format=torch.channels_last)


def cross_entropy_with_positive_first(positive, negative, temperature):
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")


def plain_info_nce(q, k, temperature, alpha=None):
    """EqCo's definition for in-batch negatives: the margin T * log(alpha / K) is taken off the positive."""
    n = len(q)
    positive = (q * k).sum(dim=1, keepdim=True) - temperature * math.log((alpha or n - 1) / (n - 1))
    negative = (q @ k.T)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    return cross_entropy_with_positive_first(positive, negative, temperature).mean()


def plain_dual_temperature(q, k, temperature, dt_m):
    """The DT authors' definition, as in the paper: softmax at both temperatures, a detached weight."""
    n = len(q)
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    positive = (q * k).sum(dim=1, keepdim=True)
    negative = (q @ k.T)[off_diagonal].view(n, n - 1)
    s = torch.cat([positive, negative], dim=1)
    p_alpha, p_beta = (s / temperature).softmax(dim=1)[:, 0], (s / (temperature * dt_m)).softmax(dim=1)[:, 0]
    weight = ((1 - p_beta) / (1 - p_alpha)).detach()
    return (weight * cross_entropy_with_positive_first(positive, negative, temperature)).mean()


def plain_sgd(parameters, velocities, gradients, lr, momentum, weight_decay):
    with torch.no_grad():
        for parameter, velocity, gradient in zip(parameters, velocities, gradients):
            velocity.mul_(momentum).add_(gradient + weight_decay * parameter)
            parameter.sub_(lr * velocity)


def assert_same_state(model, state):
    for name, value in model.state_dict().items():
        if not name.startswith("queue"):
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method, flags", [
    ("simco", []),
    ("simco", ["--dt-m", "3", "--moco-t", "0.2"]),
    ("simmoco", []),
    ("simmoco", ["--moco-m", "0.5"]),
    ("moco_v2", ["--moco-k", "100"]),  # 32 keys a step do not divide it
    ("moco_v2", ["--moco-k", "20", "--moco-m", "0.5"]),  # the batch is larger than the queue
    ("moco_v2", ["--moco-k", "100", "--symmetric"]),
    ("simmoco", ["--symmetric"]),
    ("simmoco", ["--loss", "eqco", "--alpha", "256"]),
    ("simco", ["--loss", "infonce"]),
])  # fmt: skip
def test_steps_agree_with_the_pseudocode(method, flags, tiny_run, monkeypatch):
    """Each step starts from where the run was: a training amplifies rounding (drawn shapes have flat grounds, and so whole
    regions at the kink of a ReLU), and after a few steps two right ones are far apart."""
    views, states = common.Run.views, []

    def remember(run, data, epoch):
        for two_views in views(run, data, epoch):
            states.append(copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()["state"])))
            yield two_views

    monkeypatch.setattr(common.Run, "views", remember)
    out = tiny_run(method, *flags)
    args = json.loads((out / "args.json").read_text())
    model = start_state(method, args)
    query_encoder = model.encoder if method == "simco" else model.encoder_q
    parameters = list(query_encoder.parameters())
    queue = list(model.queue.clone()) if method == "moco_v2" else None
    model.train()
    losses = []
    for epoch in range(args["epochs"]):
        # no warm-up (epochs // 20 = 0): a cosine from lr * 32 / 256, per epoch
        lr = 0.03 * 32 / 256 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / args["epochs"]))).item()
        losses.append([])
        for view1, view2 in batches(args, epoch):
            state, velocity = states.pop(0)
            assert_same_state(model, state)
            model.load_state_dict(state)
            velocities = [torch.zeros_like(parameter) for parameter in parameters]
            if velocity:  # not yet before the first step
                velocities = [velocity[i]["momentum_buffer"] for i in range(len(parameters))]

            def loss_of(q, k):
                if method == "moco_v2":
                    positive = (q * k).sum(dim=1, keepdim=True)
                    return cross_entropy_with_positive_first(positive, q @ torch.stack(queue).T, args["moco_t"]).mean()
                if args["loss"] == "dual":
                    return plain_dual_temperature(q, k, args["moco_t"], args["dt_m"])
                return plain_info_nce(q, k, args["moco_t"], args["alpha"])

            if method == "simco":
                q1, q2 = query_encoder(view1), query_encoder(view2)
                loss = (loss_of(q1, q2) + loss_of(q2, q1)) / 2
            else:
                q, keys = query_encoder(view1), [model.encoder_k(view2).detach()]
                loss = loss_of(q, keys[0])
                if args["symmetric"]:  # the mean of both directions
                    q2 = query_encoder(view2)
                    keys.append(model.encoder_k(view1).detach())
                    loss = (loss + loss_of(q2, keys[1])) / 2
            plain_sgd(parameters, velocities, torch.autograd.grad(loss, parameters), lr, 0.9, 5e-4)
            if method != "simco":
                with torch.no_grad():
                    for key, query in zip(model.encoder_k.parameters(), parameters):
                        key.copy_(args["moco_m"] * key + (1 - args["moco_m"]) * query)
            if method == "moco_v2":  # first in, first out
                queue = (queue + list(torch.cat(keys)))[-args["moco_k"] :]
            losses[-1].append(loss.item())

    logged = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    # float32 has 2**-24 of relative rounding; a few thousand roundings deep, and four steps long, 1e-5 is what is left.
    assert logged == pytest.approx([sum(part) / len(part) for part in losses], rel=1e-5)
    saved = common.load_checkpoint(out / "checkpoint.pth")
    assert saved["epoch"] == args["epochs"]
    assert_same_state(model, saved["model"])
    if method == "moco_v2":
        pointer = saved["model"]["queue_ptr"].item()
        assert pointer == 4 * 32 * (1 + args["symmetric"]) % args["moco_k"]
        oldest_first = saved["model"]["queue"].roll(-pointer, dims=0)
        torch.testing.assert_close(oldest_first, torch.stack(queue), rtol=1e-4, atol=1e-6)


def test_statistics_see_the_queue_of_the_loss(tiny_run, monkeypatch):
    """Once a key is in the queue it is a negative of itself, and no positive could rank first."""
    seen = []

    def look(q, k, temperature, dt_m, queue):
        seen.append((queue[:, None] == k).all(dim=2).any().item())
        return {}

    monkeypatch.setattr(common, "similarity_statistics", look)
    tiny_run("moco_v2", "--moco-k", "100")
    assert seen == [False, False]  # once an epoch


@pytest.mark.parametrize("size, batch", [(12, 4), (12, 5), (7, 7), (5, 12), (1, 3)])
def test_queue_is_first_in_first_out(size, batch):
    args = moco_v2.arguments().parse_args(["--moco-k", str(size), "--moco-dim", "3", "--width", "1"])
    model = moco_v2.MoCo(args)
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(size))
    expected = list(model.queue.clone())
    for _ in range(9):
        keys = torch.randn(batch, 3)
        model.dequeue_and_enqueue(keys)
        expected = (expected + list(keys))[-size:]
        assert torch.equal(model.queue.roll(-model.queue_ptr.item(), dims=0), torch.stack(expected))


def test_key_encoder_is_the_moving_average():
    args = moco_v2.arguments().parse_args(["--moco-k", "8", "--width", "2", "--moco-m", "0.9"])
    model = moco_v2.MoCo(args)
    expected = [parameter.double() for parameter in model.encoder_k.parameters()]
    buffers = {name: buffer.clone() for name, buffer in model.encoder_k.named_buffers()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.encoder_q.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.momentum_update_key_encoder()
        expected = [0.9 * e + 0.1 * q.double() for e, q in zip(expected, model.encoder_q.parameters())]
    for ours, exact in zip(model.encoder_k.parameters(), expected):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.encoder_k.named_buffers())
    assert not any(parameter.requires_grad for parameter in model.encoder_k.parameters())
