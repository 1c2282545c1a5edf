"""How fast this machine augments and trains, beside the conventional way: torchvision's PIL
transforms in DataLoader workers, float32, not compiled, the loss read at every step.

    python tests/benchmark.py
    python tests/benchmark.py --only training --methods simco --batch-sizes 64 256 --compile off
    python tests/benchmark.py --profile simco --batch-sizes 256     # the ten costliest operations

"training" runs the scripts themselves, on random images of CIFAR's size. Columns:
    images/s       median over the epochs but the first; an image with its two views counts once
    ratio          to the conventional way, in the same run: same method, same batch size
    share of peak  convolutions and matrix products per second, over what one large matrix product
                   of the same precision reaches here
    start up s     what the first epoch took longer than the others
    memory GB      peak: of PyTorch's allocator on a GPU, else resident
"""
import argparse
import contextlib
import importlib
import io
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
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MODELS = dict(simco="SimCo", simmoco="SimMoCo", moco_v2="MoCo")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, sizes = parser.add_argument, [64, 128, 256, 512, 1024] if CUDA else [64, 256]
    add("--only", nargs="+", default=["augmentation", "training"])
    add("--methods", nargs="+", default=list(MODELS), choices=MODELS)
    add("--batch-sizes", nargs="+", type=int, default=sizes)
    add("--images", type=int, default=50_000 if CUDA else 512, help="in an epoch")
    add("--epochs", type=int, default=11 if CUDA else 3, help="of each training")
    add("--width", type=int, default=64, help="of ResNet-18's first stage")
    add("--compile", nargs="+", default=["off", "on"], choices=("off", "on"))
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    add("--profile", choices=MODELS, help="only this, at the first batch size and --compile")
    return parser


def in_fresh_process(function, *arguments):
    """So that a measurement's peak memory, and what it compiled, is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def seconds_per_call(function):
    """Median over three or more calls, and two or more seconds, after a first one."""
    function()
    times = []
    while sum(times) < 2 or len(times) < 3:
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def memory_gb():
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def random_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


class TwoViews(torch.utils.data.Dataset):
    """The conventional way: PIL augments an image twice, in a worker process."""

    def __init__(self, count):
        self.images = random_images(count)
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(32, scale=(0.08, 1.0), interpolation=bicubic),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(common.MEAN, common.STD),
        ])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return self.transform(image), self.transform(image)


def pil_views_per_second(workers, count):
    batches = iter(DataLoader(TwoViews(count), 64, num_workers=workers))
    next(batches)  # the workers have started
    started = time.perf_counter()
    views = sum(len(view1) + len(view2) for view1, view2 in batches)
    return views / (time.perf_counter() - started)


def views_per_second(batch_size, compiled):
    generator = common.seeded_generator(DEVICE, 0)
    choices = common.draw_choices(batch_size, 32, generator)
    images = torch.from_numpy(random_images(batch_size)).to(DEVICE)
    augment = torch.compile(common.augment) if compiled == "on" else common.augment
    return batch_size / seconds_per_call(lambda: augment(images, choices))


def conventional_training(method, batch_size, width, steps):
    """Returns images per second and memory."""
    script = importlib.import_module(method)
    args = script.arguments().parse_args(["--width", str(width)])
    model = getattr(script, MODELS[method])(args).to(DEVICE)
    queue = getattr(model, "queue", None)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    dataset = TwoViews((steps + 1) * batch_size)
    loader = DataLoader(dataset, batch_size, True, num_workers=os.cpu_count(), pin_memory=CUDA)
    for step, (view1, view2) in enumerate(loader):
        q, k = model(view1.to(DEVICE), view2.to(DEVICE))
        loss = common.contrastive_loss(q, k, args, None, queue)
        if method == "simco":
            loss = 0.5 * (loss + common.contrastive_loss(k, q, args, None))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if method != "simco":
            model.momentum_update_key_encoder()
        if queue is not None:
            model.dequeue_and_enqueue(k)
        loss.item()
        if step == 0:
            started = time.perf_counter()
    return steps * batch_size / (time.perf_counter() - started), memory_gb()


def training(method, flags):
    """Run a method's script in this process: images per second, start-up seconds, memory."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        sys.argv = [method, *flags, "--out", f"{directory}/run"]
        importlib.import_module(method).main()
        lines = Path(directory, "run", "log.jsonl").read_text().splitlines()
    seconds = [1 / json.loads(line)["images_per_second"] for line in lines[1:]]  # of an image
    usual, images = statistics.median(seconds[1:]), int(flags[flags.index("--subset") + 1])
    return 1 / usual, max(0.0, images * (seconds[0] - usual)), memory_gb()


