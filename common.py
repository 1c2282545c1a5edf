"""What moco_v2.py, simmoco.py and simco.py share and what is not the method: in the order the data flows,

    1. errors and flags           5. ResNet-18 for CIFAR and the projection head
    2. processes                  6. the losses
    3. datasets                   7. the kNN monitor
    4. augmentation               8. the run: learning rate, log, TensorBoard, checkpoint and resume

Papers, by the names used below: MoCo (arXiv 1911.05722), MoCo v2 (2003.04297), EqCo (2010.01929) and
DT, "dual temperature" (2203.17248), the paper of SimMoCo and SimCo.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# 1. Errors and flags


class UserError(ValueError):
    """Something that the person who started the program can put right. `launch` shows it as one line."""


class Stopped(Exception):
    """A run was told to stop by the signal `number`, and has saved its state."""

    def __init__(self, number):
        self.number = number


def launch(main):
    """Run a script's `main()`. A UserError ends it with one line on stderr and exit code 2, a signal with 128 + its
    number, as shells and schedulers expect."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every process of a torchrun launch meets the same error
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("\ninterrupted; a training run goes on from its last checkpoint when started again", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


class Parser(argparse.ArgumentParser):
    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        self.presets = {}  # {flag: {name: value}}: if the flag is given, these are the defaults of other flags

    def error(self, message):  # argparse would print the whole usage first
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(self, args=None):
        given = vars(super().parse_args(args))
        for flag, defaults in self.presets.items():
            if given[flag]:
                self.set_defaults(**defaults)
        if given.get("like") is not None:
            self.set_defaults(**flags_of_run(Path(given["like"]), self.get_default("method")))
        args = super().parse_args(args)
        vars(args).pop("like", None)  # the run is what its other flags say
        return args


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # a default of None says nothing: those flags tell theirs in words
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def number(kind, least=-math.inf, above=-math.inf, most=math.inf):
    """An argparse type: a finite int or float (`kind`) that is >= least, > above and <= most."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which fails every comparison
        if not (least <= value <= most and value > above and math.isfinite(value)):
            limits = {" of at least": least, " above": above, " of at most": most}
            wants = "".join(f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit))
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number{wants}, not '{text}'")
        return value

    return parse


def argument_parser(method, description):
    """The flags that all three methods have. Their defaults are the CIFAR-100 recipe of the DT authors' scripts, so that
    a method's script without any flag is the batch-256 cell of the results table."""
    parser = Parser(description)
    parser.set_defaults(method=method)
    add = parser.add_argument
    add("--dataset", default="cifar100", choices=DATASETS, help="folder: your own images; shapes: drawn, no download")
    add("--data", default="data", metavar="DIR", help="where the dataset lies, or is downloaded to")
    add("--subset", type=number(int, 1), metavar="N", help="train on N images only, the same number of each class")
    add("--image-size", default=32, type=number(int, 8), help="--dataset folder: images are stored at this size, squared")
    add("--epochs", default=200, type=number(int, 1), help="passes over the training images")
    add("--batch-size", default=256, type=number(int, 2), help="images per step, over all processes together")
    add("--lr", default=0.03, type=number(float, above=0), help="peak learning rate at batch 256; scaled by batch / 256")
    add("--warmup-epochs", type=number(int, 0), help="linear warm-up (default: 10, or a twentieth of a shorter run)")
    add("--weight-decay", default=5e-4, type=number(float, 0), help="on every parameter")
    add("--momentum", default=0.9, type=number(float, 0, most=1), help="of SGD")
    add("--width", default=64, type=number(int, 1), help="channels of ResNet-18's first stage; 64 is the standard network")
    add("--stem-padding", default=2, type=int, choices=(1, 2), help="of the first convolution; the DT authors' code has 2")
    add("--moco-dim", default=128, type=number(int, 1), help="dimension C of queries and keys")
    add("--moco-t", default=0.1, type=number(float, above=0), help="softmax temperature")
    add("--knn-every", type=number(int, 1), metavar="N", help="kNN every N epochs (default: about 40 times a run)")
    add("--seed", default=0, type=number(int, 0, most=2**63 - 1), help="of weights, batches and augmentation")
    add("--like", metavar="DIR", help="the flags of the run in DIR (its args.json), but for those given")
    add("--out", metavar="DIR", help="run directory (default: runs/<method>-<dataset>-bs<batch size>-seed<seed>)")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a CUDA GPU if there is one")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where the hardware has it")
    add("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU, or in a long run")
    add("--deterministic", action="store_true", help="on a GPU: the same bits in every run, at some cost in speed")
    return parser


def add_mechanism_flags(parser, loss):
    """The flags by which the three methods exchange a part for that of another paper; `loss` is the method's own."""
    add = parser.add_argument
    add("--loss", default=loss, choices=("infonce", "eqco", "dual"), help="dual: dual temperature")
    add("--alpha", type=number(float, above=0), help="--loss eqco: how many negatives those there are shall count as")
    add("--dt-m", default=10.0, type=number(float, above=0), help="--loss dual: T_beta / T_alpha; 1: InfoNCE")
    add("--head", default="mlp", choices=("mlp", "linear"), help="linear: MoCo v1's")
    add("--head-bn", action="store_true", help="BatchNorm after each linear layer of the head, as in SiMo")
    add("--bn-splits", default=1, type=number(int, 1), metavar="G", help="BatchNorm over G groups of a process's images")
    add("--sync-bn", action="store_true", help="BatchNorm over the images of all processes")
    add("--augmentation", default="v2", choices=("v2", "v1"), help="v1: MoCo v1's, jitter always and on gray images too")
    add("--schedule", default="cosine", choices=("cosine", "step"), help="step: lr / 10 at 60%% and at 80%% of the epochs")


def check_mechanisms(args):
    """Raises UserError for flags of `add_mechanism_flags`, or of one method, that make no sense together."""
    num_negatives, batch_size = getattr(args, "num_negatives", None), args.batch_size
    part, groups = batch_size // world_size(), args.bn_splits
    for wrong, message in (
        (args.loss == "eqco" and args.alpha is None, "--loss eqco needs --alpha, for example --alpha 256"),
        (args.loss != "eqco" and args.alpha is not None, f"--alpha is for --loss eqco, and this is --loss {args.loss}"),
        (args.loss != "dual" and args.dt_m != 10, f"--dt-m is for --loss dual, and this is --loss {args.loss}"),
        (
            num_negatives is not None and num_negatives >= batch_size,
            f"--num-negatives {num_negatives}: a batch of {batch_size} has {batch_size - 1} for each query at most",
        ),
        (
            groups > 1 and (part % groups > 0 or part < 2 * groups),
            f"--bn-splits {groups}: a process's {part} images make no {groups} equal groups of two or more",
        ),
        (
            getattr(args, "memory_bank", False) and args.symmetric,
            "--memory-bank has no --symmetric: its keys are stored features, not a second view",
        ),
        (args.sync_bn and groups > 1, "--sync-bn is one group of all images, --bn-splits several: choose one of them"),
        (args.sync_bn and world_size() > 1 and args.device == "cpu", "--sync-bn: PyTorch has it for GPUs only"),
    ):
        if wrong:
            raise UserError(message)


# Where a run computes may change between its start and its end; what it computes may not.
MACHINE_FLAGS = ("data", "out", "device", "compile", "environment")


def flags_of_run(path, method):
    """The flags that made a run what it is, from its args.json. Raises UserError if it is not a run of `method`."""
    flags = read_json(path / "args.json")
    if not isinstance(flags, dict) or flags.get("method") != method:
        made_by = f"was written by {flags['method']}.py" if isinstance(flags, dict) and "method" in flags else "is of no run"
        raise UserError(f"'{path / 'args.json'}' {made_by}, and this is {method}.py")
    return {key: value for key, value in flags.items() if key not in MACHINE_FLAGS}


