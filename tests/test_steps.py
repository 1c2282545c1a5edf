"""The real steps of each script against the papers' pseudocode, written out plainly."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import METHODS, MODELS, TINY
from test_runs import log_of
from torch.optim.lr_scheduler import CosineAnnealingLR

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


def assert_same_state(state, modules, queue):
    """float32 rounds to 6e-8, and a step sums some thousand numbers."""
    expected = modules.state_dict()
    if queue is not None:
        oldest_first = state["0.queue"].roll(-state["0.queue_ptr"].item(), dims=0)
        torch.testing.assert_close(oldest_first, queue, rtol=1e-4, atol=1e-6)
    for name in expected.keys() - {"0.queue", "0.queue_ptr"}:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "command",
    [
        "simco",
        "simco --dt-m 3 --moco-t 0.2",
        "simco --loss infonce",
        "simco --loss dcl",
        "simmoco",
        "simmoco --symmetric --moco-m 0.5",
        "simmoco --loss eqco --alpha 256",
        "moco_v2 --moco-k 100",  # 32 keys a step do not divide it
        "moco_v2 --moco-k 20 --moco-m 0.5",  # the batch is larger than the queue
        "moco_v2 --moco-k 100 --symmetric",
        "moco_v2 --moco-k 20 --moco-m 0.5 --memory-bank",
    ],
)
def test_steps_agree_with_the_pseudocode(command, tiny_run, monkeypatch):
    """Each step begins with the script's own weights, as training amplifies rounding. The probe is
    a linear classifier of its own: nothing that it learns moves the rest of the network."""
    batches, modules, states = common.batches, [], []

    def batches_and_states(*what):
        for batch in batches(*what):
            states.append(copy.deepcopy(nn.ModuleList(modules).state_dict()))
            yield batch

    monkeypatch.setattr(common, "parallelize", lambda module, _: modules.append(module) or module)
    monkeypatch.setattr(common, "batches", batches_and_states)
    method, *flags = command.split()
    out = tiny_run(method, *flags)
    args = METHODS[method].arguments().parse_args([*TINY, *flags])
    is_simco, has_bank = method == "simco", "--memory-bank" in flags
    num_views = 2 if is_simco or args.symmetric else 1

    data = common.load_data(args, torch.device("cpu"))
    torch.manual_seed(args.seed)
    model = moco_v2.MemoryBank(args, 64) if has_bank else MODELS[method](args)
    model.to(memory_format=torch.channels_last).train()
    f_q, probe = model.encoder if is_simco else model.encoder_q, nn.Linear(64, 10)
    both = nn.ModuleList([model, probe])
    sgd = torch.optim.SGD(f_q.parameters(), 0.03 * 32 / 256, momentum=0.9, weight_decay=5e-4)
    probe_sgd = torch.optim.SGD(probe.parameters(), 0.3, momentum=0.9)
    schedules = [CosineAnnealingLR(x, args.epochs) for x in (sgd, probe_sgd)]  # without a warm-up
    queue = model.queue.clone() if method == "moco_v2" and not has_bank else None
    for epoch in range(args.epochs):
        losses = []
        for batch in batches(data, epoch, args):
            assert_same_state(states[0], both, queue)
            both.load_state_dict(states.pop(0))
            negatives = queue
            queries, features = zip(*map(f_q, (batch.view1, batch.view2)[:num_views]))
            if is_simco:
                keys = queries[::-1]
            elif has_bank:
                keys, chance = [model.bank[batch.index]], torch.rand(64, generator=batch.generator)
                chance[batch.index] = -1  # no image of the batch is a negative
                negatives = model.bank[chance.argsort(descending=True)[: args.moco_k]]
            else:
                views = (batch.view2, batch.view1)[:num_views]
                keys = [model.encoder_k(view)[0].detach() for view in views]
            pairs = zip(queries, keys)
            similarities = [plain_similarities(q, k, negatives) for q, k in pairs]
            loss = sum(plain_loss(*pair, args) for pair in similarities) / num_views
            losses.append(loss.item())
            labels = data.train_labels[batch.index].repeat(num_views)
            probe_loss = F.cross_entropy(probe(torch.cat(features)), labels)
            for optimizer, its_loss in ((sgd, loss), (probe_sgd, probe_loss)):
                optimizer.zero_grad()
                its_loss.backward()
                optimizer.step()
            if has_bank:
                mean = 0.5 * keys[0] + 0.5 * queries[0].detach()
                model.bank[batch.index] = F.normalize(mean, dim=1)
            elif not is_simco:
                with torch.no_grad():
                    for key, query in zip(model.encoder_k.parameters(), f_q.parameters()):
                        key.copy_(args.moco_m * key + (1 - args.moco_m) * query)
            if queue is not None:  # first in, first out
                queue = torch.cat([queue, *keys])[-args.moco_k :]

        for schedule in schedules:
            schedule.step()
        # The loss is of all steps. The statistics are of the last one, and of the queue that its
        # loss saw: a key is not yet a negative of itself.
        positive, negative = similarities[0]
        expected = dict(loss=sum(losses) / len(losses), positive_similarity=positive.mean().item())
        expected["negative_similarity"] = negative.mean().item()
        expected["positive_ranks_first"] = (positive > negative).all(dim=1).float().mean().item()
        if args.loss == "dual":
            weight = plain_weight(positive, negative, args)
            expected["dual_temperature_weight"] = weight.mean().item()
        entry = log_of(out)[epoch + 1]
        logged = {name: entry[name] for name in expected}
        assert logged == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert_same_state(nn.ModuleList(modules).state_dict(), both, queue)
    views = [common.normalize(common.to_float(x)) for x in (data.train_images, data.test_images)]
    bank, features = (f_q.eval()(x)[1] for x in views)
    knn = common.knn_predict(features, bank, data.train_labels, 10)
    for name, predicted in (("knn_top1", knn), ("probe_top1", probe(features).argmax(dim=1))):
        share = 100 * (predicted == data.test_labels).double().mean().item()
        assert entry[name] == pytest.approx(share, abs=100 / 256)  # a tie at most
    assert entry["effective_rank"] == pytest.approx(common.effective_rank(features), rel=1e-4)
