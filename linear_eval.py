"""Linear evaluation: how good are the features of a pre-trained, frozen backbone?

    python linear_eval.py RUN_DIR               # trains a linear classifier on the run's backbone, writes result.json
    python linear_eval.py RUN_DIR --cached      # the same on features computed once, without crops and flips: much faster
    python linear_eval.py --untrained RUN_DIR   # the network of the run as it was before training: the floor
    python linear_eval.py --table runs/         # the table of all runs below a directory, as Markdown
    python linear_eval.py --checkpoint FILE --dataset cifar100    # a ResNet-18 trained by other code; see LAYOUTS below
    python linear_eval.py RUN_DIR --export FILE                   # its backbone as a plain torchvision state dict

The protocol:
    1. The backbone is frozen and in eval mode. Training images are randomly cropped and flipped (as in pre-training, but
       without colour operations) or, with --cached, taken as they are; test images are always taken as they are.
    2. One linear classifier for each learning rate of a grid is trained by SGD (momentum 0.9, no weight decay, cosine
       schedule), all of them at once, on the training images but 5000 (but 10 % of a set with fewer than 50 000).
    3. The learning rate that is best on those held-out images is used to train once more, on all training images.
    4. That classifier is evaluated once on the test set: top-1 and top-5. kNN accuracy is reported beside it.
"""
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
import moco_v2
import simco
import simmoco
from common import UserError, autocast, extract_features, normalize, random_resized_crop_flip, to_float

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def arguments():
    parser = common.Parser("Linear evaluation of a run or of another checkpoint, or the table of all runs.")
    add, number = parser.add_argument, common.number
    add("run", nargs="?", metavar="RUN_DIR", help="directory of a run of moco_v2.py, simmoco.py or simco.py")
    add("--table", metavar="DIR", help="print the table of all evaluated runs below DIR, and do nothing else")
    add("--checkpoint", metavar="FILE", help="evaluate a ResNet-18 trained by other code; needs --dataset")
    add("--dataset", choices=common.DATASETS, help="with --checkpoint: the data to evaluate on")
    add("--subset", type=number(int, 1), metavar="N", help="with --checkpoint: N training images only")
    add("--image-size", type=number(int, 8), help="with --checkpoint --dataset folder (default: 32)")
    add("--stem-padding", type=int, choices=(1, 2), help="with --checkpoint (default: what the code it comes from has)")
    add("--json", metavar="FILE", help="with --checkpoint: write the result to a new file too; without, it is only printed")
    add("--export", metavar="FILE", help="write the backbone, named as torchvision's, to a new file, and do nothing else")
    add("--cached", action="store_true", help="compute the features once, without crops and flips")
    add("--untrained", action="store_true", help="evaluate the run's network as it was before training")
    add("--epochs", default=100, type=number(int, 1), help="of each of the two trainings")
    add("--batch-size", default=256, type=number(int, 1), help="images per step")
    add("--lrs", default=LEARNING_RATES, nargs="+", type=number(float, above=0), help="the grid of learning rates")
    add("--seed", default=0, type=number(int, 0, most=2**63 - 1), help="of the held-out part, batches and crops")
    add("--data", metavar="DIR", help="where the dataset lies now (default: where the run had it, or data)")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a CUDA GPU if there is one")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where the hardware has it")
    return parser


def read_run_args(path):
    """args.json of a run directory: a dict with every flag that this file relies on."""
    if not (path / "args.json").is_file():
        raise UserError(f"'{path}' is no run directory: it has no args.json")
    run_args = common.read_json(path / "args.json")
    wanted = {"method", *vars(common.argument_parser("", "").parse_args([]))}
    if not isinstance(run_args, dict) or not wanted <= run_args.keys() or run_args["method"] not in TITLES:
        raise UserError(f"'{path / 'args.json'}' was not written by one of the methods' scripts")
    return run_args


