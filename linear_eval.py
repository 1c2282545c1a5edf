"""Linear evaluation: how good are the features of a pre-trained, frozen backbone?

    python linear_eval.py RUN_DIR                # train a linear classifier, write result.json
    python linear_eval.py RUN_DIR --cached       # on features computed once, without crops: faster
    python linear_eval.py RUN_DIR --untrained    # the network before training: the floor
    python linear_eval.py RUN_DIR --labels-per-class 1 10 100 all    # how many labels are enough
    python linear_eval.py RUN_DIR --export FILE  # write the backbone for torchvision's resnet18
    python linear_eval.py --table runs/          # Markdown tables of all runs below a directory
    python linear_eval.py --checkpoint FILE --dataset cifar100    # of other code, see PREFIXES

Linear classifiers with a grid of learning rates are trained by SGD (momentum 0.9, no weight decay,
cosine schedule) on randomly cropped and flipped images. The learning rate is chosen on a held-out
tenth of the training images, at most 5000, by `calibrated_losses`. The classifier trained with it
on all training images is evaluated once on the test set.
"""
import itertools
import json
import statistics
import time
from argparse import Namespace
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import trange

import common
from common import UserError, number, require


def arguments():
    description = "Evaluate a run or another checkpoint, or print the tables of all runs."
    what = "RUN_DIR | --checkpoint FILE | --table DIR"
    parser = common.Parser(description, f"python linear_eval.py {what} [--flag value ...]")
    add = parser.add_argument_group("what to evaluate").add_argument
    add("run", nargs="?", metavar="RUN_DIR", help="of moco_v2.py, simmoco.py or simco.py")
    add("--table", metavar="DIR", help="print the tables of the runs below DIR")
    add("--checkpoint", metavar="FILE", help="evaluate a ResNet-18 trained by other code")
    add("--untrained", action="store_true", help="evaluate it as it was before training")
    add("--data", metavar="DIR", help="where the dataset is; default: as in the run")
    add = parser.add_argument_group("for --checkpoint").add_argument
    add("--dataset", choices=common.DATASETS, help="to evaluate on")
    add("--subset", type=number(int, 1), metavar="N", help="N training images, balanced by class")
    add("--image-size", default=32, type=number(int, 1), help="of --dataset folder, in pixels")
    add("--stem-padding", type=int, choices=(1, 2), help="default: as the code it comes from")
    add = parser.add_argument_group("protocol").add_argument
    add("--cached", action="store_true", help="compute the features once, without crops")
    labels = dict(nargs="+", type=number_or_all, metavar="N")
    add("--labels-per-class", **labels, help="N labels of each class, or all")
    add("--epochs", default=100, type=number(int, 1), help="passes over the training images")
    add("--batch-size", default=256, type=number(int, 1), help="images per step")
    grid = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    lrs = dict(nargs="+", type=number(float, 1e-6), metavar="LR")
    add("--lrs", default=grid, **lrs, help="rates to try")
    add("--seed", default=0, type=number(int, 0), help="of held-out images, batches and crops")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write the result to this new file instead")
    add("--export", metavar="FILE", help="only write the backbone to this new file")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if present")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the backbone")
    return parser


def number_or_all(text):
    return text if text == "all" else number(int, 1)(text)


def extract_features(backbone, data, args):
    """The Dataset with features, float32 [N, D], in place of its images. Freezes the backbone."""
    backbone.requires_grad_(False).eval()
    train = common.extract_features(backbone, data.train_images, args)
    test = common.extract_features(backbone, data.test_images, args)
    return data._replace(train_images=train, test_images=test)


