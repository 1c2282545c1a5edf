"""For test_runs.py: this process's share of two batches of each method. As a script, in one of
several processes, it saves the results in the directory that its argument names."""
import sys

import torch
from conftest import METHODS, TINY

import common

MODELS = {"moco_v2": "MoCo", "simmoco": "SimMoCo", "simco": "SimCo"}
FLAGS = [*TINY, "--batch-size", "16", "--width", "4"]


def compute(method):
    flags = [*FLAGS, "--moco-k", "24"] if method == "moco_v2" else FLAGS
    args = METHODS[method].arguments().parse_args(flags)
    data = common.load_data(args, torch.device("cpu"))
    torch.manual_seed(0)
    model = getattr(METHODS[method], MODELS[method])(args)
    for encoder in model.children():
        encoder.double()  # so that only the losses have the rounding of float32
    backbone = model.encoder.backbone if method == "simco" else model.encoder_q.backbone
    probe = common.Probe(args, backbone, 10, torch.device("cpu"))
    torch.manual_seed(common.rank())  # from here on, nothing may depend on the global generator
    # Eval mode: the BatchNorm statistics of a batch depend on how it is split.
    parallel_model = common.parallelize(model, args).eval()
    batches = common.batches(data, 0, args)
    for batch in (next(batches), next(batches)):  # two, so that the queue wraps round
        model.zero_grad()
        views = batch.view1.double(), batch.view2.double()
        shuffle = [] if method == "simco" else [batch.permutation]
        q, k = parallel_model(*views, *shuffle)
        queue = getattr(model, "queue", None)
        loss = common.contrastive_loss(q, k, args, batch.generator, queue)
        if method == "simco":
            loss = 0.5 * (loss + common.contrastive_loss(k, q, args, batch.generator))
        loss.backward()
        probe.features = [backbone(views[0]).detach()]  # in eval mode, it keeps none itself
        probe.step(batch)
        if method == "moco_v2":
            model.dequeue_and_enqueue(k)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    results = dict(gradients=gradients, queue=queue, probe=probe.classifier.weight.detach())
    return dict(views=torch.stack(views), loss=loss.detach(), **results)


def compute_all():
    return {method: compute(method) for method in METHODS}


if __name__ == "__main__":
    common.init_distributed(METHODS["simco"].arguments().parse_args(FLAGS))
    torch.save(compute_all(), f"{sys.argv[1]}/{common.rank()}")
    torch.distributed.destroy_process_group()