def choose_hardware(args):
    """Replace "auto" in --device and --precision by what is best here. Returns the torch.device."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA GPU")
    if args.precision == "auto":
        args.precision = "bf16" if has_fast_bf16(args.device) else "fp32"
    return torch.device(args.device)


def resolve(args):
    """Replace all flags of `argument_parser` that were left to be chosen by what they mean for this run on this machine.

    Returns the torch.device. Raises UserError for a batch that the processes cannot share evenly, and for flags that make
    no sense together.
    """
    device = choose_hardware(args)
    if args.deterministic and args.device == "cuda":  # a CPU always gives the same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order each time
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic  # let cuDNN try its convolution algorithms, and keep the fastest
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10, args.epochs // 20)
    if args.knn_every is None:
        args.knn_every = max(1, args.epochs // 40)
    if args.out is None:
        args.out = f"runs/{args.method}-{args.dataset}-bs{args.batch_size}-seed{args.seed}"
    if args.batch_size % world_size():
        raise UserError(f"--batch-size {args.batch_size} cannot be shared evenly by {world_size()} processes")
    if "loss" in args:
        check_mechanisms(args)
    return device


def worth_compiling(args, num_images):
    """What --compile auto means: yes on a GPU. On a CPU it takes minutes and saves a tenth of the time, so there must be a
    C++ compiler, and hours to go (two cores train the full network on half a million images in about three)."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    is_long = args.epochs * num_images * (args.width / 64) ** 2 > 500_000
    return args.device == "cuda" or (is_long and shutil.which(compiler) is not None)


def has_fast_bf16(device):
    """Whether the hardware multiplies bf16 natively: Ampere or newer GPUs, CPUs with AMX or AVX512-BF16."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    # Private names, so an older or newer torch may lack them: fp32 then, which is slower and never wrong.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check)


def autocast(args):
    """The mixed-precision context that --precision asks for. Weights stay in fp32; losses are outside of it."""
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.precision == "bf16")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Processes: torchrun starts one per GPU; without torchrun there is one, and everything here is a no-op


def join_processes(args):
    """Join the other processes that torchrun started, if any: over NCCL on GPUs, a GPU each, else over gloo."""
    environment = os.environ
    if int(environment.get("WORLD_SIZE", 1)) == 1:
        return
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    how = {}
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and environment.get("GROUP_WORLD_SIZE") == "1":
        # torchrun lets all its attempts (--max-restarts) meet in one store. Restarted processes would find the addresses of
        # the dead ones there, and wait for them (seen with PyTorch 2.11): so each attempt has names of its own in it.
        store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"attempt {environment['TORCHELASTIC_RESTART_COUNT']}", store)
        how = dict(store=store, rank=int(environment["RANK"]), world_size=int(environment["WORLD_SIZE"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", **how)


def init_distributed(args):
    """`join_processes`, settle `args` (see `resolve`) and return the device."""
    join_processes(args)
    return resolve(args)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def concat_all_gather(tensor):
    """[N, C] of each process -> [world_size * N, C], in the order of the ranks, so that it is the global batch.

    Where `tensor` needs a gradient it gets the sum of what all processes' losses send back to it.
    """
    if world_size() == 1:
        return tensor
    if torch.is_grad_enabled() and tensor.requires_grad:
        return torch.cat(all_gather_with_gradient(tensor))
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def batch_shuffle(x, order):
    """This process's rows of the global batch in another order, so that a key is not normalised with the images that its
    query was normalised with (MoCo, section 3.3).

    x [N, ...]: this process's rows of the global batch; order int64 [world_size * N]: a permutation of the global batch,
    the same on all processes; None: x stays as it is.
    """
    return x if order is None else concat_all_gather(x)[order.view(world_size(), -1)[rank()]]


def batch_unshuffle(x, order):
    """Undo `batch_shuffle`."""
    return x if order is None else batch_shuffle(x, order.argsort())


def sum_over_processes(tensor):
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_zero(function, *arguments):
    """Call `function` on rank 0 only and give every process what it returned, or the UserError that it raised.

    So files are read and downloaded once, and several machines need no common file system.
    """
    if world_size() == 1:
        return function(*arguments)
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function(*arguments)
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def parallelize(model, args):
    """The model to call in the training loop: compiled if --compile, in DistributedDataParallel if there are several
    processes (gradients are then averaged over them; parameters and buffers start as those of rank 0)."""
    if args.compile == "on":
        model.compile()
    if world_size() == 1:
        return model
    # The key encoder takes no gradient and nobody reads running BatchNorm statistics in training, so sending buffers
    # (the queue among them) at every step would be waste: `average_batchnorm` does it once an epoch.
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


@torch.no_grad()
def average_batchnorm(model):
    """Give all processes the same running BatchNorm statistics, the mean of their own, so that they evaluate one network."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # of any dimension, split and synchronised ones too
            for statistic in (module.running_mean, module.running_var):
                sum_over_processes(statistic).div_(world_size())


# ---------------------------------------------------------------------------------------------------------------------
# 3. Datasets: decoded once, then resident on the device as uint8

DATASETS = ("cifar10", "cifar100", "folder", "shapes")


@dataclasses.dataclass
class Dataset:
    """Images uint8 [N, S, S, 3] (RGB), labels int64 [N], class names: list of str. All tensors on one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list

    def to(self, device):
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return Dataset(*(tensor.to(device) for tensor in tensors), self.classes)

    def subset(self, count):
        """Only `count` training images, the first of each class in stored order, the classes as even as can be."""
        if count > len(self.train_labels):
            raise UserError(f"--subset {count}: there are only {len(self.train_labels)} training images")
        nth_of_its_class = torch.empty_like(self.train_labels)
        for label in range(len(self.classes)):
            where = (self.train_labels == label).nonzero().squeeze(1)
            nth_of_its_class[where] = torch.arange(len(where))
        keep = torch.argsort(nth_of_its_class * len(self.classes) + self.train_labels)[:count].sort().values
        return dataclasses.replace(self, train_images=self.train_images[keep], train_labels=self.train_labels[keep])


def load_data(args, device):
    """The dataset that the flags ask for, on `device`. Raises UserError if a batch is larger than the training set."""
    data = from_rank_zero(load_dataset, args.dataset, args.data, True, args.image_size)
    if args.subset is not None:
        data = data.subset(args.subset)
    if args.batch_size > len(data.train_labels):
        raise UserError(f"--batch-size {args.batch_size} is more than the {len(data.train_labels)} training images")
    if args.compile == "auto":
        args.compile = "on" if worth_compiling(args, len(data.train_labels)) else "off"
    return data.to(device)


def load_dataset(name, root, download=True, image_size=32):
    """Load a dataset as uint8 tensors on the CPU.

    name: cifar10 or cifar100 (torchvision downloads them into `root` if `download`, and checks their md5 sums);
        folder (`root`/train/<class>/<image> and `root`/test/<class>/<image>, resized to `image_size`: shorter side, then
        centre crop); or shapes (drawn here).
    The decoded arrays are kept in `root`/<name>.npz (keys train_images uint8 [N, S, S, 3], train_labels int64 [N],
    test_images, test_labels, classes); when that file is there, nothing is downloaded or decoded.

    Returns a Dataset. Raises UserError if the data is not there, or damaged.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset '{name}'; there are {', '.join(DATASETS)}")
    if name == "shapes":
        return draw_shapes()
    root = Path(root)
    cache = root / f"{name}.npz"
    # A folder's images may be added to or changed: its cache holds only for the files it was made from.
    source = folder_fingerprint(root, image_size) if name == "folder" and (root / "train").is_dir() else None
    if cache.is_file():
        arrays = read_npz(cache)
        if source is None or arrays.get("source") == source:
            stored = arrays["train_images"].shape[1]
            if name == "folder" and stored != image_size:
                raise UserError(f"'{cache}' holds images of size {stored} and the files are gone: use --image-size {stored}")
            return Dataset(*(torch.from_numpy(arrays[key]) for key in ARRAYS[:4]), arrays["classes"].tolist())
    arrays = decode_folder(root, image_size) if name == "folder" else read_cifar(name, root, download)
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:  # the cache saves time; a directory that cannot be written to is no reason to stop
        with open(temporary, "wb") as file:
            np.savez(file, **arrays, **({"source": source} if source else {}))
        os.replace(temporary, cache)
    except OSError as error:
        print(f"note: the decoded images are not cached: {error}", file=sys.stderr)
        temporary.unlink(missing_ok=True)
    return Dataset(*(torch.from_numpy(arrays[key]) for key in ARRAYS[:4]), arrays["classes"].tolist())


ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")


