"""What the three scripts share, in the order in which the data flows.

Papers: MoCo (arXiv 1911.05722), MoCo v2 (2003.04297), EqCo (2010.01929), DCL (2110.06848), and DT
(2203.17248), "dual temperature", the paper of SimMoCo and SimCo. Shapes: N images per step and
process, M in all, SxS pixels, D features, C dimensions of a query, K negatives; n: any number.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel
from torch.utils._triton import has_triton
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.functional import rgb_to_grayscale
from tqdm import tqdm

# 1. Flags and errors ------------------------------------------------------------------------------

# Where a run is computed, not what: these flags may change when it resumes or is repeated.
MACHINE_FLAGS = ("data", "out", "device", "compile", "cuda_graph", "environment")
NO_FLAGS = (*MACHINE_FLAGS, "images", "changed")  # in args.json, but not for --config to repeat
RETIRED = dict(probe="query", image_size=32, deterministic=False)  # removed flags, fixed at this
PRECISIONS = dict(auto=None, bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
SECONDS_BETWEEN_CHECKPOINTS = 60  # at least


def number(kind, low, high=1e9):
    """An argparse type: an int or a float, whichever `kind` is, from `low` to `high`."""
    def number(text):  # argparse says "invalid number value" if it is none
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high:g}")
        return kind(text)
    return number


def argument_parser(method, loss):
    """The flags that all methods share. The defaults are the DT authors' recipe for CIFAR-100."""
    count, positive = number(int, 1), number(float, 1e-6)
    style = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(usage=f"python {method}.py [--flag value ...]", **style)
    parser.set_defaults(method=method, images=None)
    parser.add_argument("--config", metavar="FILE", help="args.json of a run to repeat")
    add = parser.add_argument_group("data and training").add_argument
    add("--dataset", default="cifar100", help="cifar10, cifar100, or NAME of a file DATA/NAME.npz")
    add("--data", default="data", metavar="DIR", help="where it is, or is downloaded to")
    add("--subset", type=count, metavar="N", help="train on N images, balanced by class")
    add("--augmentation", default="v2", choices=("v1", "v2"), help="v1: MoCo v1's colour jitter")
    add("--epochs", default=200, type=count, help="passes over the training images")
    add("--batch-size", default=256, type=number(int, 2), help="images per step, in all processes")
    add("--lr", default=0.03, type=positive, help="peak learning rate, per 256 images")
    add("--warmup-epochs", type=number(int, 0), help="if not given: EPOCHS / 20, at most 10")
    add("--schedule", default="cosine", choices=("cosine", "step"), help="step: MoCo v1's")
    add("--weight-decay", default=5e-4, type=number(float, 0), help="of all parameters")
    add("--momentum", default=0.9, type=number(float, 0, 1), help="of SGD")
    add("--seed", default=0, type=number(int, 0), help="of weights, batches and augmentation")
    add = parser.add_argument_group("network and loss").add_argument
    # Below 8 channels oneDNN, its issue 6035, writes past its memory on CPUs with AVX2.
    add("--width", default=64, type=number(int, 8), help="channels of ResNet-18's first stage")
    add("--stem-padding", default=2, type=int, choices=(1, 2), help="1: usual; 2: the authors'")
    add("--head", default="mlp", choices=("mlp", "linear"), help="linear: MoCo v1's")
    add("--head-bn", action="store_true", help="BatchNorm in the head, as in SiMo (EqCo)")
    add("--bn-splits", default=1, type=count, metavar="G", help="BatchNorm over G groups")
    add("--sync-bn", action="store_true", help="BatchNorm over the images of all processes")
    add("--moco-dim", default=128, type=count, help="dimensions of queries and keys")
    add("--loss", default=loss, choices="infonce eqco dcl dual".split(), help="see README")
    add("--moco-t", default=0.1, type=number(float, 0.02), help="temperature of the softmax")
    add("--alpha", type=positive, help="of --loss eqco: K negatives count as ALPHA")
    add("--dt-m", default=10.0, type=positive, help="of --loss dual: T_beta / T_alpha")
    add = parser.add_argument_group("machine and log").add_argument
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if present")
    add("--precision", default="auto", choices=PRECISIONS, help="auto: bf16 or fp16 where fast")
    add("--compile", default="auto", choices=("auto", "on", "off"), help="auto: on a GPU")
    add("--cuda-graph", default="auto", choices=("auto", "off"), help="auto: where it is possible")
    add("--out", metavar="DIR", help=f"of the run; if not given: runs/{method}-...")
    add("--knn-every", default=5, type=count, metavar="N", help="evaluate every N epochs")
    return parser


def parse_args(parser):
    """parser.parse_args(). The flags in args.json of an earlier run, --config, come first."""
    args = parser.parse_args()
    if args.config is not None:
        earlier, defaults = read_json(args.config), RETIRED | vars(parser.parse_args([]))
        require(earlier.get("method") == args.method, f"'{args.config}' is not of {args.method}")
        names = [x for x in earlier if earlier[x] != defaults.get(x, ...) and x not in NO_FLAGS]
        flags = [f"--{x.replace('_', '-')}={earlier[x]}".removesuffix("=True") for x in names]
        args = parser.parse_args(flags + sys.argv[1:])
        args.images = earlier.get("images") if args.dataset == earlier.get("dataset") else None
    del args.config
    return args