def train_linear(features, index, learning_rates, args, features_of=None, ignored=None):
    """Train a linear classifier for each learning rate, all at once, as one wide linear layer.

    features: see `extract_features`. index: int64 [M], which training images to learn from.
    features_of: function of indices int64 [M] and a torch.Generator -> float [M, D], for an epoch;
    None: looked up in `features`. ignored: int64 [H], the images from which the first half of the
    classifiers does not learn. Returns the wide nn.Linear.
    """
    labels, num_rates = features.train_labels, len(learning_rates)
    batch_size = min(args.batch_size, len(index))
    heads = nn.Linear(features.train_images.shape[1], num_rates * len(features.classes))
    heads.to(labels.device)
    nn.init.zeros_(heads.weight)
    nn.init.zeros_(heads.bias)
    # SGD without weight decay on c * loss is SGD on the loss with c times the learning rate. So one
    # optimizer serves the whole grid, and its own learning rate is only the schedule, from 1 to 0.
    scale = torch.tensor(learning_rates, device=labels.device)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    steps = len(index) // batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
    counts = torch.ones(len(labels), num_rates, device=labels.device)  # whether an image counts
    if ignored is not None:
        counts[ignored, : num_rates // 2] = 0
    generator = torch.Generator(labels.device).manual_seed(args.seed)
    for _ in trange(args.epochs, desc="linear", leave=False, disable=common.rank() > 0 or None):
        order = torch.randperm(len(index), generator=generator, device=labels.device)
        order = index[order[: steps * batch_size]]
        x = features_of(order, generator) if features_of else features.train_images[order]
        for batch, rows in zip(order.split(batch_size), x.split(batch_size)):
            logits = heads(rows).view(batch_size, num_rates, -1)
            target = labels[batch, None].expand(-1, num_rates)
            losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            count = counts[batch]
            losses = (losses * count).sum(dim=0) / count.sum(dim=0).clamp(min=1)
            optimizer.zero_grad()
            (losses * scale).sum().backward()
            optimizer.step()
            schedule.step()
    return heads.requires_grad_(False)


def accuracies(heads, x, labels, num_classes, top=1):
    """Top-`top` accuracy in percent of each classifier in the wide layer: list of float."""
    best = heads(x).view(len(x), -1, num_classes).topk(min(top, num_classes), dim=2).indices
    correct = (best == labels[:, None, None]).any(dim=2).sum(dim=0)
    return [100 * count / len(labels) for count in correct.tolist()]


def calibrated_losses(heads, x, labels, num_classes):
    """The cross-entropy of each classifier in the wide layer after temperature scaling (Guo et al.,
    arXiv 1706.04599): that of logits / t, for the best t. On a thousand
    images, accuracy is too coarse to separate neighbouring learning rates. Without the scaling, an
    overconfident classifier loses even if it is right more often. Returns list of float."""
    logits = heads(x).view(len(x), -1, num_classes).transpose(1, 2)
    target = labels[:, None].expand(-1, logits.shape[2])
    losses = []
    for t in torch.logspace(-1, 3, 81).tolist():  # from 0.1 to 1000
        losses.append(F.cross_entropy(logits / t, target, reduction="none").mean(dim=0))
    return torch.stack(losses).amin(dim=0).tolist()


def evaluate(backbone, data, features, args):
    """The protocol above; `features`: see `extract_features`. Returns a dict for result.json."""
    labels, num_classes = data.train_labels, len(data.classes)
    image_size = data.train_images.shape[1]

    def features_of(index, generator):
        box = common.draw_boxes(len(index), image_size, generator)
        flip = torch.rand(len(index), generator=generator, device=index.device) < 0.5
        images = data.train_images[index]

        def crops_of(rows):
            box_and_flip = [values[rows] for values in (*box, flip)]
            crops = common.to_float(images[rows])
            crops = common.random_resized_crop_flip(crops, *box_and_flip, image_size)
            return common.normalize(crops)

        return common.extract_features(backbone, images, args, crops_of)

    generator = torch.Generator().manual_seed(args.seed)
    shuffled = torch.randperm(len(labels), generator=generator).to(labels.device)
    num_held_out = min(5000, max(1, len(labels) // 10))
    held_out, rest = shuffled[:num_held_out], shuffled[num_held_out:]
    if args.cached:
        heads = train_linear(features, rest, args.lrs, args)
    else:  # crops are costly: train the classifiers for all images on the same ones
        heads = train_linear(features, shuffled, args.lrs * 2, args, features_of, held_out)
    x, y = features.train_images[held_out], labels[held_out]
    held_out_loss = calibrated_losses(heads, x, y, num_classes)[: len(args.lrs)]
    best = held_out_loss.index(min(held_out_loss))
    if args.cached:
        heads = train_linear(features, shuffled, args.lrs[best : best + 1], args)
    column = 0 if args.cached else len(args.lrs) + best
    x, y = features.test_images, data.test_labels
    knn = common.knn_predict(x, features.train_images, labels, num_classes)
    protocol = {name: getattr(args, name) for name in ("epochs", "batch_size", "cached", "seed")}
    protocol.update(held_out=num_held_out, chosen_by="loss", precision=args.precision)
    return dict(
        linear_top1=accuracies(heads, x, y, num_classes)[column],
        linear_top5=accuracies(heads, x, y, num_classes, top=5)[column],
        knn_top1=100 * (knn == y).double().mean().item(),
        linear_lr=args.lrs[best],
        held_out_loss=dict(zip(map(str, args.lrs), held_out_loss)),
        protocol=protocol,
    )


def evaluate_few_labels(backbone, data, args):
    """For --labels-per-class: {N: top-1 accuracies in percent, for five draws of N images of each
    class}. On cached features, with the learning rate that is best for all labels."""
    labels, num_classes = data.train_labels, len(data.classes)
    fewest = labels.bincount(minlength=num_classes).min().item()
    for count in args.labels_per_class:
        enough = count == "all" or count <= fewest
        require(enough, f"--labels-per-class {count}: there is a class of {fewest} training images")
    args = Namespace(**{**vars(args), "cached": True})
    features = extract_features(backbone, data, args)
    rate = evaluate(backbone, data, features, args)["linear_lr"]
    top1 = {count: [] for count in args.labels_per_class}
    for count, args.seed in itertools.product(top1, range(5)):
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        size = len(labels) if count == "all" else count * num_classes
        index = order[common.balanced(labels[order], num_classes, size)]
        classifier = train_linear(features, index, [rate], args)
        top1[count] += accuracies(classifier, features.test_images, data.test_labels, num_classes)
    return top1


def compare_few_labels(backbone, seed, data, args):
    """Print a line for each N of --labels-per-class, beside the untrained network. Returns both."""
    start = untrained_like(backbone, seed, data)
    networks = dict(trained=backbone, untrained=start)
    top1 = {name: evaluate_few_labels(networks[name], data, args) for name in networks}
    if common.rank() == 0:
        print("labels per class        trained      untrained")
        for count in args.labels_per_class:
            words = [in_words(top1[name][count]) for name in networks]
            print(f"{count:>16}{words[0]:>15}{words[1]:>15}")
    return top1


def picture_of_neighbours(features, data, count=8, k=5):
    """`count` test images, spread over the classes, each followed by its k nearest training images,
    framed in green if they have its class. features: see `extract_features`. Returns the picture,
    float [3, H, W] in 0..1; the labels of its rows, int64 [count]; and how many of the k neighbours
    have the right class over the whole test set, in percent."""
    _, neighbours = common.nearest(features.test_images, features.train_images, k)
    same = data.train_labels[neighbours] == data.test_labels[:, None]  # [N, k]
    rows = data.test_labels.argsort(stable=True)
    rows = rows[torch.arange(count) * len(rows) // count]
    images = [data.test_images[rows, None], data.train_images[neighbours[rows]]]
    images = common.to_float(torch.cat(images, dim=1).flatten(0, 1))
    green = torch.tensor([0.0, 0.7, 0.2], device=images.device)[:, None, None]
    framed = F.pad(images, (2, 2, 2, 2), value=1.0)
    framed[F.pad(same[rows], (1, 0)).flatten()] = green  # but for the test images
    framed[:, :, 2:-2, 2:-2] = images
    picture = torchvision.utils.make_grid(framed, nrow=same.shape[1] + 1, padding=1, pad_value=1)
    return picture, data.test_labels[rows], 100 * same.float().mean().item()


# Prefixes of the backbone in checkpoints of this project, MoCo's CIFAR demo (which numbers the
# children of a ResNet; 2 is its ReLU), MoCo, torchvision, solo-learn and the DT authors.
PREFIXES = ("encoder_q.backbone.", "encoder.backbone.", "encoder_q.net.", "encoder_q.")
PREFIXES += ("", "backbone.", "encoder.")
NUMBERED = dict(zip("0134569", "conv1 bn1 layer1 layer2 layer3 layer4 fc".split()))
HEADS = ("fc", "linear", "head", "projector", "classifier")


def read_backbone(path, stem_padding=None):
    """The ResNet-18 in a checkpoint, and its epoch, if given. UserError if it is another network.
    stem_padding None: that of the code which writes such checkpoints."""
    checkpoint, state, tensors = common.load_checkpoint(path), {}, None
    if isinstance(checkpoint, dict):
        tensors = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    require(isinstance(tensors, dict), f"'{path}' has no state_dict")
    tensors = {str(k).removeprefix("module."): v for k, v in tensors.items() if torch.is_tensor(v)}
    known = [p for p in PREFIXES if p + "conv1.weight" in tensors or p + "0.weight" in tensors]
    require(known, f"'{path}' has no conv1.weight behind a known prefix, but {[*tensors][:3]}")
    prefix = known[0]
    for key, value in tensors.items():
        child, _, rest = key.removeprefix(prefix).partition(".")
        child = NUMBERED.get(child, child)
        if key.startswith(prefix) and child not in HEADS:
            state[f"{child}.{rest}"] = value
    has_probe = prefix in ("backbone.", "encoder.") and "classifier.weight" in tensors
    stem_padding = stem_padding or (2 if has_probe or prefix.endswith(".backbone.") else 1)
    backbone = common.resnet18(len(state["conv1.weight"]), stem_padding)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:  # names what is missing, unexpected or of another size
        raise UserError(f"'{path}' is no ResNet-18: {' '.join(str(error).split())[:300]}") from None
    found = f"{len(state)} of {len(tensors)} tensors ({prefix}*)"
    print(f"{path}: {found}, width {backbone.num_features // 8}, stem padding {stem_padding}")
    return backbone, checkpoint.get("epoch")


def read_args(path):
    run_args = common.read_json(Path(path, "args.json"))
    require("changed" in run_args, f"'{path}/args.json' is not of this project")
    return Namespace(**run_args)


def untrained(seed, width, stem_padding):
    """The backbone before training. The scripts initialise it first, after seeding."""
    torch.manual_seed(seed)
    return common.resnet18(width, stem_padding)


def untrained_like(backbone, seed, data):
    """An untrained backbone of the same shape, where the data is."""
    start = untrained(seed, backbone.num_features // 8, backbone.conv1.padding[0])
    return start.to(data.train_images.device, memory_format=torch.channels_last)


def load(args):
    """The backbone that the flags name, its epoch, and a Namespace with the flags of its data."""
    for path in map(Path, filter(None, (args.json, args.export))):
        require(path.parent.is_dir(), f"'{path.parent}' is not a directory")
        require(not path.exists(), f"'{path}' exists; choose another file")
    if args.run is None:
        require(args.checkpoint is not None, "which run? Name a RUN_DIR, or a --checkpoint")
        require(not args.untrained, "--untrained needs a RUN_DIR")
        require(args.dataset or args.export, "--checkpoint needs --dataset")
        return *read_backbone(args.checkpoint, args.stem_padding), Namespace(**vars(args))
    few = args.untrained and args.labels_per_class
    require(not few, "drop --untrained: --labels-per-class evaluates both")
    own = {"checkpoint", "dataset", "subset", "image_size", "stem_padding"}
    wrong = ", ".join(own.intersection(args.changed.split()))
    require(not wrong, f"drop {wrong}: a RUN_DIR has its own")
    run_args = read_args(args.run)
    if args.untrained:
        return untrained(run_args.seed, run_args.width, run_args.stem_padding), 0, run_args
    return *read_backbone(f"{args.run}/checkpoint.pth", run_args.stem_padding), run_args


BATCH_SIZES = (64, 128, 256, 512, 1024)
PUBLISHED = {  # by Zhang et al., arXiv 2203.17248
    "MoCo v2": "52.58 54.40 53.28 51.47 48.90".split(),
    "SimMoCo": "54.02 54.93 54.11 52.45 49.70".split(),
    "SimCo": "58.04 58.29 58.35 57.08 55.34".split(),
}
PROBE_NOTE = """
A dash marks what was not measured. The published figures (Zhang et al., 2022) are of an online
probe, a linear classifier trained alongside the network. Compare them with our probe only.
"""
MINIATURE = "subset 10000, epochs 60, width 16"  # as `changed_flags` writes it
SHORT_QUEUE = "moco-k 13107"  # to 10 000 images what 65536 keys are to 50 000
# The rows of the two tables by batch size: {name: (flags, method)}.
RECIPE_ROWS = {method: ("", method) for method in PUBLISHED}
MINIATURE_ROWS = {method: (MINIATURE, method) for method in PUBLISHED}
MINIATURE_ROWS[f"MoCo v2, {SHORT_QUEUE}"] = (f"{MINIATURE}, {SHORT_QUEUE}", "MoCo v2")
TITLES = dict(moco_v2="MoCo v2", simmoco="SimMoCo", simco="SimCo")
IGNORED = (*common.MACHINE_FLAGS, "method", "seed", "batch_size", "precision", "knn_every")


def changed_flags(run_args):
    """The flags that are not the recipe's, in words: "epochs 15, symmetric"."""
    names = [name for name in run_args.changed.split() if name not in IGNORED]
    words = [f"{name.replace('_', '-')} {getattr(run_args, name)}" for name in names]
    return ", ".join(word.removesuffix(" True") for word in words)


def in_words(values):
    """Their mean, and their standard deviation if there are several; None stands for no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    note = f" (of {len(known)})" if len(known) < len(values) else ""
    return f"{statistics.mean(known):.2f}{spread}{note}"


def last_probe(run):
    """The accuracy of a run's probe after its last epoch, if it was measured."""
    log = Path(run, "log.jsonl")
    lines = log.read_text().splitlines() if log.exists() else ["{}"]
    return json.loads(lines[-1]).get("probe_top1")


def table_by_batch_size(heading, rows):
    """Markdown. rows: {name: the cells, one for each of BATCH_SIZES}."""
    names = "".join(f" batch {size} |" for size in BATCH_SIZES)
    text = f"**{heading}** (test top-1 in percent: linear / probe / kNN)\n\n| |{names}\n"
    text += "|---" * (1 + len(BATCH_SIZES)) + "|\n"
    return text + "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())


def finished_runs(root):
    """The results of the evaluated runs below a directory, {(flags, method, batch size): list of
    dict}, sorted, and notes on those that are left out, a list of str."""
    results, notes = defaultdict(list), []
    for path in sorted(Path(root).rglob("result.json")):
        run_args, result = read_args(path.parent), common.read_json(path)
        flags, size = changed_flags(run_args), run_args.batch_size
        if "untrained" in result:
            results[flags, "untrained", size].append(result["untrained"])
        if result.get("epoch") == run_args.epochs:
            result["probe_top1"] = last_probe(path.parent)
            results[flags, TITLES[run_args.method], size].append(result)
        elif "epoch" in result:
            notes.append(f"Not shown: {path.parent}, evaluated after epoch {result['epoch']}.")
    require(results, f"no evaluated run below '{root}'; python linear_eval.py RUN_DIR first")
    return dict(sorted(results.items())), notes


def table(root):
    """The Markdown tables of the runs below a directory: the published table and the one in
    miniature, if it has runs of theirs, and a row for each other setting."""
    results, notes = finished_runs(root)
    figures, tables = {}, []
    for (flags, method, size), rows in results.items():
        names = ("linear_top1", "probe_top1", "knn_top1")
        figures[flags, method, size] = [in_words([row.get(name) for row in rows]) for name in names]
        if len({str(row["protocol"]) for row in rows}) > 1:
            notes.append(f"Evaluated by several protocols: {method}, batch {size}, {flags}.")

    def cells(flags, method):
        return [" / ".join(figures.pop((flags, method, size), ["–"])) for size in BATCH_SIZES]

    recipe = {name: cells(*which) for name, which in RECIPE_ROWS.items()}
    miniature = {name: cells(*which) for name, which in MINIATURE_ROWS.items()}
    if any("dataset" not in flags for flags, _, _ in results):  # CIFAR-100 is the default
        rows = {}
        for method, published in PUBLISHED.items():
            rows |= {method: recipe[method], f"{method}, published (probe)": published}
        title = "CIFAR-100, ResNet-18, 200 epochs"
        tables.append(table_by_batch_size(title, rows) + PROBE_NOTE)
    if any(cell != "–" for row in miniature.values() for cell in row):
        tables.append(table_by_batch_size(f"In miniature: {MINIATURE}", miniature))
    if figures:  # all that is in neither table
        text = "**Other settings** (top-1 in percent on the test set)\n\n"
        text += "| method | flags | batch | linear | probe | kNN | seeds |\n" + "|---" * 7 + "|\n"
        for (flags, method, size), words in figures.items():
            seeds = len(results[flags, method, size])
            text += f"| {method} | {flags} | {size} | {' | '.join(words)} | {seeds} |\n"
        tables.append(text)
    return "\n".join([*tables, *notes]).strip()


def main():
    args = arguments().parse_args()
    if args.table is not None:
        print(table(args.table))
        return
    common.init_distributed(args)
    backbone, epoch, run_args = common.from_rank_zero(load, args)
    if args.export is not None:
        save = partial(torch.save, backbone.state_dict())
        common.from_rank_zero(common.write_atomically, Path(args.export), save)
        stem = f"nn.Conv2d(3, 64, 3, padding={backbone.conv1.padding[0]}, bias=False)"
        print(f"At width 64, resnet18 loads it: conv1 = {stem}, maxpool = fc = nn.Identity()")
        return
    device, started = common.choose_hardware(args), time.perf_counter()
    run_args.data, run_args.batch_size = args.data or run_args.data or "data", 1
    data = common.load_data(run_args, device)
    backbone.to(device, memory_format=torch.channels_last)
    if args.labels_per_class:
        few_labels = compare_few_labels(backbone, run_args.seed, data, args)
        write_result(args, dict(labels_per_class=few_labels))
        return
    features = extract_features(backbone, data, args)
    result = evaluate(backbone, data, features, args)
    result.update(seconds=time.perf_counter() - started, epoch=epoch)
    if common.rank() == 0:
        figures = f"linear top-1 {result['linear_top1']:.2f} %, kNN {result['knn_top1']:.2f} %"
        took = common.duration(result["seconds"])
        print(f"{args.run or args.checkpoint}, epoch {epoch}: {figures}, in {took}")
    write_result(args, dict(untrained=result) if args.untrained else result)
    if args.run and not args.untrained:
        show_in_tensorboard(backbone, features, data, run_args, args)


def show_in_tensorboard(backbone, features, data, run_args, args):
    """Add to the events of the run: its test features, for the projector, and the neighbours that
    the features find, before and after training."""
    start = untrained_like(backbone, run_args.seed, data)
    before = extract_features(start, data, args)
    if common.rank() != 0:
        return
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    names = [data.classes[label] for label in data.test_labels[:2000].tolist()]
    images = common.to_float(data.test_images[:2000])
    with SummaryWriter(args.run) as board:
        board.add_embedding(features.test_images[:2000], names, images, tag="test_features")
        for name, these in dict(untrained=before, trained=features).items():
            board.add_image(f"neighbours/{name}", picture_of_neighbours(these, data)[0])
    parent = Path(args.run).parent
    print(f"Next: python linear_eval.py --table {parent}, or tensorboard --logdir {parent}")


def write_result(args, result):
    """Add a dict to result.json of the run, or to the new file that --json names."""
    if common.rank() != 0 or not (args.run or args.json):
        return
    if args.run is None:
        result["flags"] = vars(args)
    path = Path(args.json or f"{args.run}/result.json")
    entries = common.read_json(path) if path.exists() else {}
    if "linear_top1" in result:  # nothing of an earlier evaluation stays, but for these two
        kept = ("untrained", "labels_per_class")
        entries = {name: entries[name] for name in kept if name in entries}
    text = json.dumps({**entries, **result}, indent=1) + "\n"
    common.write_atomically(path, lambda path: path.write_text(text))


if __name__ == "__main__":
    common.launch(main)