def read_npz(path):
    """The arrays of a dataset cache by name. Raises UserError naming the file unless it is whole and of the right form."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # numpy, zipfile and zlib each have their own ways to fail on a damaged file
        raise UserError(f"'{path}' is damaged or no .npz file ({error}); delete it and start again") from None
    missing = [key for key in ARRAYS if key not in arrays]
    if missing:
        raise UserError(f"'{path}' has no array named {', '.join(missing)}; a dataset needs {', '.join(ARRAYS)}")
    sizes = set()
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
            raise UserError(f"'{path}': {split}_images must be uint8 [N, S, S, 3], not {images.dtype} {images.shape}")
        labels = arrays[f"{split}_labels"] = labels.astype(np.int64)
        if len(images) == 0 or labels.shape != (len(images),):
            raise UserError(f"'{path}': {len(images)} {split}_images, but {split}_labels of shape {labels.shape}")
        if labels.min() < 0 or labels.max() >= len(arrays["classes"]):
            raise UserError(f"'{path}': {split}_labels reach beyond its {len(arrays['classes'])} classes")
        sizes.add(images.shape[1])
    if len(sizes) > 1:
        raise UserError(f"'{path}': training and test images differ in size")
    return arrays


def read_cifar(name, root, download):
    """CIFAR through torchvision -> arrays as in `read_npz`."""
    torchvision_class = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        train, test = (torchvision_class(root, train=split, download=download) for split in (True, False))
    except Exception as error:  # no network, no room, a broken archive: torchvision has no common exception for them
        raise UserError(
            f"{name} is not in '{root}' and could not be downloaded ({error}). Put {torchvision_class.filename} "
            f"(from {torchvision_class.url}, md5 {torchvision_class.tgz_md5}) or a {name}.npz there, or name another --data"
        ) from None
    return dict(
        train_images=train.data, train_labels=np.array(train.targets, np.int64),
        test_images=test.data, test_labels=np.array(test.targets, np.int64), classes=np.array(train.classes),
    )  # fmt: skip


def folder_fingerprint(root, image_size):
    """A hash of the names, sizes and times of all files below train/ and test/, and of the size they are stored at."""
    digest = hashlib.sha256(str(image_size).encode())
    for path in sorted(path for split in ("train", "test") for path in (root / split).rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def decode_folder(root, image_size):
    """`root`/{train,test}/<class>/<image> -> arrays as in `read_npz`."""
    splits = {}
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise UserError(f"'{root / split}' is missing: a folder needs train/<class>/<image> and test/<class>/<image>")
        try:
            splits[split] = torchvision.datasets.ImageFolder(root / split)
        except FileNotFoundError as error:  # no class directories, or one without images
            raise UserError(f"'{root / split}': {str(error).splitlines()[0]}") from None
    odd = set(splits["train"].classes) ^ set(splits["test"].classes)
    if odd:
        raise UserError(f"'{root}': train and test must have the same classes; only one has {', '.join(sorted(odd))}")

    def decode(sample):
        path, _ = sample
        try:
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:
            raise UserError(f"cannot read the image '{path}' ({error}); repair or remove it") from None
        return np.asarray(ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC))

    arrays = {"classes": np.array(splits["train"].classes)}
    with ThreadPoolExecutor() as pool:  # PIL decodes outside Python's global lock
        for split, folder in splits.items():
            decoded = list(tqdm(pool.map(decode, folder.samples), f"reading {split}", len(folder), disable=None))
            arrays[f"{split}_images"] = np.stack(decoded)
            arrays[f"{split}_labels"] = np.array(folder.targets, np.int64)
    return arrays


def draw_shapes(train=4096, test=1024, size=32, seed=0):
    """Ten classes of shape in two tones. Within a class vary only place, size, tones, a little tint and a small rotation:
    what the augmentation makes a network ignore, so that the class is what is left to learn. Deterministic."""
    count = train + test
    random = np.random.RandomState(seed)  # the one numpy generator whose stream is promised never to change
    radius, angle = random.uniform(6, 11, count), np.deg2rad(random.uniform(-15, 15, count))
    centre = random.uniform(size * 0.36, size * 0.64, (2, count))
    dark = random.uniform(0.2, 0.3, count)
    tones = np.stack([dark + random.uniform(0.35, 0.45, count), dark])[..., None]  # of shape and ground
    tones = tones + random.uniform(-0.02, 0.02, (2, count, 3))  # [2, count, 3], in 0..1

    pixels = np.arange(size) + 0.5
    x, y = (pixels[None, None, :] - centre[0, :, None, None], pixels[None, :, None] - centre[1, :, None, None])
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = (cos * x + sin * y) / radius[:, None, None], (cos * y - sin * x) / radius[:, None, None]

    def plus(u, v):
        return np.maximum(np.minimum(0.3 - abs(u), 0.95 - abs(v)), np.minimum(0.3 - abs(v), 0.95 - abs(u)))

    depth = dict(  # how far a point lies inside the unit shape (negative: outside)
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
    labels = np.arange(count) % len(depth)
    inside = np.empty((count, size, size))
    for label, depth_of in enumerate(depth.values()):
        inside[labels == label] = depth_of(u[labels == label], v[labels == label])
    inside = (inside * radius[:, None, None] + 0.5).clip(0, 1)[..., None]  # anti-aliased over one pixel
    images = tones[0][:, None, None] * inside + tones[1][:, None, None] * (1 - inside)
    images, labels = torch.from_numpy((images * 255).round().astype(np.uint8)), torch.from_numpy(labels)
    return Dataset(images[:train], labels[:train], images[train:], labels[train:], list(depth))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Augmentation: torchvision's operations, for a whole batch at once, each image with its own random parameters

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class EpochPlan(NamedTuple):
    """Every random choice of an epoch, for all processes: row i is about the i-th image of the epoch, column v about its
    view v. The first four are the crop box in pixels."""

    index: Tensor  # int64 [n], which training image
    top: Tensor  # int64 [n, 2]
    left: Tensor  # int64 [n, 2]
    height: Tensor  # int64 [n, 2]
    width: Tensor  # int64 [n, 2]
    flip: Tensor  # bool [n, 2]
    order: Tensor  # int64 [n, 2, 4], which colour operation comes first, second, third, fourth
    factor: Tensor  # float32 [n, 2, 4], of brightness, contrast, saturation, hue; 1, 1, 1, 0 where there is no jitter
    grayscale: Tensor  # bool [n, 2]

    def rows(self, which):
        return EpochPlan(*(field[which] for field in self))

    def to(self, device):
        return EpochPlan(*(field.to(device) for field in self))


def draw_epoch_plan(num_images, batch_size, image_size, seed, epoch, augmentation="v2"):
    """The plan of one epoch of whole batches (the rest of the images is left out), from one CPU generator that depends on
    (seed, epoch) alone: so it is the same on any number of processes, and for a run that was interrupted.
    augmentation "v1": MoCo v1's jitter, with more of hue and of every image."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    n = num_images // batch_size * batch_size
    index = torch.randperm(num_images, generator=generator)[:n]
    box = sample_crops(2 * n, image_size, generator)
    uniform = torch.rand(2 * n, 7, generator=generator)
    spread = torch.tensor([0.4, 0.4, 0.4, 0.4 if augmentation == "v1" else 0.1])
    factor = torch.tensor([1.0, 1.0, 1.0, 0.0]) + spread * (2 * uniform[:, :4] - 1)
    jitter = uniform[:, 4:5] < (1.0 if augmentation == "v1" else 0.8)
    factor = torch.where(jitter, factor, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    order = torch.rand(2 * n, 4, generator=generator).argsort(dim=1)
    fields = (*box, uniform[:, 5] < 0.5, order, factor, uniform[:, 6] < 0.2)
    return EpochPlan(index, *(field.unflatten(0, (n, 2)) for field in fields))


def sample_crops(count, size, generator, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Boxes as torchvision's RandomResizedCrop draws them from square images of `size` pixels: ten tries of an area and a
    log-uniform aspect ratio, the first that fits, else the whole image. Returns top, left, height, width: int64 [count]."""
    area = torch.rand(count, 10, generator=generator) * (scale[1] - scale[0]) + scale[0]
    log_ratio = torch.rand(count, 10, generator=generator) * math.log(ratio[1] / ratio[0]) + math.log(ratio[0])
    width = (size * torch.sqrt(area * log_ratio.exp())).round()
    height = (size * torch.sqrt(area / log_ratio.exp())).round()
    fits = (width >= 1) & (width <= size) & (height >= 1) & (height <= size)
    first = fits.int().argmax(dim=1, keepdim=True)
    whole = torch.full((count,), float(size))
    width = torch.where(fits.any(1), width.gather(1, first).squeeze(1), whole)
    height = torch.where(fits.any(1), height.gather(1, first).squeeze(1), whole)
    corner = torch.rand(2, count, generator=generator)
    top, left = (corner[0] * (size - height + 1)).floor(), (corner[1] * (size - width + 1)).floor()
    return top.long(), left.long(), height.long(), width.long()


def resize_matrix(start, length, extent, size, flip=None):
    """The linear map of "cut out [start, start + length), then resize to `size` pixels" (mirrored where `flip`) along one
    axis of `extent` pixels, for N boxes: float32 [N, size, extent].

    PIL's bicubic filter: a = -0.5, widened when shrinking, taps outside of the crop dropped and the rest normalised.
    (`F.grid_sample` and `F.interpolate` have a = -0.75, and the former looks outside of the crop.)
    """
    start, length = start[:, None].float(), length[:, None].float()
    output = torch.arange(size, device=start.device) + 0.5
    centre = start + output * (length / size)  # [N, size], where each output pixel lies in the image
    if flip is not None:
        centre = torch.where(flip[:, None], centre.flip(1), centre)
    pixel = torch.arange(extent, device=start.device) + 0.5
    x = ((pixel - centre[:, :, None]) / (length / size).clamp(min=1)[:, :, None]).abs()  # [N, size, extent]
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    inside = (pixel > start) & (pixel < start + length)  # [N, extent]
    weight = torch.where((x < 2) & inside[:, None], weight, 0.0)
    return weight / weight.sum(dim=2, keepdim=True)


def random_resized_crop_flip(images, top, left, height, width, flip, size):
    """Crop, resize and flip as torchvision does with PIL's bicubic filter, as two matrix products.

    images: float [N, 3, H, W] in 0..1; the rest [N], one box (in pixels) and one flip (bool) per image.
    Returns float [N, 3, size, size] in 0..1.
    """
    rows = resize_matrix(top, height, images.shape[2], size)  # [N, size, H]
    columns = resize_matrix(left, width, images.shape[3], size, flip)  # [N, size, W]
    # Width first and clamped in between, as PIL's 8-bit intermediate image is: bicubic overshoots at edges.
    images = (images @ columns.transpose(1, 2)[:, None]).clamp_(0, 1)  # [N, 3, H, size]
    return (rows[:, None] @ images).clamp_(0, 1)  # [N, 3, size, size]


def to_gray(images):
    """[N, 3, H, W] -> [N, 1, H, W], ITU-R 601-2 luma as in torchvision."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def blend(images, operation, factor):
    """Brightness, contrast or saturation (`operation` [N]) of images [N, 3, H, W] in 0..1, as torchvision defines them:
    factor * image + (1 - factor) * (black, the mean gray of the image, or its gray version). Factor 1 changes nothing."""
    operation, factor = operation[:, None, None, None], factor[:, None, None, None]
    gray = to_gray(images)
    other = torch.where(operation == SATURATION, gray, gray.mean(dim=(2, 3), keepdim=True) * (operation != BRIGHTNESS))
    return torch.lerp(other, images, factor).clamp_(0, 1)


def adjust_hue(images, shift):
    """Turn the hue of images [N, 3, H, W] in 0..1 by `shift` [N] of a full circle, as torchvision does by way of HSV."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(
        value == red, (green - blue) / safe, torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    hue = hue + 6 * shift[:, None, None]  # in sixths of the circle
    # HSV -> RGB in closed form: channel n lies between value - chroma and value, by its distance from the hue.
    offset = 5 - 2 * torch.arange(3, device=images.device)[:, None, None]  # 5, 3, 1 for red, green, blue
    k = (offset + hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(images, order, factor):
    """torchvision's ColorJitter with per-image factors [N, 4] and order of the four operations [N, 4]."""
    # Each image has its hue step at its own place among three blends. Six blends with factor 1 where an image has none,
    # three before one hue step and three after, cost less than a hue step in each of four places.
    hue_place = (order == HUE).int().argmax(dim=1)
    ordered = factor.gather(1, order)
    for place in (0, 1, 2):
        images = blend(images, order[:, place], torch.where(place < hue_place, ordered[:, place], 1.0))
    images = adjust_hue(images, factor[:, HUE])
    for place in (1, 2, 3):
        images = blend(images, order[:, place], torch.where(place > hue_place, ordered[:, place], 1.0))
    return images


def random_grayscale(images, grayscale):
    """Images [N, 3, H, W], gray where `grayscale` [N]."""
    return torch.where(grayscale[:, None, None, None], to_gray(images), images)


def normalize(images):
    """float [N, 3, H, W] in 0..1 -> zero mean and unit variance per channel, by CIFAR's statistics."""
    channels = [(channel - mean) / std for channel, mean, std in zip(images.unbind(1), MEAN, STD)]
    return torch.stack(channels, dim=3).permute(0, 3, 1, 2)  # in memory [N, H, W, 3]: channels_last


def to_float(images):
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in 0..1."""
    return images.permute(0, 3, 1, 2).float().div(255)


def augment(images, top, left, height, width, flip, order, factor, grayscale, augmentation="v2"):
    """One random view of each image, in the order of the DT authors' pipeline. uint8 [N, S, S, 3] -> float [N, 3, S, S].
    augmentation "v1": gray before the jitter, not after it, as in MoCo v1."""
    images = random_resized_crop_flip(to_float(images), top, left, height, width, flip, images.shape[1])
    if augmentation == "v1":
        return normalize(color_jitter(random_grayscale(images, grayscale), order, factor))
    return normalize(random_grayscale(color_jitter(images, order, factor), grayscale))


# ---------------------------------------------------------------------------------------------------------------------
# 5. ResNet-18 for CIFAR and the projection head


class BasicBlock(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # in place: activations are what fills the memory
        return F.relu(self.bn2(self.conv2(x)).add_(identity), inplace=True)


class ResNet(nn.Module):
    def __init__(self, width, stem_padding):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=stem_padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width, 1))
        self.num_features = 8 * width
        for module in self.modules():  # torchvision's initialisation, except for the stem:
            if isinstance(module, nn.Conv2d) and module is not self.conv1:  # the DT authors replace it, untouched
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # no max-pooling: the images are small
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


def resnet18(width=64, stem_padding=2):
    """ResNet-18 with the CIFAR stem (3x3 convolution, stride 1, no max-pooling) and no classifier.

    [B, 3, H, W] -> features [B, 8 * width]. The parameters have torchvision's names, so that at width 64 the state dict
    loads into torchvision's resnet18 whose conv1 has been replaced. `stem_padding` 2 is a quirk of the DT authors' code
    (maps of 34x34 for images of 32x32); 1 is what most CIFAR code has.
    """
    return ResNet(width, stem_padding)


def projection_head(features, hidden=128, dim=128, batchnorm=False):
    """MoCo v2's two-layer head, with the DT authors' hidden size. [B, features] -> [B, dim].

    hidden None: MoCo v1's single layer. batchnorm: after each linear layer, as in SiMo (EqCo).
    """
    sizes, layers = [size for size in (features, hidden, dim) if size is not None], []
    for size_in, size_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(size_in, size_out), *([nn.BatchNorm1d(size_out)] if batchnorm else []), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """Backbone and head: images [B, 3, H, W] -> L2-normalised queries or keys, float32 [B, dim]."""

    def __init__(self, width=64, stem_padding=2, dim=128, hidden=128, head_bn=False):
        super().__init__()
        self.backbone = resnet18(width, stem_padding)
        self.head = projection_head(self.backbone.num_features, hidden, dim, head_bn)

    def forward(self, x):
        return F.normalize(self.head(self.backbone(x)).float(), dim=1)


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm of [N, C, ...] over each of `splits` groups of consecutive rows, as if each were on a GPU of its own (MoCo's
    CIFAR demo). Running statistics are the mean of what those of the groups would be: the average of `average_batchnorm`.
    With one group it is nn.BatchNorm2d to the last bit."""

    def __init__(self, num_features, splits):
        super().__init__(num_features)
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        parts, means, variances = [], [], []
        for part in x.chunk(self.splits):
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            parts.append(F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps))
            means.append(mean), variances.append(variance)
        self.running_mean.copy_(torch.stack(means).mean(dim=0))
        self.running_var.copy_(torch.stack(variances).mean(dim=0))
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def split_batchnorm(module, splits):
    """Put a SplitBatchNorm in the place of every BatchNorm in a new `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, SplitBatchNorm(child.num_features, splits))
        split_batchnorm(child, splits)


def build_encoder(args):
    """The Encoder that the flags ask for."""
    hidden = 128 if args.head == "mlp" else None
    encoder = Encoder(args.width, args.stem_padding, args.moco_dim, hidden, args.head_bn)
    if args.bn_splits > 1:
        split_batchnorm(encoder, args.bn_splits)
    if args.sync_bn and world_size() > 1:
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    return encoder


# ---------------------------------------------------------------------------------------------------------------------
# 6. Losses


def similarities(q, k, queue=None, num_negatives=None, generator=None):
    """Cosine similarities of queries with their positives [N] and with their negatives [N, K].

    q, k: [N, C], L2-normalised; row i of k is the positive of row i of q. queue [K, C]: the negatives; None: the other
    keys of the batch, of all processes' batches if there are several, or `num_negatives` of them, drawn for each query from
    `generator`, which must be in the same state on all processes. Similarities are computed in float32 or better; a key
    that is no negative (the positive itself) stands as -inf.
    """
    if q.dtype != torch.float64:
        q, k = q.float(), k.float()
    if queue is not None:
        return (q * k).sum(dim=1), q @ queue.to(q.dtype).T
    keys = concat_all_gather(k)  # of the global batch: MxC
    if len(keys) < 2:
        raise ValueError("in-batch negatives need at least two images in the batch")
    similarity = q @ keys.T  # NxM
    row = torch.arange(len(q), device=q.device)
    own = (row + rank() * len(q))[:, None]  # where in the global batch this process's positives are
    positive = similarity.gather(1, own).squeeze(1)
    if num_negatives is None:
        is_positive = own == torch.arange(len(keys), device=q.device)
        return positive, similarity.masked_fill(is_positive, -math.inf)
    if not 1 <= num_negatives < len(keys):
        raise ValueError(f"num_negatives must be from 1 to {len(keys) - 1}, not {num_negatives}")
    # Drawn for the whole global batch, so that a query has the same negatives on any number of processes.
    draw = torch.rand(len(keys), len(keys), device=q.device, generator=generator).fill_diagonal_(-1)  # positives: last
    return positive, similarity.gather(1, draw[own.squeeze(1)].topk(num_negatives, dim=1).indices)


def negative_log_odds(positive, negative, temperature):
    """M = log [ sum_neg exp(s_neg / T) / exp(s_pos / T) ], [N]: how strongly the softmax prefers a negative to the positive.

    The softmax probability p of the positive is 1 / (1 + exp M). Hence 1 - p = sigmoid(M) and -log p = softplus(M), both
    to full precision for every M, where "1 - softmax" would have lost its digits for p near 1.
    """
    return torch.logsumexp((negative - positive[:, None]) / temperature, dim=1)


def check_temperatures(**temperatures):
    for name, value in temperatures.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive, not {value}")


def info_nce_loss(q, k, temperature=0.1, queue=None, alpha=None, num_negatives=None, generator=None):
    """InfoNCE (MoCo, equation 1): the mean over queries of -log [ e^(s_pos/T) / (e^(s_pos/T) + sum_neg e^(s_neg/T)) ].

    q, k: [N, C], L2-normalised; row i of k is the positive of row i of q.
    queue: [K, C] negatives; None: the other rows of k (of all processes), or `num_negatives` of them (see `similarities`).
    alpha: EqCo's margin T * log(alpha / K) on the positive, which makes the K negatives count as alpha of them.
    Returns a scalar. Raises ValueError for a temperature or alpha that is not positive, or if there is no negative.
    """
    check_temperatures(temperature=temperature, alpha=1 if alpha is None else alpha)
    with torch.autocast(q.device.type, enabled=False):
        positive, negative = similarities(q, k, queue, num_negatives, generator)
        log_odds = negative_log_odds(positive, negative, temperature)
        if alpha is not None:
            count = negative.shape[1] - (queue is None and num_negatives is None)  # there the positive has a column too
            log_odds = log_odds + math.log(alpha / count)
        return F.softplus(log_odds).mean()


def dual_temperature_loss(q, k, temperature=0.1, dt_m=10.0, queue=None, num_negatives=None, generator=None):
    """Dual temperature (DT): the mean over queries of weight * InfoNCE at T_alpha = `temperature`, where
    weight = (1 - p at T_beta) / (1 - p at T_alpha), T_beta = `dt_m` * T_alpha, and no gradient flows through the weight.

    q, k: [N, C], L2-normalised; row i of k is the positive of row i of q.
    queue: [K, C] negatives; None: the other rows of k (of all processes), or `num_negatives` of them (see `similarities`).
    dt_m = 1 is InfoNCE.
    Returns a scalar. Raises ValueError for a temperature or dt_m that is not positive, or if there is no negative.
    """
    check_temperatures(temperature=temperature, dt_m=dt_m)
    with torch.autocast(q.device.type, enabled=False):
        positive, negative = similarities(q, k, queue, num_negatives, generator)
        log_odds = negative_log_odds(positive, negative, temperature)  # M: 1 - p = sigmoid(M), InfoNCE = softplus(M)
        with torch.no_grad():
            hardness = torch.sigmoid(negative_log_odds(positive, negative, temperature * dt_m))  # 1 - p at T_beta
            value = hardness * softplus_over_sigmoid(log_odds)
        # The gradient of weight * softplus(M) is weight * sigmoid(M) * grad M, and sigmoid(M), which is 1 - p at T_alpha,
        # cancels the weight's denominator: hardness * grad M. So the loss is written with that gradient and that value,
        # and nothing is divided by a 1 - p that may underflow.
        surrogate = hardness * log_odds
        return (value + surrogate - surrogate.detach()).mean()


def softplus_over_sigmoid(x):
    """log(1 + e^x) * (1 + e^-x), which tends to 1 for x -> -inf, where both factors of the quotient underflow."""
    small = x.clamp(min=-40)  # there the quotient is 1 + e^x / 2 = 1, in float64 too
    return F.softplus(small) / torch.sigmoid(small)


def contrastive_loss(q, k, args, generator, queue=None):
    """The loss that --loss names, with the flags that belong to it. q, k, generator, queue: as for the losses."""
    num_negatives = getattr(args, "num_negatives", None)
    if args.loss == "dual":
        return dual_temperature_loss(q, k, args.moco_t, args.dt_m, queue, num_negatives, generator)
    return info_nce_loss(q, k, args.moco_t, queue, args.alpha, num_negatives, generator)  # EqCo is InfoNCE with an alpha


@torch.no_grad()
def similarity_statistics(q, k, temperature, dt_m=None, queue=None):
    """What TensorBoard shows of a batch: similarities of the positives and (a part of) the negatives, how often the
    positive is the most similar of all, and the mean dual-temperature weight. Arguments as for the losses; a dict."""
    positive, negative = similarities(q, k, queue)
    first = (positive[:, None] > negative).all(dim=1).float().mean()
    some = negative[:, :: math.ceil(negative.shape[1] / 1024)]  # from all over the queue, as its keys differ by age
    statistics = {"positive": positive, "negative": some.flatten(), "positive_ranks_first": first}
    if dt_m is not None:
        hardness = [torch.sigmoid(negative_log_odds(positive, negative, t)) for t in (temperature * dt_m, temperature)]
        statistics["dual_temperature_weight"] = (hardness[0] / hardness[1].clamp(min=1e-30)).mean()
    return statistics


# ---------------------------------------------------------------------------------------------------------------------
# 7. The kNN monitor


@torch.no_grad()
def extract_features(backbone, images, args, batch_size=1024):
    """Backbone features, float32 [N, D], of uint8 images [N, S, S, 3] without augmentation. The backbone is in eval mode
    while this runs and as it was afterwards. Each process computes a part; all of them get the whole."""
    was_training = backbone.training
    backbone.eval()
    features = torch.zeros(len(images), backbone.num_features, device=images.device)
    for chunk in torch.arange(len(images), device=images.device).split(batch_size)[rank() :: world_size()]:
        with autocast(args):
            features[chunk] = backbone(normalize(to_float(images[chunk]))).float()
    backbone.train(was_training)
    return sum_over_processes(features)  # the rows of the other processes are zero here


@torch.no_grad()
def knn_predict(features, bank, bank_labels, num_classes, k=200, temperature=0.1):
    """Cosine-weighted k-nearest-neighbour classification (Wu et al. 2018, as in MoCo's CIFAR demo): each of the k most
    similar rows of the bank votes for its label with weight exp(similarity / temperature).

    features [N, D], bank [M, D]: any floating dtype and scale; bank_labels int64 [M].
    Returns predicted labels, int64 [N]. Memory stays bounded: at most 2**25 similarities are held at once.
    """
    features, bank = F.normalize(features, dim=1), F.normalize(bank, dim=1)
    k = min(k, len(bank))
    predictions = []
    for chunk in features.split(max(1, 2**25 // len(bank))):
        similarity, neighbour = (chunk @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=bank.device, dtype=similarity.dtype)
        votes.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(backbone, data, args):
    """Top-1 in percent on the test set, with the training images as the bank."""
    bank = extract_features(backbone, data.train_images, args)
    features = extract_features(backbone, data.test_images, args)
    predicted = knn_predict(features, bank, data.train_labels, len(data.classes))
    return 100 * (predicted == data.test_labels).double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# 8. The run: learning rate, log, TensorBoard, checkpoint and resume


def adjust_learning_rate(optimizer, epoch, args):
    """Set the learning rate of an epoch (0-based): from 0.003 linearly to lr * batch / 256 in the warm-up, then along a
    cosine to 0. This is the schedule of the DT authors' library: stepped per epoch, its warm-up start not scaled.
    --schedule step: after the warm-up constant but for a division by 10 at 60 % and at 80 % of the epochs (MoCo v1)."""
    peak, start, warmup = args.lr * args.batch_size / 256, 0.003, args.warmup_epochs
    if epoch < warmup:
        lr = start + (peak - start) * epoch / max(1, warmup - 1)
    elif args.schedule == "step":
        lr = peak * 0.1 ** sum(5 * epoch >= fifths * args.epochs for fifths in (3, 4))
    else:
        lr = peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}' ({error})") from None


def write_atomically(path, write, previous=None, size=0):
    """`write(temporary path)`, then put that file, flushed to disk, in the place of `path`: a crash leaves old or new.

    previous: where to keep the old file. size: of the new one, in bytes, for the message. Raises UserError if it cannot be
    written; what was there before is left as it is.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        room = f"{size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free there"
        raise UserError(f"cannot write '{path}' ({room}; {str(error).splitlines()[0]}); what was there is kept") from None


def read_checkpoint(path):
    """What torch.save put into a file, on the CPU. Only tensors and plain Python values are read: unpickling anything else
    could run code. Raises UserError if the file cannot be read, or holds more."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each have their own ways to fail on a damaged file
        if more := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error)):
            load = "torch.load(sys.argv[1], 'cpu', weights_only=False)['state_dict']"
            paths = shlex.join(map(str, (path, Path(path).with_suffix(".weights.pth"))))
            raise UserError(
                f"'{path}' holds more than weights ({more[1]}), and loading that could run code. If you trust it, save its "
                f"weights alone, where the libraries it was made with are installed: "
                f'python -c "import sys, torch; torch.save({load}, sys.argv[2])" {paths}'
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "weights_only" in reason:  # advice on how to run the code in a file that has none
            reason = "damaged, or not written by torch.save"
        raise UserError(f"'{path}' is not a checkpoint that can be read ({reason})") from None


def load_checkpoint(path):
    """What `Run.save` has saved, on the CPU. Raises UserError if the file is something else."""
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or not {"epoch", "step", "loss_sum", "model", "optimizer"} <= checkpoint.keys():
        raise UserError(f"'{path}' is not a checkpoint of this project")
    return checkpoint


def lock_file(file):
    """Lock an open file for this process, until it is closed or the process ends. False: another process has it."""
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # no such locks on Windows and on some network file systems: then none is taken
        pass
    return True


def describe_device(device):
    """The name of the GPU, or of the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


class Run:
    """A run directory, --out: args.json; log.jsonl, a line an epoch; checkpoint.pth and, until the next one is written, the
    one before it; TensorBoard events; .lock, held while a process trains here.

    Started again with the same flags, a run goes on where its checkpoint is: after an epoch, or, if it was told to stop by
    SIGTERM, SIGUSR1 or Ctrl-C, after the step it was at. Only rank 0 reads and writes files.

    log.jsonl: epoch (number of finished epochs; 0 is the untrained network), loss (mean of the epoch), lr, knn_top1
    (percent; null when it was not this epoch's turn), images_per_second (training alone, since the start or the last
    interruption; an image counts once, not once per view), seconds (the whole epoch, with kNN); and of its last step
    positive_similarity and negative_similarity (means), positive_ranks_first, for --loss dual dual_temperature_weight.
    """

    def __init__(self, args, device):
        """Look at the directory, touch nothing. Raises UserError if it belongs to something else."""
        self.args, self.device, self.path = args, device, Path(args.out)
        self.first_step, self.loss_before = 0, 0  # steps of the epoch to go on with that are done, and their losses' sum
        self.signal, self.control, self.message, self.restore_previous = 0, None, None, False
        self.checkpoint = from_rank_zero(self.open)
        self.finished = self.checkpoint is not None and self.checkpoint["epoch"] >= args.epochs
        if self.finished and rank() == 0:
            print(f"{self.path} is finished: {args.epochs} epochs. {self.next_command()}")

    def next_command(self):
        return f"Next: python linear_eval.py {self.path}{' --cached' if self.device.type == 'cpu' else ''}"

    def open(self):
        """The checkpoint to go on from, or None."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise UserError(f"--out '{self.path}' is a file")
        if not (self.path / "args.json").exists():
            if any(path.name != ".lock" for path in self.path.iterdir()):
                raise UserError(f"--out '{self.path}' is neither empty nor a run directory; choose another")
            return None
        theirs, ours = read_json(self.path / "args.json"), vars(self.args)
        keys = sorted((theirs.keys() | ours.keys()) - set(MACHINE_FLAGS))
        differ = [f"{key} {theirs.get(key)} (now {ours.get(key)})" for key in keys if theirs.get(key) != ours.get(key)]
        if differ:
            raise UserError(f"'{self.path}' holds a run with other flags: {', '.join(differ)}; choose another --out")
        newest, previous = self.path / "checkpoint.pth", self.path / "checkpoint.previous.pth"
        try:
            if newest.exists():
                return load_checkpoint(newest)
        except UserError as error:
            if not previous.exists():
                raise
            print(f"note: {error}; going on from the one before it", file=sys.stderr)
        self.restore_previous = previous.exists()
        return load_checkpoint(previous) if previous.exists() else None

    def start(self, model, optimizer, backbone, data):
        """Begin the run, or go on with it: fills model and optimizer. Returns the epoch to go on with, from 0.

        `backbone` (a part of the model) is what the kNN monitor evaluates on `data`.
        """
        args = self.args
        self.model, self.optimizer, self.backbone, self.data = model, optimizer, backbone, data
        self.augment = torch.compile(augment) if args.compile == "on" else augment
        start_epoch = 0
        if self.checkpoint is not None:
            try:
                model.load_state_dict(self.checkpoint["model"])
                optimizer.load_state_dict(self.checkpoint["optimizer"])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"'{self.path}/checkpoint.pth' does not fit this network ({reason})") from None
            start_epoch, self.first_step = self.checkpoint["epoch"], self.checkpoint["step"]
            self.loss_before = self.checkpoint["loss_sum"] if rank() == 0 else 0  # it is all processes' sum
        going_on, self.checkpoint = self.checkpoint is not None, None
        from_rank_zero(self.create, start_epoch, going_on)
        self.catch_signals()
        if rank() == 0:
            where = f", going on after epoch {start_epoch}" + (f", step {self.first_step}" if self.first_step else "")
            print(
                f"{args.method}: {args.dataset}, {len(data.train_labels)} images, ResNet-18 width {args.width}, batch "
                f"{args.batch_size} on {world_size()} process{'es' * (world_size() > 1)}, {describe_device(self.device)}, "
                f"{args.precision}, {'compiled' if args.compile == 'on' else 'eager'} -> {self.path}{where * going_on}",
                flush=True,
            )
        if not going_on:  # where learning starts from: without it no kNN figure means much
            self.log(dict(epoch=0, loss=None, lr=None, knn_top1=knn_accuracy(backbone, data, args)))
        return start_epoch

    def create(self, start_epoch, going_on):
        from torch.utils.tensorboard import SummaryWriter  # here, because importing it takes longer than all the rest

        environment = dict(torch=torch.__version__, device=describe_device(self.device), processes=world_size())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UserError(f"cannot write to --out '{self.path}' ({error})") from None
        if not lock_file(self.lock):
            raise UserError(f"another process is training in '{self.path}'; wait for it, or choose another --out")
        if self.restore_previous:  # in the damaged one's place, before the next save makes that the previous one
            os.replace(self.path / "checkpoint.previous.pth", self.path / "checkpoint.pth")
        arguments = json.dumps({**vars(self.args), "environment": environment}, indent=1)
        write_atomically(self.path / "args.json", lambda path: path.write_text(arguments + "\n"))
        # An interrupted run may have logged an epoch that its checkpoint does not have; that epoch comes again.
        lines = (self.path / "log.jsonl").read_text().splitlines() if (self.path / "log.jsonl").exists() else []
        kept = "".join(f"{line}\n" for line in lines if going_on and is_log_line(line, start_epoch))
        write_atomically(self.path / "log.jsonl", lambda path: path.write_text(kept))
        self.tensorboard = SummaryWriter(self.path, purge_step=start_epoch + 1 if going_on else 0)
        self.saver, self.saving = ThreadPoolExecutor(1), None

    def catch_signals(self):
        """Let SIGTERM (the preemption notice of clusters), SIGUSR1 (SLURM's --signal) and Ctrl-C be requests to stop after
        the step; a second one ends the process as usual."""

        def request(number, frame):
            self.signal = number
            signal.signal(number, usual[number])
            if rank() == 0:
                print(f"\n{signal.Signals(number).name}: stopping after this step", file=sys.stderr, flush=True)

        numbers = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM))
        usual = {number: signal.signal(number, request) for number in numbers}
        self.release_signals = lambda: [signal.signal(number, handler) for number, handler in usual.items()]
        # Signals reach processes at different steps: to stop at the same one, they tell each other, step by step.
        self.control = dist.new_group(backend="gloo") if world_size() > 1 else None

    def stop_signal(self):
        """The signal that any process has caught, by the step before this one if there are several; 0: none. All processes
        get the same answer. The message travels while a step computes, and on the CPU, so that no GPU waits for it."""
        if self.control is None:
            return self.signal
        answer = 0
        if self.message is not None:
            numbers, sent = self.message
            sent.wait()
            answer = int(numbers)
        numbers = torch.tensor(self.signal)
        self.message = numbers, dist.all_reduce(numbers, dist.ReduceOp.MAX, self.control, async_op=True)
        return answer

    def views(self, data, epoch):
        """The batches of an epoch (0-based): yields two augmented views, float [N, 3, S, S] each, of this process's part
        of every global batch. Raises Stopped, its state saved, after a step during which a signal came.

        `generator` is for what else the step draws, and in the same state on all processes; `order` is how keys are
        shuffled (int64 [global batch]), or None where BatchNorm sees the whole batch; `index` int64 [N] is which training
        images these are."""
        args, self.started = self.args, time.perf_counter()
        num_images, image_size = data.train_images.shape[:2]
        plan = draw_epoch_plan(num_images, args.batch_size, image_size, args.seed, epoch, args.augmentation)
        plan = plan.to(self.device)
        part = args.batch_size // world_size()
        self.num_steps = self.steps_left = len(plan.index) // args.batch_size
        self.loss_sum = torch.zeros((), device=self.device) + self.loss_before
        first_step, self.first_step, self.loss_before = self.first_step, 0, 0
        self.steps_left -= first_step
        self.steps_here, self.statistics, self.two_views = self.steps_left, None, None
        self.generator = torch.Generator(self.device)
        # The bar shows the newest loss that has arrived; it never makes the loop wait for the device.
        self.shown_loss = torch.zeros((), pin_memory=self.device.type == "cuda")
        title, quiet = f"epoch {epoch + 1}/{args.epochs}", None if rank() == 0 else True  # None: shown on a terminal only
        with tqdm(desc=title, total=len(plan.index), unit=" images", leave=False, disable=quiet) as self.bar:
            for step in range(first_step, self.num_steps):
                begin = step * args.batch_size + rank() * part
                batch = plan.rows(slice(begin, begin + part))
                self.index, images = batch.index, data.train_images[batch.index]
                # What a step draws on the device depends on (seed, epoch, step) alone; the plan has (seed, epoch, 0).
                state = np.random.SeedSequence([args.seed, epoch, step + 1]).generate_state(1, np.uint64)
                self.generator.manual_seed(int(state[0]))
                # Drawn in any case, so that what is drawn after it does not depend on the number of processes.
                order = torch.rand(args.batch_size, device=self.device, generator=self.generator).argsort()
                self.order = order if args.bn_splits > 1 or (world_size() > 1 and not args.sync_bn) else None
                choices = [[field[:, view] for field in batch[1:]] for view in (0, 1)]
                self.two_views = [self.augment(images, *of_view, args.augmentation) for of_view in choices]
                yield self.two_views
                if number := self.stop_signal():
                    self.stop(number, epoch, step + 1)

    def record(self, loss, q, k, queue=None):
        """Note one step: its loss, without waiting for it, and in the last step of an epoch the similarities of its
        queries and keys [N, C] (with the queue [K, C] as it was for the loss), for TensorBoard."""
        self.steps_left -= 1
        if self.steps_left == 0:
            dt_m = self.args.dt_m if self.args.loss == "dual" else None
            self.statistics = similarity_statistics(q, k, self.args.moco_t, dt_m, queue)
        self.loss_sum += loss.detach()
        self.shown_loss.copy_(loss.detach(), non_blocking=True)
        shown = float(self.shown_loss)
        if rank() == 0:  # whose weights are no longer finite one step after any process's loss
            self.check_finite(shown, f"at step {self.num_steps - self.steps_left} of {self.num_steps}, or shortly before")
        self.bar.set_postfix(loss=f"{shown:.4f}", lr=f"{self.learning_rate():.4f}", refresh=False)
        self.bar.update(self.args.batch_size)

    def check_finite(self, loss, where):
        if not math.isfinite(loss):
            at = f"{where}, at lr {self.learning_rate():.4g} in {self.args.precision}"
            raise UserError(f"the loss became {loss} {at}; a lower --lr may help. The last checkpoint is as it was")

    def learning_rate(self):
        return self.optimizer.param_groups[0]["lr"]

    def end_epoch(self, epoch):
        """After an epoch (0-based): kNN if it is due, log line, TensorBoard, checkpoint.

        Raises UserError if the loss is no longer a finite number; the checkpoint of the epoch before is left as it is.
        """
        args, finished = self.args, epoch + 1
        loss = sum_over_processes(self.loss_sum).item() / (self.num_steps * world_size())
        trained = time.perf_counter()
        self.check_finite(loss, f"in epoch {finished}")
        average_batchnorm(self.model)
        due = finished % args.knn_every == 0 or finished == args.epochs
        entry = dict(
            epoch=finished, loss=loss, lr=self.learning_rate(),
            knn_top1=knn_accuracy(self.backbone, self.data, args) if due else None,
            images_per_second=self.steps_here * args.batch_size / (trained - self.started),
            seconds=time.perf_counter() - self.started,
        )  # fmt: skip
        self.log(entry, self.statistics, show_views=due)
        self.save(finished)
        if finished == args.epochs:
            self.close()
            if rank() == 0:
                print(f"finished. {self.next_command()}", flush=True)

    def save(self, epoch, step=0, loss_sum=0.0):
        """Write checkpoint.pth: the state after `epoch` epochs and `step` steps of the next one, whose losses add up to
        `loss_sum`. In the background: on a GPU it would take a good part of an epoch. The next call raises its UserError."""
        if rank() != 0:
            return
        self.finish_saving()
        state = dict(epoch=epoch, step=step, loss_sum=loss_sum)
        state.update(model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        state = tree_map(lambda value: value.to("cpu", copy=True) if isinstance(value, Tensor) else value, state)
        size = sum(value.nbytes for value in tree_leaves(state) if isinstance(value, Tensor))
        path, previous = self.path / "checkpoint.pth", self.path / "checkpoint.previous.pth"
        self.saving = self.saver.submit(write_atomically, path, lambda path: torch.save(state, path), previous, size)

    def finish_saving(self):
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.result()

    def stop(self, number, epoch, step):
        """Save the state after `step` steps of an epoch (0-based), then raise Stopped."""
        loss_sum = sum_over_processes(self.loss_sum).item()
        self.check_finite(loss_sum, f"in epoch {epoch + 1}")
        # Running statistics are moving averages, so averaging them over the processes here and at the end of the epoch is
        # the same as at its end alone.
        average_batchnorm(self.model)
        self.save(epoch, step, loss_sum)
        self.close()
        if rank() == 0:
            print(f"saved after step {step} of epoch {epoch + 1}; the same command goes on from there", file=sys.stderr)
        raise Stopped(number)

    def close(self):
        if rank() == 0:
            self.finish_saving()
            self.tensorboard.close()
            self.lock.close()
        self.release_signals()

    def log(self, entry, statistics=None, show_views=False):
        """One epoch: a printed line, a line of log.jsonl, TensorBoard. Raises UserError if they cannot be written."""
        if rank() == 0:
            try:
                self.write_log(entry, statistics, show_views)
            except OSError as error:
                raise UserError(f"cannot write to '{self.path}' ({error}); the last checkpoint is as it was") from None

    def write_log(self, entry, statistics, show_views):
        epoch, board = entry["epoch"], self.tensorboard
        for name, value in (statistics or {}).items():
            if value.dim() > 0:
                value = value[value.isfinite()]  # the positive stands as -inf among the in-batch negatives
                board.add_histogram(f"similarity/{name}", value, epoch)
                name, value = f"{name}_similarity", value.mean()
            board.add_scalar(f"contrast/{name}", value, epoch)
            entry[name] = value.item()
        with open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        text = f"epoch {epoch:3d}/{self.args.epochs}"
        text += f"  loss {entry['loss']:.4f}  lr {entry['lr']:.4f}" if epoch else "  (untrained)"
        text += f"  kNN {entry['knn_top1']:.2f} %" if entry["knn_top1"] is not None else ""
        text += f"  {entry['images_per_second']:.0f} images/s  {entry['seconds']:.1f} s" if epoch else ""
        print(text, flush=True)
        titles = dict(loss="train/loss", lr="train/lr", knn_top1="knn/top1", images_per_second="speed/images_per_second")
        for key, title in titles.items():
            if entry.get(key) is not None:
                board.add_scalar(title, entry[key], epoch)
        if show_views and self.two_views is not None:
            mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
            first, second = ((view[:24].cpu() * std + mean).clamp(0, 1).split(8) for view in self.two_views)
            rows = [row for pair in zip(first, second) for row in pair]  # the second view of an image below its first
            grid = torchvision.utils.make_grid(torch.cat(rows), nrow=len(rows[0]))
            board.add_image("two views of each image", F.interpolate(grid[None], scale_factor=2)[0], epoch)
        board.flush()


def is_log_line(line, last_epoch):
    """Whether this is a whole line of log.jsonl about an epoch up to `last_epoch`."""
    try:
        return json.loads(line)["epoch"] <= last_epoch
    except (ValueError, KeyError, TypeError):
        return False
