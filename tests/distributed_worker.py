"""Part of test_runs.py: this process's share of two batches of each method. As a script, on one of several processes, it
saves what it has computed in a directory."""
import sys

import torch
from conftest import METHODS

import common

FLAGS = "--dataset shapes --batch-size 16 --width 4 --device cpu --precision fp32 --compile off".split()


def compute(method, args, device):
    data = common.load_data(args, device)
    torch.manual_seed(0)
    model = {"moco_v2": "MoCo", "simmoco": "SimMoCo", "simco": "SimCo"}[method]
    model = getattr(METHODS[method], model)(args).to(memory_format=torch.channels_last)
    for encoder in model.children():
        encoder.double()
    for module in model.modules():  # running statistics that are not 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    torch.manual_seed(common.rank())  # from here on, nothing may depend on the global generator
    parallel_model = common.parallelize(model, args).eval()
    run = common.Run(args, device)
    run.augment, run.optimizer = common.augment, torch.optim.SGD(model.parameters(), 0.1)
    views = run.views(data, 0)
    for _ in range(2):  # two batches, so that the queue wraps round
        view1, view2 = (view.double() for view in next(views))  # so that only the loss has float32's rounding in it
        model.zero_grad()
        q, k = parallel_model(view1, view2, *([run.order] if method != "simco" else []))
        loss = common.contrastive_loss(q, k, args, run.generator, getattr(model, "queue", None))
        if method == "simco":
            loss = 0.5 * (loss + common.contrastive_loss(k, q, args, run.generator))
        loss.backward()
        if method == "moco_v2":
            model.dequeue_and_enqueue(k)
    views.close()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    queue = getattr(model, "queue", None)
    return dict(views=torch.stack([view1, view2]), loss=loss.detach(), gradients=gradients, queue=queue)


def compute_all():
    results = {}
    for method in METHODS:
        args = METHODS[method].arguments().parse_args(FLAGS + ["--moco-k", "24"] * (method == "moco_v2"))
        results[method] = compute(method, args, common.resolve(args))
    return results


def main():
    common.join_processes(METHODS["simco"].arguments().parse_args(FLAGS))
    torch.save(compute_all(), f"{sys.argv[1]}/{common.rank()}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
