"""What moco_v2.py, simmoco.py and simco.py share, in the order in which the data flows:

    1. errors and flags    4. augmentation    7. monitors
    2. processes           5. network         8. run: optimizer to checkpoint
    3. datasets            6. losses

Papers, by the names used below: MoCo (arXiv 1911.05722), MoCo v2 (2003.04297), EqCo (2010.01929),
DCL (2110.06848) and DT, "dual temperature" (2203.17248), the paper of SimMoCo and SimCo.
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.functional import rgb_to_grayscale
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# 1. Errors and flags


class UserError(Exception):
    """A mistake that the user can fix. `launch` prints it as one line, without a traceback."""


def require(condition, message):
    if not condition:
        raise UserError(message)


def launch(main):
    """Run `main()`. A UserError, or a file that cannot be used, is one line and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # usually the same in all processes
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; to resume training, run the same command again", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


# Entries of args.json that may differ when a run is resumed or repeated.
MACHINE_FLAGS = ("data", "out", "device", "compile", "cuda_graph", "changed", "environment")


class HelpFormatter(argparse.HelpFormatter):
    """Shows a flag's default value in brackets."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34)

    def _get_help_string(self, action):
        no_default = action.default in (None, argparse.SUPPRESS) or action.default is False
        return action.help if no_default else f"{action.help} [%(default)s]"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; @DIR/args.json stands for the flags of an earlier run. The
    parsed arguments also have `changed`, the names of the flags that differ from their default."""

    def __init__(self, description, usage=None):
        super().__init__(usage=usage, description=description, formatter_class=HelpFormatter)
        self.allow_abbrev, self.fromfile_prefix_chars = False, "@"

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(self, *args):
        args = super().parse_args(*args)
        flags = vars(args).items()
        args.changed = " ".join(name for name, value in flags if value != self.get_default(name))
        return args

    def convert_arg_line_to_args(self, line):
        """Read a line of args.json: ' "batch_size": 256,' is --batch-size=256."""
        name, _, value = line.strip(" ,").replace('"', "").partition(": ")
        if value in ("", "null", "false") or name in (*MACHINE_FLAGS, "method"):
            return []
        flag = f"--{name.replace('_', '-')}"
        return [flag if value == "true" else f"{flag}={value}"]


def number(kind, low, high=2**62):
    """An argparse type: an int or a float, whichever `kind` is, from `low` to `high`."""
    limits = f"at least {low}" if high == 2**62 else f"from {low} to {high}"

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's message, if text is not a number
    return parse


def argument_parser(name, description, loss):
    """Return a parser with the flags that all methods share, and the function that adds a flag to
    its group "method". The defaults are the CIFAR-100 recipe of the DT authors' scripts: without
    flags, a script trains the batch-256 cell of the results table."""
    description += " Without flags: the recipe for CIFAR-100. [Defaults] are in brackets."
    parser = Parser(description, f"python {name}.py [--flag value ...] [@RUN_DIR/args.json]")
    parser.set_defaults(method=name)
    titles = ("data", "method", "training", "machine")
    data, method, training, machine = (parser.add_argument_group(t).add_argument for t in titles)
    # In the order of args.json, and so of the words for a setting in the results tables.
    data("--dataset", default="cifar100", choices=DATASETS, help="folder: your own images")
    data("--data", default="data", metavar="DIR", help="where it is, or is downloaded to")
    data("--subset", type=number(int, 1), metavar="N", help="train on N images, balanced by class")
    data("--image-size", default=32, type=number(int, 1), help="of --dataset folder, in pixels")
    data("--augmentation", default="v2", choices=("v1", "v2"), help="v1: MoCo v1's colour jitter")
    add = training
    add("--epochs", default=200, type=number(int, 1), help="passes over the training images")
    add("--batch-size", default=256, type=number(int, 2), help="images per step, in all processes")
    add("--lr", default=0.03, type=number(float, 1e-6), help="peak; scales as batch size / 256")
    add("--warmup-epochs", type=number(int, 0), help="default: EPOCHS / 20, at most 10")
    add("--schedule", default="cosine", choices=("cosine", "step"), help="step: MoCo v1's")
    add("--weight-decay", default=5e-4, type=number(float, 0), help="of all parameters")
    add("--momentum", default=0.9, type=number(float, 0, 1), help="of SGD")
    add("--seed", default=0, type=number(int, 0), help="of weights, batches and augmentation")
    add = method
    add("--width", default=64, type=number(int, 1), help="channels of ResNet-18's first stage")
    add("--stem-padding", default=2, type=int, choices=(1, 2), help="1 is usual, 2 the authors'")
    add("--head", default="mlp", choices=("mlp", "linear"), help="linear: MoCo v1's")
    add("--head-bn", action="store_true", help="BatchNorm in the head, as in SiMo (EqCo)")
    add("--bn-splits", default=1, type=number(int, 1), metavar="G", help="BatchNorm over G groups")
    add("--sync-bn", action="store_true", help="BatchNorm over the images of all processes")
    add("--moco-dim", default=128, type=number(int, 1), help="dimension of queries and keys")
    losses = ("infonce", "eqco", "dcl", "dual")
    add("--loss", default=loss, choices=losses, help="dual: dual temperature")
    add("--moco-t", default=0.1, type=number(float, 0.02), help="temperature of the softmax")
    add("--alpha", type=number(float, 1e-6), help="of --loss eqco: K negatives count as ALPHA")
    add("--dt-m", default=10.0, type=number(float, 1e-6), help="of --loss dual: T_beta / T_alpha")
    add = training
    add("--out", metavar="DIR", help=f"run directory; default: runs/{name}-...")
    add("--knn-every", default=5, type=number(int, 1), metavar="N", help="evaluate every N epochs")
    probes = ("query", "both", "off")
    add("--probe", default="query", choices=probes, help="views that the probe learns from")
    add = machine
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if present")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the encoders")
    add("--compile", default="auto", choices=("auto", "on", "off"), help="auto: on a GPU")
    add("--cuda-graph", default="auto", choices=("auto", "on", "off"), help="auto: where possible")
    add("--deterministic", action="store_true", help="bitwise reproducible on a GPU; slower")
    return parser, method


def setup(args):
    """Join the other processes, check the flags, and resolve "auto" and the default of --out.
    Returns the torch.device. Raises UserError for flags that do not go together, or not here."""
    init_distributed(args)
    device = choose_hardware(args)
    share, groups, processes = args.batch_size // world_size(), args.bn_splits, world_size()
    require(share * processes == args.batch_size, f"--batch-size must be a multiple of {processes}")
    require((args.loss == "eqco") == (args.alpha is not None), "--alpha goes with --loss eqco")
    require(args.loss == "dual" or args.dt_m == 10, "--dt-m needs --loss dual")
    can_split = groups == 1 or (share % groups == 0 and share > groups)
    require(can_split, f"--bn-splits must divide {share} images into groups of two or more")
    require(groups == 1 or not args.sync_bn, "--bn-splits and --sync-bn exclude each other")
    can_sync = processes == 1 or args.device == "cuda"
    require(can_sync or not args.sync_bn, "--sync-bn on several processes needs GPUs")
    if args.out is None:
        args.out = f"runs/{args.method}-{args.dataset}-bs{args.batch_size}-seed{args.seed}"
    if args.compile == "auto":
        has_compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
        args.compile = "on" if args.device == "cuda" and has_compiler else "off"
    draws = getattr(args, "num_negatives", None) or getattr(args, "memory_bank", False)
    can_record = args.device == "cuda" and processes == 1 and not draws  # it would repeat the draws
    needs = "a GPU, one process, no --num-negatives, no --memory-bank"
    require(can_record or args.cuda_graph != "on", f"--cuda-graph on needs {needs}")
    args.cuda_graph = "on" if can_record and args.cuda_graph != "off" else "off"
    if args.cuda_graph == "on":
        torch.cuda.set_stream(torch.cuda.Stream())  # on the default one, nothing can be recorded
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    return device