def load_backbone(run_args, checkpoint):
    """The backbone of a run, frozen, in eval mode. checkpoint: as `common.load_checkpoint`; None: as before training."""
    torch.manual_seed(run_args["seed"])  # the scripts draw the encoder first, so this draws the same one
    backbone = common.Encoder(run_args["width"], run_args["stem_padding"], run_args["moco_dim"]).backbone
    if checkpoint is not None:
        fill(backbone, find_backbone(checkpoint, "checkpoint.pth")[0], "checkpoint.pth does not fit this run's network")
    return backbone.requires_grad_(False).eval()


def fill(backbone, state, complaint):
    """Load a state dict, whole. Raises UserError, `complaint` and the first keys that do not fit, for another network's."""
    own, shape = backbone.state_dict(), lambda tensor: "x".join(map(str, tensor.shape))
    pairs = [(key, shape(state[key]), shape(value)) for key, value in own.items() if key in state]
    wrong = [f"{key} is {theirs}, not {ours}" for key, theirs, ours in pairs if theirs != ours]
    wrong += [f"{key} has no place" for key in state if key not in own]
    wrong += [f"{key} is missing" for key in own if key not in state and "num_batches" not in key]  # old files have none
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{complaint}: {'; '.join(wrong[:3])}{more}")
    backbone.load_state_dict(state, strict=False)


