"""Table 5 of EqCo (Zhu et al., arXiv 2010.01929): the mutual information that the losses find.

    x, e ~ Normal(0, I) in 20 dimensions
    y = rho x + sqrt(1 - rho^2) e            # they share -20/2 log(1 - rho^2) nats, the truth
    score of x with y = g(x) . h(y)          # g, h: two MLPs, trained to minimise L
    L = info_nce_loss of N pairs, T = 1      # K = N - 1 negatives: the y of the other pairs
    estimate = log(1 + K) - L for InfoNCE    # at most log N, because L >= 0
    estimate = log(1 + alpha) - L for EqCo   # falls with N: L is concave in a mean over negatives

    python results/eqco_table5.py                          # 40 cells: thirteen minutes on one core
    python results/eqco_table5.py --truths 10 --pairs 64   # some of them, with the same figures
"""
import argparse
import math
import sys

import torch
import torch.nn as nn

sys.path.insert(0, f"{sys.path[0]}/..")  # where common.py is
from common import info_nce_loss, launch, number  # noqa: E402

DIM, ALPHA, PAIRS = 20, 512, (64, 128, 256, 512)  # were these K, not N: 0.016 nats more at most
PUBLISHED = {  # truth in nats: figures of InfoNCE and of EqCo, for each of PAIRS
    2: ((1.7, 1.8, 1.9, 1.9), (1.9, 1.9, 1.9, 1.9)),
    4: ((2.9, 3.2, 3.4, 3.6), (3.8, 3.7, 3.6, 3.6)),
    6: ((3.6, 4.1, 4.5, 4.9), (5.1, 5.0, 4.9, 4.9)),
    8: ((3.9, 4.6, 5.1, 5.6), (5.8, 5.7, 5.7, 5.6)),
    10: ((4.1, 4.7, 5.4, 6.0), (6.1, 6.0, 6.0, 6.0)),
}


def estimate(truth, pairs, alpha, steps):
    """Train g and h on pairs that share `truth` nats. Returns how many nats they find."""
    torch.manual_seed(0)  # a cell does not depend on the others
    # The hidden layer is the paper's, the 32 outputs are those of Poole et al. (arXiv 1905.06922).
    g, h = (nn.Sequential(nn.Linear(DIM, 256), nn.ReLU(), nn.Linear(256, 32)) for _ in range(2))
    optimizer = torch.optim.Adam([*g.parameters(), *h.parameters()], lr=5e-4)

    rho = math.sqrt(1 - math.exp(-2 * truth / DIM))

    def loss_of_new_pairs():
        x, noise = torch.randn(2, pairs, DIM)
        y = rho * x + math.sqrt(1 - rho**2) * noise
        return info_nce_loss(g(x), h(y), temperature=1.0, alpha=alpha)  # scores are not cosines

    for _ in range(steps):
        optimizer.zero_grad()
        loss_of_new_pairs().backward()
        optimizer.step()
    losses = [loss_of_new_pairs().item() for _ in range(steps // 5)]
    return math.log(1 + (alpha or pairs - 1)) - sum(losses) / len(losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--truths", default=list(PUBLISHED), type=int, nargs="+", choices=PUBLISHED, help="nats")
    add("--pairs", default=list(PAIRS), type=int, nargs="+", choices=PAIRS, help="N, per batch")
    add("--steps", default=5000, type=number(int, 5), help="of training, on N new pairs each")
    args = parser.parse_args()
    print("Measured (published):\n| truth | loss |", *(f"N = {pairs} |" for pairs in args.pairs))
    print("|---|---|" + "---|" * len(args.pairs))
    for truth in args.truths:
        for name, alpha, figures in zip(("InfoNCE", "EqCo"), (None, ALPHA), PUBLISHED[truth]):
            row, published = [str(truth), name], dict(zip(PAIRS, figures))
            for pairs in args.pairs:
                found = estimate(truth, pairs, alpha, args.steps)
                row.append(f"{found:.2f} ({published[pairs]})")
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # faster for small tensors; sums have the same order everywhere
    launch(main)