def choose_hardware(args):
    """Replace "auto" in --device and in --precision, bf16 being for GPUs since Ampere and for CPUs
    with AMX or AVX512-BF16. Returns the torch.device."""
    has_gpu = torch.cuda.is_available()
    if args.device == "auto":
        args.device = "cuda" if has_gpu else "cpu"
    require(args.device == "cpu" or has_gpu, "PyTorch sees no CUDA GPU; use --device cpu")
    if args.precision == "auto":
        names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # not in every PyTorch
        has_bf16 = any(getattr(torch.cpu, name, bool)() for name in names)
        if args.device == "cuda":
            has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
        args.precision = "bf16" if has_bf16 else "fp32"
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"  # fp32: no TF32 in convolutions
    return torch.device(args.device)


def autocast(args):
    """Mixed precision for the encoders. Weights, similarities and losses stay in float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


# --------------------------------------------------------------------------------------------------
# 2. Processes: torchrun starts one per GPU. Without torchrun there is only one


def init_distributed(args):
    """Join the processes that torchrun started: over NCCL on GPUs, one each, else over gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def concat_all_gather(tensor):
    """[N, ...] of each process -> [world_size * N, ...], in the order of ranks: the global batch.
    Gradients flow back to the process that a row comes from."""
    return torch.cat(all_gather(tensor)) if world_size() > 1 else tensor


def all_reduce_sum(tensor):
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def batch_shuffle(x, permutation):
    """Shuffling BN (MoCo, section 3.3): permute the global batch and return this process's share of
    it, [N, ...], so that BatchNorm does not normalise a key with the images of its query's group.
    permutation: int64 [world_size * N], the same on all processes; None: return x."""
    if permutation is None:
        return x
    return concat_all_gather(x)[permutation.view(world_size(), -1)[rank()]]


def batch_unshuffle(x, permutation):
    return batch_shuffle(x, None if permutation is None else permutation.argsort())


def from_rank_zero(function, *arguments):
    """Call `function` on rank 0 only and give its result, or its UserError, to all processes. So
    files are read once, and machines need no shared file system."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function(*arguments)
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    require(outcome[1] is None, outcome[1])
    return outcome[0]


compiled = cache(torch.compile)  # each function once


def parallelize(model, args):
    """The model to call in the training loop: compiled if --compile; in DDP if there are several
    processes. DDP need not broadcast the buffers: queues are the same on all processes, and
    `average_batchnorm` takes care of BatchNorm."""
    if args.compile == "on":
        model.compile()
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


@torch.no_grad()
def average_batchnorm(model):
    """Average the running statistics over the processes, so that all evaluate the same network."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for statistic in (module.running_mean, module.running_var):
                all_reduce_sum(statistic).div_(world_size())


# --------------------------------------------------------------------------------------------------
# 3. Datasets: decoded once, then resident on the device as uint8

DATASETS = ("cifar10", "cifar100", "folder", "shapes")


class Dataset(NamedTuple):
    train_images: Tensor  # uint8 [N, S, S, 3], RGB
    train_labels: Tensor  # int64 [N]
    test_images: Tensor
    test_labels: Tensor
    classes: list  # of str

    def to(self, device):
        return Dataset(*(tensor.to(device) for tensor in self[:4]), self.classes)

    def subset(self, count):
        """Only `count` training images: the first ones of each class, the classes in turn."""
        labels = self.train_labels
        require(count <= len(labels), f"--subset {count}: there are only {len(labels)} images")
        keep = balanced(labels, len(self.classes), count)
        return self._replace(train_images=self.train_images[keep], train_labels=labels[keep])


def balanced(labels, num_classes, count):
    """The sorted indices of `count` images, taken from the classes in turn, first images first."""
    counts = F.one_hot(labels, num_classes).cumsum(dim=0)
    nth_of_its_class = counts.gather(1, labels[:, None]).squeeze(1)
    return (nth_of_its_class * num_classes + labels).argsort()[:count].sort().values


def load_data(args, device):
    """The Dataset that the flags name, on `device`."""
    data = from_rank_zero(load_dataset, args.dataset, args.data, True, args.image_size)
    if args.subset is not None:
        data = data.subset(args.subset)
    num_images, batch_size = len(data.train_images), args.batch_size
    require(num_images >= batch_size, f"--batch-size must be at most {num_images} here")
    return data.to(device)


def load_dataset(name, root, download=True, image_size=32):
    """Load a Dataset, on the CPU, from `root`/<name>.npz if that file exists. Otherwise torchvision
    reads CIFAR, and downloads it if `download`; "folder" is `root`/{train,test}/<class>/<image>,
    resized and cropped to `image_size`; "shapes" is drawn. Raises UserError for bad data."""
    require(name in DATASETS, f"unknown dataset '{name}'; there are {', '.join(DATASETS)}")
    if Path(root, f"{name}.npz").exists():
        return read_npz(Path(root, f"{name}.npz"))
    if name == "shapes":
        return draw_shapes()
    return read_folder(root, image_size) if name == "folder" else read_cifar(name, root, download)


def read_npz(path):
    """A Dataset from an .npz file whose arrays have the names, types and shapes of its fields."""
    try:
        with np.load(path, allow_pickle=False) as file:
            *arrays, classes = (file[name] for name in Dataset._fields)
    except Exception as error:  # numpy, zipfile and zlib each fail in their own way
        raise UserError(f"'{path}' is damaged or not a dataset ({error})") from None
    known = set(range(len(classes)))
    for i in (0, 2):
        images, labels = arrays[i : i + 2]
        is_rgb = images.dtype == np.uint8 and images.shape[1:] == (*images.shape[1:2] * 2, 3)
        fits = labels.shape == images.shape[:1] and set(labels.tolist()) <= known
        require(is_rgb and fits, f"'{path}': images must be uint8 [N, S, S, 3], with N labels")
        arrays[i + 1] = labels.astype(np.int64)
    return Dataset(*map(torch.from_numpy, arrays), classes.tolist())


def read_cifar(name, root, download):
    cifar = getattr(torchvision.datasets, name.upper())
    try:
        train, test = (cifar(root, train=train, download=download) for train in (True, False))
    except Exception as error:  # no network, a full disk, a damaged archive: many exceptions
        raise UserError(
            f"{name} is not in '{root}' and cannot be downloaded ({error}). Put {cifar.filename} "
            f"there (from {cifar.url}, md5 {cifar.tgz_md5}), or name another directory by --data"
        ) from None
    tensors = [torch.as_tensor(x) for split in (train, test) for x in (split.data, split.targets)]
    return Dataset(*tensors, train.classes)


