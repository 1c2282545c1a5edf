"""The losses against the formulas of the papers, evaluated in float64 numpy."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import dual_temperature_loss, info_nce_loss, similarities, similarity_statistics


def log_softmax_of_positive(s, temperature, alpha=None):
    """s [N, 1 + K] with the positive first, float64 -> log p of the positive, from the definition."""
    logits = s / temperature
    if alpha is not None:
        logits = logits + np.concatenate([[0.0], np.full(s.shape[1] - 1, np.log(alpha / (s.shape[1] - 1)))])
    return logits[:, 0] - np.log(np.exp(logits).sum(axis=1))


def one_minus_p(s, temperature):
    """1 - p of the positive without cancellation: the share of the negatives."""
    logits = s / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights[:, 1:].sum(axis=1) / weights.sum(axis=1)


def with_positive_first(q, k, queue):
    if queue is not None:
        return np.concatenate([(q * k).sum(1, keepdims=True), q @ queue.T], axis=1)
    s = q @ k.T
    return np.array([np.concatenate([[row[i]], np.delete(row, i)]) for i, row in enumerate(s)])


def numpy_info_nce(q, k, temperature, queue=None, alpha=None):
    return -log_softmax_of_positive(with_positive_first(q, k, queue), temperature, alpha).mean()


def numpy_dual(q, k, temperature, dt_m, queue=None, weight=None):
    s = with_positive_first(q, k, queue)
    if weight is None:
        weight = one_minus_p(s, temperature * dt_m) / one_minus_p(s, temperature)
    return (weight * -log_softmax_of_positive(s, temperature)).mean()


def numpy_dual_weight(q, k, temperature, dt_m, queue=None):
    s = with_positive_first(q, k, queue)
    return one_minus_p(s, temperature * dt_m) / one_minus_p(s, temperature)


def complex_step(function, x):
    """The gradient to full precision: the imaginary part of f(x + ih) / h has no cancellation, so h can be tiny."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[i] += 1e-30j
        gradient[i] = function(moved).imag / 1e-30
    return gradient


def embeddings(kind, n, c=8, seed=0):
    """q, k [n, c] float64, L2-normalised, as pairs of a view and another."""
    generator = torch.Generator().manual_seed(seed)
    q, noise = torch.randn(2, n, c, generator=generator, dtype=torch.float64)
    if kind == "near 1":  # all similarities, of positives and negatives, above 0.999
        q, noise = torch.ones(n, c, dtype=torch.float64) + 0.01 * q, torch.ones(n, c, dtype=torch.float64) + 0.01 * noise
    return F.normalize(q, dim=1), F.normalize(0.5 * q + 0.5 * noise, dim=1)


CASES = [
    (kind, n, temperature, dt_m, queue)
    for kind in ("random", "near 1") for n in (2, 7) for temperature in (0.05, 0.1, 1.0) for dt_m in (1, 3, 10)
    for queue in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("kind, n, temperature, dt_m, with_queue", CASES)
def test_value_and_gradient_agree_with_the_formula(kind, n, temperature, dt_m, with_queue):
    q, k = embeddings(kind, n)
    queue = embeddings(kind, 11, seed=1)[0] if with_queue else None
    queue_np = queue.numpy() if with_queue else None
    weight = numpy_dual_weight(q.numpy(), k.numpy(), temperature, dt_m, queue_np)  # held fixed: no gradient through it
    pairs = [
        (lambda q, k: info_nce_loss(q, k, temperature, queue), lambda q, k: numpy_info_nce(q, k, temperature, queue_np)),
        (
            lambda q, k: dual_temperature_loss(q, k, temperature, dt_m, queue),
            lambda q, k: numpy_dual(q, k, temperature, dt_m, queue_np, weight),
        ),
    ]
    for ours, formula in pairs:
        q_leaf, k_leaf = q.clone().requires_grad_(), k.clone().requires_grad_()
        loss = ours(q_leaf, k_leaf)
        loss.backward()
        assert loss.item() == pytest.approx(formula(q.numpy(), k.numpy()), rel=1e-6)
        for leaf, other in ((q_leaf, lambda x: formula(x, k.numpy())), (k_leaf, lambda x: formula(q.numpy(), x))):
            expected = complex_step(other, leaf.detach().numpy())
            np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-6, atol=1e-9 * abs(expected).max())


