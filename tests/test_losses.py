"""The losses against the formulas of the papers in float64 numpy."""
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import (
    contrast_statistics,
    dcl_loss,
    dual_temperature_loss,
    info_nce_loss,
    log_odds_against,
    similarities,
)

# InfoNCE, EqCo (with alpha), dual temperature (with dt_m) and DCL.
LOSSES = ({}, {"alpha": 1}, {"alpha": 256}, {"dt_m": 1}, {"dt_m": 3}, {"dt_m": 10}, {"dcl": True})


def loss_of(flags, temperature, q, k, queue=None, **sampling):
    if "dcl" in flags:
        return dcl_loss(q, k, temperature, queue=queue, **sampling)
    loss = dual_temperature_loss if "dt_m" in flags else info_nce_loss
    return loss(q, k, temperature, queue=queue, **flags, **sampling)


def numpy_similarities(q, k, queue=None):
    """Of the positives, [N], and of the negatives, [N, K]."""
    if queue is not None:
        return (q * k).sum(axis=1), q @ queue.T
    similarity, others = q @ k.T, ~np.eye(len(q), dtype=bool)
    return similarity.diagonal(), similarity[others].reshape(len(q), -1)


def numpy_losses(positive, negative, temperature, alpha=None, dt_m=1, dcl=False):
    """[N], where p = e^(s_pos/T) / (e^(s_pos/T) + sum_neg e^(s_neg/T)) = 1 / (1 + odds). The odds
    do not underflow in float64 for T >= 0.02. For EqCo, K negatives count as alpha. DCL leaves the
    positive out of the denominator of p."""
    gap = negative - positive[:, None]
    odds, odds_beta = (np.exp(gap / t).sum(axis=1) for t in (temperature, temperature * dt_m))
    if dcl:
        return np.log(odds)
    weight = odds_beta / (1 + odds_beta) / (odds / (1 + odds))  # (1 - p_beta) / (1 - p_alpha)
    if alpha is not None:
        odds = odds * alpha / negative.shape[1]
    return weight.real * np.log1p(odds)  # .real: no gradient flows through the weight


def formula_of(flags, temperature, *inputs):
    return numpy_losses(*numpy_similarities(*inputs), temperature, **flags).mean()


def complex_step(function, inputs, which):
    """The gradient by inputs[which]: f(x + ih) has no cancellation, so h can be tiny."""
    gradient = np.zeros_like(inputs[which])
    for i in np.ndindex(gradient.shape):
        moved = [x.astype(complex) for x in inputs]
        moved[which][i] += 1e-30j
        gradient[i] = function(*moved).imag / 1e-30
    return gradient


def assert_agree_with_formulas(temperature, inputs, tolerance, first=0):
    """Values relative to themselves, gradients by inputs[first:] to their largest entry."""
    arrays = [x.double().numpy() for x in inputs]
    for flags in LOSSES:
        formula = partial(formula_of, flags, temperature)
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = loss_of(flags, temperature, *leaves)
        loss.backward()
        # DCL has no lower bound: it may be near 0 as a difference of numbers that are not.
        absolute = tolerance if "dcl" in flags else 0
        assert loss.item() == pytest.approx(formula(*arrays), rel=tolerance, abs=absolute)
        for i in range(first, len(inputs)):
            expected = complex_step(formula, arrays, i)
            assert abs(leaves[i].grad.numpy() - expected).max() <= tolerance * abs(expected).max()


def embeddings(kind, n, c=8, seed=0):
    """q, k: float64 [n, c], L2-normalised. "near 1": all similarities are above 0.999."""
    generator = torch.Generator().manual_seed(seed)
    q, noise = torch.randn(2, n, c, generator=generator, dtype=torch.float64)
    if kind == "near 1":
        q, noise = 1 + 0.01 * q, 1 + 0.01 * noise
    return F.normalize(q, dim=1), F.normalize(q + noise, dim=1)


@pytest.mark.parametrize("kind", ["random", "near 1"])
@pytest.mark.parametrize("n", [2, 7])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_value_and_gradient_agree_with_the_formula(kind, n, temperature):
    q_and_k, queue = embeddings(kind, n), embeddings(kind, 11, seed=1)[0]
    assert_agree_with_formulas(temperature, q_and_k, tolerance=1e-10)
    assert_agree_with_formulas(temperature, (*q_and_k, queue), tolerance=1e-10)


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.1, 1.0])
@pytest.mark.parametrize("sizes", [[8], [8, 31]])  # of the batch and the queue
@pytest.mark.parametrize("similarity", [-0.9, 0.3, 1.0])  # of positives: hard, mixed and easy
def test_float32_keeps_its_digits(similarity, sizes, temperature):
    """If q is the identity, then the entries of k and the queue are the similarities, exactly, and
    their gradients are those by the similarities."""
    keys = 0.2 * torch.randn(sum(sizes), 8, generator=torch.Generator().manual_seed(0))
    keys.diagonal().fill_(similarity)
    inputs = [torch.eye(8), *keys.clamp(-1, 1).split(sizes)]
    # Four roundings: of s_neg - s_pos (2 at most), of T, of their quotient and of its logsumexp.
    tolerance = 4 * 2**-24 * (2 / temperature + np.log(sum(sizes)))
    assert_agree_with_formulas(temperature, inputs, tolerance, first=1)