def flop_per_image(method, width):
    """What an image costs in training, by PyTorch's count of convolutions and matrix products."""
    encoder, views = common.Encoder(width), torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        encoder(views)
    with FlopCounterMode(display=False) as both:
        encoder(views).sum().backward()
    forward, both = forward.get_total_flops() / 2, both.get_total_flops() / 2
    return 2 * both if method == "simco" else both + forward  # a key encoder has no backward pass


def matrix_product_flops(precision):
    size, dtype = 8192 if CUDA else 2048, torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.randn(size, size, device=DEVICE, dtype=dtype)
    return 2 * size**3 / seconds_per_call(lambda: matrix @ matrix)


def print_row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def augmentation_table(args):
    print_row("augmentation", "batch size", "views/s", "ratio")
    print_row(*["---"] * 4)
    workers = os.cpu_count()
    base = in_fresh_process(pil_views_per_second, workers, 8192 if CUDA else 2048)
    print_row(f"PIL, {workers} DataLoader workers", "–", f"{base:.0f}", "1.0")
    for compiled in args.compile:
        for size in args.batch_sizes:
            speed = in_fresh_process(views_per_second, size, compiled)
            name = "compiled" if compiled == "on" else "eager"
            print_row(name, size, f"{speed:.0f}", f"{speed / base:.1f}")


def training_table(args):
    columns = ("images/s", "ratio", "share of peak", "start up s", "memory GB")
    print_row("training", "batch size", *columns)
    print_row(*["---"] * 7)
    peak = in_fresh_process(matrix_product_flops, args.precision)
    for method in args.methods:
        for size in args.batch_sizes:
            steps = 40 if CUDA else max(2, args.images // size)
            base, memory = in_fresh_process(conventional_training, method, size, args.width, steps)
            name = f"{method}, conventional"
            print_row(name, size, f"{base:.1f}", "1.0", "–", "–", f"{memory:.1f}")
            for compiled in args.compile:
                flags = script_flags(args, size, compiled)
                speed, start_up, memory = in_fresh_process(training, method, flags)
                share = speed * flop_per_image(method, args.width) / peak
                name = f"{method}, {args.precision}, {'compiled' if compiled == 'on' else 'eager'}"
                figures = f"{share:.0%}", f"{start_up:.0f}", f"{memory:.1f}"
                print_row(name, size, f"{speed:.1f}", f"{speed / base:.1f}", *figures)
    print(f"\nOne large matrix product in {args.precision}: {peak / 1e12:.2f} TFLOP/s.")


def script_flags(args, batch_size, compiled):
    flags = dict(data=args.data, subset=args.images, width=args.width, batch_size=batch_size)
    flags.update(precision=args.precision, compile=compiled, epochs=args.epochs, knn_every=5)
    words = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def profile(args):
    """Print the ten costliest operations of the second epoch's steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if CUDA:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler, batches = torch.profiler.profile(activities=activities), common.batches

    def profiled_batches(data, epoch, run_args):
        with profiler if epoch == 1 else contextlib.nullcontext():
            yield from batches(data, epoch, run_args)
            synchronize()

    common.batches, args.epochs = profiled_batches, 2
    training(args.profile, script_flags(args, args.batch_sizes[0], args.compile[0]))
    sort_by = f"self_{DEVICE.type}_time_total"
    print(profiler.key_averages().table(sort_by, row_limit=10, max_name_column_width=60))


def main():
    args = arguments().parse_args()
    args.device = "auto"
    common.choose_hardware(args)  # settles --precision
    device = torch.cuda.get_device_name() if CUDA else torch.backends.cpu.get_cpu_capability()
    print(f"{device}, {os.cpu_count()} CPUs, PyTorch {torch.__version__}, width {args.width}\n")
    with tempfile.TemporaryDirectory() as args.data:
        arrays = dict(classes=np.array([f"class {i}" for i in range(100)]))
        for split, count in (("train", args.images), ("test", args.images // 5)):
            arrays[f"{split}_images"] = random_images(count)
            arrays[f"{split}_labels"] = np.arange(count) % 100
        np.savez(Path(args.data, "cifar100.npz"), **arrays)
        if args.profile:
            profile(args)
            return
        if "augmentation" in args.only:
            augmentation_table(args)
            print()
        if "training" in args.only:
            training_table(args)


if __name__ == "__main__":
    main()