@pytest.mark.parametrize("temperature, dt_m", [(0.1, 10), (0.02, 10), (0.005, 20)])
@pytest.mark.parametrize("n", [2, 64])
def test_float32_keeps_its_digits_for_easy_anchors(temperature, dt_m, n):
    """p -> 1: the positive at similarity 1, few negatives, small temperature. 1 - softmax would be 0 or mostly rounding."""
    q = F.normalize(torch.randn(n, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    k = q.clone()
    q_leaf, k_leaf = q.clone().requires_grad_(), k.clone().requires_grad_()
    loss = dual_temperature_loss(q_leaf, k_leaf, temperature, dt_m)
    loss.backward()
    exact = [x.double().requires_grad_() for x in (q, k)]
    dual_temperature_loss(*exact, temperature, dt_m).backward()
    # A similarity in float32 is wrong by up to about sqrt(128) * 2**-24; that times 1 / (dt_m * temperature), and times
    # 1 / temperature in the softmax over negatives, is how much the rounding of the input can move value and gradient.
    rounding = 128**0.5 * 2**-24
    value = numpy_dual_limit(q.double().numpy(), k.double().numpy(), temperature, dt_m)
    assert loss.item() == pytest.approx(value, rel=4 * rounding / temperature)
    for leaf, reference in zip((q_leaf, k_leaf), exact):
        scale = reference.grad.abs().max().item()
        assert scale > 0
        assert (leaf.grad - reference.grad).abs().max().item() <= 8 * rounding / temperature * scale


def numpy_dual_limit(q, k, temperature, dt_m):
    """The loss by log-sums in float64 and extended range, so that neither 1 - p nor -log p underflows."""
    s = with_positive_first(q, k, None).astype(np.longdouble)
    gap = ((s[:, 1:] - s[:, :1]) / temperature).astype(np.longdouble)
    odds = np.exp(gap).sum(axis=1)  # long double: down to 1e-4932
    odds_beta = np.exp(gap / dt_m).sum(axis=1)
    weight = (odds_beta / (1 + odds_beta)) / (odds / (1 + odds))
    return float((weight * np.log1p(odds)).mean())


def test_dt_m_1_is_info_nce():
    for kind in ("random", "near 1"):
        for n in (2, 16):
            results = []
            for loss_of in (lambda q, k: dual_temperature_loss(q, k, 0.1, 1.0), lambda q, k: info_nce_loss(q, k, 0.1)):
                q, k = (x.requires_grad_() for x in embeddings(kind, n))
                loss = loss_of(q, k)
                results.append((loss.detach(), *torch.autograd.grad(loss, (q, k))))
            for ours, theirs in zip(*results):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 10.0])
def test_no_nan_for_identical_queries_and_keys(dtype, temperature):
    same = F.normalize(torch.ones(4, 8, dtype=dtype), dim=1)  # every similarity is 1
    apart = torch.eye(4, 8, dtype=dtype)  # positives 1, negatives 0
    opposite = torch.stack([same[0], -same[0]])  # the negative at -1
    for x in (same, apart, opposite):
        q, k = x.clone().requires_grad_(), x.clone().requires_grad_()
        for loss in (dual_temperature_loss(q, k, temperature, 10.0), info_nce_loss(q, k, temperature)):
            gradients = torch.autograd.grad(loss, (q, k))
            assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_eqco_counts_the_negatives_as_alpha():
    q, k = (x.numpy() for x in embeddings("random", 9))
    ours = info_nce_loss(torch.tensor(q), torch.tensor(k), 0.1, alpha=256)
    assert ours.item() == pytest.approx(numpy_info_nce(q, k, 0.1, alpha=256), rel=1e-10)
    unchanged = info_nce_loss(torch.tensor(q), torch.tensor(k), 0.1, alpha=8)  # alpha = K
    assert unchanged.item() == pytest.approx(numpy_info_nce(q, k, 0.1), rel=1e-10)