@pytest.mark.parametrize("flags", [{"dt_m": 1}, {"alpha": 15}])
@pytest.mark.parametrize("kind", ["random", "near 1"])
def test_is_info_nce(kind, flags):
    inputs = [x.requires_grad_() for x in embeddings(kind, 16)]
    losses = [loss_of(flags, 0.1, *inputs), loss_of({}, 0.1, *inputs)]
    gradients = [torch.autograd.grad(loss, inputs) for loss in losses]
    for ours, info_nce in (losses, *zip(*gradients)):
        torch.testing.assert_close(ours, info_nce, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dt_m", [1, 3, 10])
@pytest.mark.parametrize("kind", ["random", "near 1"])
def test_dual_temperature_is_dcl_weighted_by_how_hard_a_query_is(kind, dt_m):
    """Of each query alone: its gradient is (1 - p at T_beta) times that of DCL."""
    q, k = (x.requires_grad_() for x in embeddings(kind, 16))
    positive, negative = similarities(q, k)
    p = torch.cat([positive[:, None], negative], dim=1).div(0.1 * dt_m).softmax(dim=1)[:, 0]
    log_odds = log_odds_against(positive, negative, 0.1)
    weighted = ((1 - p).detach() * log_odds).mean()
    losses = dual_temperature_loss(q, k, 0.1, dt_m), weighted
    for ours, theirs in zip(*(torch.autograd.grad(loss, (q, k)) for loss in losses)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dcl_loss(q, k, 0.1), log_odds.mean(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 10.0])
def test_no_nan_for_identical_queries_and_keys(dtype, temperature):
    same = F.normalize(torch.ones(4, 8, dtype=dtype), dim=1)  # all similarities are 1
    apart = torch.eye(4, 8, dtype=dtype)  # those of negatives are 0
    opposite = torch.stack([same[0], -same[0]])  # they are -1
    for x in (same, apart, opposite):
        q, k = x.clone().requires_grad_(), x.clone().requires_grad_()
        for flags in LOSSES:
            loss = loss_of(flags, temperature, q, k)
            for result in (loss, *torch.autograd.grad(loss, (q, k))):
                assert result.dtype == dtype and result.isfinite().all()


@pytest.mark.parametrize("num_negatives", [1, 3, 8])
def test_sampled_negatives(num_negatives):
    """Each query has K different negatives; all keys but its own are drawn equally often."""
    q, k = embeddings("random", 9)
    everything, counts, generator = q @ k.T, torch.zeros(9, 9), torch.Generator()
    for seed in range(400):
        generator.manual_seed(seed)
        positive, negative = similarities(q, k, None, num_negatives, generator)
        assert torch.equal(positive, everything.diagonal())
        # No two similarities are equal, so each tells its key.
        is_drawn = (negative[:, :, None] == everything[:, None]).sum(dim=1)
        assert is_drawn.max() == 1 and (is_drawn.sum(dim=1) == num_negatives).all()
        counts += is_drawn
        for flags in LOSSES if seed < 3 else ():
            generator.manual_seed(seed)
            loss = loss_of(flags, 0.1, q, k, num_negatives=num_negatives, generator=generator)
            expected = numpy_losses(positive.numpy(), negative.numpy(), 0.1, **flags).mean()
            assert loss.item() == pytest.approx(expected, rel=1e-10)
    p = num_negatives / 8 * (1 - torch.eye(9))  # the own key: never; five standard deviations
    assert ((counts - 400 * p).abs() <= 5 * (400 * p * (1 - p)) ** 0.5).all()


def test_losses_are_computed_in_float32_under_autocast():
    q, k = (x.float() for x in embeddings("random", 8, 64))
    for flags in LOSSES:
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss_of(flags, 0.1, q, k)
        assert inside.dtype == torch.float32 and inside == loss_of(flags, 0.1, q, k)


@pytest.mark.parametrize("n, num_negatives", [(1, None), (9, 9), (9, 20)])
def test_too_few_images(n, num_negatives):
    for flags in LOSSES:
        with pytest.raises(ValueError, match=f"in a batch of {n} images"):
            loss_of(flags, 0.1, *embeddings("random", n), num_negatives=num_negatives)


def test_statistics():
    q, k = embeddings("random", 24)
    args = SimpleNamespace(loss="dual", moco_t=0.1, dt_m=10)
    positive, negative = numpy_similarities(q.numpy(), k.numpy())
    ranks_first = (positive[:, None] > negative).all(axis=1)
    assert 0 < ranks_first.sum() < 24
    weight = numpy_losses(positive, negative, 0.1, dt_m=10) / numpy_losses(positive, negative, 0.1)
    expected = dict(positive_similarity=positive, negative_similarity=negative)
    expected.update(positive_ranks_first=ranks_first, dual_temperature_weight=weight)
    for name, values in contrast_statistics(q, k, args).items():
        np.testing.assert_allclose(np.sort(values), np.sort(expected.pop(name).ravel()), rtol=1e-10)
    assert not expected


def test_statistics_are_of_keys_of_all_ages():
    cosine = torch.linspace(-1, 1, 4096)  # the older the key, the less similar
    queue = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)
    q, args = torch.tensor([[1.0, 0.0]]), SimpleNamespace(loss="infonce", moco_t=0.1)
    negative = contrast_statistics(q, q, args, queue)["negative_similarity"]
    torch.testing.assert_close(negative, cosine[::4])