def train_linear(features_of, labels, index, num_classes, num_features, learning_rates, args):
    """Train one linear classifier per learning rate, all at once, as one wide linear layer.

    features_of: function of image indices int64 [B] and a torch.Generator -> features float [B, num_features].
    labels int64 [N]; index int64 [M]: which images to train on.
    Returns an nn.Linear with len(learning_rates) * num_classes outputs.
    """
    heads = nn.Linear(num_features, len(learning_rates) * num_classes).to(labels.device)
    nn.init.zeros_(heads.weight)
    nn.init.zeros_(heads.bias)
    # Under SGD without weight decay, a classifier whose loss is multiplied by c learns as one with c times the rate. So one
    # optimiser serves the whole grid: its own rate is only the schedule, from 1 to 0.
    scale = torch.tensor(learning_rates, device=labels.device)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    batch_size = min(args.batch_size, len(index))
    steps = args.epochs * (len(index) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(args.seed)
    quiet = None if common.rank() == 0 else True  # None: shown on a terminal only
    for _ in tqdm(range(args.epochs), f"linear x{len(learning_rates)}", unit="epoch", leave=False, disable=quiet):
        order = index[torch.randperm(len(index), generator=generator).to(index.device)]
        for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
            logits = heads(features_of(batch, generator)).view(batch_size, len(learning_rates), num_classes)
            target = labels[batch, None].expand(-1, len(learning_rates))
            losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(dim=0)  # of each classifier
            optimizer.zero_grad()
            (losses * scale).sum().backward()
            optimizer.step()
            schedule.step()
    return heads


@torch.no_grad()
def accuracies(heads, features, labels, num_classes, top=1):
    """Top-`top` accuracy in percent of each classifier in the wide layer: list of float."""
    correct = 0
    for rows, target in zip(features.split(1024), labels.split(1024)):
        logits = heads(rows).view(len(rows), -1, num_classes)
        best = logits.topk(min(top, num_classes), dim=2).indices
        correct = correct + (best == target[:, None, None]).any(dim=2).sum(dim=0)
    return [100 * count / len(labels) for count in correct.tolist()]


def evaluate(backbone, data, args):
    """The protocol of this file's docstring. Returns what goes into result.json, and the test features [N, D]."""
    num_images, num_classes, num_features = len(data.train_labels), len(data.classes), backbone.num_features
    features = {split: extract_features(backbone, getattr(data, f"{split}_images"), args) for split in ("train", "test")}

    def cropped(index, generator):
        image_size = data.train_images.shape[1]
        box = common.sample_crops(len(index), image_size, generator)
        flip = torch.rand(len(index), generator=generator) < 0.5
        result = torch.zeros(len(index), num_features, device=index.device)
        mine = slice(common.rank(), None, common.world_size())  # each process computes a part; all of them get the whole
        parameters = [parameter[mine].to(index.device) for parameter in (*box, flip)]
        with torch.no_grad(), autocast(args):
            images = random_resized_crop_flip(to_float(data.train_images[index[mine]]), *parameters, image_size)
            result[mine] = backbone(normalize(images)).float()
        return common.sum_over_processes(result)

    def cached(index, generator):
        return features["train"][index]

    def train(index, learning_rates):
        features_of = cached if args.cached else cropped
        return train_linear(features_of, data.train_labels, index, num_classes, num_features, learning_rates, args)

    shuffled = torch.randperm(num_images, generator=torch.Generator().manual_seed(args.seed)).to(data.train_labels.device)
    num_held_out = 5000 if num_images >= 50_000 else max(1, num_images // 10)
    held_out, rest = shuffled[:num_held_out], shuffled[num_held_out:]
    held_out_top1 = accuracies(train(rest, args.lrs), features["train"][held_out], data.train_labels[held_out], num_classes)
    best = max(range(len(args.lrs)), key=lambda i: held_out_top1[i])
    if len(args.lrs) > 2 and best in (0, len(args.lrs) - 1) and common.rank() == 0:
        print(f"note: the best learning rate, {args.lrs[best]}, is at the end of the grid; --lrs can extend it")

    classifier = train(shuffled, [args.lrs[best]])
    top1, top5 = (accuracies(classifier, features["test"], data.test_labels, num_classes, top)[0] for top in (1, 5))
    knn = common.knn_predict(features["test"], features["train"], data.train_labels, num_classes)
    result = dict(
        linear_top1=top1, linear_top5=top5, knn_top1=100 * (knn == data.test_labels).double().mean().item(),
        linear_lr=args.lrs[best], held_out_top1=dict(zip(map(str, args.lrs), held_out_top1)),
        protocol=dict(epochs=args.epochs, batch_size=args.batch_size, cached=args.cached, seed=args.seed,
                      held_out=num_held_out, precision=args.precision),
    )  # fmt: skip
    return result, features["test"]


def show_embedding(path, features, data, count=2000):
    """Put the features of some test images, with labels and thumbnails, into TensorBoard's projector."""
    from torch.utils.tensorboard import SummaryWriter

    names = [data.classes[label] for label in data.test_labels[:count].tolist()]
    thumbnails = data.test_images[:count].permute(0, 3, 1, 2).cpu().float() / 255
    with SummaryWriter(path) as board:
        board.add_embedding(features[:count].cpu(), names, thumbnails, tag="test_features")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of others

# How the backbone's keys begin, after DistributedDataParallel's "module."; whose code names them so; its stem padding, which
# neither names nor shapes tell.
LAYOUTS = (
    ("encoder_q.backbone.", "this project", 2), ("encoder.backbone.", "this project", 2),
    ("encoder_q.net.", "MoCo's CIFAR demo", 1), ("encoder_q.", "MoCo's code", 1),
    ("backbone.", "lightly", 1), ("encoder.", "unknown code", 1), ("", "torchvision", 1),
)  # fmt: skip
PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
HEADS = ("fc", "linear", "head", "projector", "classifier")


def find_backbone(checkpoint, name):
    """Find the backbone in what `common.read_checkpoint` returned for the file `name`. Returns its state dict under
    torchvision's names, whose code it comes from, the stem padding of that code, whether a ReLU follows the stem, and which
    modules are left out (heads, key encoders, queue). Raises UserError if there is no backbone by a known name."""
    if isinstance(checkpoint, dict):
        checkpoint = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    items = checkpoint.items() if isinstance(checkpoint, dict) else ()
    tensors = {str(key).removeprefix("module."): value for key, value in items if isinstance(value, torch.Tensor)}
    stems = {key for key, value in tensors.items() if value.dim() == 4}
    known = [layout for layout in LAYOUTS if {layout[0] + "conv1.weight", layout[0] + "0.weight"} & stems]
    if not known:
        wanted = ", ".join(f"'{layout[0]}'" for layout in LAYOUTS if layout[0])
        found = ", ".join(list(tensors)[:3]) or "no tensors"
        raise UserError(f"{name} holds no conv1.weight (or 0.weight), alone or behind {wanted}, but {found}")
    prefix, origin, stem_padding = known[0]
    if prefix in ("backbone.", "encoder.") and "classifier.weight" in tensors:  # its online probe, which it always has
        origin, stem_padding = "solo-learn", 2  # the DT authors' code is built on it

    # lightly and MoCo's demo make an nn.Sequential of a ResNet's children, whose names are then numbers: those with
    # parameters in the order of PARTS, then the head. In lightly's own ResNet the stem's ReLU is no child, so its Sequential
    # is a network without it; it is known by layer1 having the number after bn1's.
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    numbers = sorted({int(key.split(".")[0]) for key in inside if key.split(".")[0].isdigit()})
    parts = dict(zip(map(str, numbers), PARTS))
    state, depth = {}, max(1, prefix.count("."))
    left_out = [".".join(key.split(".")[:depth]) for key in tensors if not key.startswith(prefix)]
    for key, value in inside.items():
        child, _, rest = key.partition(".")
        if child in HEADS or (child.isdigit() and child not in parts):
            left_out.append(prefix + child)
        else:  # "shortcut" is lightly's word
            state[f"{parts.get(child, child)}.{rest}".replace(".shortcut.", ".downsample.")] = value
    for key, value in state.items():
        weight = state.get(key.rpartition(".")[0] + ".weight", value)
        if "running_" in key and value.numel() % weight.numel() == 0:
            # lightly's split BatchNorm keeps a row of statistics for each split and evaluates with their mean.
            state[key] = value.reshape(-1, weight.numel()).mean(dim=0)
    return state, origin, stem_padding, 2 not in numbers, list(dict.fromkeys(left_out))


class WithoutStemReLU(common.ResNet):
    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))).mean(dim=(2, 3))


