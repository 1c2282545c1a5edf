"""How fast this machine augments and trains, beside the conventional way: torchvision's PIL
transforms in DataLoader workers, float32, not compiled, the loss read at every step.

    python tests/benchmark.py --only training --methods simco --batch-sizes 64 256 --compile off
    python tests/benchmark.py --profile simco --batch-sizes 256     # the ten costliest operations

"training" runs the scripts themselves, on random images. Columns: images/s, the median over the
epochs but the first, where an image counts once, not twice; ratio, to the conventional way with the
same method and batch size; share of peak, convolutions and matrix products per second over what one
large matrix product of the same precision reaches here; start up s, what the first epoch took
longer than the others; memory GB, the peak, of PyTorch's allocator on a GPU, else resident.
"""
import argparse
import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as transforms
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPOCHS, IMAGES, SIZES = (11, 50_000, [64, 128, 256, 512, 1024]) if CUDA else (3, 512, [64, 256])
GFLOP = dict(simco=8.436, simmoco=5.625, moco_v2=5.625)  # of an image, as FlopCounterMode counts
NAMES = dict(on="compiled", off="eager")
CONVENTIONAL = transforms.Compose([
    transforms.RandomResizedCrop(32, interpolation=transforms.InterpolationMode.BICUBIC),
    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
    transforms.RandomGrayscale(p=0.2),
    transforms.RandomHorizontalFlip(),
    transforms.ToTensor(),
    transforms.Normalize(common.MEAN, common.STD),
])


def in_fresh_process(function, *arguments):
    """So that a measurement's peak memory, and what it compiled, is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def seconds_per_call(function):
    """Median over two seconds, after a first call."""
    function()
    timer = Timer("f()", globals=dict(f=function), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=2).median


def random_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def two_views(images):
    images = [Image.fromarray(image) for image in images]
    return [torch.stack([*map(CONVENTIONAL, images)]) for _ in range(2)]


def conventional_loader(images, batch_size):
    flags = dict(num_workers=os.cpu_count(), pin_memory=CUDA, drop_last=True)
    return DataLoader(images, batch_size, collate_fn=two_views, **flags)


def conventional_batches(data, epoch, args):
    """In place of common.batches."""
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    images = data.train_images.numpy(force=True)
    for i, views in enumerate(conventional_loader(images, args.batch_size)):
        index = torch.arange(args.batch_size, device=DEVICE) + i * args.batch_size
        views = [view.to(DEVICE) for view in views]
        yield common.Batch(*views, index, data.train_labels[index], None, None)


def not_channels_last(model, args):
    """In place of common.parallelize. (With .to(), 1x1 convolutions would stay channels_last.)"""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def conventional_views_per_second(count):
    batches = iter(conventional_loader(random_images(count), 64))
    next(batches)  # the workers have started
    started = time.perf_counter()
    views = sum(len(view1) + len(view2) for view1, view2 in batches)
    return views / (time.perf_counter() - started)


def views_per_second(batch_size, compiled):
    params = common.draw_params(batch_size, 32, torch.Generator(DEVICE))
    images = torch.from_numpy(random_images(batch_size)).to(DEVICE)
    augment = torch.compile(common.augment) if compiled == "on" else common.augment
    return batch_size / seconds_per_call(lambda: augment(images, params))


def training(method, batch_size, how, data, epochs=EPOCHS):
    """Run a method's script in this process: images per second, start-up seconds, memory."""
    out, add = tempfile.mkdtemp(dir=data), common.Log.add
    flags = f"--data {data} --out {out} --batch-size {batch_size} --epochs {epochs}"
    if how == "conventional":
        flags += " --epochs 2 --precision fp32 --compile off --cuda-graph off"
        common.batches = conventional_batches
        common.parallelize = not_channels_last
        common.Log.add = lambda log, loss: add(log, torch.tensor(loss.item()))  # waits
    else:
        flags += f" --compile {how}"
    with contextlib.redirect_stdout(io.StringIO()):
        sys.argv = [method, *flags.split()]
        importlib.import_module(method).main()
    log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()[1:]]
    first, *others = [1 / entry["images_per_second"] for entry in log]
    usual = statistics.median(others)  # seconds of an image
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # on Linux
    memory = torch.cuda.max_memory_allocated() if CUDA else resident
    return 1 / usual, max(0.0, IMAGES * (first - usual)), memory / 1e9


