"""MoCo v2: a momentum encoder for the keys, a queue of past keys for the negatives, InfoNCE.

He, Fan, Wu, Xie, Girshick: "Momentum Contrast for Unsupervised Visual Representation Learning",
CVPR 2020 (arXiv 1911.05722), and Chen, Fan, Girshick, He: "Improved Baselines with Momentum
Contrastive Learning" (arXiv 2003.04297).

    f_k = copy of f_q; queue = K random unit vectors
    for a batch of N images:
        view1, view2 = augment(images), augment(images)
        q, k = f_q(view1), f_k(view2)                     # NxC, L2-normalised; no gradient in k
        # the positive of q[i] is k[i]; its negatives are the K keys of the queue
        loss = mean_i  -log( e^(q_i.k_i/T) / (e^(q_i.k_i/T) + sum_j e^(q_i.queue_j/T)) )
        update f_q by SGD
        f_k = m * f_k + (1 - m) * f_q
        k replaces the N oldest keys of the queue

    python moco_v2.py                                     # CIFAR-100, batch 256, 200 epochs
    torchrun --standalone --nproc_per_node=4 moco_v2.py   # the same batches on 4 GPUs
    python moco_v2.py --memory-bank --moco-k 4096 --moco-m 0.5    # a memory bank, no queue
"""
import copy
from shlex import quote

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import autocast, contrastive_loss, number


def arguments():
    parser = common.argument_parser("moco_v2", loss="infonce")
    add = parser.add_argument_group("moco_v2").add_argument
    add("--moco-k", default=65536, type=number(int, 1), help="number of keys in the queue")
    add("--moco-m", default=0.99, type=number(float, 0, 1), help="momentum of the key encoder")
    add("--symmetric", action="store_true", help="also use view 2 as query, view 1 as key")
    add("--memory-bank", action="store_true", help="no queue: draw K stored keys as negatives")
    return parser


class MoCo(nn.Module):
    """A trained query encoder, a key encoder (its moving average), and a queue of past keys."""

    def __init__(self, args):
        super().__init__()
        self.m = args.moco_m
        self.encoder_q = common.Encoder(args)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(args.moco_k, args.moco_dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))  # the oldest key

    @torch.no_grad()
    def momentum_update_key_encoder(self):
        """f_k = m * f_k + (1 - m) * f_q, parameters only: f_k has its own BatchNorm statistics."""
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
            param_k.lerp_(param_q, 1 - self.m)

    @torch.no_grad()
    def dequeue_and_enqueue(self, keys):
        """Overwrite the oldest keys (a ring buffer) with those of the global batch."""
        keys = common.concat_all_gather(keys)[-len(self.queue) :]  # at most K
        rows = self.queue_ptr + torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(0, rows % len(self.queue), keys)
        self.queue_ptr.add_(len(keys)).remainder_(len(self.queue))  # on the device: nothing waits

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
    model = MemoryBank(args, len(data.train_images)) if args.memory_bank else MoCo(args)
    model.to(device, memory_format=torch.channels_last)
    probe = nn.Linear(8 * args.width, len(data.classes)).to(device)
    optimizer, scaler = common.build_optimizer(model.encoder_q, probe, args)  # scaler: only in fp16
    start_epoch = common.resume(args, model, probe, optimizer, scaler)
    parallel_model = common.parallelize(model, args)
    parallel_probe = common.parallelize(probe, args)

    def step(batch):
        if args.memory_bank:
            model.look_up(batch.index, batch.generator)
        with autocast(args):
            q, k, features = parallel_model(batch.view1, batch.view2, batch.permutation)
        positive, negative = (q * k).sum(dim=1), q @ model.queue.T  # N, NxK
        loss, labels = contrastive_loss(positive, negative, args), batch.labels
        if args.symmetric:
            with autocast(args):
                q2, k1, features2 = parallel_model(batch.view2, batch.view1, batch.permutation)
            positive2, negative2 = (q2 * k1).sum(dim=1), q2 @ model.queue.T
            loss = 0.5 * (loss + contrastive_loss(positive2, negative2, args))
            features, labels = torch.cat([features, features2]), labels.repeat(2)
        probe_loss = F.cross_entropy(parallel_probe(features), labels)

        optimizer.zero_grad()
        scaler.scale(loss + probe_loss).backward()  # probe_loss does not train the encoder
        scaler.step(optimizer)
        scaler.update()
        model.momentum_update_key_encoder()
        model.dequeue_and_enqueue(k)
        if args.symmetric:
            model.dequeue_and_enqueue(k1)
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


class MemoryBank(nn.Module):
    """What MoCo replaces (MoCo, figure 2b; Wu, Xiong, Yu, Lin, arXiv 1805.01978): a stored key for
    each training image, a moving average of its queries. There is no key encoder and no queue."""

    def __init__(self, args, num_images):
        super().__init__()
        self.m, self.num_negatives = args.moco_m, args.moco_k
        others = num_images - args.batch_size
        common.require(args.moco_k <= others, f"--memory-bank needs --moco-k {others} or less")
        common.require(not args.symmetric, "--memory-bank and --symmetric exclude each other")
        self.encoder_q = common.Encoder(args)
        self.register_buffer("bank", F.normalize(torch.randn(num_images, args.moco_dim), dim=1))

    @torch.no_grad()
    def look_up(self, index, generator):
        """Take the stored keys of the batch, `index` int64 [N], and those of K other images."""
        self.index = common.concat_all_gather(index)  # of the global batch
        chance = torch.rand(len(self.bank), device=index.device, generator=generator)
        chance.index_fill_(0, self.index, -1)  # no image of the batch is a negative
        self.queue = self.bank[chance.topk(self.num_negatives).indices]  # KxC
        self.keys = self.bank[index]  # NxC

    def forward(self, view1, view2, permutation=None):
        q, features = self.encoder_q(view1)  # queries: NxC; for the probe: NxD
        self.updated = F.normalize(torch.lerp(q.detach(), self.keys, self.m), dim=1)
        return q, self.keys, features

    def momentum_update_key_encoder(self):
        pass  # there is no key encoder

    def dequeue_and_enqueue(self, keys):
        """Store k = normalize(m * k + (1 - m) * q) of the batch. `keys` is not used."""
        self.bank.index_copy_(0, self.index, common.concat_all_gather(self.updated))


if __name__ == "__main__":
    common.launch(main, if_interrupted="; to resume, run the same command again")
