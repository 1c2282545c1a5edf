"""Part of test_runs.py: one step of a method on this process's share of a batch; saves what it computed to PATH<rank>."""
import sys

import torch
from conftest import METHODS

import common

method, path = sys.argv[1:]
flags = "--dataset shapes --batch-size 16 --width 4 --device cpu --precision fp32"
args = METHODS[method].arguments().parse_args(flags.split())
if method == "moco_v2":
    args.moco_k = 24
device = common.init_distributed(args)
data = common.load_data(args, device)
torch.manual_seed(0)
model = {"moco_v2": "MoCo", "simmoco": "SimMoCo", "simco": "SimCo"}[method]
model = getattr(METHODS[method], model)(args)
for module in model.modules():  # running statistics that are not 0 and 1
    if isinstance(module, torch.nn.BatchNorm2d):
        module.running_mean.uniform_(-0.1, 0.1)
        module.running_var.uniform_(0.5, 2.0)
torch.manual_seed(common.rank())  # from here on, nothing may depend on the global generator
parallel_model = common.parallelize(model, args).eval()
run = common.Run(args, device)
run.optimizer = torch.optim.SGD(model.parameters(), 0.1)
views = run.views(data, 0)
for _ in range(2):  # two batches, so that the queue wraps round
    view1, view2 = next(views)
    model.zero_grad()
    q, k = parallel_model(view1, view2) if method == "simco" else parallel_model(view1, view2, run.order)
    if method == "moco_v2":
        loss = common.info_nce_loss(q, k, 0.1, model.queue)
    elif method == "simmoco":
        loss = common.dual_temperature_loss(q, k)
    else:
        loss = 0.5 * (common.dual_temperature_loss(q, k) + common.dual_temperature_loss(k, q))
    loss.backward()
    if method == "moco_v2":
        model.dequeue_and_enqueue(k)
gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
views_of_last_batch, queue = torch.stack([view1, view2]), getattr(model, "queue", None)
result = dict(views=views_of_last_batch, loss=loss.detach(), gradients=gradients, queue=queue)
torch.save(result, f"{path}{common.rank()}")
views.close()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
