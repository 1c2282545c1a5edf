"""SimMoCo: MoCo v2 without its queue. A momentum encoder for the keys, and dual temperature.

Zhang, Zhang, Pham, Niu, Qiao, Yoo, Kweon: "Dual Temperature Helps Contrastive Learning Without Many
Negative Samples: Towards Understanding and Simplifying MoCo", CVPR 2022 (arXiv 2203.17248).

    f_k = copy of f_q
    for a batch of N images:
        view1, view2 = augment(images), augment(images)
        q, k = f_q(view1), f_k(view2)                     # NxC, L2-normalised; no gradient in k
        # the positive of q[i] is k[i]; its negatives are the N - 1 other rows of k
        p_i(T) = e^(q_i.k_i/T) / sum_j e^(q_i.k_j/T)      # softmax probability of the positive
        loss = mean_i  w_i * -log p_i(T)
        w_i = (1 - p_i(dt_m * T)) / (1 - p_i(T))          # no gradient through w
        update f_q by SGD
        f_k = m * f_k + (1 - m) * f_q

    python simmoco.py                                     # CIFAR-100, batch 256, 200 epochs
    torchrun --nproc_per_node=4 simmoco.py                # the same batches on 4 GPUs
    python simmoco.py --loss eqco --alpha 256 --num-negatives 16 --head-bn    # SiMo (EqCo)

Next, `diff simmoco.py moco_v2.py` shows what a queue adds.
"""
import copy

import torch
import torch.nn as nn

import common
from common import adjust_learning_rate, autocast, contrastive_loss, number


def arguments():
    parser, add = common.argument_parser("simmoco", "Train SimMoCo.", loss="dual")
    add("--num-negatives", type=number(int, 1), metavar="K", help="per query; default: all others")
    add("--moco-m", default=0.99, type=number(float, 0, 1), help="momentum of the key encoder")
    add("--symmetric", action="store_true", help="also use view 2 as query, view 1 as key")
    return parser


class SimMoCo(nn.Module):
    """A trained query encoder, and a key encoder (its moving average)."""

    def __init__(self, args):
        super().__init__()
        self.m = args.moco_m
        self.encoder_q = common.build_encoder(args)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

    @torch.no_grad()
    def momentum_update_key_encoder(self):
        """f_k = m * f_k + (1 - m) * f_q, parameters only: f_k has its own BatchNorm statistics."""
        params_k, params_q = self.encoder_k.parameters(), self.encoder_q.parameters()
        torch._foreach_lerp_(list(params_k), list(params_q), 1 - self.m)

    def forward(self, view1, view2, permutation=None):
        q = self.encoder_q(view1)  # queries: NxC
        with torch.no_grad():
            k = self.encoder_k(common.batch_shuffle(view2, permutation))  # keys: NxC
            k = common.batch_unshuffle(k, permutation)
        return q, k


def main():
    args = arguments().parse_args()
    device = common.setup(args)
    data = common.load_data(args, device)

    torch.manual_seed(args.seed)
    model = SimMoCo(args).to(device, memory_format=torch.channels_last)
    optimizer = common.build_optimizer(model.encoder_q.parameters(), args)
    run = common.Run(args, model, optimizer, model.encoder_q.backbone, data)
    parallel_model = common.parallelize(model, args)

    @run.cuda_graph
    def step(batch):
        with autocast(args):
            q, k = parallel_model(batch.view1, batch.view2, batch.permutation)  # NxC each
        loss = contrastive_loss(q, k, args, batch.generator)
        if args.symmetric:
            with autocast(args):
                q2, k1 = parallel_model(batch.view2, batch.view1, batch.permutation)
            loss = 0.5 * (loss + contrastive_loss(q2, k1, args, batch.generator))
        run.probe.step(batch)  # trains the probe on detached features

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.momentum_update_key_encoder()
        return loss, q, k

    for epoch in range(run.start_epoch, args.epochs):
        adjust_learning_rate(optimizer, epoch, args)
        model.train()
        for batch in common.batches(data, epoch, args):
            run.record(batch, *step(batch))
        run.end_epoch(epoch)


if __name__ == "__main__":
    common.launch(main)
