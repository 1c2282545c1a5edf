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
    torchrun --standalone --nproc_per_node=4 simco.py     # the same batches on 4 GPUs
    python simco.py --loss infonce                        # InfoNCE, end to end (MoCo, figure 2a)
    diff simco.py simmoco.py                              # next: what a momentum encoder adds
"""
from shlex import quote

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import autocast, contrastive_loss, number, similarities


def arguments():
    parser = common.argument_parser("simco", loss="dual")
    add = parser.add_argument_group("simco").add_argument
    add("--num-negatives", type=number(int, 1), metavar="K", help="if not given: all others")
    return parser


class SimCo(nn.Module):
    """One encoder for both views."""

    def __init__(self, args):
        super().__init__()
        self.encoder = common.Encoder(args)

    def forward(self, view1, view2):
        q1, features1 = self.encoder(view1)  # queries: NxC; for the probe: NxD
        q2, features2 = self.encoder(view2)  # not in one pass: BatchNorm sees one view at a time
        return q1, q2, torch.cat([features1, features2])


def main():
    args = common.parse_args(arguments())
    device = common.setup(args)
    data = common.load_data(args, device, at_least=args.batch_size)

    torch.manual_seed(args.seed)
    model = SimCo(args).to(device, memory_format=torch.channels_last)
    probe = nn.Linear(8 * args.width, len(data.classes)).to(device)
    optimizer, scaler = common.build_optimizer(model.encoder, probe, args)  # scaler: only in fp16
    start_epoch = common.resume(args, model, probe, optimizer, scaler)
    parallel_model = common.parallelize(model, args)
    parallel_probe = common.parallelize(probe, args)

    def step(batch):
        with autocast(args):
            q1, q2, features = parallel_model(batch.view1, batch.view2)  # NxC, NxC, 2NxD
        positive, negative = similarities(q1, q2, args.num_negatives, batch.generator)  # N, NxK
        positive2, negative2 = similarities(q2, q1, args.num_negatives, batch.generator)
        loss = contrastive_loss(positive, negative, args)
        loss = 0.5 * (loss + contrastive_loss(positive2, negative2, args))
        probe_loss = F.cross_entropy(parallel_probe(features), batch.labels.repeat(2))

        optimizer.zero_grad()
        scaler.scale(loss + probe_loss).backward()  # probe_loss does not train the encoder
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), positive.detach(), negative.detach()

    if args.cuda_graph == "on":
        step = common.CUDAGraph(step)

    log = common.Log(args, start_epoch)
    if start_epoch == 0:  # the untrained network, to see how much is learnt
        log.write(0, common.evaluate(model.encoder.backbone, probe, data, args))
    for epoch in range(start_epoch, args.epochs):
        lr = common.adjust_learning_rate(optimizer, epoch, args)
        log.begin_epoch()
        model.train()
        for batch in common.batches(data, epoch, args):
            loss, positive, negative = step(batch)
            log.add(loss)
        common.average_batchnorm(model)
        measured = log.training(lr) | common.contrast_statistics(positive, negative, args)
        if (epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs:
            measured |= common.evaluate(model.encoder.backbone, probe, data, args)
        log.write(epoch + 1, measured)
        common.save_checkpoint(epoch + 1, args, model, probe, optimizer, scaler)
    if common.RANK == 0:
        cached = " --cached" if args.device == "cpu" else ""
        print(f"'{args.out}' is finished. Next: python linear_eval.py {quote(args.out)}{cached}")


if __name__ == "__main__":
    common.launch(main, if_interrupted="; to resume, run the same command again")
