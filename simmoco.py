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
    torchrun --standalone --nproc_per_node=4 simmoco.py   # the same batches on 4 GPUs
    python simmoco.py --loss eqco --alpha 256 --num-negatives 16 --head-bn    # SiMo (EqCo)
    diff simmoco.py moco_v2.py                            # next: what a queue adds
"""
import copy
from shlex import quote

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import autocast, contrastive_loss, number, similarities


def arguments():
    parser = common.argument_parser("simmoco", loss="dual")
    add = parser.add_argument_group("simmoco").add_argument
    add("--num-negatives", type=number(int, 1), metavar="K", help="if not given: all others")
    add("--moco-m", default=0.99, type=number(float, 0, 1), help="momentum of the key encoder")
    add("--symmetric", action="store_true", help="also use view 2 as query, view 1 as key")
    return parser


class SimMoCo(nn.Module):
    """A trained query encoder, and a key encoder (its moving average)."""

    def __init__(self, args):
        super().__init__()
        self.m = args.moco_m
        self.encoder_q = common.Encoder(args)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)

    @torch.no_grad()
    def momentum_update_key_encoder(self):
        """f_k = m * f_k + (1 - m) * f_q, parameters only: f_k has its own BatchNorm statistics."""
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
            param_k.lerp_(param_q, 1 - self.m)

    def forward(self, view1, view2, permutation=None):
        q, features = self.encoder_q(view1)  # queries: NxC; for the probe: NxD
        with torch.no_grad():
            k = common.encode_shuffled(self.encoder_k, view2, permutation)  # keys: NxC
        return q, k, features


def main():
    args = common.parse_args(arguments())
    device = common.setup(args)
    data = common.load_data(args, device, at_least=args.batch_size)

    torch.manual_seed(args.seed)
    model = SimMoCo(args).to(device, memory_format=torch.channels_last)
    probe = nn.Linear(8 * args.width, len(data.classes)).to(device)
    optimizer, scaler = common.build_optimizer(model.encoder_q, probe, args)  # scaler: only in fp16
    start_epoch = common.resume(args, model, probe, optimizer, scaler)
    parallel_model = common.parallelize(model, args)
    parallel_probe = common.parallelize(probe, args)

    def step(batch):
        with autocast(args):
            q, k, features = parallel_model(batch.view1, batch.view2, batch.permutation)
        positive, negative = similarities(q, k, args.num_negatives, batch.generator)  # N, NxK
        loss, labels = contrastive_loss(positive, negative, args), batch.labels
        if args.symmetric:
            with autocast(args):
                q2, k1, features2 = parallel_model(batch.view2, batch.view1, batch.permutation)
            positive2, negative2 = similarities(q2, k1, args.num_negatives, batch.generator)
            loss = 0.5 * (loss + contrastive_loss(positive2, negative2, args))
            features, labels = torch.cat([features, features2]), labels.repeat(2)
        probe_loss = F.cross_entropy(parallel_probe(features), labels)

        optimizer.zero_grad()
        scaler.scale(loss + probe_loss).backward()  # probe_loss does not train the encoder
        scaler.step(optimizer)
        scaler.update()
        model.momentum_update_key_encoder()
        return loss.detach(), positive.detach(), negative.detach()

    if args.cuda_graph == "on":
        step = common.CUDAGraph(step)

    log = common.Log(args, start_epoch)
    if start_epoch == 0:  # the untrained network, to see how much is learnt
        log.write(0, common.evaluate(model.encoder_q.backbone, probe, data, args))
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
            measured |= common.evaluate(model.encoder_q.backbone, probe, data, args)
        log.write(epoch + 1, measured)
        common.save_checkpoint(epoch + 1, args, model, probe, optimizer, scaler)
    if common.RANK == 0:
        cached = " --cached" if args.device == "cpu" else ""
        print(f"'{args.out}' is finished. Next: python linear_eval.py {quote(args.out)}{cached}")


if __name__ == "__main__":
    common.launch(main, if_interrupted="; to resume, run the same command again")
