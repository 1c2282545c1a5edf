"""EqCo as an estimator of mutual information, its gradient, and the short form of eqco_table5.py."""
import math
import re

import eqco_table5
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_losses import complex_step, embeddings, numpy_info_nce

from common import info_nce_loss


def test_short_form_of_table_5(run_script, capsys):
    """A tenth of the steps and a fifth of the batches, held to the same 0.25 nat as the whole form. In these four cells
    that came out 0.01 below to 0.14 above the published figures, and a tenth of its steps ended 0.02 to 0.21 nat lower
    (three seeds); the standard error of a mean over 200 batches is below 0.02 nat."""
    flags = "--truths 4 10 --pairs 64 --steps 500 --batches 200".split()
    assert run_script(eqco_table5, *flags) == 0
    output = capsys.readouterr().out
    rows = re.findall(r"^\| (\d+) \| (\w+) \| ([\d.]+) \(([\d.]+)\) \|$", output, re.MULTILINE)
    found = {(int(truth), loss): float(measured) for truth, loss, measured, _ in rows}
    assert list(found) == [(4, "InfoNCE"), (4, "EqCo"), (10, "InfoNCE"), (10, "EqCo")]
    deviations = [float(measured) - float(published) for _, _, measured, published in rows]
    assert max(map(abs, deviations)) < 0.25
    assert found[4, "InfoNCE"] < math.log(64) - 1 < found[4, "EqCo"]
    assert found[10, "InfoNCE"] < math.log(64) < found[10, "EqCo"]  # the most that InfoNCE can find; EqCo finds more
    largest = float(re.search(r"largest deviation: ([+-][\d.]+) nat", output)[1])
    assert largest == pytest.approx(max(deviations, key=abs), abs=0.011)  # both are rounded
    assert run_script(eqco_table5, *flags[:-2], "--batches", "0") == 2


def exact_critic(x, y, truth):
    """Embeddings [N, 22] of x and y [N, 20] whose products are log p(y | x) / p(y) up to a constant: no critic is better.

    Of two standard normal numbers with correlation rho that is (rho x y - rho^2 (x^2 + y^2) / 2) / (1 - rho^2).
    """
    rho = math.sqrt(1 - math.exp(-truth / 10))
    one = torch.ones(len(x), 1)
    x_square, y_square = (-0.5 * rho**2 * z.square().sum(dim=1, keepdim=True) for z in (x, y))
    return torch.cat([rho * x, x_square, one], dim=1) / (1 - rho**2), torch.cat([y, one, y_square], dim=1)


@pytest.mark.parametrize("truth", eqco_table5.PUBLISHED)
def test_table_5_is_what_the_exact_critic_finds(truth):
    """Without any training: so it is the loss that makes the table. The published critics, being trained, find less, by at
    most the 0.25 nat that ours are held to; a figure above the exact critic's would have to be an accident of rounding."""
    torch.manual_seed(0)
    for column, pairs in enumerate(eqco_table5.PAIRS):
        batches = [exact_critic(*eqco_table5.sample_pairs(truth, pairs), truth) for _ in range(16384 // pairs)]
        for loss, alpha in (("InfoNCE", None), ("EqCo", eqco_table5.ALPHA)):
            losses = [info_nce_loss(q, k, 1.0, alpha=alpha).item() for q, k in batches]
            found = [eqco_table5.bound(value, pairs, alpha) for value in losses]
            published, noise = eqco_table5.PUBLISHED[truth][loss][column], 3 * np.std(found) / len(found) ** 0.5
            assert published - 0.05 - noise < np.mean(found) < published + 0.25 + noise  # 0.05: it is rounded


@pytest.mark.parametrize("with_queue", [False, True])
def test_gradient_of_eqco(with_queue):
    q, k = embeddings("random", 9)
    queue = embeddings("random", 5, seed=1)[0] if with_queue else None
    queue_np, num_negatives = (queue.numpy(), 5) if with_queue else (None, 8)

    def gradients(alpha):
        q_leaf, k_leaf = q.clone().requires_grad_(), k.clone().requires_grad_()
        return torch.autograd.grad(info_nce_loss(q_leaf, k_leaf, 0.1, queue, alpha), (q_leaf, k_leaf))

    for alpha in (1, 256):
        formulas = (
            lambda q: numpy_info_nce(q, k.numpy(), 0.1, queue_np, alpha),
            lambda k: numpy_info_nce(q.numpy(), k, 0.1, queue_np, alpha),
        )
        for gradient, formula, x in zip(gradients(alpha), formulas, (q, k)):
            expected = complex_step(formula, x.numpy())
            np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-6, atol=1e-9 * abs(expected).max())
    for eqco, info_nce in zip(gradients(num_negatives), gradients(None)):  # alpha = K
        assert torch.equal(eqco, info_nce)


def test_gradient_norm_depends_on_alpha_and_not_on_the_number_of_negatives():
    """EqCo, Theorem 2. A query's gradient is (1 - p) / T times the distance of its positive from the softmax mean of its
    negatives. 1 - p is the same for every K, up to the noise of a mean over K negatives. The softmax mean of K random
    directions in C dimensions has a squared length of about e^(1 / (C T^2)) / K, which for the smallest K makes the distance
    longer by a factor of about sqrt(1 + 2.2 / 16) = 1.07."""
    temperature, generator = 0.1, torch.Generator().manual_seed(0)
    q, noise = (F.normalize(x, dim=1) for x in torch.randn(2, 64, 128, generator=generator, dtype=torch.float64))
    k = F.normalize(q + noise, dim=1)
    negatives = F.normalize(torch.randn(4096, 128, generator=generator, dtype=torch.float64), dim=1)

    def gradient_norms(alpha):
        norms = []
        for num_negatives in (16, 64, 256, 1024, 4096):
            leaf = q.clone().requires_grad_()
            loss = len(q) * info_nce_loss(leaf, k, temperature, negatives[:num_negatives], alpha)  # the sum over queries
            norms.append(torch.autograd.grad(loss, leaf)[0].norm(dim=1).mean().item())
        return norms

    for alpha in (256, 4096):
        norms = gradient_norms(alpha)
        assert max(norms) / min(norms) < 1.1
    norms = gradient_norms(None)
    assert norms == sorted(norms) and norms[-1] / norms[0] > 10