def profile(*cell):
    """Print the ten costliest operations of the second of two epochs."""
    profiler, batches = torch.profiler.profile(), common.batches

    def profiled_batches(data, epoch, args):
        with profiler if epoch == 1 else contextlib.nullcontext():
            yield from batches(data, epoch, args)

    common.batches = profiled_batches
    training(*cell, epochs=2)
    order = dict(sort_by=f"self_{DEVICE}_time_total", row_limit=10, max_name_column_width=60)
    print(profiler.key_averages().table(**order))


def print_row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def augmentation_table(args):
    print("| augmentation | batch size | views/s | ratio |\n" + "|---" * 4 + "|")
    base = conventional_views_per_second(8192 if CUDA else 2048)
    print_row(f"PIL, {os.cpu_count()} DataLoader workers", "–", f"{base:.0f}", "1.0")
    for compiled, size in itertools.product(args.compile, args.batch_sizes):
        speed = in_fresh_process(views_per_second, size, compiled)
        print_row(NAMES[compiled], size, f"{speed:.0f}", f"{speed / base:.1f}")
    print()


def training_table(args):
    columns = "images/s | ratio | share of peak | start up s | memory GB"
    print(f"| training | batch size | {columns} |\n" + "|---" * 7 + "|")
    size, kind = 8192 if CUDA else 2048, dict(bf16=torch.bfloat16, fp32=torch.float32)
    matrix = torch.randn(size, size, device=DEVICE, dtype=kind[args.precision])
    peak = 2e-9 * size**3 / seconds_per_call(lambda: matrix @ matrix)  # GFLOP/s
    for method, size in itertools.product(args.methods, args.batch_sizes):
        for how in ("conventional", *args.compile):
            result = in_fresh_process(training, method, size, how, args.data)
            speed, start_up, memory = result
            name, cells = f"{method}, {how}", ("1.0", "–", "–")
            if how == "conventional":
                base = speed
            else:
                name = f"{method}, {args.precision}, {NAMES[how]}"
                share = f"{speed * GFLOP[method] / peak:.0%}"
                cells = (f"{speed / base:.1f}", share, f"{start_up:.0f}")
            print_row(name, size, f"{speed:.1f}", *cells, f"{memory:.1f}")
    print(f"\nOne large matrix product in {args.precision}: {peak / 1e3:.2f} TFLOP/s.")


def main():
    style = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**style)
    tables = dict(augmentation=augmentation_table, training=training_table)
    add = parser.add_argument
    add("--only", nargs="+", default=[*tables], choices=tables)
    add("--methods", nargs="+", default=[*GFLOP], choices=GFLOP)
    add("--batch-sizes", nargs="+", type=int, default=SIZES)
    add("--compile", nargs="+", default=["off", "on"], choices=("off", "on"))
    add("--profile", choices=GFLOP, help="at the first of --batch-sizes and of --compile")
    args = parser.parse_args()
    args.device = args.precision = "auto"
    common.init_device(args)
    device = torch.cuda.get_device_name() if CUDA else torch.backends.cpu.get_cpu_capability()
    print(f"{device}, {os.cpu_count()} CPUs, PyTorch {torch.__version__}\n")
    images, labels = random_images(IMAGES), np.arange(IMAGES) % 100
    arrays = dict(train_images=images, train_labels=labels, classes=np.arange(100).astype(str))
    arrays |= dict(test_images=images[::5], test_labels=labels[::5])
    with tempfile.TemporaryDirectory() as args.data:
        np.savez(Path(args.data, "cifar100.npz"), **arrays)
        if args.profile:
            profile(args.profile, args.batch_sizes[0], args.compile[0], args.data)
        for name in args.only if args.profile is None else []:
            tables[name](args)


if __name__ == "__main__":
    main()