def load_foreign_backbone(path, stem_padding):
    """The backbone in a file, frozen, in eval mode. stem_padding: 1 or 2; None: as the code it comes from has it."""
    state, origin, usual_padding, stem_relu, left_out = find_backbone(common.read_checkpoint(path), f"'{path}'")
    if stem_padding is None:
        of_a_run = origin == "this project" and path.with_name("args.json").exists()
        stem_padding = read_run_args(path.parent)["stem_padding"] if of_a_run else usual_padding
    backbone = (common.ResNet if stem_relu else WithoutStemReLU)(len(state["conv1.weight"]), stem_padding)
    fill(backbone, state, f"'{path}' holds no ResNet-18 with a 3x3 first convolution")
    print(
        f"{path}: layout of {origin}, width {len(state['bn1.weight'])}, stem padding {stem_padding}"
        f"{'' if stem_relu else ' and no ReLU after it'}; left out: {', '.join(left_out) or 'nothing'}"
    )
    return backbone.requires_grad_(False).eval()


def export(backbone, path):
    """Write the state dict of a backbone; say what makes torchvision's resnet18 the same network."""
    common.write_atomically(path, lambda path: torch.save(backbone.state_dict(), path))
    stem = f"conv1 = nn.Conv2d(3, 64, 3, padding={backbone.conv1.padding[0]}, bias=False)"
    relu = "relu = " if isinstance(backbone, WithoutStemReLU) else ""
    way = f"torchvision's resnet18 loads it with {stem}, {relu}maxpool = fc = nn.Identity()"
    print(f"wrote {path}; {way if len(backbone.bn1.weight) == 64 else 'torchvision has no resnet18 as narrow or wide'}")


# ---------------------------------------------------------------------------------------------------------------------
# The table

TITLES = dict(moco_v2="MoCo v2", simmoco="SimMoCo", simco="SimCo")
# CIFAR-100 top-1 by batch size, table of the dual-temperature paper (arXiv 2203.17248), ResNet-18, 200 epochs.
PUBLISHED = dict(
    moco_v2={64: 52.58, 128: 54.40, 256: 53.28, 512: 51.47, 1024: 48.90},
    simmoco={64: 54.02, 128: 54.93, 256: 54.11, 512: 52.45, 1024: 49.70},
    simco={64: 58.04, 128: 58.29, 256: 58.35, 512: 57.08, 1024: 55.34},
)
# What tells the cells of one table apart, or does not change the result: these are not part of a table's heading.
NOT_IN_HEADING = (*common.MACHINE_FLAGS, "method", "batch_size", "seed", "precision", "knn_every", "warmup_epochs")


