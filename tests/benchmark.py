"""How fast it is on this machine, beside the conventional way: torchvision's PIL transforms in DataLoader workers, float32,
nothing compiled, the loss read at every step.

    python tests/benchmark.py                            # everything, as Markdown tables
    python tests/benchmark.py --json speed.json          # and as a record
    python tests/benchmark.py --only training --methods simco --batch-sizes 64 256 1024
    python tests/benchmark.py --profile simco            # the ten costliest operations of its training

The training rows are the scripts themselves, run on random images of CIFAR's size; each measurement has a process of its
own, so that its peak memory is its own too. Columns:
    images/s        `images_per_second` of log.jsonl, median of all epochs but the first: with augmentation, loss, optimiser,
                    queue and logging. An image counts once, not once per view.
    ratio           to the conventional way with the same method and batch size, on the same machine, in the same run
    share of peak   operations of the convolutions and matrix products (8.5 GFLOP for an image in SimCo), per second, over
                    what one large matrix product of the same precision reaches here
    epoch s         from one epoch's end to the next one's: with the epoch's plan, the checkpoint, and kNN every fifth time
    start-up s      what the first epoch took longer than the others: compilation, mostly
    GPU GB, RAM GB  the most that was in use at a time: as PyTorch's allocator counts it, and resident
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MODELS = dict(simco="SimCo", simmoco="SimMoCo", moco_v2="MoCo")
SECTIONS = ("augmentation", "training", "knn")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=SECTIONS, choices=SECTIONS, help="which tables")
    add("--methods", nargs="+", default=list(MODELS), choices=MODELS)
    add("--batch-sizes", nargs="+", type=int, default=[64, 128, 256, 512, 1024] if CUDA else [64, 256])
    add("--images", type=int, default=50_000 if CUDA else 512, help="in an epoch (default: 50000 on a GPU, else 512)")
    add("--epochs", type=int, default=11 if CUDA else 3, help="of each training (default: 11 on a GPU, else 3)")
    add("--width", type=int, default=64, help="of ResNet-18's first stage")
    add("--compile", nargs="+", default=["off", "on"], choices=("off", "on"), help="eager, compiled, or both")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of our rows")
    add("--json", metavar="FILE", help="write all figures there as well")
    add("--profile", choices=MODELS, help="only this, at the first of --batch-sizes and of --compile")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Tools


def in_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def seconds_per_call(function, at_least=2.0):
    """Median time of a call, over three or more calls and `at_least` seconds; the first one does not count."""
    function()
    times = []
    while sum(times) < at_least or len(times) < 3:
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_memory():
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac, in KiB on Linux
    resident *= 1 if sys.platform == "darwin" else 1024
    return dict(gpu_gb=torch.cuda.max_memory_allocated() / 1e9 if CUDA else None, ram_gb=resident / 1e9)


def random_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


class Report:
    """Prints each row of a Markdown table as soon as it is known, and keeps all of them for --json."""

    FORMATS = dict(
        views_per_second="{:.0f}", images_per_second="{:.1f}", ratio="{:.1f}", share_of_peak="{:.0%}",
        epoch_seconds="{:.2f}", start_up_seconds="{:.0f}", extraction_seconds="{:.2f}", search_seconds="{:.2f}",
        gpu_gb="{:.1f}", ram_gb="{:.1f}",
    )  # fmt: skip

    def __init__(self, machine):
        self.record = dict(machine=machine, cpus=os.cpu_count(), rows=[])
        print(machine, flush=True)

    def table(self, title, *columns):
        self.title, self.columns = title, columns
        words = [column.replace("_per_second", "/s").replace("_", " ").replace("seconds", "s") for column in columns]
        print(f"\n| {title} | " + " | ".join(words) + " |\n" + "|---" * (len(columns) + 1) + "|", flush=True)

    def row(self, name, **figures):
        self.record["rows"].append(dict(table=self.title, name=name, **figures))
        cells = (
            "–" if figures.get(column) is None else self.FORMATS.get(column, "{}").format(figures[column])
            for column in self.columns
        )
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The conventional way


class TwoViews(torch.utils.data.Dataset):
    """PIL crops and colours an image twice, in a worker process."""

    def __init__(self, count):
        self.images = random_images(count)
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(32, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(common.MEAN, common.STD),
        ])  # fmt: skip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return self.transform(image), self.transform(image)


def pil_views_per_second(workers, count):
    batches = iter(DataLoader(TwoViews(count), 64, num_workers=workers))
    next(batches)  # the workers have started, and have a few batches ready: few beside `count`
    started = time.perf_counter()
    views = sum(len(view1) + len(view2) for view1, view2 in batches)
    return views / (time.perf_counter() - started)


def conventional_training(method, batch_size, width, steps, loading):
    """A method with the views from DataLoader workers or (not `loading`) at hand already."""
    script, symmetric = importlib.import_module(method), method == "simco"
    args = script.arguments().parse_args(["--width", str(width)])
    model = getattr(script, MODELS[method])(args).to(DEVICE)
    queue = getattr(model, "queue", None)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    if loading:
        dataset = TwoViews((steps + 1) * batch_size)
        batches = DataLoader(dataset, batch_size, shuffle=True, num_workers=os.cpu_count(), pin_memory=CUDA)
    else:
        batches = [torch.randn(2, batch_size, 3, 32, 32, device=DEVICE).unbind()] * (steps + 1)
    for step, (view1, view2) in enumerate(batches):
        q, k = model(view1.to(DEVICE), view2.to(DEVICE))
        loss = common.contrastive_loss(q, k, args, None, queue)
        if symmetric:
            loss = 0.5 * (loss + common.contrastive_loss(k, q, args, None))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not symmetric:
            model.momentum_update_key_encoder()
        if queue is not None:
            model.dequeue_and_enqueue(k)
        loss.item()
        if step == 0:  # a step to start up
            started = time.perf_counter()
    return dict(images_per_second=steps * batch_size / (time.perf_counter() - started), **peak_memory())


# ---------------------------------------------------------------------------------------------------------------------
# Our way


def views_per_second(batch_size, compiled):
    plan = common.draw_epoch_plan(batch_size, batch_size, 32, seed=0, epoch=0).to(DEVICE)
    images = torch.from_numpy(random_images(batch_size)).to(DEVICE)
    augment = torch.compile(common.augment) if compiled else common.augment
    return batch_size / seconds_per_call(lambda: augment(images, *(field[:, 0] for field in plan[1:])))


def training(method, flags):
    """Run a method's script in this process."""
    ends, images, end_epoch = [], [], common.Run.end_epoch

    def timed_end_epoch(run, epoch):
        images.append(run.num_steps * run.args.batch_size)
        end_epoch(run, epoch)
        ends.append(time.perf_counter())

    common.Run.end_epoch = timed_end_epoch
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        sys.argv = [method, *flags, "--out", f"{directory}/run"]
        importlib.import_module(method).main()
        lines = Path(directory, "run", "log.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["images_per_second"] for line in lines[1:]]
    usual = statistics.median(speeds[1:])
    return dict(
        images_per_second=usual,
        epoch_seconds=(ends[-1] - ends[0]) / (len(ends) - 1),
        start_up_seconds=max(0, images[0] / speeds[0] - images[0] / usual),
        **peak_memory(),
    )


def flop_per_image(method, width):
    """What an image costs in training, by PyTorch's own count of convolutions and matrix products."""
    encoder, views = common.Encoder(width), torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        encoder(views)
    with FlopCounterMode(display=False) as both:
        encoder(views).sum().backward()
    forward, both = forward.get_total_flops() / 2, both.get_total_flops() / 2
    return 2 * both if method == "simco" else both + forward  # the key encoder sees no gradient


def matrix_product_flops(precision):
    """FLOP/s of a large square matrix product."""
    size = 8192 if CUDA else 2048
    matrix = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * size**3 / seconds_per_call(lambda: matrix @ matrix)


def knn_monitor(width, precision, images, queries):
    args = argparse.Namespace(precision=precision, device=DEVICE.type)
    backbone = common.resnet18(width).to(DEVICE, memory_format=torch.channels_last)
    images = torch.from_numpy(random_images(images)).to(DEVICE)
    extraction = seconds_per_call(lambda: common.extract_features(backbone, images, args))
    bank, labels = torch.randn(50_000, 8 * width, device=DEVICE), torch.randint(100, (50_000,), device=DEVICE)
    queries = torch.randn(queries, 8 * width, device=DEVICE)
    search = seconds_per_call(lambda: common.knn_predict(queries, bank, labels, 100))
    counts = dict(images=len(images), queries=len(queries))
    return dict(extraction_seconds=extraction, search_seconds=search, **counts, **peak_memory())


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def augmentation_table(report, args):
    report.table("augmentation", "batch_size", "views_per_second", "ratio")
    workers = os.cpu_count()
    base = in_fresh_process(pil_views_per_second, workers, 8192 if CUDA else 2048)
    report.row(f"PIL, {workers} DataLoader workers", views_per_second=base, ratio=1)
    alone = in_fresh_process(pil_views_per_second, 0, 1024)
    report.row("PIL, no workers", views_per_second=alone, ratio=alone / base)
    for compiled in args.compile:
        for batch_size in args.batch_sizes:
            speed = in_fresh_process(views_per_second, batch_size, compiled == "on")
            name = "compiled" if compiled == "on" else "eager"
            report.row(name, batch_size=batch_size, views_per_second=speed, ratio=speed / base)


def training_table(report, args, precision):
    columns = ("images_per_second", "ratio", "share_of_peak", "epoch_seconds", "start_up_seconds", "gpu_gb", "ram_gb")
    report.table("training", "batch_size", *columns)
    steps = {size: 40 if CUDA else max(2, args.images // size) for size in args.batch_sizes}
    peak = in_fresh_process(matrix_product_flops, precision)
    report.record["matrix_product_flops"] = peak
    for method in args.methods:
        base = {}
        for loading, name in ((True, "conventional"), (False, "conventional, views at hand")):
            for size in args.batch_sizes:
                result = in_fresh_process(conventional_training, method, size, args.width, steps[size], loading)
                speed = result["images_per_second"]
                base.setdefault(size, speed)
                report.row(f"{method}, {name}", batch_size=size, ratio=speed / base[size], **result)
        operations = flop_per_image(method, args.width)
        for compiled in args.compile:
            for batch_size in args.batch_sizes:
                result = in_fresh_process(training, method, script_flags(args, precision, batch_size, compiled))
                speed = result["images_per_second"]
                report.row(
                    f"{method}, {precision}, {'compiled' if compiled == 'on' else 'eager'}", batch_size=batch_size,
                    ratio=speed / base[batch_size], share_of_peak=speed * operations / peak, **result,
                )  # fmt: skip
    print(f"\nOne large matrix product in {precision}: {peak / 1e12:.2f} TFLOP/s.")


def knn_table(report, args, precision):
    report.table("kNN monitor", "images", "extraction_seconds", "queries", "search_seconds", "gpu_gb", "ram_gb")
    sizes = (60_000, 10_000) if CUDA else (1024, 1000)
    report.row("among 50 000 images", **in_fresh_process(knn_monitor, args.width, precision, *sizes))


def script_flags(args, precision, batch_size, compiled):
    flags = dict(data=args.data, width=args.width, precision=precision, batch_size=batch_size, compile=compiled,
                 epochs=args.epochs, knn_every=5)  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def write_data(path, count):
    """A CIFAR-100 of random images, in the form in which the scripts find it decoded already."""
    arrays = dict(classes=np.array([f"class {i}" for i in range(100)]))
    for split, size in (("train", count), ("test", count // 5)):
        arrays |= {f"{split}_images": random_images(size), f"{split}_labels": np.arange(size) % 100}
    np.savez(path, **arrays)


def profile(args, precision):
    """Print the ten costliest operations of the second epoch's steps."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * CUDA
    profiler, views = torch.profiler.profile(activities=activities), common.Run.views

    def profiled_views(run, data, epoch):
        with profiler if epoch == 1 else contextlib.nullcontext():
            yield from views(run, data, epoch)
            synchronize()

    common.Run.views, args.epochs = profiled_views, 2
    training(args.profile, script_flags(args, precision, args.batch_sizes[0], args.compile[0]))
    print(profiler.key_averages().table(sort_by=f"self_{DEVICE.type}_time_total", row_limit=10, max_name_column_width=60))


def main():
    args = arguments().parse_args()
    settings = argparse.Namespace(device="auto", precision=args.precision)
    common.choose_hardware(settings)
    precision = settings.precision
    report = Report(f"{common.describe_device(DEVICE)}; PyTorch {torch.__version__}; ResNet-18 of width {args.width}")
    with tempfile.TemporaryDirectory() as args.data:
        write_data(Path(args.data, "cifar100.npz"), args.images)
        if args.profile:
            profile(args, precision)
            return
        if "augmentation" in args.only:
            augmentation_table(report, args)
        if "training" in args.only:
            training_table(report, args, precision)
        if "knn" in args.only:
            knn_table(report, args, precision)
    if args.json:
        Path(args.json).write_text(json.dumps(report.record, indent=1) + "\n")


if __name__ == "__main__":
    main()
