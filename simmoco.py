"""SimMoCo: MoCo v2 without its queue. A momentum encoder for the keys, the batch for the negatives, dual temperature.

Zhang, Zhang, Pham, Niu, Qiao, Yoo, Kweon: "Dual Temperature Helps Contrastive Learning Without Many Negative Samples:
Towards Understanding and Simplifying MoCo", CVPR 2022 (arXiv 2203.17248).

    f_k = copy of f_q
    for a batch of N images:
        view1, view2 = augment(images), augment(images)
        q, k = f_q(view1), f_k(view2)                                 # L2-normalised; NxC; no gradient through k
        # the positive of q[i] is k[i]; its negatives are the N - 1 other rows of k
        loss = mean_i  w_i * -log( e^(q_i.k_i / T) / sum_j e^(q_i.k_j / T) )
        w_i = (1 - p_i at temperature dt_m * T) / (1 - p_i at T)       # no gradient through w; p_i: softmax of the positive
        update f_q by SGD
        f_k = m * f_k + (1 - m) * f_q

    python simmoco.py                                # CIFAR-100, batch 256, 200 epochs: the table's cell
    torchrun --nproc_per_node=4 simmoco.py           # the same run on 4 GPUs
    python simmoco.py --loss eqco --alpha 256 --num-negatives 16 --head-bn    # SiMo (EqCo)

`diff simco.py simmoco.py` shows what the momentum encoder changes, `diff simmoco.py moco_v2.py` what the queue does.
"""
import copy

import torch
import torch.nn as nn

import common
from common import Run, adjust_learning_rate, autocast, build_encoder, contrastive_loss


def arguments():
    parser = common.argument_parser("simmoco", "Train SimMoCo.")
    parser.add_argument("--moco-m", default=0.99, type=common.number(float, 0, most=1), help="momentum of the key encoder")
    common.add_mechanism_flags(parser, loss="dual")
    help_negatives = "negatives per query, drawn from the batch (default: all other images)"
    parser.add_argument("--num-negatives", type=common.number(int, 1), metavar="K", help=help_negatives)
    parser.add_argument("--symmetric", action="store_true", help="the mean of both directions: view 2 queries view 1 too")
    return parser


class SimMoCo(nn.Module):
    """A query encoder, trained, and a key encoder, its moving average."""

    def __init__(self, args):
        super().__init__()
        self.m = args.moco_m
        self.encoder_q = build_encoder(args)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

    @torch.no_grad()
    def momentum_update_key_encoder(self):
        """k = m * k + (1 - m) * q, parameters only: BatchNorm statistics of f_k come from its own forward passes."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m)

    def forward(self, view1, view2, order=None):
        q = self.encoder_q(view1)  # queries: NxC
        with torch.no_grad():
            k = self.encoder_k(common.batch_shuffle(view2, order))  # in another order if BatchNorm sees the batch in parts
            k = common.batch_unshuffle(k, order)  # keys: NxC
        return q, k


def main():
    args = arguments().parse_args()
    device = common.init_distributed(args)
    run = Run(args, device)
    if run.finished:
        return
    data = common.load_data(args, device)

    torch.manual_seed(args.seed)
    model = SimMoCo(args).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    start_epoch = run.start(model, optimizer, model.encoder_q.backbone, data)
    parallel_model = common.parallelize(model, args)

    for epoch in range(start_epoch, args.epochs):
        adjust_learning_rate(optimizer, epoch, args)
        model.train()
        for view1, view2 in run.views(data, epoch):  # Nx3xHxW each
            with autocast(args):
                q, k = parallel_model(view1, view2, run.order)  # NxC each, L2-normalised
            loss = contrastive_loss(q, k, args, run.generator)
            if args.symmetric:
                with autocast(args):
                    q2, k1 = parallel_model(view2, view1, run.order)
                loss = 0.5 * (loss + contrastive_loss(q2, k1, args, run.generator))

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.record(loss, q, k)
            model.momentum_update_key_encoder()

        run.end_epoch(epoch)


if __name__ == "__main__":
    common.launch(main)
