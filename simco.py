"""SimCo: contrastive learning without momentum encoder and without queue, by dual temperature.

Zhang, Zhang, Pham, Niu, Qiao, Yoo, Kweon: "Dual Temperature Helps Contrastive Learning Without Many Negative Samples:
Towards Understanding and Simplifying MoCo", CVPR 2022 (arXiv 2203.17248).

    for a batch of N images:
        view1, view2 = augment(images), augment(images)
        q1, q2 = f(view1), f(view2)                                   # one encoder f; L2-normalised; NxC
        # the positive of q1[i] is q2[i]; its negatives are the N - 1 other rows of q2
        L(q, k) = mean_i  w_i * -log( e^(q_i.k_i / T) / sum_j e^(q_i.k_j / T) )
        w_i = (1 - p_i at temperature dt_m * T) / (1 - p_i at T)       # no gradient through w; p_i: softmax of the positive
        loss = (L(q1, q2) + L(q2, q1)) / 2                              # gradient through both sides
        update f by SGD

    python simco.py                                  # CIFAR-100, batch 256, 200 epochs: the table's cell
    torchrun --nproc_per_node=4 simco.py             # the same run on 4 GPUs
    python simco.py --loss infonce                   # end-to-end contrastive learning, as SimCLR's

To see what a momentum encoder adds to this, read simmoco.py next; then what a queue adds to that, in moco_v2.py.
"""
import torch
import torch.nn as nn

import common
from common import Run, adjust_learning_rate, autocast, build_encoder, contrastive_loss


def arguments():
    parser = common.argument_parser("simco", "Train SimCo.")
    common.add_mechanism_flags(parser, loss="dual")
    help_negatives = "negatives per query, drawn from the batch (default: all other images)"
    parser.add_argument("--num-negatives", type=common.number(int, 1), metavar="K", help=help_negatives)
    return parser


class SimCo(nn.Module):
    """One encoder for both views."""

    def __init__(self, args):
        super().__init__()
        self.encoder = build_encoder(args)

    def forward(self, view1, view2):
        q1 = self.encoder(view1)  # queries: NxC
        q2 = self.encoder(view2)  # a forward pass of its own: BatchNorm sees one view at a time
        return q1, q2


def main():
    args = arguments().parse_args()
    device = common.init_distributed(args)
    run = Run(args, device)
    if run.finished:
        return
    data = common.load_data(args, device)

    torch.manual_seed(args.seed)
    model = SimCo(args).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.encoder.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    start_epoch = run.start(model, optimizer, model.encoder.backbone, data)
    parallel_model = common.parallelize(model, args)

    for epoch in range(start_epoch, args.epochs):
        adjust_learning_rate(optimizer, epoch, args)
        model.train()
        for view1, view2 in run.views(data, epoch):  # Nx3xHxW each
            with autocast(args):
                q1, q2 = parallel_model(view1, view2)  # NxC each, L2-normalised
            loss = contrastive_loss(q1, q2, args, run.generator)
            loss = 0.5 * (loss + contrastive_loss(q2, q1, args, run.generator))

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.record(loss, q1, q2)

        run.end_epoch(epoch)


if __name__ == "__main__":
    common.launch(main)
