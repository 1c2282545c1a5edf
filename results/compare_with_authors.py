"""Compare this code with that of the authors of dual temperature, number by number, in float64.

    git clone https://github.com/ChaoningZhang/Dual-temperature
    pip install --no-deps lightning-bolts                    # has their learning rate scheduler
    python results/compare_with_authors.py Dual-temperature    # three minutes on one core

Compared are the losses and their gradients, the learning rates, and eight training steps of each
method: `main()` of our script makes the views and trains, and after each of its steps the authors'
class, set up by their shell script, takes a step on the same views. In MoCo v2 and SimMoCo, their
probe learns from both views, and that updates BatchNorm's running statistics: not compared there.
Exit code 0: all that was compared agrees; 1: something differs; 2: DIR is not such a clone.
"""
import importlib.util
import io
import runpy
import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import prepare  # noqa: E402

import common  # noqa: E402
import moco_v2  # noqa: E402
import simco  # noqa: E402
import simmoco  # noqa: E402

DIM, TEMPERATURE, STEPS, BATCH, QUEUE, IMAGE_SIZE = 128, 0.1, 8, 16, 64, 16
# Tolerances. A sum of n products errs by at most n EPS times the sum of their sizes: a cosine by
# DIM EPS, a loss, a difference of functions of logits, by twice that over TEMPERATURE, a gradient
# by that over TEMPERATURE once more. In a step, the longest sums are over all pixels of a batch's
# first maps, 2 larger than its images. Errors of random sign make sqrt(n) EPS out of n EPS, which
# then has room for n such sums, one after the other; 20 layers, there and back, in 8 steps are
# 320.
EPS = torch.finfo(torch.float64).eps
LOSS, GRADIENT = 2 * DIM * EPS / TEMPERATURE, 2 * DIM * EPS / TEMPERATURE**2
WEIGHT = BATCH * (IMAGE_SIZE + 2) ** 2 * EPS
verdicts = []  # True or False for each comparison


def report(what, measured, tolerance):
    verdicts.append(measured <= tolerance)  # False for nan
    verdict = "agrees" if verdicts[-1] else "DIFFERS"
    print(f"{what:38} {measured:7.1e}, tolerance {tolerance:.1e}: {verdict}", flush=True)


def difference(a, b):
    return (a - b).detach().abs().max().item()


def import_authors(directory):
    """Let their package be imported, with a stand-in for what it imports but does not need here:
    by PyTorch Lightning, their classes only log and count steps."""
    stand_in = mock.MagicMock(LightningModule=nn.Module, Callback=object, Metric=object)
    stand_in.under_review = lambda: lambda decorated: decorated
    names = "pytorch_lightning pytorch_lightning.callbacks torchmetrics.metric "
    names += "timm.models.swin_transformer timm.models.vision_transformer "  # other networks
    names += "pl_bolts.utils.stability pl_bolts.optimizers.lr_scheduler"  # for now
    sys.modules.update(dict.fromkeys(names.split(), stand_in))
    sys.dont_write_bytecode = True  # leave the clone as it is
    sys.path.insert(0, str(directory))


def authors_method(directory, script, *flags):
    """What their main_pretrain.py trains when bash_files/`script` calls it, with more `flags`."""
    from solo.args import setup

    def add_trainer_flags(parser):  # those of Lightning 1 that the scripts use
        for flag, kind in dict(max_epochs=int, gpus=str, precision=int).items():
            parser.add_argument(f"--{flag}", type=kind)
        parser.set_defaults(accumulate_grad_batches=None)
        return parser

    setup.pl = mock.Mock(**{"Trainer.add_argparse_args": add_trainer_flags})
    command = (directory / "bash_files" / script).read_text().replace("\\\n", " ")
    words = shlex.split(command, comments=True)[1:]  # without "python3"
    with mock.patch("sys.argv", [*words, *map(str, flags), "--disable_knn_eval"]):
        args = setup.parse_args_pretrain()
    return setup.METHODS[args.method](**vars(args))


def compare_losses():
    from solo.losses import dual_temperature_loss_func, moco_loss_func

    queue = F.normalize(torch.randn(4096, DIM), dim=1)  # KxC; theirs is CxK
    infonce = partial(moco_loss_func, queue=queue.T), partial(common.info_nce_loss, queue=queue)
    dual = dual_temperature_loss_func, common.dual_temperature_loss
    for name, losses in {"dual temperature": dual, "InfoNCE": infonce}.items():
        for n in (8, 64, 256):
            q = F.normalize(torch.randn(n, DIM), dim=1).requires_grad_()
            k = F.normalize(q.detach() + 0.1 * torch.randn(n, DIM), dim=1).requires_grad_()
            values = [loss(q, k) for loss in losses]
            gradients = [torch.cat(torch.autograd.grad(value, (q, k))) for value in values]
            report(f"{name}, N = {n}: value", difference(*values), LOSS)
            report(f"{name}, N = {n}: gradients", difference(*gradients), GRADIENT)