def read_folder(root, image_size):
    def load_image(path):
        try:
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:
            raise UserError(f"cannot read the image '{path}' ({error})") from None
        return np.asarray(ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC))

    tensors, classes = [], []
    for split in ("train", "test"):
        folder = torchvision.datasets.ImageFolder(Path(root, split), loader=load_image)
        with ThreadPoolExecutor() as pool:
            images = [image for image, _ in pool.map(folder.__getitem__, range(len(folder)))]
        tensors += [torch.from_numpy(np.stack(images)), torch.tensor(folder.targets)]
        classes.append(folder.classes)
    odd = ", ".join(sorted(set(classes[0]) ^ set(classes[1])))
    require(not odd, f"'{root}': only one of train and test has the class {odd}")
    return Dataset(*tensors, classes[0])


def draw_shapes(train=4096, test=1024, size=32, seed=0):
    """Ten classes of shapes in two tones. Position, size, brightness, tint and, a little, rotation
    vary within a class. The augmentation varies all of these but the rotation."""
    count = train + test
    random = np.random.RandomState(seed)  # numpy promises that its stream never changes
    radius, angle = random.uniform(6, 11, count), np.deg2rad(random.uniform(-15, 15, count))
    centre = random.uniform(size * 0.36, size * 0.64, (2, count))
    dark = random.uniform(0.2, 0.3, count)
    tones = np.stack([dark + random.uniform(0.35, 0.45, count), dark])  # of shape and ground
    tones = tones[..., None] + random.uniform(-0.02, 0.02, (2, count, 3))

    # Coordinates of all pixels, [count, size, size], in which a shape has radius 1.
    pixels = np.arange(size) + 0.5
    x, y = pixels - centre[0, :, None, None], pixels[:, None] - centre[1, :, None, None]
    cos, sin, radius = (values[:, None, None] for values in (np.cos(angle), np.sin(angle), radius))
    u, v = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius

    def plus(u, v):
        upright = np.minimum(0.3 - abs(u), 0.95 - abs(v))
        return np.maximum(upright, np.minimum(0.3 - abs(v), 0.95 - abs(u)))

    depth = dict(  # how far inside the shape a point is; negative: outside
        disc=lambda u, v: 1 - np.hypot(u, v),
        ring=lambda u, v: 0.22 - abs(np.hypot(u, v) - 0.78),
        square=lambda u, v: 0.85 - np.maximum(abs(u), abs(v)),
        frame=lambda u, v: 0.2 - abs(np.maximum(abs(u), abs(v)) - 0.72),
        triangle=lambda u, v: 0.5 - np.maximum(v, 0.866 * abs(u) - v / 2),
        plus=plus,
        cross=lambda u, v: plus((u + v) * 0.7071, (u - v) * 0.7071),
        star=lambda u, v: 0.62 + 0.36 * np.cos(5 * np.arctan2(u, -v)) - np.hypot(u, v),
        crescent=lambda u, v: np.minimum(1 - np.hypot(u, v), np.hypot(u - 0.5, v) - 0.75),
        bars=lambda u, v: np.minimum(0.24 - abs(abs(v) - 0.55), 0.9 - abs(u)),
    )
    inside = np.empty((count, size, size))
    for label, depth_of in enumerate(depth.values()):
        inside[label::10] = depth_of(u[label::10], v[label::10])
    inside = (inside * radius + 0.5).clip(0, 1)[..., None]  # with a soft edge of one pixel
    images = tones[0][:, None, None] * inside + tones[1][:, None, None] * (1 - inside)
    images = torch.from_numpy((images * 255).round().astype(np.uint8))
    labels = torch.arange(count) % 10
    return Dataset(images[:train], labels[:train], images[train:], labels[train:], list(depth))


# --------------------------------------------------------------------------------------------------
# 4. Augmentation: torchvision's operations for a whole batch at once, on the device

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class Choices(NamedTuple):
    """The random parameters of N views."""

    top: Tensor  # int64 [N], the crop box in pixels, like the next three
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor  # bool [N]
    operations: Tensor  # int64 [N, 4], the order of the four colour operations
    factor: Tensor  # float32 [N, 4], of BRIGHTNESS, ..., HUE; 1, 1, 1, 0 where there is no jitter
    grayscale: Tensor  # bool [N]

    def rows(self, which):
        return Choices(*(field[which] for field in self))


class Batch(NamedTuple):
    """A process's share, N images, of the global batch."""

    view1: Tensor  # float32 [N, 3, S, S]
    view2: Tensor
    index: Tensor  # int64 [N], which training images these are
    labels: Tensor  # int64 [N]; for the probe only
    permutation: Tensor  # int64 [global batch], for `batch_shuffle`; None: not needed
    generator: torch.Generator  # for other draws of this step; in the same state on all processes


def batches(data, epoch, args):
    """Yield the Batches of an epoch (0-based), without the last, incomplete one. Everything random
    is drawn for the global batch and depends on (seed, epoch, step) only, so it is the same on any
    number of processes, and after an interruption."""
    device, (num_images, image_size) = data.train_images.device, data.train_images.shape[:2]
    num_steps, share = num_images // args.batch_size, args.batch_size // world_size()
    generator = seeded_generator(device, args.seed, epoch)
    index = torch.randperm(num_images, generator=generator, device=device)
    num_views = 2 * num_steps * args.batch_size
    choices = draw_choices(num_views, image_size, generator, args.augmentation)
    # This process's part: of each step first all first views, then all second ones.
    index = index[: num_views // 2].view(num_steps, world_size(), share)[:, rank()]
    parts = (field.unflatten(0, (num_steps, world_size(), share, 2)) for field in choices)
    choices = Choices(*(part[:, rank()].transpose(1, 2).flatten(1, 2) for part in parts))
    views_of = compiled(augment) if args.compile == "on" else augment
    several_groups = args.bn_splits > 1 or (world_size() > 1 and not args.sync_bn)
    bar = dict(total=args.epochs * num_steps, initial=epoch * num_steps, leave=False)
    bar["disable"] = rank() > 0 or None  # None: shown on a terminal only
    bar["bar_format"] = "{desc}{percentage:3.0f}% {bar} {remaining} left for the run, {rate_fmt}"
    for step in tqdm(range(num_steps), f"epoch {epoch + 1}/{args.epochs}", unit="step", **bar):
        images, labels = data.train_images[index[step]], data.train_labels[index[step]]
        views = views_of(images.repeat(2, 1, 1, 1), choices.rows(step), args.augmentation)
        generator = seeded_generator(device, args.seed, epoch, step + 1)
        chance = torch.rand(args.batch_size, generator=generator, device=device)
        permutation = chance.argsort() if several_groups else None
        yield Batch(*views.chunk(2), index[step], labels, permutation, generator)


def seeded_generator(device, *numbers):
    """A random generator whose state depends on `numbers` only."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


def draw_choices(count, image_size, generator, augmentation="v2"):
    """Choices for `count` views, on the device of `generator`, distributed as in torchvision.
    augmentation "v1": MoCo v1's colour jitter, applied to all images, with more hue."""
    device = generator.device
    box = draw_boxes(count, image_size, generator)
    uniform = torch.rand(count, 7, generator=generator, device=device)
    operations = torch.rand(count, 4, generator=generator, device=device).argsort(dim=1)
    hue, probability = (0.4, 1.0) if augmentation == "v1" else (0.1, 0.8)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device)
    spread = torch.tensor([0.4, 0.4, 0.4, hue], device=device)
    factor = neutral + spread * (2 * uniform[:, :4] - 1)
    factor = torch.where(uniform[:, 4:5] < probability, factor, neutral)
    return Choices(*box, uniform[:, 5] < 0.5, operations, factor, uniform[:, 6] < 0.2)