def setup(args):
    """Join the other processes, check that the flags go together, resolve "auto" and --out."""
    device = init_device(args)
    share, rest = divmod(args.batch_size, WORLD_SIZE)
    require(rest == 0, f"--batch-size must be a multiple of {WORLD_SIZE}, the number of processes")
    fits = share % args.bn_splits == 0 and share > args.bn_splits
    require(fits, f"BatchNorm needs groups of two or more of {share} images; see --bn-splits")
    can_sync = args.bn_splits == 1 and (WORLD_SIZE == 1 or args.device == "cuda")
    require(can_sync or not args.sync_bn, "--sync-bn needs GPUs, and no --bn-splits")
    require((args.loss == "eqco") == (args.alpha is not None), "--alpha goes with --loss eqco")
    require(args.loss == "dual" or args.dt_m == 10, "--dt-m goes with --loss dual")
    if args.out is None:
        args.out = f"runs/{args.method}-{args.dataset}-bs{args.batch_size}-seed{args.seed}"
    if args.compile == "auto":  # Triton, which writes the kernels, needs a C compiler
        has_compiler = any(map(shutil.which, os.getenv("CC", "gcc clang").split()))
        args.compile = "on" if args.device == "cuda" and has_compiler and has_triton() else "off"
    drawn = getattr(args, "num_negatives", None) or 0  # per query; 0: all others are negatives
    require(drawn < args.batch_size, "--num-negatives must be less than --batch-size")
    draws = drawn or getattr(args, "memory_bank", False)  # a graph would repeat what was drawn
    can_record = args.device == "cuda" and WORLD_SIZE == 1 and not draws
    args.cuda_graph = "on" if can_record and args.cuda_graph == "auto" else "off"
    if args.cuda_graph == "on":
        torch.cuda.set_stream(torch.cuda.Stream())  # on the default one, nothing can be recorded
    return device


def init_device(args):
    """Join the processes that torchrun started, and resolve "auto" in --device and --precision."""
    has_gpu = torch.cuda.is_available()
    if args.device == "auto":
        args.device = "cuda" if has_gpu else "cpu"
    require(has_gpu or args.device == "cpu", "PyTorch sees no CUDA GPU; use --device cpu")
    if WORLD_SIZE > 1:
        if args.device == "cuda":
            gpu = int(os.environ["LOCAL_RANK"])
            require(gpu < torch.cuda.device_count(), f"more processes than GPUs (LOCAL_RANK {gpu})")
            torch.cuda.set_device(gpu)
        print(f"RANK {RANK} of WORLD_SIZE {WORLD_SIZE} waits for the others", flush=True)
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        OBJECTS.append(dist.new_group(backend="gloo", timeout=timedelta(hours=9)))
    if args.precision == "auto":  # bf16 where it is fast: on GPUs since Ampere, on some CPUs
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # not in every PyTorch
        if args.device == "cuda":
            has_bf16 = torch.cuda.get_device_capability()[0] >= 8
        args.precision = "bf16" if has_bf16 else "fp16" if args.device == "cuda" else "fp32"
    require(args.precision != "fp16" or args.device == "cuda", "--precision fp16 needs a GPU")
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.backends.cudnn.benchmark = True  # choose the fastest convolutions by trying
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # too coarse for similarities
    return torch.device(args.device)


def autocast(args):
    """Mixed precision for the encoders. Weights, similarities and losses stay in float32."""
    dtype = PRECISIONS[args.precision]
    return torch.autocast(args.device, dtype, enabled=dtype != torch.float32)


def require(condition, message):
    """For mistakes that the user can fix: one line and exit code 2, as argparse has it."""
    if not condition:
        if RANK == 0 or not dist.is_initialized():  # usually all processes fail in the same way
            print("error:", message, file=sys.stderr)
        sys.exit(2)


