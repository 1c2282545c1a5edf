"""For whoever has a GPU: does it compute what the CPU computes, how fast is it, and how long would
the results table take? It should take three minutes with 16 CPU cores, but has not been tried yet.

    python tests/gpu_check.py
    python tests/gpu_check.py --methods simco --batch-sizes 256
    python tests/gpu_check.py --compile off           # where there is no C compiler

1. Twenty steps of a small network in fp32, eager, compiled, and as a CUDA graph. Each begins with
   the CPU's weights, as training amplifies rounding: within twenty steps, to a tenth in the loss.
   Compared are the loss and the change of each tensor: weights, BatchNorm's statistics, momenta,
   key encoder, queue, probe. How far they may be from the CPU's is taken from the CPU itself: eight
   times as far as they move when what each layer returns, and its gradient, is rounded as the sum
   of 74 000 numbers may be, and as they round themselves.
2. Speed of the scripts as they run without flags. All cells compile at the same time; then each
   trains alone on the GPU.
"""
import argparse
import contextlib
import importlib
import io
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import benchmark
import torch
import torchvision

import common
import linear_eval

NO_MONITOR = dict(monitor=lambda *_: dict(knn_top1=None, probe_top1=None))


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=list(benchmark.MODELS), choices=benchmark.MODELS)
    add("--batch-sizes", nargs="+", type=int, default=[64, 256, 1024])
    add("--compile", default="auto", choices=("auto", "on", "off"))
    return parser


def run_script(method, flags):
    """`python method.py flags`, in this process and without its output."""
    output = io.StringIO()
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(output):
        sys.argv = [method, *flags.split(), "--out", f"{directory}/run"]
        importlib.import_module(method).main()
    common.require("so slower" not in output.getvalue(), output.getvalue())  # there was no graph


# --------------------------------------------------------------------------------------------------
# 1. The same steps?

STEPS = 20
ROUNDING = 2**-16  # of a sum of 64 * 34 * 34 float32: 2^-24 times the root of their number
FACTOR = 8  # compiled code on one CPU thread, which sums most clumsily, needs 5
SHOWN = (0, 1, 4, 9, 19)


class Steps:
    """Twenty steps of a script: the state before each, its loss, and what it changes in the state.

    where: flags that say where to compute. begin_with: other Steps, with whose states all steps
    begin; otherwise with what the last one left. noise_seed: of a relative change of all that the
    layers return, and of its gradient."""

    def __init__(self, method, where, begin_with=None, noise_seed=None):
        self.begin_with, self.losses, self.states, self.changes = begin_with, [], [], []
        self.generator = None if noise_seed is None else common.seeded_generator("cpu", noise_seed)
        self.batches, self.record = common.batches, common.Run.record
        self.parallelize, self.build_optimizer = common.parallelize, common.build_optimizer
        self.optimizers = []
        flags = f"--dataset shapes --subset {64 * STEPS} --batch-size 64 --epochs 1 --width 16"
        flags += " --precision fp32 --moco-k 4096" if method == "moco_v2" else " --precision fp32"
        watched = dict(batches=self.watch_batches, parallelize=self.watch_parallelize)
        watched.update(build_optimizer=self.watch_optimizer, **NO_MONITOR)
        keep_loss = mock.patch.object(common.Run, "record", lambda *what: self.watch_record(*what))
        with mock.patch.multiple(common, **watched), keep_loss:
            run_script(method, f"{flags} {where}")

    def watch_batches(self, data, epoch, args):
        eager = argparse.Namespace(**{**vars(args), "compile": "off"})
        for i, batch in enumerate(self.batches(data.to("cpu"), epoch, eager)):
            if self.begin_with is not None:
                for name, tensor in self.state().items():
                    tensor.copy_(self.begin_with.states[i][name])
            before = {name: tensor.cpu().clone() for name, tensor in self.state().items()}
            self.states.append(before)
            yield common.Batch(*(x.to(args.device) if torch.is_tensor(x) else x for x in batch))
            after = {name: tensor.cpu() for name, tensor in self.state().items()}
            self.changes.append({name: after[name] - before.get(name, 0) for name in after})

    def noisy(self, *what):
        """A hook on a module, or on the gradient of what it returns."""
        tensor = what[-1]
        noisy = tensor * (1 + ROUNDING * torch.randn(tensor.shape, generator=self.generator))
        if noisy.requires_grad:
            noisy.register_hook(self.noisy)
        return noisy

    @torch.no_grad()
    def state(self):
        """All that a step changes, by name. There are no momenta before the first."""
        state = dict(self.model.state_dict())
        for owner, optimizer in zip(("network", "probe"), self.optimizers):
            for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
                if owner == "probe":
                    state[f"probe {i}"] = parameter.data
                for momentum in optimizer.state.get(parameter, {}).values():
                    state[f"momentum {i} of the {owner}"] = momentum
        return state

    def watch_parallelize(self, model, args):
        self.model = model
        for module in model.modules() if self.generator is not None else []:
            if module is not model:
                module.register_forward_hook(self.noisy)
        return self.parallelize(model, args)

    def watch_optimizer(self, *what, **flags):
        self.optimizers.append(self.build_optimizer(*what, **flags))  # the first is the network's
        return self.optimizers[-1]

    def watch_record(self, run, batch, loss, *others):
        self.losses.append(loss.item())
        self.record(run, batch, loss, *others)

    def roundings(self):
        """Of sums, and of the numbers that they are added to: {name: float}, as in errors()."""
        roundings = {"the loss": 2**-24 * max(self.losses)}
        for name, tensor in self.states[-1].items():
            change = max(changes[name].double().norm() for changes in self.changes)
            roundings[name] = (ROUNDING * change + 2**-24 * tensor.double().norm()).item()
        return roundings

    def errors(self):
        """How far loss and changes are from those of the steps it began with: {name: float}, the
        largest of all steps."""
        errors = {"the loss": max(abs(a - b) for a, b in zip(self.losses, self.begin_with.losses))}
        for name in self.changes[0]:
            pairs = zip(self.changes, self.begin_with.changes)
            distances = [(a[name].double() - b[name].double()).norm() for a, b in pairs]
            errors[name] = torch.stack(distances).max().item()  # nan, if one of them is
        return errors


