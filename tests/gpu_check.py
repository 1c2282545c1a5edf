"""For whoever has a GPU: does it compute what the CPU computes, and how fast? A minute or two.

    python tests/gpu_check.py

1. Steps of a small network in fp32, eager and graphed, each from the CPU's weights. Allowed is
   eight times the CPU's own error when what each layer returns is rounded as a long sum may be.
   (SiLU replaces ReLU, whose gradient is all or nothing where its input is 0 but for rounding.)
2. simco.py without flags, compiled and graphed, and eager: the same loss? Then alone: how fast?
"""
import argparse
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import prepare  # noqa: E402

import common  # noqa: E402

STEPS = 6  # a CUDA graph computes the last three
ROUNDING = 2**-16  # of a sum of 64 * 34 * 34 float32: 2^-24 times the root of their number
FACTOR = 8  # compiled code on one CPU thread, which sums most clumsily, needs 6
TOLERANCE = 0.03  # of the second epoch's loss: roundings change it by 1 %, the fourth's by 9 %
PLACES = dict(eager="--compile off --cuda-graph off", graphed="--compile off")  # of part 1


def steps_of(method, where, begin_with=None, noise=None):
    """The first steps of a script: two lists of {name: Tensor}, what they change before each, and
    after it with the loss. begin_with: the former. noise: a generator, to round layers' outputs."""
    befores, afters, real_batches = [], [], common.batches
    *tensors, classes = prepare.draw_shapes(64 * STEPS, 64).values()
    images = common.Dataset(*map(torch.from_numpy, tensors), classes.tolist())

    def noisy(layer, inputs, output):
        if torch.is_tensor(output):  # not of an encoder or a model, whose layers are noisy already
            return output * (1 + ROUNDING * torch.randn(output.shape, generator=noise))

    @torch.no_grad()
    def state():
        _, model, probe, *_ = resume.call_args.args
        return model.state_dict() | {f"probe {x}": y for x, y in probe.state_dict().items()}

    def batches(data, epoch, args):
        for layer in resume.call_args.args[1].modules() if noise is not None else []:
            layer.register_forward_hook(noisy)
        args.compile = "off"  # of the views, which are the CPU's everywhere
        for i, batch in enumerate(real_batches(data, epoch, args)):
            for name, tensor in state().items() if begin_with is not None else []:
                tensor.copy_(begin_with[i][name])
            befores.append({name: tensor.cpu().clone() for name, tensor in state().items()})
            yield common.Batch(*(x.to(args.device) if torch.is_tensor(x) else x for x in batch))
            after = state() | {"the loss": add.call_args.args[1]}
            afters.append({name: tensor.cpu().clone() for name, tensor in after.items()})

    flags = f"--batch-size 64 --epochs 1 --width 16 --precision fp32 {where}"
    flags += " --moco-k 256" * (method == "moco_v2")  # so few that the queue wraps
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("sys.argv", [method, *flags.split(), "--out", f"{folder}/run"]),
        mock.patch.multiple(common, batches=batches, load_data=lambda *_, **__: images),
        mock.patch("common.evaluate", lambda *_: {}),
        mock.patch("torch.nn.functional.relu", torch.nn.functional.silu),
        mock.patch("common.resume", wraps=common.resume) as resume,
        mock.patch.object(common.Log, "add", autospec=True, side_effect=common.Log.add) as add,
        mock.patch("sys.stdout", io.StringIO()),
    ):
        importlib.import_module(method).main()
    return befores, afters


def largest(tensors):  # of their norms; infinite, if there is a nan
    return torch.stack([x.double().norm() for x in tensors]).nan_to_num(torch.inf).max().item()


def errors(steps, others):
    """{name: how far it is from the others' after a step, at most}."""
    return {x: largest(a[x] - b[x] for a, b in zip(steps, others)) for x in steps[0]}


def compare_steps(method, places=PLACES):
    """Are the steps of `places`, {name: flags}, the CPU's? Prints how far they are from them."""
    where, right = "--device cpu --compile off", True
    befores, cpu = steps_of(method, where)
    _, noisy = steps_of(method, where, befores, common.seeded_generator("cpu", 0))
    allowed = errors(noisy, cpu)
    for name in allowed:  # and how its own sum is rounded, and what that is added to
        changes = [y[name] - x.get(name, y[name]) for x, y in zip(befores, cpu)]
        allowed[name] += ROUNDING * largest(changes) + 2**-24 * largest([cpu[-1][name]])
    for name, flags in places.items():
        found = errors(steps_of(method, flags, befores)[1], cpu)
        ratios = {x: found[x] / allowed[x] / FACTOR for x in found}
        worst = max(ratios, key=ratios.get)
        right &= ratios[worst] <= 1
        print(f"{method}, {name}: {ratios[worst]:.2f} of the error allowed ({worst})", flush=True)
    return right


def train(folder, name, flags=""):
    """Run simco.py, with what it compiles in `folder`. Returns a loss, and a line about it."""
    np.savez(f"{folder}/{name}.npz", **prepare.draw_shapes(6_400, 256))
    command = [sys.executable, ROOT / "simco.py", "--data", folder, "--out", f"{folder}/{name}"]
    command += f"--dataset {name} --epochs 4 --knn-every 4 {flags}".split()
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    log = [json.loads(x) for x in Path(folder, name, "log.jsonl").read_text().splitlines()]
    loss, speed = log[2]["loss"], np.median([x["images_per_second"] for x in log[2:]])
    return loss, f"{name}: {speed:.0f} images/s, loss {loss:.4f}; {done.stdout.split(' -> ')[0]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default="simco simmoco moco_v2".split())
    methods, right = parser.parse_args().methods, True
    common.require(torch.cuda.is_available(), "this PyTorch sees no CUDA GPU")
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as folder, ThreadPoolExecutor() as pool:
        usual = pool.submit(train, folder, "usual")
        eager = pool.submit(train, folder, "eager", PLACES["eager"])

        def same_losses_and_speed():
            (loss, line), (eager_loss, eager_line) = usual.result(), eager.result()
            for choice in Path(folder).rglob("*.best_config"):
                choice.unlink()  # it was made beside other work
            print(line, eager_line, train(folder, "alone")[1], sep="\n")
            return abs(loss / eager_loss - 1) <= TOLERANCE

        for part, *names in [*((compare_steps, x) for x in methods), (same_losses_and_speed,)]:
            try:
                right &= part(*names)
            except (Exception, SystemExit):  # the latter is by common.require
                traceback.print_exc()
                right = False
    print("The GPU computes what the CPU computes." if right else "SOMETHING IS WRONG.")
    sys.exit(not right)


if __name__ == "__main__":
    main()
