"""Table 5 of EqCo (Zhu et al., arXiv 2010.01929): how much mutual information InfoNCE and EqCo find, measured (published).

    x, e ~ Normal(0, I) in 20 dimensions, y = rho x + sqrt(1 - rho^2) e      # truth: -20/2 log(1 - rho^2) nats
    score of x with y = g(x) . h(y)                                          # g, h: two MLPs, trained to minimise L
    L = info_nce_loss of N pairs at temperature 1                            # K = N - 1 negatives: the y of the other pairs
    estimate = log(1 + K) - L for InfoNCE, log(1 + alpha) - L for EqCo

InfoNCE cannot find more than log N, because L >= 0. EqCo finds about as much with few negatives as InfoNCE with alpha of
them. A little more, in fact: L averages log(1 + alpha * mean over K negatives), which is concave, so the noisier the mean,
the smaller L. That is why EqCo's figures fall from left to right, and may begin above the truth.

    python tests/eqco_table5.py                          # 40 cells: thirteen minutes on one core
    python tests/eqco_table5.py --truths 10 --pairs 64   # some of them, with the same figures
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402

DIMENSION = 20
ALPHA = 512
# N: the paper's, taken as the number of pairs. Were it the number of negatives, InfoNCE could find log(65 / 64) = 0.016 nat
# more at the most. Hence alpha = 512 meets K = 511 in the last column, where the two losses are all but the same.
PAIRS = (64, 128, 256, 512)
PUBLISHED = {  # truth in nats -> a figure for each of PAIRS
    2: {"InfoNCE": (1.7, 1.8, 1.9, 1.9), "EqCo": (1.9, 1.9, 1.9, 1.9)},
    4: {"InfoNCE": (2.9, 3.2, 3.4, 3.6), "EqCo": (3.8, 3.7, 3.6, 3.6)},
    6: {"InfoNCE": (3.6, 4.1, 4.5, 4.9), "EqCo": (5.1, 5.0, 4.9, 4.9)},
    8: {"InfoNCE": (3.9, 4.6, 5.1, 5.6), "EqCo": (5.8, 5.7, 5.7, 5.6)},
    10: {"InfoNCE": (4.1, 4.7, 5.4, 6.0), "EqCo": (6.1, 6.0, 6.0, 6.0)},
}


def arguments():
    parser = common.Parser("Estimate mutual information by InfoNCE and EqCo: Table 5 of EqCo, measured (published).")
    add = parser.add_argument
    add("--truths", default=list(PUBLISHED), type=int, nargs="+", choices=PUBLISHED, help="rows: nats")
    add("--pairs", default=list(PAIRS), type=int, nargs="+", choices=PAIRS, help="columns: N, pairs per batch")
    add("--steps", default=5000, type=common.number(int, 1), help="of training, each on N new pairs")
    add("--batches", default=1000, type=common.number(int, 1), help="of N new pairs that the estimate is the mean over")
    add("--seed", default=0, type=common.number(int, 0, most=2**63 - 1), help="of weights and pairs")
    return parser


def sample_pairs(truth, pairs):
    """x, y [pairs, DIMENSION] with a mutual information of `truth` nats; row i of x goes with row i of y."""
    rho = math.sqrt(1 - math.exp(-2 * truth / DIMENSION))
    x, noise = torch.randn(2, pairs, DIMENSION)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def bound(loss, pairs, alpha=None):
    """The mutual information, in nats, that a loss over this many pairs amounts to."""
    return math.log(1 + (pairs - 1 if alpha is None else alpha)) - loss


def estimate(truth, pairs, alpha, args):
    """Train a critic on pairs that share `truth` nats; returns how many it finds. alpha: EqCo's; None: InfoNCE."""
    torch.manual_seed(args.seed)  # for every cell: it is the same whichever others are asked for
    # The paper gives one hidden layer of 256; 32 outputs are those of Poole et al. (arXiv 1905.06922), whose set-up this is.
    g, h = (nn.Sequential(nn.Linear(DIMENSION, 256), nn.ReLU(), nn.Linear(256, 32)) for _ in range(2))
    optimizer = torch.optim.Adam([*g.parameters(), *h.parameters()], lr=5e-4)

    def loss_of_new_pairs():
        x, y = sample_pairs(truth, pairs)  # NxD each
        return common.info_nce_loss(g(x), h(y), temperature=1.0, alpha=alpha)  # scores are not cosines: no normalisation

    for _ in range(args.steps):
        loss = loss_of_new_pairs()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return bound(sum(loss_of_new_pairs().item() for _ in range(args.batches)) / args.batches, pairs, alpha)


def main():
    args = arguments().parse_args()
    print("| truth | loss |", *(f"N = {pairs} |" for pairs in args.pairs))
    print("|---|---|" + "---|" * len(args.pairs))
    deviations = []
    for truth in args.truths:
        for name, alpha in (("InfoNCE", None), ("EqCo", ALPHA)):
            print(f"| {truth} | {name} |", end="", flush=True)
            for pairs in args.pairs:
                measured, published = estimate(truth, pairs, alpha, args), PUBLISHED[truth][name][PAIRS.index(pairs)]
                print(f" {measured:.2f} ({published}) |", end="", flush=True)
                deviations.append((measured - published, f"truth {truth}, {name}, N = {pairs}"))
            print()
    deviation, where = max(deviations, key=lambda entry: abs(entry[0]))
    print(f"\nlargest deviation: {deviation:+.2f} nat ({where})")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small; and sums are taken in the same order on every machine
    common.launch(main)
