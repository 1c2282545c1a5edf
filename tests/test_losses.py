"""The losses against the formulas of the papers in float64 numpy."""
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import similarities

# InfoNCE, EqCo (with alpha), dual temperature (with dt_m) and DCL.
LOSSES = ({}, {"alpha": 1}, {"alpha": 256}, {"dt_m": 1}, {"dt_m": 3}, {"dt_m": 10}, {"dcl": True})


def loss_of(flags, temperature, q, k, queue=None):
    if "dcl" in flags:  # of cosines only
        pair = similarities(q, k) if queue is None else ((q * k).sum(dim=1), q @ queue.T)
        return common.dcl(*pair, temperature)
    loss = common.dual_temperature_loss if "dt_m" in flags else common.info_nce_loss
    return loss(q, k, temperature, queue=queue, **flags)


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


def embeddings(n, c=8, seed=0):
    """q, k: float64 [n, c], L2-normalised."""
    generator = torch.Generator().manual_seed(seed)
    q, noise = torch.randn(2, n, c, generator=generator, dtype=torch.float64)
    return F.normalize(q, dim=1), F.normalize(q + noise, dim=1)


@pytest.mark.parametrize("n", [2, 7])
def test_value_and_gradient_agree_with_the_formula(n):
    q_and_k, queue = embeddings(n), embeddings(11, seed=1)[0]
    for temperature in (0.05, 0.1, 1.0):
        assert_agree_with_formulas(temperature, q_and_k, tolerance=1e-10)
        assert_agree_with_formulas(temperature, (*q_and_k, queue), tolerance=1e-10)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 10.0])
@pytest.mark.parametrize("spread", [0.0, 0.2, 0.8])  # of negatives
@pytest.mark.parametrize("sizes", [[8], [8, 31]])  # of the batch and the queue
@pytest.mark.parametrize("similarity", [-0.9, 0.3, 1.0])  # of positives: hard, mixed and easy
def test_float32_keeps_its_digits(similarity, sizes, spread, temperature):
    """If q is the identity, then the entries of k and the queue are the similarities, exactly, and
    their gradients are those by the similarities."""
    keys = spread * torch.randn(sum(sizes), 8, generator=torch.Generator().manual_seed(0))
    keys.diagonal().fill_(similarity)
    inputs = [torch.eye(8), *keys.clamp(-1, 1).split(sizes)]
    # Four roundings: of s_neg - s_pos (2 at most), of T, of their quotient and of its logsumexp.
    tolerance = 4 * 2**-24 * (2 / temperature + np.log(sum(sizes)))
    assert_agree_with_formulas(temperature, inputs, tolerance, first=1)


@pytest.mark.parametrize("num_negatives", [1, 3, 8])
def test_sampled_negatives(num_negatives):
    """Each query has K different negatives; all keys but its own are drawn equally often."""
    q, k = embeddings(9)
    everything, counts, generator = q @ k.T, torch.zeros(9, 9), torch.Generator()
    for seed in range(400):
        positive, negative = similarities(q, k, num_negatives, generator.manual_seed(seed))
        assert torch.equal(positive, everything.diagonal())
        # No two similarities are equal, so each tells its key.
        is_drawn = (negative[:, :, None] == everything[:, None]).sum(dim=1)
        assert is_drawn.max() == 1 and (is_drawn.sum(dim=1) == num_negatives).all()
        counts += is_drawn
    p = num_negatives / 8 * (1 - torch.eye(9))  # the own key: never; five standard deviations
    assert ((counts - 400 * p).abs() <= 5 * (400 * p * (1 - p)) ** 0.5).all()
    for n, too_many in ((1, None), (9, 9)):
        with pytest.raises(ValueError, match=f"in a batch of {n} images"):
            similarities(q[:n], k[:n], too_many)


def test_losses_are_computed_in_float32_under_autocast():
    q, k, queue, _ = (x.float() for n in (8, 20) for x in embeddings(n, 64))
    for inputs in ((q, k), (q, k, queue)):
        for flags in LOSSES[:-1]:
            with torch.autocast("cpu", torch.bfloat16):
                inside = loss_of(flags, 0.1, *inputs)
            assert inside.dtype == torch.float32 and inside == loss_of(flags, 0.1, *inputs)
