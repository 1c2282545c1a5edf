"""SimCo: contrastive learning without a momentum encoder and without a queue, by dual temperature.

Zhang, Zhang, Pham, Niu, Qiao, Yoo, Kweon: "Dual Temperature Helps Contrastive Learning Without Many
Negative Samples: Towards Understanding and Simplifying MoCo", CVPR 2022 (arXiv 2203.17248).

    for a batch of N images:
        view1, view2 = augment(images), augment(images)
        q1, q2 = f(view1), f(view2)                       # one encoder f; L2-normalised; NxC
        # the positive of q1[i] is q2[i]; its negatives are the N - 1 other rows of q2
        p_i(T) = e^(q_i.k_i/T) / sum_j e^(q_i.k_j/T)      # softmax probability of the positive
        L(q, k) = mean_i  w_i * -log p_i(T)
        w_i = (1 - p_i(dt_m * T)) / (1 - p_i(T))          # no gradient through w
        loss = (L(q1, q2) + L(q2, q1)) / 2                # gradient through both sides
        update f by SGD

    python simco.py                                       # CIFAR-100, batch 256, 200 epochs
    torchrun --nproc_per_node=4 simco.py                  # the same batches on 4 GPUs
    python simco.py --loss infonce                        # InfoNCE, end to end (MoCo, figure 2a)

Next, `diff simco.py simmoco.py` shows what a momentum encoder adds.
"""
import torch
import torch.nn as nn

import common
from common import adjust_learning_rate, autocast, contrastive_loss, number


def arguments():
    parser, add = common.argument_parser("simco", "Train SimCo.", loss="dual")
    add("--num-negatives", type=number(int, 1), metavar="K", help="per query; default: all others")
    return parser


class SimCo(nn.Module):
    """One encoder for both views."""

    def __init__(self, args):
        super().__init__()
        self.encoder = common.build_encoder(args)

    def forward(self, view1, view2):
        q1 = self.encoder(view1)  # queries: NxC
        q2 = self.encoder(view2)  # a pass of its own: BatchNorm sees one view at a time
        return q1, q2


def main():
    args = arguments().parse_args()
    device = common.setup(args)
    data = common.load_data(args, device)

    torch.manual_seed(args.seed)
    model = SimCo(args).to(device, memory_format=torch.channels_last)
    optimizer = common.build_optimizer(model.encoder.parameters(), args)
    run = common.Run(args, model, optimizer, model.encoder.backbone, data)
    parallel_model = common.parallelize(model, args)

    @run.cuda_graph
    def step(batch):
        with autocast(args):
            q1, q2 = parallel_model(batch.view1, batch.view2)  # NxC each, L2-normalised
        loss = contrastive_loss(q1, q2, args, batch.generator)
        loss = 0.5 * (loss + contrastive_loss(q2, q1, args, batch.generator))
        run.probe.step(batch)  # trains the probe on detached features

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss, q1, q2

    for epoch in range(run.start_epoch, args.epochs):
        adjust_learning_rate(optimizer, epoch, args)
        model.train()
        for batch in common.batches(data, epoch, args):
            run.record(batch, *step(batch))
        run.end_epoch(epoch)


if __name__ == "__main__":
    common.launch(main)