@pytest.mark.parametrize("num_negatives", [1, 3, 8])
def test_sampled_negatives(num_negatives):
    """Of each query its own set of other images: never the positive, none twice, all equally often, and by the generator."""
    q, k = embeddings("random", 9)

    def draw(seed):
        return similarities(q, k, None, num_negatives, torch.Generator().manual_seed(seed))

    counts = torch.zeros(9, 9)
    for seed in range(400):
        positive, negative = draw(seed)
        assert torch.equal(positive, (q @ k.T).diagonal()) and negative.shape == (9, num_negatives)
        where = negative[:, :, None] == (q @ k.T)[:, None]  # all similarities differ, so each tells its key
        assert (where.sum(dim=2) == 1).all()
        counts += where.sum(dim=1)
        if seed < 3:
            assert torch.equal(draw(seed)[1], negative)
            s = np.concatenate([positive[:, None].numpy(), negative.numpy()], axis=1)
            loss = info_nce_loss(q, k, 0.1, None, 64, num_negatives, torch.Generator().manual_seed(seed))
            assert loss.item() == pytest.approx(-log_softmax_of_positive(s, 0.1, 64).mean(), rel=1e-6)
            loss = dual_temperature_loss(q, k, 0.1, 10, None, num_negatives, torch.Generator().manual_seed(seed))
            weight = one_minus_p(s, 1.0) / one_minus_p(s, 0.1)
            assert loss.item() == pytest.approx((weight * -log_softmax_of_positive(s, 0.1)).mean(), rel=1e-6)
    p = num_negatives / 8
    assert counts.diagonal().sum() == 0
    others = counts[~torch.eye(9, dtype=torch.bool)]  # 400 draws each: within five standard deviations
    assert (others - 400 * p).abs().max() <= 5 * (400 * p * (1 - p)) ** 0.5
    assert num_negatives == 8 or not torch.equal(draw(0)[1], draw(1)[1])
    with pytest.raises(ValueError, match="num_negatives"):
        similarities(q, k, None, 9)


def test_losses_are_computed_in_float32_under_autocast():
    q, k = (x.float() for x in embeddings("random", 8, 64))
    for loss_of in (dual_temperature_loss, info_nce_loss):
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss_of(q, k)
        assert inside.dtype == torch.float32 and inside == loss_of(q, k)


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf")])
def test_bad_temperatures_are_named(bad):
    q, k = embeddings("random", 4)
    with pytest.raises(ValueError, match="temperature"):
        info_nce_loss(q, k, temperature=bad)
    with pytest.raises(ValueError, match="dt_m"):
        dual_temperature_loss(q, k, dt_m=bad)
    with pytest.raises(ValueError, match="alpha"):
        info_nce_loss(q, k, alpha=bad)


def test_one_image_has_no_negatives():
    q, k = embeddings("random", 1)
    with pytest.raises(ValueError, match="two images"):
        dual_temperature_loss(q, k)


def test_statistics_for_tensorboard():
    q, k = embeddings("random", 6)
    statistics = similarity_statistics(q, k, 0.1, dt_m=10)
    s = with_positive_first(q.numpy(), k.numpy(), None)
    np.testing.assert_allclose(statistics["positive"], s[:, 0])
    negative = statistics["negative"]
    np.testing.assert_allclose(np.sort(negative[negative.isfinite()]), np.sort(s[:, 1:].ravel()))
    assert statistics["positive_ranks_first"].item() == pytest.approx((s[:, :1] > s[:, 1:]).all(1).mean())
    weight = numpy_dual_weight(q.numpy(), k.numpy(), 0.1, 10).mean()
    assert statistics["dual_temperature_weight"].item() == pytest.approx(weight)


def test_statistics_are_of_keys_from_all_over_the_queue():
    q = torch.tensor([[1.0, 0.0]])
    cosine = torch.linspace(-1, 1, 4096)  # the older, the less similar
    statistics = similarity_statistics(q, q, 0.1, queue=torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1))
    assert len(statistics["negative"]) == 1024
    assert statistics["negative"].mean().abs() < 4 * (2 / 4095)  # every fourth: at most three steps of the ramp off