def draw_boxes(count, size, generator, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """The boxes of torchvision's RandomResizedCrop, for square images: ten tries of an area and a
    log-uniform aspect ratio, the first that fits, else the whole image. Returns top, left, height
    and width in pixels, int64 [count]."""
    draw = dict(generator=generator, device=generator.device)
    area = torch.rand(count, 10, **draw) * (scale[1] - scale[0]) + scale[0]
    log_ratio = torch.rand(count, 10, **draw) * math.log(ratio[1] / ratio[0]) + math.log(ratio[0])
    width = (size * torch.sqrt(area * log_ratio.exp())).round()
    height = (size * torch.sqrt(area / log_ratio.exp())).round()
    fits = (width >= 1) & (width <= size) & (height >= 1) & (height <= size)
    first, any_fits = fits.int().argmax(dim=1, keepdim=True), fits.any(dim=1)
    width = torch.where(any_fits, width.gather(1, first).squeeze(1), float(size))
    height = torch.where(any_fits, height.gather(1, first).squeeze(1), float(size))
    corner = torch.rand(2, count, **draw)
    top = (corner[0] * (size - height + 1)).floor()
    left = (corner[1] * (size - width + 1)).floor()
    return top.long(), left.long(), height.long(), width.long()


def resize_matrix(start, length, extent, size, flip=None):
    """Cropping and resizing are linear along each axis. This is their matrix, float32
    [N, size, extent], for N crops [start, start + length) of an axis of `extent` pixels, resized to
    `size` pixels and mirrored where `flip`. The filter is PIL's bicubic: a = -0.5, wider when
    shrinking, normalised over the crop. (`F.interpolate` and `F.grid_sample` have a = -0.75.)"""
    start, length = start[:, None].float(), length[:, None].float()
    output = torch.arange(size, device=start.device) + 0.5
    centre = start + output * (length / size)  # [N, size]: where each output pixel is in the image
    if flip is not None:
        centre = torch.where(flip[:, None], centre.flip(1), centre)
    pixel = torch.arange(extent, device=start.device) + 0.5
    scale = (length / size).clamp(min=1)[:, :, None]
    x = ((pixel - centre[:, :, None]) / scale).abs()  # [N, size, extent]
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    inside = (pixel > start) & (pixel < start + length)  # [N, extent]
    weight = torch.where((x < 2) & inside[:, None], weight, 0.0)
    return weight / weight.sum(dim=2, keepdim=True)


def random_resized_crop_flip(images, top, left, height, width, flip, size):
    """Crop, resize and flip by two matrix products, as torchvision does with PIL's bicubic filter.
    images: float [N, 3, H, W] in 0..1; for each a box, in pixels, and flip (bool): [N]. Returns
    float [N, 3, size, size] in 0..1."""
    rows = resize_matrix(top, height, images.shape[2], size)  # [N, size, H]
    columns = resize_matrix(left, width, images.shape[3], size, flip)  # [N, size, W]
    # Bicubic overshoots at edges. PIL resizes the width first and stores 8 bits: clamp there, too.
    images = (images @ columns.transpose(1, 2)[:, None]).clamp_(0, 1)  # [N, 3, H, size]
    return (rows[:, None] @ images).clamp_(0, 1)  # [N, 3, size, size]


def blend(images, operation, factor):
    """Brightness, contrast or saturation (`operation` [N]) of images [N, 3, H, W] in 0..1:
    factor * image + (1 - factor) * (black, the mean gray of the image, or the gray image)."""
    operation, factor = operation[:, None, None, None], factor[:, None, None, None]
    gray = rgb_to_grayscale(images)
    mean_gray_or_black = gray.mean(dim=(2, 3), keepdim=True) * (operation != BRIGHTNESS)
    other = torch.where(operation == SATURATION, gray, mean_gray_or_black)
    return torch.lerp(other, images, factor).clamp_(0, 1)


def adjust_hue(images, shift):
    """Rotate the hue of images [N, 3, H, W] in 0..1 by `shift` [N] of a circle, through HSV."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue)  # in sixths of the circle
    hue = hue + 6 * shift[:, None, None]
    # Back to RGB: a channel is between value - chroma and value, by its distance from the hue.
    offset = 5 - 2 * torch.arange(3, device=images.device)[:, None, None]  # red 5, green 3, blue 1
    k = (offset + hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(images, operations, factor):
    """torchvision's ColorJitter. operations, factor: [N, 4], see `Choices`. Three blends, the hue
    step and three blends, with factor 1 where an image does not need one, are cheaper than a hue
    step in each of the four places."""
    hue_place = (operations == HUE).int().argmax(dim=1)
    ordered = factor.gather(1, operations)
    for place in (0, 1, 2):
        before = torch.where(place < hue_place, ordered[:, place], 1.0)
        images = blend(images, operations[:, place], before)
    images = adjust_hue(images, factor[:, HUE])
    for place in (1, 2, 3):
        after = torch.where(place > hue_place, ordered[:, place], 1.0)
        images = blend(images, operations[:, place], after)
    return images


def to_float(images):
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in 0..1."""
    return images.permute(0, 3, 1, 2).float().div(255)


def normalize(images):
    """float [N, 3, H, W] in 0..1 -> the same in channels_last, normalised by CIFAR's statistics."""
    channels = [(channel - mean) / std for channel, mean, std in zip(images.unbind(1), MEAN, STD)]
    return torch.stack(channels, dim=3).permute(0, 3, 1, 2)


def augment(images, choices, augmentation="v2"):
    """One view of each image: uint8 [N, S, S, 3] -> float32 [N, 3, S, S], with Choices of N rows.
    augmentation "v1": gray before the jitter, as in MoCo v1."""
    gray = choices.grayscale[:, None, None, None]
    images = random_resized_crop_flip(to_float(images), *choices[:5], images.shape[1])
    if augmentation == "v1":
        images = torch.where(gray, rgb_to_grayscale(images), images)
    images = color_jitter(images, choices.operations, choices.factor)
    if augmentation == "v2":
        images = torch.where(gray, rgb_to_grayscale(images), images)
    return normalize(images)


# --------------------------------------------------------------------------------------------------
# 5. Network


def stage(channels_in, channels, stride):
    """Two residual blocks. [B, channels_in, H, W] -> [B, channels, H / stride, W / stride]."""
    downsample = None
    if stride != 1:
        projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
        downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))
    first = BasicBlock(channels_in, channels, stride, downsample)
    return nn.Sequential(first, BasicBlock(channels, channels))