def settings(run_args):
    """The flags of a run that are not the defaults, that is not the recipe of the published table: (shared, method's)."""
    parser = {"moco_v2": moco_v2, "simmoco": simmoco, "simco": simco}[run_args["method"]].arguments()
    presets = [flag for flag in parser.presets if run_args.get(flag)]  # such a flag stands for the defaults that it sets
    defaults = vars(parser.parse_args([f"--{flag.replace('_', '-')}" for flag in presets])) | dict.fromkeys(presets)
    shared_flags = vars(common.argument_parser("", "").parse_args([])).keys()
    changed = {key: value for key, value in run_args.items() if key not in NOT_IN_HEADING and value != defaults.get(key)}
    words = [[], []]
    for key, value in sorted(changed.items()):
        name = key.replace("_", "-")
        words[key not in shared_flags].append(name if value is True else f"{name} {value}")
    return tuple(", ".join(part) for part in words)


def mean_and_spread(values):
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def table(root):
    """Markdown: all runs below `root` that have a result.json. Runs with the same flags but method, batch size and seed
    make one table; over seeds, mean ± sample standard deviation. The published figures stand beside runs of the recipe."""
    groups = defaultdict(lambda: defaultdict(list))  # heading -> (method, its own flags, batch size) -> results
    unfinished = []
    for path in sorted(Path(root).rglob("result.json")):
        run_args, result = read_run_args(path.parent), common.read_json(path)
        shared, own = settings(run_args)
        if run_args["dataset"] == "cifar100":
            groups[""]  # whatever was run on CIFAR-100: show what there is to compare with, and what is missing
        if "linear_top1" in result:
            if result["epoch"] < run_args["epochs"]:
                unfinished.append(f"{path.parent} (epoch {result['epoch']} of {run_args['epochs']})")
                continue
            groups[shared][run_args["method"], own, run_args["batch_size"]].append(result)
        if "untrained" in result:
            groups[shared]["untrained", "", run_args["batch_size"]].append(result["untrained"])
    if not any(groups.values()):
        raise UserError(f"no finished result.json below '{root}'; python linear_eval.py RUN_DIR makes one")

    text = []
    for heading, cells in sorted(groups.items()):
        recipe = heading == ""
        sizes = sorted({size for _, _, size in cells} | (set(PUBLISHED["simco"]) if recipe else set()))
        protocols = {json.dumps(result["protocol"], sort_keys=True) for results in cells.values() for result in results}
        title = "CIFAR-100, ResNet-18, 200 epochs" if recipe else heading
        text.append(f"**{title}** (top-1 in percent on the test set: linear / kNN)\n")
        text.append("| | " + " | ".join(f"batch {size}" for size in sizes) + " |")
        text.append("|---|" + "---|" * len(sizes))
        rows = {(method, own) for method, own, _ in cells} | ({(method, "") for method in PUBLISHED} if recipe else set())
        order = ["untrained", *TITLES]
        for method, own in sorted(rows, key=lambda row: (order.index(row[0]), row[1])):
            of_size = [cells.get((method, own, size), []) for size in sizes]
            figures = [
                " / ".join(mean_and_spread([result[key] for result in results]) for key in ("linear_top1", "knn_top1"))
                if results else "–" for results in of_size
            ]  # fmt: skip
            text.append(f"| {TITLES.get(method, method)}{own and f' ({own})'} | " + " | ".join(figures) + " |")
            if recipe and method in PUBLISHED and not own:
                published = [f"{PUBLISHED[method][size]:.2f}" if size in PUBLISHED[method] else "–" for size in sizes]
                text.append(f"| {TITLES[method]}, published | " + " | ".join(published) + " |")
        text.append("")
        if len(protocols) > 1:
            text.append("Note: these runs were not all evaluated by the same protocol (see `protocol` in result.json).\n")
    if unfinished:
        text.append(f"Not in the tables, for training was not finished when they were evaluated: {', '.join(unfinished)}\n")
    return "\n".join(text).rstrip()


