"""For whoever has a GPU: does it compute what the CPU computes, and how fast?

    python tests/gpu_check.py --methods simco simmoco moco_v2

1. Steps of a small network in fp32, eager and as usual. Each begins with the CPU's weights, because
   training amplifies rounding. Its loss and all that it changes may be eight times as far from the
   CPU's as those move when what each layer returns is rounded as a long sum may be.
2. simco.py as it runs without flags, and eager: how fast, and do the losses at the end agree? This
   should take a minute, most of it to compile.
"""
import argparse
import contextlib
import importlib
import io
import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import prepare  # noqa: E402

import common  # noqa: E402

STEPS, SHOWN = 6, (0, 1, 3, 5)  # a CUDA graph computes the last three
ROUNDING = 2**-16  # of a sum of 64 * 34 * 34 float32: 2^-24 times the root of their number
FACTOR = 8  # compiled code on one CPU thread, which sums most clumsily, needs 5
TOLERANCE = 0.05  # in part 2: narrow networks ended within 3 %, in fp32 and bf16, on a CPU


def steps_of(method, where, begin_with=None, noise=None):
    """The first steps of a script: all that they change, before each and after each, and then with
    its loss: two lists of {name: Tensor}. where: flags. begin_with: the states to begin with.
    noise: a generator, to round what the layers return."""
    befores, afters, real_batches = [], [], common.batches
    *tensors, classes = prepare.draw_shapes(64 * STEPS, 64).values()
    images = common.Dataset(*map(torch.from_numpy, tensors), classes.tolist())

    def noisy(layer, inputs, output):
        if torch.is_tensor(output):  # not of an encoder or a model, whose layers are noisy already
            return output * (1 + ROUNDING * torch.randn(output.shape, generator=noise))

    @torch.no_grad()
    def state():  # there are no momenta before the first step
        _, model, probe, optimizer = resume.call_args.args
        state = model.state_dict() | {f"probe {x}": y for x, y in probe.state_dict().items()}
        momenta = optimizer.state_dict()["state"].items()
        return state | {f"momentum {i}": values["momentum_buffer"] for i, values in momenta}

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
    flags += " --moco-k 256" if method == "moco_v2" else ""  # so few that the queue wraps
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("sys.argv", [method, *flags.split(), "--out", f"{folder}/run"]),
        mock.patch.multiple(common, batches=batches, load_data=lambda *_, **__: images),
        mock.patch("common.evaluate", lambda *_: {}),
        mock.patch("common.resume", wraps=common.resume) as resume,
        mock.patch.object(common.Log, "add", autospec=True, side_effect=common.Log.add) as add,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        importlib.import_module(method).main()
    assert "so slower" not in printed.getvalue(), "there was no CUDA graph"
    return befores, afters


def largest(tensors):  # of their norms; infinite, if there is a nan
    return torch.stack([x.double().norm() for x in tensors]).nan_to_num(torch.inf).max().item()


def errors(steps, others):
    """{name: how far it is from the others' after a step, at most}."""
    return {x: largest(a[x] - b[x] for a, b in zip(steps, others)) for x in steps[0]}


def compare_steps(method, places):
    """Lines that compare the steps of `places`, {name: flags}, with the CPU's, and a verdict."""
    where = "--device cpu --compile off"
    befores, cpu = steps_of(method, where)
    _, noisy = steps_of(method, where, befores, common.seeded_generator("cpu", 0))
    allowed = errors(noisy, cpu)
    for name in allowed:  # and how its own sum is rounded, and what that is added to
        changes = [y[name] - x.get(name, y[name]) for x, y in zip(befores, cpu)]
        allowed[name] += ROUNDING * largest(changes) + 2**-24 * largest([cpu[-1][name]])
    numbers = "".join(f"{f'step {i + 1}':>10}" for i in SHOWN)
    lines, verdict = [f"{method:16}{numbers}   largest error / allowed"], True
    for name, flags in {"CPU": where, **places}.items():
        _, steps = steps_of(method, flags, befores)
        ratios = {x: error / allowed[x] / FACTOR for x, error in errors(steps, cpu).items()}
        worst = max(ratios, key=ratios.get)
        verdict &= ratios[worst] <= 1
        numbers = "".join(f"{steps[i]['the loss'].item():10.6f}" for i in SHOWN)
        words = f"({worst})" if ratios[worst] <= 1 else f"({worst}) DIFFERS"
        lines.append(f"{name:16}{numbers}   {ratios[worst]:.2f} {words}")
    return lines, verdict


def train(data, flags):
    """Run simco.py as a user does, and print how fast it is. Returns the loss at the end."""
    out = tempfile.mkdtemp(dir=data)
    flags += f" --dataset shapes --data {data} --epochs 6 --knn-every 6 --out {out}"
    command = [sys.executable, ROOT / "simco.py", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "so slower" not in done.stdout, done.stdout + done.stderr
    log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    speed, loss = np.median([x["images_per_second"] for x in log[3:]]), log[-1]["loss"]
    print(f"{done.stdout.splitlines()[0]}\n  {speed:.0f} images/s, loss at the end {loss:.4f}")
    return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["simco", "simmoco", "moco_v2"])
    parts, right = [*parser.parse_args().methods, "speed"], True
    common.require(torch.cuda.is_available(), "this PyTorch sees no CUDA GPU")
    eager, usual = "--device cuda --compile off --cuda-graph off", "--device cuda"
    for part in parts:
        try:
            if part == "speed":
                with tempfile.TemporaryDirectory() as data:
                    np.savez(f"{data}/shapes.npz", **prepare.draw_shapes(12_800, 256))
                    losses = train(data, eager), train(data, usual)
                same = abs(losses[0] - losses[1]) <= TOLERANCE * losses[0]
            else:
                lines, same = compare_steps(part, {"GPU, eager": eager, "GPU, as usual": usual})
                print(*lines, "", sep="\n", flush=True)
        except (Exception, SystemExit):  # the latter is by common.require
            traceback.print_exc()
            same = False
        right &= same
    print("The GPU computes what the CPU computes." if right else "SOMETHING IS WRONG.")
    sys.exit(not right)


if __name__ == "__main__":
    main()