def compare_learning_rates(directory):
    bolts = importlib.util.find_spec("pl_bolts")
    if bolts is None:
        print("learning rates: skipped, they need `pip install --no-deps lightning-bolts`")
        return
    # Only this file of it is run. The others need old versions of much else.
    file = Path(bolts.submodule_search_locations[0], "optimizers", "lr_scheduler.py")
    sys.modules["solo.methods.base"].__dict__.update(runpy.run_path(str(file)))
    for batch_size in (64, 128, 256, 512, 1024):
        theirs = authors_method(directory, "simco.sh", "--batch_size", batch_size)
        [optimizer], [scheduler] = theirs.configure_optimizers()
        args = simco.arguments().parse_args(["--batch-size", str(batch_size), "--device", "cpu"])
        (ours, _), differences = common.build_optimizer(nn.Linear(1, 1), nn.Linear(1, 1), args), []
        for epoch in range(theirs.max_epochs):
            rate = common.adjust_learning_rate(ours, epoch, args)
            for group in (0, -1):  # backbone and head
                differences.append(abs(rate - optimizer.param_groups[group]["lr"]))
            optimizer.step()
            scheduler.step()  # makes each rate from the last one, so that its errors add up
        tolerance = theirs.max_epochs * EPS * theirs.lr
        report(f"learning rates, batch {batch_size}", max(differences), tolerance)


def compare_steps(module, flags, theirs):
    """Run `module.main()`, and train `theirs`, an authors' method, alongside, on the same views."""
    theirs.classifier = nn.Linear(theirs.features_dim, 10)  # of our images, not of CIFAR-100
    optimizer, logged = theirs.configure_optimizers(), {}
    theirs.log_dict = logged.update
    theirs.log = lambda name, value, **_: logged.update({name: value})
    theirs.trainer = mock.Mock(global_step=0, accumulate_grad_batches=1, max_epochs=1)
    theirs.trainer.train_dataloader = range(STEPS)
    theirs.on_train_start()
    query = nn.ModuleDict(dict(backbone=theirs.encoder, head=theirs.projector))
    key = nn.ModuleDict(dict(backbone=theirs.momentum_encoder, head=theirs.momentum_projector))
    copies, rows = dict(encoder=query, encoder_q=query, encoder_k=key), []

    def batches(*which, our_batches=common.batches):
        _, model, probe, *_ = resume.call_args.args
        theirs.classifier.load_state_dict(probe.state_dict())
        for name, encoder in model.named_children():
            copies[name].load_state_dict(encoder.state_dict())
        if module is moco_v2:
            theirs.queue[1] = model.queue.T
        for step, batch in enumerate(our_batches(*which)):
            yield batch  # main() takes its step, and comes back for the next batch
            loss = theirs.training_step([None, [batch.view1, batch.view2], batch.labels], step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            theirs.trainer.global_step += 1
            theirs.on_train_batch_end(None, None, step, 0)  # updates the key encoder
            row = dict(losses=difference(add.call_args.args[1], logged["train_nce_loss"]))
            for name, encoder in model.named_children():
                pairs = zip(encoder.parameters(), copies[name].parameters())
                row[name] = max(difference(*pair) for pair in pairs)
            if module is simco:
                row["probe"] = difference(probe.weight, theirs.classifier.weight)
            if module is moco_v2:
                row["queue"] = difference(model.queue.T, theirs.queue[1])
            rows.append(row)

    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/shapes.npz", **prepare.draw_shapes(STEPS * BATCH, BATCH, IMAGE_SIZE))
        flags += f" --dataset shapes --data {folder} --out {folder}/run --batch-size {BATCH}"
        flags += " --epochs 1 --device cpu --precision fp32"
        with (
            mock.patch("sys.argv", [module.__name__, *flags.split()]),
            mock.patch("sys.stdout", io.StringIO()),
            mock.patch("common.batches", batches),
            mock.patch("common.resume", wraps=common.resume) as resume,
            mock.patch("common.Log.add", autospec=True, side_effect=common.Log.add) as add,
        ):
            module.main()
    assert len(rows) == STEPS
    for name in rows[0]:
        tolerance = WEIGHT / TEMPERATURE if name == "losses" else WEIGHT
        report(f"{module.__name__}, {STEPS} steps: {name}", max(r[name] for r in rows), tolerance)


def main():
    directory = Path(*sys.argv[1:]).resolve()
    is_clone = (directory / "solo/losses/dual_temperature_loss.py").exists()
    common.require(is_clone, f"'{directory}' is not a clone of ChaoningZhang/Dual-temperature")
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # which our encoders and augmentation call
    torch.manual_seed(0)
    import_authors(directory)
    compare_losses()
    compare_learning_rates(directory)
    method = partial(authors_method, directory)
    flags = ("--batch_size", BATCH, "--scheduler", "none")  # one learning rate, as in one epoch
    compare_steps(simco, "", method("simco.sh", *flags))
    compare_steps(simmoco, "", method("simmoco.sh", *flags))
    compare_steps(moco_v2, f"--moco-k {QUEUE}", method("moco.sh", *flags, "--queue_size", QUEUE))
    print(f"{sum(verdicts)} of {len(verdicts)} comparisons agree")
    sys.exit(not all(verdicts))


if __name__ == "__main__":
    common.launch(main)