def launch(main, if_interrupted=""):
    """Run a script. A file that cannot be read or written is a mistake that the user can fix."""
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # of what a terminal cannot show
    home = os.path.expanduser("~/")  # the shell leaves it to us in --out=~/run
    sys.argv = [os.path.expanduser(x).replace("=~/", f"={home}", 1) for x in sys.argv]
    try:
        main()
    except OSError as error:
        require(False, error)
    except KeyboardInterrupt:
        print(f"\ninterrupted{if_interrupted}", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def read_json(path):
    try:
        return {**json.loads(Path(path).read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        require(False, f"'{path}' is damaged, or not a JSON object: {error}")


def write_atomically(path, write):
    """write(temporary path), then rename: after a crash there is the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power failure could leave an empty file
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk; the latter by torch.save
        temporary.unlink(missing_ok=True)
        require(False, f"cannot write '{path}' (a full disk?): {str(error).splitlines()[0]}")


# 2. Processes: torchrun starts one per GPU. Without torchrun there is only one --------------------

TORCHRUN = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT".split()
LAUNCHED = all(map(os.getenv, TORCHRUN))  # other programs may set only some of them
RANK, WORLD_SIZE = (int(os.environ[x]) for x in TORCHRUN[:2]) if LAUNCHED else (0, 1)
OBJECTS = []  # a group for data and checkpoints: NCCL would time out, say in a long download


def concat_all_gather(tensor):
    """[N, ...] of each process -> [M, ...], in the order of ranks. Gradients flow back."""
    return torch.cat(all_gather(tensor)) if WORLD_SIZE > 1 else tensor


def all_reduce_sum(tensor):
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_zero(function, *arguments):
    """What the function returns in process 0, for all. So machines need no shared file system."""
    result = [function(*arguments) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(result, group=OBJECTS[-1])
    return result[0]


def encode_shuffled(encoder, views, permutation):
    """Shuffling BN (MoCo, section 3.3): the keys of views [N, 3, S, S], encoded with the global
    batch permuted (int64 [M] or None). Else BatchNorm would tell which key goes with a query."""
    if permutation is None:
        return encoder(views)[0]
    share = permutation.chunk(WORLD_SIZE)[RANK]
    keys, _ = encoder(concat_all_gather(views)[share])
    origin = permutation.argsort().chunk(WORLD_SIZE)[RANK]
    return concat_all_gather(keys)[origin]


def parallelize(model, args):
    """The model to call in a step. DDP copies no buffers: queues agree; see average_batchnorm."""
    if args.compile == "on":
        model.compile()
    if WORLD_SIZE == 1:
        return model
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def average_batchnorm(model):
    """Average the running statistics over the processes, so that all evaluate the same network."""
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            all_reduce_sum(buffer).div_(WORLD_SIZE)


# 3. Datasets: decoded once, then resident on the device as uint8. CIFAR-100 takes 184 MB ----------

class Dataset(NamedTuple):
    train_images: Tensor  # uint8 [number of images, S, S, 3], RGB
    train_labels: Tensor  # int64 [number of images]
    test_images: Tensor
    test_labels: Tensor
    classes: list  # of str


def load_data(args, device, at_least=1):
    """The Dataset that the flags name, on the device; it must have `at_least` training images. Sets
    args.images to its fingerprint. Where that is set already, by a run, the two must be equal."""
    images, labels, *test, classes = data = from_rank_zero(read_dataset, args)
    wanted, args.images = args.images, fingerprint(data)
    fault = f"'{args.dataset}' in '{args.data}' is {args.images}, but the run's was {wanted}"
    require(wanted in (None, args.images), fault)
    size = args.subset or len(images)
    require(size <= len(images), f"--subset {size}: '{args.dataset}' has {len(images)} images")
    require(at_least <= size, f"--batch-size {at_least}: there are only {size} training images")
    keep = balanced(labels, len(classes), size)
    tensors = (images[keep], labels[keep], *test)
    return Dataset(*(x.to(device) for x in tensors), classes)


def fingerprint(data):
    """A str for args.json, which identifies a Dataset by its content, not by its name."""
    content = hashlib.sha256(json.dumps(data.classes).encode())
    for tensor in data[:4]:
        content.update(tensor.contiguous().numpy())
    count = f"{len(data.train_images)} + {len(data.test_images)} images"
    return f"{count}, {len(data.classes)} classes, sha256 {content.hexdigest()[:12]}"


def balanced(labels, num_classes, count):
    """The sorted indices of `count` images, taken from the classes in turn, first images first."""
    by_class, index = labels.sort(stable=True)
    nth = torch.ones_like(labels).cumsum(0) - torch.searchsorted(by_class, by_class)  # of its class
    turn = nth * num_classes + by_class
    return index[turn.argsort()[:count]].sort().values


def read_dataset(args):
    """DATA/NAME.npz if there is such a file, or else CIFAR by torchvision."""
    path = Path(args.data, f"{args.dataset}.npz")
    if path.exists():
        return read_npz(path)
    require(args.dataset in ("cifar10", "cifar100"), f"'{path}' is missing; see results/prepare.py")
    cifar = getattr(torchvision.datasets, args.dataset.upper())
    try:
        train, test = (cifar(args.data, train=x, download=True) for x in (True, False))
    except Exception as error:  # no network, a full disk, a damaged archive: many exceptions
        require(False, f"cannot download {cifar.url} to '{args.data}': {error}")
    arrays = (train.data, train.targets, test.data, test.targets)
    return Dataset(*map(torch.as_tensor, arrays), train.classes)


def read_npz(path):
    """A Dataset of the arrays in a file, which have the names of its fields."""
    try:
        with np.load(path) as file:
            *arrays, classes = (file[name] for name in Dataset._fields)
        names = [*map(str, classes.astype(str))]
    except Exception as error:  # numpy, zipfile and zlib each fail in their own way
        require(False, f"'{path}' is damaged or not a dataset: {error}")
    tensors, size = [], arrays[0].shape[1:2]
    for images, labels in (arrays[:2], arrays[2:]):
        kind, shape = images.dtype, images.shape
        odd = {*labels.ravel().tolist()} - {*range(len(names))}
        fits = kind == "uint8" and shape[1:] == (*size, *size, 3) and images.size > 0
        require(fits, f"'{path}': images must be uint8 [N > 0, S, S, 3], not {kind} {list(shape)}")
        fault = f"'{path}': labels must be {shape[0]} integers from 0 to {len(names) - 1}, not"
        require(labels.shape == shape[:1] and not odd, f"{fault} {list(labels.shape)} {[*odd][:3]}")
        tensors += torch.from_numpy(images), torch.from_numpy(labels.astype("int64"))
    return Dataset(*tensors, names)


# 4. Augmentation: torchvision's, but for a batch at once, of images float [n, 3, S, S] in 0..1 ----

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class ViewParams(NamedTuple):  # of n views
    box: Tensor  # int64 [n, 4], of the crop: top, left, height, width, in pixels
    flip: Tensor  # bool [n]
    order: Tensor  # int64 [n, 4], a permutation of BRIGHTNESS, ..., HUE
    factor: Tensor  # float32 [n, 4], of BRIGHTNESS, ..., HUE; 1, 1, 1, 0: no jitter
    grayscale: Tensor  # bool [n]


class Batch(NamedTuple):  # a process's share, N images, of the global batch of M images
    view1: Tensor  # float32 [N, 3, S, S]
    view2: Tensor
    index: Tensor  # int64 [N], which training images these are
    labels: Tensor  # int64 [N]; for the probe only
    permutation: Tensor  # int64 [M], for encode_shuffled; None: there is nothing to shuffle
    generator: torch.Generator  # for other draws of this step; in the same state everywhere


def batches(data, epoch, args):
    """Yield an epoch's (0-based) Batches, dropping an incomplete last one. What is random is drawn
    for the global batch, seeded by --seed, epoch and step; WORLD_SIZE plays no part."""
    num_images, image_size = data.train_images.shape[:2]
    device, batch_size = data.train_images.device, args.batch_size
    steps, share = num_images // batch_size, batch_size // WORLD_SIZE
    generator = seeded_generator(device, args.seed, epoch)
    index = torch.randperm(num_images, generator=generator, device=device)
    params = draw_params(2 * steps * batch_size, image_size, generator, args.augmentation)
    # This process's rows, by step: index [steps, N], params [steps, 2N, ...], first views first.
    index = index[: steps * batch_size].view(steps, WORLD_SIZE, share)[:, RANK]
    params = [x.unflatten(0, (steps, WORLD_SIZE, share, 2))[:, RANK] for x in params]
    params = [x.transpose(1, 2).flatten(1, 2) for x in params]
    make_views = torch.compile(augment) if args.compile == "on" else augment  # compiled once
    several_groups = args.bn_splits > 1 or (WORLD_SIZE > 1 and not args.sync_bn)
    bar = dict(desc=f"epoch {epoch + 1}/{args.epochs}", total=args.epochs * steps, leave=False)
    for step in tqdm(range(steps), initial=epoch * steps, disable=RANK > 0 or None, **bar):
        own, both = index[step], ViewParams(*(x[step] for x in params))
        images = data.train_images[own].repeat(2, 1, 1, 1)
        view1, view2 = make_views(images, both, args.augmentation).chunk(2)
        generator = seeded_generator(device, args.seed, epoch, step + 1)
        chance = torch.rand(batch_size, generator=generator, device=device)
        permutation = chance.argsort() if several_groups else None
        yield Batch(view1, view2, own, data.train_labels[own], permutation, generator)


def seeded_generator(device, *numbers):
    """A random generator whose state depends on the numbers only."""
    seed = np.random.SeedSequence(numbers).generate_state(1, "uint64").item()
    return torch.Generator(device).manual_seed(seed)


def draw_params(count, image_size, generator, augmentation="v2"):
    """Random ViewParams, distributed as torchvision's. "v1": jitter for all, with more hue."""
    draw = dict(generator=generator, device=generator.device)
    box = draw_boxes(count, image_size, generator)
    uniform = torch.rand(count, 7, **draw)  # 4 factors, 3 chances
    order = torch.rand(count, 4, **draw).argsort()
    hue, probability = (0.4, 1.0) if augmentation == "v1" else (0.1, 0.8)
    strength, neutral = torch.tensor([[0.4, 0.4, 0.4, hue], [1.0, 1, 1, 0]], device=box.device)
    jitter = uniform[:, 4:5] < probability
    factor = neutral + jitter * strength * (2 * uniform[:, :4] - 1)
    return ViewParams(box, uniform[:, 5] < 0.5, order, factor, uniform[:, 6] < 0.2)


def draw_boxes(count, size, generator):
    """The boxes of RandomResizedCrop for square images: of ten random areas (0.08 to 1) and aspect
    ratios (3/4 to 4/3, log-uniform), the first that fits; if none does, the whole image."""
    draw = dict(generator=generator, device=generator.device)
    area = 0.08 + 0.92 * torch.rand(count, 10, **draw)
    ratio = (math.log(3 / 4) + math.log(16 / 9) * torch.rand(count, 10, **draw)).exp()
    sides = (size * torch.stack([area / ratio, area * ratio]).sqrt()).round()  # height, width
    fits = (sides == sides.clamp(1, size)).all(0)  # [count, 10]
    first = fits.int().argmax(1)
    sides = sides.take_along_dim(first[None, :, None], dim=2).squeeze(2)  # [2, count]
    sides = torch.where(fits.any(1), sides, float(size))
    corners = (torch.rand(2, count, **draw) * (size - sides + 1)).floor()
    return torch.cat([corners, sides]).long().T


def resize_matrix(start, length, size):
    """Cropping and resizing are linear along each axis. This is their matrix, [n, S, S]: row i has
    the weights of an axis's pixels in output pixel i, if the output shows the part from `start` to
    `start + length`, int64 [n]. The filter is PIL's bicubic (a = -0.5), wider when shrinking."""
    start, end = start[:, None], (start + length)[:, None]
    step = length[:, None] / size  # [n, 1]: from one output pixel to the next, in the image
    pixel = torch.arange(size, device=start.device) + 0.5
    centre = (start + pixel * step)[:, :, None]  # where each output pixel is in the image
    x = ((pixel - centre) / step.clamp(1)[:, :, None]).abs()  # output pixel, image pixel
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, far)
    inside = (pixel > start) & (pixel < end)  # [n, S]: image pixels of the crop
    weight = torch.where((x < 2) & inside[:, None], weight, 0.0)
    return weight / weight.sum(dim=2, keepdim=True)


def crop_resize_flip(images, box, flip):
    """Resize the boxes [n, 4] to the size of the image, and mirror where `flip` [n]."""
    top, left, height, width = box.unbind(1)
    rows = resize_matrix(top, height, images.shape[2])  # [n, S, S]
    columns = resize_matrix(left, width, images.shape[2])
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)  # mirrors the output
    # Bicubic overshoots at edges. PIL resizes the width first and stores 8 bits: clamp there, too.
    images = (images @ columns.mT[:, None]).clamp_(0, 1)
    return (rows[:, None] @ images).clamp_(0, 1)


def blend(images, operation, factor):
    """Brightness, contrast or saturation, as `operation` [n] says: factor * image
    + (1 - factor) * (black, the mean gray of the image, or the gray image)."""
    operation, factor = operation[:, None, None, None], factor[:, None, None, None]
    gray = rgb_to_grayscale(images)
    black_or_mean = gray.mean(dim=(2, 3), keepdim=True) * (operation != BRIGHTNESS)
    other = torch.where(operation == SATURATION, gray, black_or_mean)
    return torch.lerp(other, images, factor).clamp_(0, 1)


def adjust_hue(images, shift):
    """Rotate the hue by `shift` [n] of a circle, through HSV."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma == 0, 1.0, chroma)  # no division by 0: gray has no hue
    # The hue, in sixths of the circle: red is 0, green 2, blue 4.
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue)
    hue = hue + 6 * shift[:, None, None]
    # Back to RGB: a channel is between value - chroma and value, by its distance from the hue.
    offset = 5 - 2 * torch.arange(3, device=images.device)[:, None, None]  # red 5, green 3, blue 1
    k = (offset + hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(images, order, factor):
    """torchvision's ColorJitter. The hue step is costly, and an image has it at any of four places.
    So all have it at once, between two rounds of blends: those before it, and those after it."""
    hue_place = (order == HUE).int().argmax(dim=1)
    factor_at = factor.gather(1, order)  # [n, 4], by place
    for place in (0, 1, 2):
        before = torch.where(place < hue_place, factor_at[:, place], 1.0)  # 1: changes nothing
        images = blend(images, order[:, place], before)
    images = adjust_hue(images, factor[:, HUE])
    for place in (1, 2, 3):
        after = torch.where(place > hue_place, factor_at[:, place], 1.0)
        images = blend(images, order[:, place], after)
    return images


def to_float(images):
    """uint8 [n, S, S, 3] -> float32 [n, 3, S, S] in 0..1."""
    return images.permute(0, 3, 1, 2).float() / 255


def normalize(images):
    """Subtract the mean colour of CIFAR, divide by its standard deviation. In channels_last."""
    channels = [(channel - mean) / std for channel, mean, std in zip(images.unbind(1), MEAN, STD)]
    return torch.stack(channels, dim=3).permute(0, 3, 1, 2)


def augment(images, params, augmentation="v2"):
    """A normalised view of each image, uint8 [n, S, S, 3]. "v1": grayscale before the jitter."""
    grayscale = params.grayscale[:, None, None, None]
    images = crop_resize_flip(to_float(images), params.box, params.flip)
    if augmentation == "v1":
        images = torch.where(grayscale, rgb_to_grayscale(images), images)
    images = color_jitter(images, params.order, params.factor)
    if augmentation == "v2":
        images = torch.where(grayscale, rgb_to_grayscale(images), images)
    return normalize(images)


# 5. Network ---------------------------------------------------------------------------------------

def resnet18(width=64, stem_padding=2, norm_layer=nn.BatchNorm2d):
    """ResNet-18 for CIFAR: a 3x3 first convolution of stride 1, no max-pooling, no classifier.
    [N, 3, S, S] -> features [N, D], D = 8 * width. Parameters have torchvision's names.
    The DT authors pad the first convolution by 2, so that their maps are 34x34; 1 is usual."""
    backbone = nn.Sequential()
    backbone.conv1 = nn.Conv2d(3, width, 3, padding=stem_padding, bias=False)
    backbone.bn1 = norm_layer(width)
    backbone.relu = nn.ReLU(inplace=True)
    for name, stride in dict(layer1=1, layer2=2, layer3=2, layer4=2).items():
        before, channels, shortcut = width, stride * width, None  # as maps halve, channels double
        if stride > 1:
            conv = nn.Conv2d(before, channels, 1, stride, bias=False)
            shortcut = nn.Sequential(conv, norm_layer(channels))
        first = BasicBlock(before, channels, stride, shortcut, norm_layer=norm_layer)
        second = BasicBlock(channels, channels, norm_layer=norm_layer)
        backbone.add_module(name, nn.Sequential(first, second))
        width = channels
    backbone.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.num_features = width
    for name, module in backbone.named_modules():
        # As torchvision. A conv1 that is put in afterwards, as is usual, keeps PyTorch's default.
        if isinstance(module, nn.Conv2d) and name != "conv1":
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


class Encoder(nn.Module):
    """Images [N, 3, S, S] -> queries or keys [N, C], of length 1, and the features [N, D] behind
    them, for the probe. The head is MoCo v2's, with the DT authors' 128 hidden units."""
    def __init__(self, args):
        super().__init__()
        norm1d, norm2d = nn.BatchNorm1d, nn.BatchNorm2d
        if args.bn_splits > 1:
            norm1d = norm2d = partial(SplitBatchNorm, splits=args.bn_splits)

        def linear(size_in, size_out):
            layer = nn.Linear(size_in, size_out)
            return nn.Sequential(layer, norm1d(size_out)) if args.head_bn else layer

        self.backbone = resnet18(args.width, args.stem_padding, norm2d)
        if args.head == "linear":
            self.head = linear(8 * args.width, args.moco_dim)
        else:
            hidden = linear(8 * args.width, 128)
            self.head = nn.Sequential(hidden, nn.ReLU(), linear(128, args.moco_dim))

    def forward(self, x):
        features = self.backbone(x)
        z = F.normalize(self.head(features).float())
        return z, features.detach().float()  # the probe must not train the backbone


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm over each of `splits` groups of consecutive rows of [N, C, ...], as if each were on
    its own GPU (MoCo's CIFAR demo). The running statistics are averages over the groups."""
    def __init__(self, num_features, splits):
        super().__init__(num_features)
        self.splits = splits

    def forward(self, x):
        running = torch.stack([self.running_mean, self.running_var])
        if not self.training:
            return F.batch_norm(x, *running, self.weight, self.bias)
        outputs, copies = [], running.repeat(self.splits, 1, 1)  # each group updates its copy
        for group, copy in zip(x.chunk(self.splits), copies):
            outputs.append(F.batch_norm(group, *copy, self.weight, self.bias, training=True))
        for buffer, mean in zip((self.running_mean, self.running_var), copies.mean(dim=0)):
            buffer.copy_(mean)
        self.num_batches_tracked += 1
        return torch.cat(outputs)


# 6. Losses. To try another one, write it and name it in contrastive_loss --------------------------

def similarities(q, k, num_negatives=None, generator=None, queue=None):
    """`positive` and `negative` of q and k, float32 [N, C], of length 1. The positive of q[i] is
    k[i]; its negatives are `queue` [K, C], or else the other keys of the global batch: all, or
    `num_negatives`, by a generator with the same state everywhere. May raise ValueError."""
    with torch.autocast(q.device.type, enabled=False):
        if queue is not None:
            return (q * k).sum(dim=1), q @ queue.T
        similarity = q @ concat_all_gather(k).T  # NxM
    size = similarity.shape[1]
    if not 0 < (size - 1 if num_negatives is None else num_negatives) < size:
        raise ValueError(f"{num_negatives or 'no'} negatives in a batch of {size} images")
    own = RANK * len(q) + torch.arange(len(q), device=q.device)[:, None]  # Nx1, of the positives
    if num_negatives is None:
        others = (own + torch.arange(1, size, device=q.device)) % size  # Nx(M-1)
    else:  # draw for the global batch, so that it is the same on any number of processes
        chance = torch.rand(size, size, device=q.device, generator=generator)
        chance.fill_diagonal_(-1)  # never the own key
        others = chance[own.squeeze(1)].topk(num_negatives).indices  # NxK
    return similarity.gather(1, own).squeeze(1), similarity.gather(1, others)


def log_odds_against(positive, negative, t):
    """M = log( sum_neg e^(s_neg/T) / e^(s_pos/T) ), [N]: the log-odds against the positive. The
    softmax gives the positive p = 1 / (1 + e^M). So 1 - p = sigmoid(M) and -log p = softplus(M),
    which are accurate even where p is close to 1."""
    return torch.logsumexp((negative - positive[:, None]) / t, dim=1)


def info_nce(positive, negative, t, alpha=None):
    """InfoNCE (MoCo, equation 1): the mean of -log p, where p is the softmax of the positive at
    temperature t. alpha: with EqCo's margin t * log(alpha / K), K negatives count as alpha."""
    m = log_odds_against(positive, negative, t)
    if alpha is not None:
        m = m + math.log(alpha / negative.shape[1])
    return F.softplus(m).mean()


def dcl(positive, negative, t):
    """Decoupled contrastive learning (DCL, equation 5): InfoNCE without the positive in the
    denominator, so without the factor 1 - p in the gradient. No query counts less if it is easy."""
    return log_odds_against(positive, negative, t).mean()


def dual_temperature(positive, negative, t, dt_m):
    """Dual temperature (DT): the mean of w * -log p at T_alpha = t, with the weight
    w = (1 - p at T_beta) / (1 - p at T_alpha), T_beta = dt_m * t, through which no gradient flows.
    The gradient is DCL's, weighted by how hard the query is at T_beta (1 - p = sigmoid(M)):
        grad softplus(M) = sigmoid(M) grad M = (1 - p at T_alpha) grad M            # InfoNCE
        grad w softplus(M) = w (1 - p at T_alpha) grad M = (1 - p at T_beta) grad M"""
    m = log_odds_against(positive, negative, t)
    w = dual_temperature_weight(positive, negative, t, dt_m)
    # In float64: at t = 0.02, 1 - p can be as small as e^-100, where 1 / (1 - p) overflows float32.
    return (w * F.softplus(m.double())).mean().to(m.dtype)


@torch.no_grad()
def dual_temperature_weight(positive, negative, t, dt_m):
    """w = (1 - p at T_beta) / (1 - p at T_alpha), float64 [N]."""
    at_alpha = log_odds_against(positive, negative, t).double()
    at_beta = log_odds_against(positive, negative, t * dt_m).double()
    return (F.logsigmoid(at_beta) - F.logsigmoid(at_alpha)).exp()


def contrastive_loss(positive, negative, args):
    """The loss that --loss names, a scalar. (infonce and eqco differ in --alpha only.)"""
    if args.loss == "dual":
        return dual_temperature(positive, negative, args.moco_t, args.dt_m)
    if args.loss == "dcl":
        return dcl(positive, negative, args.moco_t)
    return info_nce(positive, negative, args.moco_t, args.alpha)


def info_nce_loss(q, k, temperature=0.1, queue=None, alpha=None):
    """info_nce of vectors, for other people's code. See similarities. Returns a scalar."""
    return info_nce(*similarities(q, k, queue=queue), temperature, alpha)


def dual_temperature_loss(q, k, temperature=0.1, dt_m=10.0, queue=None):
    """dual_temperature of vectors, for other people's code. See similarities. Returns a scalar."""
    return dual_temperature(*similarities(q, k, queue=queue), temperature, dt_m)


def contrast_statistics(positive, negative, args):
    """What the log says of a batch: {name: float}."""
    statistics = dict(positive_similarity=positive, negative_similarity=negative)
    statistics["positive_ranks_first"] = (positive > negative.amax(1)).float()
    if args.loss == "dual":
        weight = dual_temperature_weight(positive, negative, args.moco_t, args.dt_m)
        statistics["dual_temperature_weight"] = weight
    return {name: values.mean().item() for name, values in statistics.items()}


# 7. Evaluation while training, on the test set: kNN, the probe, and whether the features collapse -

@torch.no_grad()
def extract_features(backbone, images, args, crops=None):
    """Features [n, D] in eval mode, of images uint8 [n, S, S, 3], or of their `crops`: arguments of
    crop_resize_flip. Each process computes a part, and all return the whole."""
    backbone.eval()
    features = torch.zeros(len(images), backbone.num_features, device=images.device)
    chunks = torch.arange(len(images), device=images.device).split(1000)
    for chunk in chunks[RANK :: WORLD_SIZE]:
        views = to_float(images[chunk])
        if crops:
            views = crop_resize_flip(views, *(x[chunk] for x in crops))
        with autocast(args):
            features[chunk] = backbone(normalize(views)).float()
    features = all_reduce_sum(features)  # the rows of other processes are zero here
    for tensor in (*backbone.state_dict().values(), features.norm(dim=1)):  # else NaN is scored
        require(math.isfinite(tensor.sum()), "a weight, statistic or feature is NaN or infinite")
    return features


def knn_predict(features, bank, bank_labels, num_classes, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018, as in MoCo's CIFAR demo) for features [n, D]: the k rows of the
    bank [m, D] with the highest cosines vote, weighted by exp(cosine / temperature). Labels, [n]"""
    features, bank = F.normalize(features), F.normalize(bank)
    predicted = []
    for chunk in features.split(max(1, 2**25 // len(bank))):  # bounds the memory
        cosine, rows = (chunk @ bank.T).topk(min(k, len(bank)))
        votes = chunk.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, bank_labels[rows], (cosine / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def effective_rank(features):
    """RankMe (Garrido et al., arXiv 2210.02885): e^H, where H is the entropy of the singular values
    of features [n, D], scaled to sum to 1. From 1 (all rows are parallel) to D."""
    gram = features.double().T @ features.double()  # DxD: an SVD of the features is slower
    singular_values = torch.linalg.eigvalsh(gram.cpu()).clamp(min=0).sqrt()
    p = singular_values / singular_values.sum().clamp(min=1e-9) + 1e-7  # neither 0 / 0 nor log 0
    return (-p * p.log()).sum().exp().item()


def evaluate(backbone, probe, data, args):
    """What the log says of a network: {name: float}. The bank of kNN is the training set."""
    features = extract_features(backbone, data.test_images, args)
    measured = dict(effective_rank=effective_rank(features))
    if len(data.classes) > 1:
        bank = extract_features(backbone, data.train_images, args)
        logits = probe(features)
        require(math.isfinite(logits.sum().item()), "the probe became NaN or infinite")
        knn = knn_predict(features, bank, data.train_labels, len(data.classes))
        for name, predicted in dict(knn_top1=knn, probe_top1=logits.argmax(1)).items():
            measured[name] = 100 * (predicted == data.test_labels).double().mean().item()
    return measured


# 8. Optimizer, CUDA graph, checkpoint, log --------------------------------------------------------

def build_optimizer(encoder, probe, args):
    """SGD for the encoder and the probe (the DT authors' metric: a linear classifier that learns
    online, at learning rate 0.3, without weight decay), and a GradScaler, enabled only for fp16."""
    peak = args.lr * args.batch_size / 256
    groups = [
        dict(params=encoder.parameters(), peak_lr=peak, weight_decay=args.weight_decay),
        dict(params=probe.parameters(), peak_lr=0.3, weight_decay=0, momentum=0.9),
    ]
    fused = dict(fused=True) if args.device == "cuda" else {}
    optimizer = torch.optim.SGD(groups, lr=0, momentum=args.momentum, **fused)
    for group in optimizer.param_groups if fused else []:
        group["lr"] = torch.tensor(0.0, device="cuda")  # a CUDA graph would freeze a number
        for param in group["params"]:  # if the first step is skipped, fused SGD leaves garbage
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    GradScaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)  # before PyTorch 2.3
    return optimizer, GradScaler(enabled=args.precision == "fp16")


def adjust_learning_rate(optimizer, epoch, args):
    """Set an epoch's (0-based) learning rates as the DT authors do: linear warm-up from 0.003, then
    a cosine to 0. --schedule step, MoCo v1's: / 10 at 60 % and 80 %. Returns the encoder's."""
    warmup = min(10, args.epochs // 20) if args.warmup_epochs is None else args.warmup_epochs
    for group in reversed(optimizer.param_groups):  # the probe's, then the encoder's
        lr = group["peak_lr"]
        if epoch < warmup:
            lr = 0.003 + (lr - 0.003) * epoch / max(1, warmup - 1)
        elif args.schedule == "step":
            lr *= 0.1 ** max(0, 5 * epoch // args.epochs - 2)
        else:
            lr *= 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup)))
        group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr
    return lr


class CUDAGraph:
    """A training step whose 500 to 1000 kernels are launched at once. Three calls warm up: compile,
    tune, allocate. The fourth is recorded, and replayed from then on, into the same tensors."""
    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls < 4:
            return self.step(batch)
        if self.calls == 4:
            self.record(batch)
        for mine, new in zip(self.batch, batch):
            if torch.is_tensor(new):
                mine.copy_(new)
        self.graph.replay()
        return self.outputs

    def record(self, batch):
        self.graph, self.batch = torch.cuda.CUDAGraph(), batch  # later ones are copied there
        try:
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.outputs = self.step(batch)
        except RuntimeError as error:  # of ending the recording; its context is why the step failed
            cause = error.__context__ or error
            require(False, f"recording a CUDA graph failed; use --cuda-graph off ({cause!r})")


def resume(args, model, probe, optimizer, scaler):
    """Begin or continue the run in --out. Returns the number of epochs that are trained already."""
    checkpoint = from_rank_zero(open_run, args)
    if checkpoint is None:
        return 0
    try:
        model.load_state_dict(checkpoint["model"])
        probe.load_state_dict(checkpoint["probe"])
        groups = optimizer.state_dict()["param_groups"]  # of this machine, not of the other
        optimizer.load_state_dict(dict(state=checkpoint["momenta"], param_groups=groups))
        scaler.load_state_dict(checkpoint.get("scaler", {}))
        return checkpoint["epoch"]
    except Exception:  # each wrong layout fails in its own way
        require(False, f"'{args.out}/checkpoint.pth' is of another network or an earlier version")


def open_run(args):
    """Create --out, or check that it is a run of these flags. Returns its checkpoint, or None."""
    path, flags = Path(args.out), Path(args.out, "args.json")
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    args.environment = f"torch {torch.__version__}, {WORLD_SIZE} x {machine}"
    path.mkdir(parents=True, exist_ok=True)
    is_run = flags.exists() or {*os.listdir(path)} <= {".lock", "args.json.tmp"}  # just begun
    require(is_run, f"--out '{path}' is neither empty nor a run; choose another")
    try:  # a lock, until this process ends
        import fcntl
        lock = os.open(path / ".lock", os.O_CREAT | os.O_RDWR)
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        require(False, f"another process is training in '{path}'; choose another --out")
    except (ImportError, OSError):  # Windows and some network file systems have no such locks
        pass
    if not flags.exists():
        write_atomically(flags, lambda x: x.write_text(json.dumps(vars(args), indent=1)))
    theirs, ours = read_json(flags), vars(args)
    names = [x for x in ours if x not in MACHINE_FLAGS and ours[x] != theirs.get(x)]
    differ = ", ".join(f"{name} {theirs.get(name)} (now {ours[name]})" for name in names)
    require(not differ, f"'{path}' is a run with {differ}; choose another --out")
    how = f"{args.precision}, compile {args.compile}, CUDA graph {args.cuda_graph}"
    print(f"{args.method}, {how}, {args.environment} -> {path}", flush=True)
    checkpoint = path / "checkpoint.pth"
    if checkpoint.exists():
        return load_checkpoint(checkpoint)
    require(not (path / "result.json").exists(), f"'{path}' has a result, but lost its checkpoint")


def load_checkpoint(path):
    """What torch.save wrote. Tensors and plain values only: to unpickle more could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception:  # torch, zipfile and pickle each fail in their own way
        require(False, f"'{path}' is damaged, or has more in it than tensors; save its state_dict")


def save_checkpoint(epoch, args, model, probe, optimizer, scaler):
    """Write what `resume` reads, unless there is one of the last minute, and training goes on."""
    fits = scaler.get_scale() >= 1  # halved by each step that is skipped
    require(fits, "too many steps overflow in fp16; start anew: lower --lr, or --precision fp32")
    path = Path(args.out, "checkpoint.pth")
    age = abs(time.time() - path.stat().st_mtime) if path.exists() else math.inf
    if RANK == 0 and (epoch == args.epochs or age > SECONDS_BETWEEN_CHECKPOINTS):
        state = dict(epoch=epoch, stem_padding=args.stem_padding, scaler=scaler.state_dict())
        state |= dict(model=model.state_dict(), probe=probe.state_dict())
        state["momenta"] = optimizer.state_dict()["state"]
        write_atomically(path, lambda path: torch.save(state, path))


class Log:
    """A line for each epoch, printed and in log.jsonl, and curves in TensorBoard."""
    def __init__(self, args, start_epoch):
        self.args, self.path = args, Path(args.out, "log.jsonl")
        if RANK == 0 and start_epoch < args.epochs:
            from torch.utils.tensorboard import SummaryWriter  # slow to import
            self.lines = self.path.read_text().splitlines() if self.path.exists() else []
            fits = len(self.lines) > start_epoch if start_epoch else len(self.lines) < 3
            require(fits, f"'{args.out}' lost lines of its log, or its checkpoint; choose another")
            del self.lines[start_epoch and start_epoch + 1 :]  # to be trained and logged again
            threading.excepthook = lambda _: None  # TensorBoard raises in ours, too
            self.board = SummaryWriter(args.out, purge_step=start_epoch + 1)
        self.begin_epoch()

    def begin_epoch(self):
        self.started, self.steps, self.loss_sum = time.perf_counter(), 0, 0

    def add(self, loss):
        self.loss_sum += loss  # on the device: nothing waits
        self.steps += 1

    def training(self, lr):
        loss = all_reduce_sum(self.loss_sum).item() / (self.steps * WORLD_SIZE)
        require(math.isfinite(loss), f"the loss became {loss} in {self.args.precision}; lower --lr")
        speed = self.steps * self.args.batch_size / (time.perf_counter() - self.started)
        return dict(loss=loss, lr=lr, images_per_second=speed)  # an image counts once, not twice

    def write(self, epoch, measured):
        """Log what was measured after an epoch, {name: float}."""
        entry = dict(epoch=epoch, **measured, seconds=time.perf_counter() - self.started)
        if RANK != 0:
            return
        names = "loss lr images_per_second seconds knn_top1 probe_top1".split()
        text = [f"{name} {entry[name]:<6.5g}" for name in names if name in entry]
        print(f"epoch {epoch}/{self.args.epochs}", *text, sep="  ", flush=True)
        self.lines.append(json.dumps(entry))
        write_atomically(self.path, lambda path: path.write_text("\n".join(self.lines) + "\n"))
        for name, value in entry.items():
            self.board.add_scalar(name, value, epoch)
        self.board.flush()