def compare_steps(method, places):
    """Lines that compare the steps of `places`, {name: flags}, with the CPU's, and a verdict."""
    cpu = Steps(method, "--device cpu --compile off")
    noisy = [Steps(method, "--device cpu --compile off", cpu, seed).errors() for seed in (0, 1)]
    allowed = {}
    for name, rounding in cpu.roundings().items():
        allowed[name] = FACTOR * (max(errors[name] for errors in noisy) + rounding)
    lines = [row(method, *(f"step {i + 1}" for i in SHOWN), "largest error / allowed")]
    lines.append(row("CPU", *(f"{cpu.losses[i]:.6f}" for i in SHOWN), ""))
    verdict = True
    for name, flags in places.items():
        try:
            steps = Steps(method, flags, cpu)
        except Exception:
            lines.append(f"{name}: FAILED\n{traceback.format_exc()}")
            verdict = False
            continue
        ratios = {key: error / allowed[key] for key, error in steps.errors().items()}
        worst = max(ratios, key=lambda key: math.inf if math.isnan(ratios[key]) else ratios[key])
        fits = ratios[worst] <= 1
        verdict &= fits
        words = f"{ratios[worst]:.2f} ({worst}){'' if fits else ' DIFFERS'}"
        lines.append(row(name, *(f"{steps.losses[i]:.6f}" for i in SHOWN), words))
    return lines, verdict


def row(*cells):
    return f"{cells[0]:<18}" + "".join(f"{cell:>10}" for cell in cells[1:-1]) + f"   {cells[-1]}"


# --------------------------------------------------------------------------------------------------
# 2. How fast?


def random_data(count):
    """A Dataset of `count` training images and CIFAR's 10 000 test images."""
    images = torch.from_numpy(benchmark.random_images(count + 10_000))
    labels = torch.arange(count + 10_000) % 100
    parts = images[:count], labels[:count], images[count:], labels[count:]
    return common.Dataset(*parts, list(map(str, range(100))))