def check(args):
    """Raises UserError for flags that do not go together, and if a file to be written is there already."""
    if (args.run is None) == (args.checkpoint is None):
        raise UserError("which run? python linear_eval.py RUN_DIR (or --checkpoint FILE --dataset NAME, or --table DIR)")
    flags = ("dataset", "subset", "image_size", "stem_padding", "json") if args.run is not None else ("untrained",)
    given = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag) not in (None, False)]
    if given:
        raise UserError(f"{', '.join(given)} cannot be used with {'a run: it has its own' if args.run else '--checkpoint'}")
    if args.checkpoint is not None and args.dataset is None and args.export is None:
        raise UserError(f"--checkpoint needs --dataset, one of {', '.join(common.DATASETS)}")
    for path in (Path(file) for file in (args.json, args.export) if file is not None):
        if path.exists() or not path.parent.is_dir():
            raise UserError(f"'{path}' exists already" if path.exists() else f"'{path.parent}' is no directory")


def load(args):
    """The backbone that the flags name, what is known of its data, and how many epochs it was trained (None: not known)."""
    path = Path(args.run or args.checkpoint)
    if args.checkpoint is not None:
        run_args = dict(dataset=args.dataset, data=args.data or "data", subset=args.subset, image_size=args.image_size or 32)
        return load_foreign_backbone(path, args.stem_padding), run_args, None
    run_args = read_run_args(path)
    if args.untrained:
        return load_backbone(run_args, None), run_args, 0
    if not (path / "checkpoint.pth").exists():
        raise UserError(f"'{path}' has no checkpoint.pth yet: training has not finished an epoch")
    checkpoint = common.load_checkpoint(path / "checkpoint.pth")
    return load_backbone(run_args, checkpoint), run_args, checkpoint["epoch"]


def save(args, outcome, backbone, run_args):
    """Write what was measured: into the run's result.json, or for a --checkpoint to --json, if given."""
    if args.checkpoint is not None:
        given = dict(checkpoint=args.checkpoint, stem_padding=backbone.conv1.padding[0], **run_args)
        file, result = args.json, {**given, **outcome}
    else:
        file = Path(args.run, "result.json")
        result = common.read_json(file) if file.exists() else {}
        if args.untrained:
            result["untrained"] = outcome
        else:  # an earlier evaluation of the untrained network stays
            result = {**outcome, **{key: value for key, value in result.items() if key == "untrained"}}
    if file is not None:
        common.write_atomically(Path(file), lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


def main():
    args = arguments().parse_args()
    if args.table is not None:
        print(table(args.table))
        return
    check(args)
    common.join_processes(args)
    backbone, run_args, epoch = common.from_rank_zero(load, args)
    if args.export is not None:
        common.from_rank_zero(export, backbone, Path(args.export))
        return
    device, started = common.choose_hardware(args), time.perf_counter()
    if device.type == "cpu" and not args.cached and common.rank() == 0:
        print("note: every epoch computes the features of its crops anew; on a CPU, --cached is many times faster")
    where = run_args["dataset"], args.data or run_args["data"], True, run_args["image_size"]
    data = common.from_rank_zero(common.load_dataset, *where)
    data = (data if run_args["subset"] is None else data.subset(run_args["subset"])).to(device)
    backbone.to(device, memory_format=torch.channels_last)

    outcome, test_features = evaluate(backbone, data, args)
    outcome["seconds"] = time.perf_counter() - started
    if epoch is not None:
        outcome["epoch"] = epoch
    if common.rank() != 0:
        return
    save(args, outcome, backbone, run_args)
    if args.run is not None and not args.untrained:
        show_embedding(args.run, test_features, data)
    print(
        f"{args.run or args.checkpoint}{' before training' if args.untrained else ''}: linear top-1 "
        f"{outcome['linear_top1']:.2f} %, top-5 {outcome['linear_top5']:.2f} % (lr {outcome['linear_lr']}), "
        f"kNN {outcome['knn_top1']:.2f} %"
    )


if __name__ == "__main__":
    common.launch(main)