def resnet18(width=64, stem_padding=2):
    """ResNet-18 for CIFAR: a 3x3 first convolution of stride 1, no max-pooling, no classifier.
    [B, 3, H, W] -> features [B, 8 * width]. Parameters have the names of torchvision's resnet18.
    The DT authors pad the first convolution by 2, so that their maps are 34x34; 1 is usual."""
    if width < 8 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        # There, oneDNN writes past its memory in the strided 1x1 convolutions (its issue 6035).
        torch.backends.mkldnn.enabled = False
    backbone = nn.Sequential()
    backbone.conv1 = nn.Conv2d(3, width, 3, padding=stem_padding, bias=False)
    backbone.bn1 = nn.BatchNorm2d(width)
    backbone.relu = nn.ReLU(inplace=True)
    backbone.layer1 = stage(width, width, stride=1)
    backbone.layer2 = stage(width, 2 * width, stride=2)
    backbone.layer3 = stage(2 * width, 4 * width, stride=2)
    backbone.layer4 = stage(4 * width, 8 * width, stride=2)
    backbone.avgpool = nn.AdaptiveAvgPool2d(1)
    backbone.flatten = nn.Flatten()
    backbone.num_features = 8 * width
    for name, module in backbone.named_modules():  # as torchvision, but not the new conv1
        if isinstance(module, nn.Conv2d) and name != "conv1":
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


class Encoder(nn.Module):
    """Backbone and head: images [B, 3, H, W] -> L2-normalised queries or keys, float32 [B, dim].
    The head is MoCo v2's, with the DT authors' hidden size. hidden None: MoCo v1's single layer."""

    def __init__(self, width=64, stem_padding=2, dim=128, hidden=128, head_bn=False):
        super().__init__()

        def linear(size_in, size_out):
            layer = nn.Linear(size_in, size_out)
            return nn.Sequential(layer, nn.BatchNorm1d(size_out)) if head_bn else layer

        self.backbone = resnet18(width, stem_padding)
        if hidden is None:
            self.head = linear(8 * width, dim)
        else:
            self.head = nn.Sequential(linear(8 * width, hidden), nn.ReLU(), linear(hidden, dim))

    def forward(self, x):
        return F.normalize(self.head(self.backbone(x)).float(), dim=1)


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm over each of `splits` groups of consecutive rows of [N, C, ...], as if each were on
    its own GPU (MoCo's CIFAR demo). The running statistics are averages over the groups."""

    def __init__(self, num_features, splits):
        super().__init__(num_features)
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        outputs, means, variances = [], [], []
        for group in x.chunk(self.splits):
            means.append(self.running_mean.clone())
            variances.append(self.running_var.clone())
            group = F.batch_norm(group, means[-1], variances[-1], self.weight, self.bias, True)
            outputs.append(group)
        self.running_mean.copy_(torch.stack(means).mean(dim=0))
        self.running_var.copy_(torch.stack(variances).mean(dim=0))
        self.num_batches_tracked.add_(1)
        return torch.cat(outputs)


def build_encoder(args):
    """The Encoder that the flags ask for."""
    hidden = 128 if args.head == "mlp" else None
    encoder = Encoder(args.width, args.stem_padding, args.moco_dim, hidden, args.head_bn)
    if args.bn_splits > 1:
        for name, module in list(encoder.named_modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                parent, _, child = name.rpartition(".")
                split = SplitBatchNorm(module.num_features, args.bn_splits)
                setattr(encoder.get_submodule(parent), child, split)
    if args.sync_bn and world_size() > 1:
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    return encoder


# --------------------------------------------------------------------------------------------------
# 6. Losses


def similarities(q, k, queue=None, num_negatives=None, generator=None):
    """Cosine similarities of N queries with their positives, [N], and with their negatives, [N, K].

    q, k: float [N, C], L2-normalised; row i of k is the positive of row i of q. The negatives are
    the rows of `queue` [K, C], or without one the other keys of the global batch: all of them, or
    `num_negatives` for each query, drawn from `generator`, whose state must be the same on all
    processes. Raises ValueError if the batch has too few keys.
    """
    with torch.autocast(q.device.type, enabled=False):
        if queue is not None:
            return (q * k).sum(dim=1), q @ queue.T
        keys = concat_all_gather(k)  # of the global batch: MxC
        similarity = q @ keys.T  # NxM
    size = len(keys)
    if not 1 <= (num_negatives or size - 1) < size:
        raise ValueError(f"{num_negatives or 'no'} negatives in a batch of {size} images")
    own = rank() * len(q) + torch.arange(len(q), device=q.device)[:, None]  # Nx1, of the positives
    if num_negatives is None:
        others = (own + torch.arange(1, size, device=q.device)) % size  # Nx(M-1)
    else:  # drawn for the global batch: the same on any number of processes
        draw = torch.rand(size, size, device=q.device, generator=generator).fill_diagonal_(-1)
        others = draw[own.squeeze(1)].topk(num_negatives, dim=1).indices  # NxK; never the own key
    return similarity.gather(1, own).squeeze(1), similarity.gather(1, others)


def log_odds_against(positive, negative, temperature):
    """M = log( sum_neg e^(s_neg/T) / e^(s_pos/T) ), [N]: the log-odds against the positive. The
    softmax gives the positive p = 1 / (1 + e^M). So 1 - p = sigmoid(M) and -log p = softplus(M),
    which are accurate even where p is close to 1."""
    return torch.logsumexp((negative - positive[:, None]) / temperature, dim=1)


def info_nce_loss(q, k, temperature=0.1, queue=None, alpha=None, **sampling):
    """InfoNCE (MoCo, equation 1): the mean of -log p, p the softmax of the positive at T =
    `temperature`. alpha: with EqCo's margin T log(alpha / K), K negatives count as alpha of them.
    q, k, queue, and in `sampling` num_negatives and generator: see `similarities`."""
    positive, negative = similarities(q, k, queue, **sampling)
    log_odds = log_odds_against(positive, negative, temperature)
    if alpha is not None:
        log_odds = log_odds + math.log(alpha / negative.shape[1])
    return F.softplus(log_odds).mean()


def dcl_loss(q, k, temperature=0.1, queue=None, **sampling):
    """Decoupled contrastive learning (DCL, equation 5): the mean of M. It is InfoNCE without the
    positive in the denominator, so without the factor 1 - p in the gradient: no query counts less
    because it is easy. Arguments: see `info_nce_loss`."""
    positive, negative = similarities(q, k, queue, **sampling)
    return log_odds_against(positive, negative, temperature).mean()


def dual_temperature_loss(q, k, temperature=0.1, dt_m=10.0, queue=None, **sampling):
    """Dual temperature (DT): the mean of w * -log p at T_alpha = `temperature`, with the weight
    w = (1 - p at T_beta) / (1 - p at T_alpha), T_beta = `dt_m` * T_alpha, through which no gradient
    flows. The gradient is DCL's, weighted by how hard a query is at T_beta (1 - p = sigmoid(M)):

        grad softplus(M) = sigmoid(M) grad M = (1 - p at T_alpha) grad M          InfoNCE
        grad w softplus(M) = w (1 - p at T_alpha) grad M = (1 - p at T_beta) grad M

    So dt_m = 1 is InfoNCE, whose gradient vanishes for easy queries (p near 1). For them, 1 - p is
    larger at T_beta > T_alpha. Other arguments: see `info_nce_loss`."""
    positive, negative = similarities(q, k, queue, **sampling)
    log_odds = log_odds_against(positive, negative, temperature)
    weight = dual_temperature_weight(positive, negative, log_odds, temperature * dt_m)
    return (weight * F.softplus(log_odds.double())).mean().to(q.dtype)


@torch.no_grad()
def dual_temperature_weight(positive, negative, log_odds, t_beta):
    """[N], in float64: for T_alpha = 0.02, 1 - p = sigmoid(log_odds) can be as small as e^-100."""
    log_odds_beta = log_odds_against(positive, negative, t_beta)
    return (F.logsigmoid(log_odds_beta.double()) - F.logsigmoid(log_odds.double())).exp()


def contrastive_loss(q, k, args, generator, queue=None):
    """The loss that --loss names. q, k, generator, queue: see `similarities`."""
    losses = dict(dcl=dcl_loss, dual=dual_temperature_loss)
    loss = losses.get(args.loss, info_nce_loss)
    if args.compile == "on":
        loss = compiled(loss)
    flags = dict(queue=queue, generator=generator)
    flags.update(num_negatives=getattr(args, "num_negatives", None))
    flags.update(dict(dcl={}, dual=dict(dt_m=args.dt_m)).get(args.loss, dict(alpha=args.alpha)))
    return loss(q, k, args.moco_t, **flags)


@torch.no_grad()
def contrast_statistics(q, k, args, queue=None):
    """Statistics whose means are logged: similarities of the positives and of some negatives,
    whether the positive ranks first, and the weight of dual temperature, over all negatives."""
    positive, negative = similarities(q, k, queue)
    every = math.ceil(negative.shape[1] / 1024)  # from all over the queue, for keys of all ages
    statistics = dict(
        positive_similarity=positive,
        negative_similarity=negative[:, ::every].flatten(),
        positive_ranks_first=(positive[:, None] > negative).all(dim=1).float(),
    )
    if args.loss == "dual":
        log_odds = log_odds_against(positive, negative, args.moco_t)
        weight = dual_temperature_weight(positive, negative, log_odds, args.moco_t * args.dt_m)
        statistics["dual_temperature_weight"] = weight
    return statistics


# --------------------------------------------------------------------------------------------------
# 7. Monitors: a linear probe that learns with the network, kNN, and statistics of the features


class Probe:
    """The DT authors' metric: a linear classifier that learns online, by the labels of the batch,
    from the backbone's features of the augmented views, in train mode. SGD with momentum 0.9, no
    weight decay, lr 0.3 for any batch size, with the network's warm-up and schedule. The features
    are detached, and the classifier has its own optimizer: the network trains as it would without.

    --probe query: it learns from the views that the backbone encodes anyway: only view 1 in MoCo v2
    and SimMoCo without --symmetric. both: it learns from both views, as in the authors' code."""

    def __init__(self, args, backbone, num_classes, device):
        self.args, self.backbone, self.features = args, backbone, []
        self.classifier = nn.Linear(backbone.num_features, num_classes).to(device)
        flags = dict(lr=0.3, momentum=0.9, weight_decay=0)
        self.optimizer = build_optimizer(self.classifier.parameters(), args, **flags)
        self.loss_of = torch.compile(self.loss) if args.compile == "on" else self.loss
        if args.probe != "off":
            backbone.register_forward_hook(self.keep_features)

    def keep_features(self, backbone, images, features):
        if backbone.training:
            self.features.append(features.detach())  # [N, D]

    def loss(self, features, labels):
        """The mean cross-entropy of one or two views: a list of [N, D], with labels int64 [N]."""
        logits = self.classifier(torch.cat(features).float())
        return F.cross_entropy(logits, labels.repeat(len(features)))

    def step(self, batch):
        """Learn from a batch. To be called before the optimizer changes the network."""
        if self.args.probe == "off":
            return
        if self.args.probe == "both" and len(self.features) == 1:
            # BatchNorm updates running statistics in its forward pass: here, copies of them.
            buffers = {name: buffer.clone() for name, buffer in self.backbone.named_buffers()}
            with torch.no_grad(), autocast(self.args):
                functional_call(self.backbone, buffers, batch.view2)
        self.optimizer.zero_grad()
        self.loss_of(self.features, batch.labels).backward()
        self.features.clear()
        for parameter in self.classifier.parameters():
            all_reduce_sum(parameter.grad).div_(world_size())
        self.optimizer.step()

    def state_dict(self):
        return dict(classifier=self.classifier.state_dict(), optimizer=self.optimizer.state_dict())

    def load_state_dict(self, state):
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])