def speed_of(method, size, compiled, everyone_is_ready, alone):
    """Images per second and peak memory in GB of a cell, or the error as text."""
    batches, measured = common.batches, []
    steps = max(24, min(160, 25_600 // size))

    def timed_batches(data, epoch, args):
        if epoch == 0:  # compiles and records
            yield from batches(data, epoch, args)
            return
        everyone_is_ready.wait()
        with alone:
            torch.cuda.synchronize()
            started = time.perf_counter()
            yield from batches(data, epoch, args)
            torch.cuda.synchronize()
            measured.append(steps * size / (time.perf_counter() - started))

    def load_data(args, device):
        return random_data(steps * size).to(device)

    try:
        changed = dict(batches=timed_batches, load_data=load_data, **NO_MONITOR)
        with mock.patch.multiple(common, **changed):
            run_script(method, f"--batch-size {size} --epochs 2 --compile {compiled}")
        return measured[0], torch.cuda.max_memory_allocated() / 1e9
    except Exception:
        if not measured:
            everyone_is_ready.wait()  # nobody shall wait for this one
        return traceback.format_exc()


def seconds_of_evaluation():
    """Of a monitor, and of an epoch of linear_eval.py, on as many images as CIFAR has."""
    args = importlib.import_module("simco").arguments().parse_args([])
    data = random_data(50_000).to(common.setup(args))
    backbone = common.resnet18().to("cuda", memory_format=torch.channels_last)
    probe = common.Probe(args, backbone, 100, torch.device("cuda"))

    def evaluate(epochs):
        args = linear_eval.arguments().parse_args(["run", "--epochs", str(epochs)])
        common.choose_hardware(args)
        linear_eval.evaluate(backbone, data, features, args)

    def seconds(function, *arguments):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function(*arguments)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    common.monitor(backbone, probe, data, args)
    monitor = seconds(common.monitor, backbone, probe, data, args)
    features = linear_eval.extract_features(backbone, data, args)
    evaluate(1)
    return monitor, (seconds(evaluate, 3) - seconds(evaluate, 1)) / 2


def speed_table(args, pool):
    cells = [(method, size) for method in args.methods for size in args.batch_sizes]
    with multiprocessing.Manager() as manager:
        ready, alone = manager.Barrier(len(cells)), manager.Lock()
        futures = [pool.submit(speed_of, *cell, args.compile, ready, alone) for cell in cells]
        speeds = dict(zip(cells, (future.result() for future in futures)))
    args.device = args.precision = "auto"
    common.choose_hardware(args)
    peak = pool.submit(benchmark.matrix_product_flops, args.precision).result()
    monitor, linear_epoch = pool.submit(seconds_of_evaluation).result()
    print(f"A monitor takes {monitor:.1f} s, an epoch of linear_eval.py {linear_epoch:.2f} s.")
    print(f"One large matrix product in {args.precision}: {peak / 1e12:.0f} TFLOP/s.\n")
    print("| method | batch | images/s | share of peak | s an epoch | min a cell | peak GB |")
    print("|---|---|---|---|---|---|---|")
    minutes, ok = {}, True
    for (method, size), result in speeds.items():
        if isinstance(result, str):
            print(f"| {method} | {size} | FAILED | – | – | – | – |")
            print(result, file=sys.stderr)
            ok = False
            continue
        speed, memory = result
        share = speed * benchmark.flop_per_image(method, 64) / peak
        seconds = 50_000 / speed
        minutes[method, size] = (200 * seconds + 41 * monitor + 100 * linear_epoch) / 60
        print(f"| {method} | {size} | {speed:.0f} | {share:.0%} | {seconds:.2f} ", end="")
        print(f"| {minutes[method, size]:.1f} | {memory:.1f} |")
    print("\nA cell: 200 epochs, 41 monitors, 100 epochs of linear_eval.py, without start-up.")
    if len(minutes) == 9:  # of fifteen: 128 and 512 are taken to be between their neighbours
        hours = sum(minutes.values()) / 60 * 15 / 9
        print(f"The table, fifteen cells one after the other: about {hours:.1f} hours.")
    return ok


def print_versions():
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
    major, minor = torch.cuda.get_device_capability()
    commit = subprocess.run(["git", "log", "-1", "--format=%h"], capture_output=True, text=True)
    device = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    print(f"{device}, {free:.1f} of {total:.1f} GB free, {os.cpu_count()} CPU cores")
    versions = f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, "
    versions += f"torchvision {torchvision.__version__}, CUDA {torch.version.cuda}"
    print(f"{versions}, commit {commit.stdout.strip() or 'unknown'}\n", flush=True)


def main():
    args, started = arguments().parse_args(), time.perf_counter()
    if not torch.cuda.is_available():
        sys.exit("this PyTorch sees no CUDA GPU")
    num_cells = len(args.methods) * len(args.batch_sizes)
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, str(max(1, os.cpu_count() // num_cells)))
    print_versions()
    places = {"GPU, eager": "--device cuda --compile off --cuda-graph off"}
    if args.compile != "off":
        places["GPU, compiled"] = "--device cuda --compile on --cuda-graph off"
    places["GPU, CUDA graph"] = f"--device cuda --compile {args.compile} --cuda-graph on"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_cells, spawn) as pool:
        futures = [pool.submit(compare_steps, method, places) for method in args.methods]
        ok = True
        for future in futures:
            lines, verdict = future.result()
            print(*lines, "", sep="\n", flush=True)
            ok &= verdict
    with ProcessPoolExecutor(num_cells, spawn) as pool:
        ok &= speed_table(args, pool)
    print(f"\n{time.perf_counter() - started:.0f} s. ", end="")
    if ok:
        print("The GPU computes what the CPU computes.")
        return
    print("SOMETHING IS WRONG. Please report it, with all of this output and that of")
    print("    python -m torch.utils.collect_env")
    print("    python -m pytest -q tests/test_no_waiting.py tests/test_cuda_graph.py")
    sys.exit(1)


if __name__ == "__main__":
    main()
