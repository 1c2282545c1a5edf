"""MoCo v2: a momentum encoder for the keys, a queue of past keys for the negatives, InfoNCE.

He, Fan, Wu, Xie, Girshick: "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020 (arXiv
1911.05722), and Chen, Fan, Girshick, He: "Improved Baselines with Momentum Contrastive Learning" (arXiv 2003.04297).

    f_k = copy of f_q; queue = K random unit vectors
    for a batch of N images:
        view1, view2 = augment(images), augment(images)
        q, k = f_q(view1), f_k(view2)                                 # L2-normalised; NxC; no gradient through k
        # the positive of q[i] is k[i]; its negatives are the K keys of the queue
        loss = mean_i  -log( e^(q_i.k_i / T) / (e^(q_i.k_i / T) + sum_j e^(q_i.queue_j / T)) )
        update f_q by SGD
        f_k = m * f_k + (1 - m) * f_q
        the N oldest keys of the queue make place for k

    python moco_v2.py                                # CIFAR-100, batch 256, 200 epochs: the table's cell
    torchrun --nproc_per_node=4 moco_v2.py           # the same run on 4 GPUs
    python moco_v2.py --v1                           # MoCo v1
    python moco_v2.py --memory-bank                  # stored keys instead of a queue and a key encoder

`diff simmoco.py moco_v2.py` shows what the queue changes.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import Run, UserError, adjust_learning_rate, autocast, build_encoder, contrastive_loss


def arguments():
    parser = common.argument_parser("moco_v2", "Train MoCo v2.")
    parser.add_argument("--moco-m", default=0.99, type=common.number(float, 0, most=1), help="momentum of the key encoder")
    parser.add_argument("--moco-k", default=65536, type=common.number(int, 1), help="number of keys in the queue")
    common.add_mechanism_flags(parser, loss="infonce")
    parser.presets = dict(  # the defaults that come with a flag
        v1=dict(head="linear", moco_t=0.07, moco_m=0.999, schedule="step", augmentation="v1"),
        memory_bank=dict(moco_k=4096, moco_m=0.5),
    )
    help_v1 = "MoCo v1; defaults: --head linear --moco-t 0.07 --moco-m 0.999 --schedule step --augmentation v1"
    parser.add_argument("--v1", action="store_true", help=help_v1)
    help_bank = "negatives are K stored keys, one an image, of momentum m; defaults: --moco-k 4096 --moco-m 0.5"
    parser.add_argument("--memory-bank", action="store_true", help=help_bank)
    parser.add_argument("--symmetric", action="store_true", help="the mean of both directions: view 2 queries view 1 too")
    return parser


class MoCo(nn.Module):
    """A query encoder, trained, a key encoder, its moving average, and a queue of past keys."""

    def __init__(self, args):
        super().__init__()
        self.m = args.moco_m
        self.encoder_q = build_encoder(args)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(args.moco_k, args.moco_dim), dim=1))  # KxC
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))  # where the oldest key is

    @torch.no_grad()
    def momentum_update_key_encoder(self):
        """k = m * k + (1 - m) * q, parameters only: BatchNorm statistics of f_k come from its own forward passes."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m)

    @torch.no_grad()
    def dequeue_and_enqueue(self, keys):
        """The global batch of keys replaces the oldest ones, round and round, whatever their numbers are. The pointer lives
        on the device, so that nothing waits to know it."""
        keys = common.concat_all_gather(keys)  # keys of all processes: NxC
        rows = self.queue_ptr + torch.arange(len(keys), device=keys.device)
        kept = slice(-len(self.queue), None)  # of a batch larger than the queue the newest keys stay
        self.queue.index_copy_(0, rows[kept] % len(self.queue), keys[kept])
        self.queue_ptr.add_(len(keys)).remainder_(len(self.queue))

    def forward(self, view1, view2, order=None):
        q = self.encoder_q(view1)  # queries: NxC
        with torch.no_grad():
            k = self.encoder_k(common.batch_shuffle(view2, order))  # in another order if BatchNorm sees the batch in parts
            k = common.batch_unshuffle(k, order)  # keys: NxC
        return q, k


class MemoryBank(nn.Module):
    """In the place of MoCo: a query encoder, and a stored key for each training image instead of a key encoder and a queue
    (MoCo, figure 2b; Wu, Xiong, Yu, Lin, arXiv 1805.01978). A key is the average of what its image's queries have been."""

    def __init__(self, args, run, num_images):
        super().__init__()
        others = num_images - args.batch_size
        if args.moco_k > others:
            raise UserError(f"--moco-k {args.moco_k}: only {others} images are not in the batch and can be negatives")
        self.m, self.num_negatives, self.run = args.moco_m, args.moco_k, run
        self.encoder_q = build_encoder(args)
        self.register_buffer("bank", F.normalize(torch.randn(num_images, args.moco_dim), dim=1))
        self.queue = None  # the negatives of a step: KxC

    @torch.compiler.disable
    @torch.no_grad()
    def look_up(self, q):
        """The stored keys of the batch, NxC. Draws the negatives, then updates the keys: k = normalize(m * k + (1 - m) * q),
        the same ones on all processes."""
        index = common.concat_all_gather(self.run.index)  # of the global batch
        chance = torch.rand(len(self.bank), device=q.device, generator=self.run.generator)
        chance.index_fill_(0, index, -1)  # no image of the batch is a negative
        self.queue = self.bank[chance.topk(self.num_negatives).indices]
        k = self.bank[self.run.index]
        updated = F.normalize(torch.lerp(q, k, self.m), dim=1)
        self.bank.index_copy_(0, index, common.concat_all_gather(updated))
        return k

    def forward(self, view1, view2, order=None):
        q = self.encoder_q(view1)  # queries: NxC
        return q, self.look_up(q)

    def momentum_update_key_encoder(self):
        """Nothing: there is no key encoder."""

    def dequeue_and_enqueue(self, keys):
        """Nothing: `look_up` has updated the bank."""


def main():
    args = arguments().parse_args()
    device = common.init_distributed(args)
    run = Run(args, device)
    if run.finished:
        return
    data = common.load_data(args, device)

    torch.manual_seed(args.seed)
    model = MemoryBank(args, run, len(data.train_images)) if args.memory_bank else MoCo(args)
    model.to(device, memory_format=torch.channels_last)
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
            loss = contrastive_loss(q, k, args, run.generator, model.queue)
            if args.symmetric:
                with autocast(args):
                    q2, k1 = parallel_model(view2, view1, run.order)
                loss = 0.5 * (loss + contrastive_loss(q2, k1, args, run.generator, model.queue))

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.record(loss, q, k, model.queue)
            model.momentum_update_key_encoder()
            model.dequeue_and_enqueue(k)
            if args.symmetric:
                model.dequeue_and_enqueue(k1)

        run.end_epoch(epoch)


if __name__ == "__main__":
    common.launch(main)