@torch.no_grad()
def extract_features(backbone, images, args, views_of=None):
    """Features in eval mode, float32 [N, D], of images uint8 [N, S, S, 3], or of views of them.
    views_of: function of indices int64 [M] -> float [M, 3, S, S]; None: the images, not augmented.
    Each process computes a part; all of them return the whole."""
    was_training = backbone.training
    backbone.eval()
    features = torch.zeros(len(images), backbone.num_features, device=images.device)
    chunks = torch.arange(len(images), device=images.device).split(1000)  # equal ones, in CIFAR
    for chunk in chunks[rank() :: world_size()]:
        views = normalize(to_float(images[chunk])) if views_of is None else views_of(chunk)
        with autocast(args):
            features[chunk] = backbone(views).float()
    backbone.train(was_training)
    return all_reduce_sum(features)  # the rows of other processes are zero here


@torch.no_grad()
def nearest(features, bank, k):
    """The k rows of the bank with the highest cosine, for each of the features: float [N, D]; bank:
    float [M, D]. Returns the cosines and the rows, [N, k], highest first; [N, M] if M < k."""
    features, bank = F.normalize(features, dim=1), F.normalize(bank, dim=1)
    chunks = features.split(max(1, 2**25 // len(bank)))  # bounds the memory
    found = [(chunk @ bank.T).topk(min(k, len(bank)), dim=1) for chunk in chunks]
    return tuple(torch.cat(part) for part in zip(*found))


@torch.no_grad()
def knn_predict(features, bank, bank_labels, num_classes, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018, as in MoCo's CIFAR demo): each of the k most similar rows of
    the bank votes for its label with weight exp(cosine / temperature). features: float [N, D];
    bank: float [M, D]; bank_labels: int64 [M]. Returns labels, int64 [N]."""
    similarity, rows = nearest(features, bank, k)
    votes = torch.zeros(len(features), num_classes, device=bank.device, dtype=similarity.dtype)
    votes.scatter_add_(1, bank_labels[rows], (similarity / temperature).exp())
    return votes.argmax(dim=1)


@torch.no_grad()
def monitor(backbone, probe, data, args):
    """What is logged every few epochs, as a dict: top-1 accuracy in percent on the test set, of kNN
    (its bank is the training set) and of the probe, and statistics of the features."""
    bank = extract_features(backbone, data.train_images, args)
    features = extract_features(backbone, data.test_images, args)
    knn = knn_predict(features, bank, data.train_labels, len(data.classes))
    probed = probe.classifier(features).argmax(dim=1)
    accuracies = [100 * (x == data.test_labels).double().mean().item() for x in (knn, probed)]
    # Two views of up to 500 evenly spaced test images, the same ones at every call.
    images = data.test_images[:: math.ceil(len(data.test_images) / 500)]
    generator = seeded_generator(images.device, 0)
    views = []
    for _ in range(2):
        choices = draw_choices(len(images), images.shape[1], generator, args.augmentation)
        view = augment(images, choices, args.augmentation)
        features_of_view = extract_features(backbone, images, args, view.__getitem__)
        views.append(F.normalize(features_of_view, dim=1))
    return dict(
        knn_top1=accuracies[0],
        probe_top1=accuracies[1] if args.probe != "off" else None,
        alignment=alignment(*views).item(),
        uniformity=uniformity(views[0]).item(),
        effective_rank=effective_rank(features).item(),
        feature_std=F.normalize(features, dim=1).std(dim=0).mean().item(),
    )


def alignment(x, y):
    """The mean squared distance of the two views of an image (Wang and Isola, arXiv 2005.10242).
    x, y: float [N, D], L2-normalised, row i of y the other view of row i of x. 0: they coincide."""
    return (x - y).square().sum(dim=1).mean()


def uniformity(x, t=2):
    """The logarithm of the mean of e^(-t d^2), d the distance of two rows of x (Wang and Isola).
    x: float [N, D], L2-normalised. 0: all coincide; the lower, the more evenly they are spread."""
    return torch.pdist(x).square().mul(-t).exp().mean().log()


def effective_rank(x):
    """RankMe (Garrido et al., arXiv 2210.02885): e^H, H the entropy of the singular values of x
    [N, D], scaled to sum to 1. 1: all rows are parallel; D: all singular values are equal."""
    gram = (x.double().T @ x.double()).nan_to_num(0, 0, 0)  # D x D: faster than an SVD
    singular_values = torch.linalg.eigvalsh(gram.cpu()).clamp(min=0).sqrt()
    p = singular_values / singular_values.sum() + 1e-7  # so that log 0 is never asked for
    return (-p * p.log()).sum().exp()


# --------------------------------------------------------------------------------------------------
# 8. Run: optimizer, learning rate, CUDA graph; run directory: log, TensorBoard, checkpoint, resume

SECONDS_BETWEEN_CHECKPOINTS = 60


def build_optimizer(parameters, args, **flags):
    """SGD with the flags of the run, or with `flags`. On a GPU the learning rate is a tensor that
    the fused SGD reads there: a CUDA graph would freeze a number at what it was when recorded."""
    flags = dict(lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay) | flags
    how = dict(fused=True) if args.device == "cuda" else {}
    optimizer = torch.optim.SGD(parameters, **flags, **how)
    if args.device == "cuda":  # not before: SGD would wait for it, to compare it with 0
        optimizer.param_groups[0]["lr"] = torch.tensor(flags["lr"], device="cuda")
    groups = optimizer.state_dict()["param_groups"]  # of this machine, not of the checkpoint's
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "param_groups": groups})
    return optimizer


def adjust_learning_rate(optimizer, epoch, args, peak=None):
    """Set the learning rate of an epoch (0-based) as the DT authors do: a linear warm-up from 0.003
    to `peak`, by default lr * batch_size / 256, then a cosine to 0; or, with --schedule step, a
    tenth from 60 % and a hundredth from 80 % of the epochs on (MoCo v1)."""
    start, warmup = 0.003, args.warmup_epochs
    if peak is None:
        peak = args.lr * args.batch_size / 256
    if warmup is None:
        warmup = min(10, args.epochs // 20)
    if epoch < warmup:
        lr = start + (peak - start) * epoch / max(1, warmup - 1)
    elif args.schedule == "step":
        lr = peak * 0.1 ** ((5 * epoch >= 3 * args.epochs) + (5 * epoch >= 4 * args.epochs))
    else:
        lr = peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup)))
    group = optimizer.param_groups[0]
    group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr


class CUDAGraph:
    """A training step whose kernels are all launched at once. One by one, some 500 to 1000 of them
    take the host several milliseconds, which may be longer than the GPU needs for a small batch.
    The first three steps run as usual, so that everything is compiled, tuned and allocated; the
    fourth is recorded. From then on, a step returns the same tensors, with new values."""

    def __init__(self, step, probe):
        self.step, self.probe, self.graph, self.calls = step, probe, None, 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 4:
            self.record(batch)
        if self.graph is None:
            return self.step(batch)
        for mine, given in zip(self.batch, batch):
            if torch.is_tensor(given):
                mine.copy_(given)
        self.graph.replay()
        return self.outputs

    def record(self, batch):
        self.batch = Batch(*(x.clone() if torch.is_tensor(x) else x for x in batch))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.outputs = [x.detach() for x in self.step(self.batch)]
            self.graph = graph
        except RuntimeError as error:
            self.probe.features.clear()  # they were recorded, but not computed
            print(f"no CUDA graph, so slower: {str(error).splitlines()[0]}", flush=True)


def duration(seconds):
    """In words: "1 h 5 min", "4 min 10 s", "8 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min {seconds} s".removeprefix("0 min ")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error})") from None


def load_checkpoint(path):
    """Load a torch.save file onto the CPU. Only tensors and plain values are accepted: unpickling
    anything else could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch, zipfile and pickle each fail in their own way
        fix = "to read it, save its state_dict alone"
        raise UserError(f"'{path}' is damaged, or has more in it than tensors: {fix}") from None


def write_atomically(path, write):
    """write(temporary path), then rename: after a crash there is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power failure could leave an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        temporary.unlink(missing_ok=True)
        free, reason = shutil.disk_usage(path.parent).free / 1e6, str(error).splitlines()[0]
        raise UserError(f"cannot write '{path}', {free:.0f} MB are free: {reason}") from None


def lock(path):
    """Raise UserError if another process has locked this file; lock it until this one ends."""
    try:
        import fcntl

        fcntl.lockf(os.open(path, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in '{path.parent}'; change --out") from None
    except (ImportError, OSError):  # Windows and some network file systems have no such locks
        pass


class Run:
    """A run directory, --out: args.json, log.jsonl, checkpoint.pth and TensorBoard events, which
    only rank 0 reads and writes. Started again with the same flags, a run resumes from its last
    checkpoint. One is saved at most once a minute, and always after the last epoch."""

    def __init__(self, args, model, optimizer, backbone, data):
        """Begin a run, or fill `model` and `optimizer` from its checkpoint; exit if it is finished.
        `start_epoch` (0-based) is the first to train. kNN evaluates `backbone` on `data`."""
        self.args, self.path, self.data = args, Path(args.out), data
        self.model, self.optimizer, self.backbone = model, optimizer, backbone
        self.device, self.saved_at = data.train_images.device, -math.inf
        self.probe = Probe(args, backbone, len(data.classes), self.device)
        cached = " --cached" if self.device.type == "cpu" else ""
        self.next_command = f"Next: python linear_eval.py {self.path}{cached}"
        checkpoint = from_rank_zero(self.open)
        self.start_epoch = checkpoint["epoch"]
        if self.start_epoch >= args.epochs:
            sys.exit()
        if self.start_epoch > 0:
            self.load(checkpoint)
        else:  # the untrained network, to see how much is learnt
            entry = dict(epoch=0, loss=None, lr=None)
            self.log(dict(entry, **monitor(backbone, self.probe, data, args)))
        self.begin_epoch(self.start_epoch)

    def open(self):
        """Check what is in the directory and begin to write. Returns the checkpoint to resume from;
        its epoch is 0 if there is none."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        args, path, flags = self.args, self.path, self.path / "args.json"
        if flags.exists():
            theirs, ours, differences = read_json(flags), vars(args), []
            theirs.setdefault("probe", "off")  # a run from before there was one
            for name in sorted((theirs.keys() | ours.keys()) - set(MACHINE_FLAGS)):
                if theirs.get(name) != ours.get(name):
                    differences.append(f"{name} {theirs.get(name)} (now {ours.get(name)})")
            other = ", ".join(differences)
            require(not other, f"'{path}' is a run with {other}; choose another --out")
        else:
            is_free = not path.exists() or (path.is_dir() and os.listdir(path) in ([], [".lock"]))
            require(is_free, f"--out '{path}' is neither empty nor a run; choose another")
        checkpoint = dict(epoch=0)
        if (path / "checkpoint.pth").exists():
            checkpoint = load_checkpoint(path / "checkpoint.pth")
            try:  # before anything is written
                self.load(checkpoint)
            except Exception:  # another network, or no checkpoint at all
                raise UserError(f"'{path}/checkpoint.pth' is not of this run") from None
        epoch = checkpoint["epoch"]
        if epoch >= args.epochs:
            print(f"'{path}' is finished: {epoch} epochs. {self.next_command}")
            return checkpoint

        hardware = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        hardware = torch.cuda.get_device_name() if args.device == "cuda" else hardware
        environment = f"torch {torch.__version__}, {world_size()} x {hardware}"
        path.mkdir(parents=True, exist_ok=True)
        lock(path / ".lock")
        flags.write_text(json.dumps(dict(vars(args), environment=environment), indent=1) + "\n")
        # Epochs that were logged but not saved are trained, and logged, again.
        log = path / "log.jsonl"
        logged = log.read_text().splitlines(keepends=True) if epoch > 0 else []
        log.write_text("".join(logged[: epoch + 1]))
        self.tensorboard = SummaryWriter(path, purge_step=epoch + 1 if epoch > 0 else 0)
        resumed = f", resumed after epoch {epoch}" if epoch > 0 else ""
        how = f"{args.precision}, {'compiled' if args.compile == 'on' else 'eager'}"
        if args.device == "cuda":
            how += ", CUDA graph" if args.cuda_graph == "on" else ", no CUDA graph"
        print(f"{args.method}, {how}, {environment} -> {path}{resumed}", flush=True)
        return checkpoint

    def load(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.args.probe != "off":
            self.probe.load_state_dict(checkpoint["probe"])

    def begin_epoch(self, epoch):
        adjust_learning_rate(self.probe.optimizer, epoch, self.args, peak=0.3)
        self.started, self.step = time.perf_counter(), 0
        self.loss_sum = torch.zeros((), device=self.device)

    def cuda_graph(self, step):
        """Decorator: the training step, a function of a Batch, as a CUDAGraph if --cuda-graph."""
        return CUDAGraph(step, self.probe) if self.args.cuda_graph == "on" else step

    def record(self, batch, loss, q, k, queue=None):
        """Add the loss of a step to the epoch's sum, without waiting for the device. Of the last
        step, also keep the views and the statistics of q, k [N, C] and queue [K, C] for the log."""
        self.loss_sum += loss.detach()
        self.step += 1
        if self.step == len(self.data.train_images) // self.args.batch_size:
            self.views = torch.cat([batch.view1[:8], batch.view2[:8]])
            self.statistics = contrast_statistics(q, k, self.args, queue)

    def end_epoch(self, epoch):
        """After an epoch (0-based): kNN if it is due, log, checkpoint. Raises UserError if the loss
        is not finite or a file cannot be written; the last checkpoint stays."""
        args, finished, lr = self.args, epoch + 1, float(self.optimizer.param_groups[0]["lr"])
        loss = all_reduce_sum(self.loss_sum).item() / (self.step * world_size())
        training_seconds = time.perf_counter() - self.started
        where = f"epoch {finished}, at lr {lr:.4g} in {args.precision}; a lower --lr may help"
        require(math.isfinite(loss), f"the loss became {loss} in {where}")
        average_batchnorm(self.model)
        entry = dict(epoch=finished, loss=loss, lr=lr, knn_top1=None, probe_top1=None)
        if finished % args.knn_every == 0 or finished == args.epochs:
            entry.update(monitor(self.backbone, self.probe, self.data, args))
        # An image counts once, though it has two views.
        entry["images_per_second"] = self.step * args.batch_size / training_seconds
        entry["seconds"] = time.perf_counter() - self.started
        self.log(entry)
        is_old = time.perf_counter() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS
        if rank() == 0 and (is_old or finished == args.epochs):
            state = dict(epoch=finished, model=self.model.state_dict())
            state["optimizer"] = self.optimizer.state_dict()
            if args.probe != "off":
                state["probe"] = self.probe.state_dict()
            write_atomically(self.path / "checkpoint.pth", lambda path: torch.save(state, path))
            self.saved_at = time.perf_counter()
            if finished == args.epochs:
                log = map(json.loads, (self.path / "log.jsonl").read_text().splitlines())
                took = duration(sum(entry.get("seconds", 0) for entry in log))  # in all starts
                print(f"{finished} epochs took {took}. {self.next_command}", flush=True)
        self.begin_epoch(finished)

    def log(self, entry):
        """Print an epoch, and write it to TensorBoard and log.jsonl."""
        if rank() != 0:
            return
        epoch, board = entry["epoch"], self.tensorboard
        text = f"{'(untrained)':51}"  # as wide as what is printed of other epochs
        if epoch > 0:
            text = f"loss {entry['loss']:7.4f}  lr {entry['lr']:.4f}"
            text += f"  {entry['images_per_second']:6.0f} images/s {entry['seconds']:7.1f} s"
            for name, value in self.statistics.items():
                if "_similarity" in name:
                    board.add_histogram(f"similarity/{name}", value, epoch)
                entry[name] = value.mean().item()
            mean, std = (torch.tensor(x, device=self.device)[:, None, None] for x in (MEAN, STD))
            grid = torchvision.utils.make_grid((self.views * std + mean).clamp(0, 1))
            board.add_image("first and second views", grid, epoch)
        for name, title in (("knn_top1", "kNN"), ("probe_top1", "probe")):
            if entry[name] is not None:
                text += f"  {title} {entry[name]:5.2f} %"
        last = str(self.args.epochs)
        print(f"epoch {epoch:{len(last)}d}/{last}  {text}", flush=True)
        groups = dict(loss="train", lr="train", images_per_second="speed")
        groups.update(knn_top1="accuracy", probe_top1="accuracy")
        for name in ("alignment", "uniformity", "effective_rank", "feature_std"):
            groups[name] = "features"
        for name, value in entry.items():
            if value is not None and name not in ("epoch", "seconds"):
                board.add_scalar(f"{groups.get(name, 'contrast')}/{name}", value, epoch)
        board.flush()
        with open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
