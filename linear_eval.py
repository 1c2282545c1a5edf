"""Linear evaluation: how good are the features of a pre-trained, frozen backbone?

    python linear_eval.py RUN_DIR                # train a linear classifier, write result.json
    python linear_eval.py RUN_DIR --cached       # on features computed once, without crops: faster
    python linear_eval.py RUN_DIR --untrained    # the network before training: the floor
    python linear_eval.py RUN_DIR --export FILE  # write the backbone for torchvision's resnet18
    python linear_eval.py --checkpoint FILE --dataset cifar100    # of other code, see PREFIXES

Linear classifiers with a grid of learning rates are trained by SGD (momentum 0.9, no weight decay,
cosine schedule) on randomly cropped and flipped images: with each rate once on all training images,
and once without a held-out tenth, at most 5000. By the latter's loss on the held-out images (see
calibrated_losses) a rate is chosen. Its classifier of all images is evaluated on the test set.
"""
import argparse
import json
import math
from pathlib import Path
from shlex import quote

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange

import common
from common import number, require

LEARNING_RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
PROTOCOL = "epochs batch_size cached seed precision lrs".split()  # flags, for result.json


def arguments():
    style = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    what = "RUN_DIR | --checkpoint FILE --dataset NAME"
    parser = argparse.ArgumentParser(usage=f"python linear_eval.py {what} [--flag ...]", **style)
    parser.set_defaults(images=None)
    add, count = parser.add_argument, number(int, 1)
    add("run", nargs="?", metavar="RUN_DIR", help="of moco_v2.py, simmoco.py or simco.py")
    add("--data", metavar="DIR", help="where the dataset is; if not given: as in RUN_DIR, or data")
    add("--untrained", action="store_true", help="RUN_DIR's network as it was before training")
    add("--export", metavar="FILE", help="only write the backbone to this new file")
    add = parser.add_argument_group("instead of RUN_DIR").add_argument
    add("--checkpoint", metavar="FILE", help="a ResNet-18, of a run or of other code")
    add("--dataset", help="cifar10, cifar100, or NAME of a file DATA/NAME.npz")
    add("--subset", type=count, metavar="N", help="N training images, balanced by class")
    add("--stem-padding", type=int, choices=(1, 2), help="if not given: the file's, or a guess")
    add = parser.add_argument_group("protocol, machine and result").add_argument
    add("--cached", action="store_true", help="compute the features once, without crops")
    add("--epochs", default=100, type=count, help="passes over the training images")
    add("--batch-size", default=256, type=count, help="images per step")
    add("--lrs", default=LEARNING_RATES, type=number(float, 1e-6), nargs="+", help="learning rates")
    add("--seed", default=0, type=number(int, 0), help="of held-out images, batches and crops")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if present")
    add("--precision", default="auto", choices=common.PRECISIONS, help="of the backbone")
    add("--json", metavar="FILE", help="new, for the result; if not given: RUN_DIR/result.json")
    return parser


# In checkpoints, the backbone's tensors have a prefix: of this project, MoCo's CIFAR demo (which
# numbers the children of a ResNet; 2 is its ReLU), MoCo, torchvision, solo-learn, the DT authors.
PREFIXES = ("encoder_q.backbone.", "encoder.backbone.", "encoder_q.net.", "encoder_q.")
PREFIXES += ("", "backbone.", "encoder.")
NUMBERED = dict(zip("0134569", "conv1 bn1 layer1 layer2 layer3 layer4 fc".split()))
HEADS = ("fc", "linear", "head", "projector", "classifier")


def load(args):
    """The backbone that the flags name, its epoch, and the flags, completed by the run's."""
    require(None in (args.export, args.json), "--export writes no result, so drop --json")
    new = args.export or args.json
    is_new = not new or (Path(new).parent.is_dir() and not Path(new).exists())
    require(is_new, f"'{new}' exists, or its directory does not; choose another file")
    if args.run is None:
        require(args.checkpoint, "which run? Name a RUN_DIR, or a --checkpoint")
        require(args.dataset or args.export, "--checkpoint needs --dataset")
        require(not args.untrained, "--untrained needs a RUN_DIR")
        args.data = args.data or "data"
        return *read_backbone(args.checkpoint, args.stem_padding), args
    own = [x for x in ("checkpoint", "dataset", "subset", "stem_padding") if getattr(args, x)]
    require(not own, f"a run has its own network and data: drop {', '.join(own)}".replace("_", "-"))
    run = common.read_json(f"{args.run}/args.json")
    require("stem_padding" in run, f"'{args.run}' is not a run of this project")
    args.data = args.data or run["data"]
    args.json = args.json or f"{args.run}/result.json"
    for name in ("dataset", "subset", "stem_padding", "images"):  # earlier versions have no images
        setattr(args, name, run.get(name))
    if args.untrained:
        return untrained(run["seed"], run["width"], args.stem_padding), 0, args
    return *read_backbone(f"{args.run}/checkpoint.pth", args.stem_padding), args


def untrained(seed, width, stem_padding):
    """The backbone before training: the scripts initialise it first, after seeding."""
    torch.manual_seed(seed)
    return common.resnet18(width, stem_padding)


def read_backbone(path, stem_padding=None):
    """The ResNet-18 in a checkpoint, and its epoch. stem_padding None: the file's, or a guess."""
    checkpoint = common.load_checkpoint(path)
    require(isinstance(checkpoint, dict), f"'{path}' has no state_dict")
    tensors = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    require(isinstance(tensors, dict), f"'{path}' has no state_dict")
    ours = checkpoint.get("stem_padding", getattr(tensors, "_metadata", {}).get("stem_padding"))
    tensors = {str(k).removeprefix("module."): v for k, v in tensors.items() if torch.is_tensor(v)}
    known = [p for p in PREFIXES if p + "conv1.weight" in tensors or p + "0.weight" in tensors]
    require(known, f"'{path}' has no conv1.weight behind a known prefix, but {[*tensors][:3]}")
    prefix, state = known[0], {}
    for name, tensor in tensors.items():
        child, _, rest = name.removeprefix(prefix).partition(".")
        child = NUMBERED.get(child, child)
        if name.startswith(prefix) and child not in HEADS:
            state[f"{child}.{rest}"] = tensor
    require(ours in (None, stem_padding or ours), f"'{path}' was trained with stem padding {ours}")
    stem_padding, guess = stem_padding or ours, ""
    if stem_padding is None:  # solo-learn and the DT authors pad by 2, and so do our defaults
        has_probe = prefix in ("backbone.", "encoder.") and "classifier.weight" in tensors
        stem_padding = 2 if has_probe or prefix.endswith(".backbone.") else 1
        guess = " (a guess: see --stem-padding)"
    backbone = common.resnet18(len(state["conv1.weight"]), stem_padding)
    backbone.is_guess = guess != ""
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:  # names what is missing, unexpected or of another size
        require(False, f"'{path}' is no ResNet-18: {' '.join(str(error).split())[:300]}")
    print(f"{path}: {len(state)} of {len(tensors)} tensors, stem padding {stem_padding}{guess}")
    return backbone, checkpoint.get("epoch")


def train_linear(features_of, num_features, index, data, learning_rates, args, ignores):
    """Train a linear classifier for each of R learning rates on the training images `index`, int64.
    Returns all as one nn.Linear: num_features -> R * num_classes. features_of(indices, generator):
    float [m, num_features], once an epoch. ignores: bool [number of images, R], see evaluate."""
    labels, num_classes, num_rates = data.train_labels, len(data.classes), len(learning_rates)
    heads = nn.Linear(num_features, num_rates * num_classes).to(labels.device)
    nn.init.zeros_(heads.weight)
    nn.init.zeros_(heads.bias)
    batch_size = min(args.batch_size, len(index))
    steps = len(index) // batch_size
    # SGD without weight decay on c * loss is SGD on the loss with c times the learning rate. So one
    # optimizer serves all rates, and its own learning rate is only the schedule, from 1 to 0.
    scale = torch.tensor(learning_rates, device=labels.device)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
    generator = torch.Generator(labels.device).manual_seed(args.seed)
    bar = dict(desc="linear", leave=False, disable=common.RANK > 0 or None)
    for _ in trange(args.epochs, **bar):
        order = torch.randperm(len(index), generator=generator, device=labels.device)
        order = index[order[: steps * batch_size]]
        features = features_of(order, generator)
        for batch, x in zip(order.split(batch_size), features.split(batch_size)):
            logits = heads(x).view(batch_size, num_rates, num_classes)
            target = labels[batch, None].expand(-1, num_rates)
            losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")  # [batch, R]
            learns = (~ignores[batch]).float()
            losses = (losses * learns).sum(dim=0) / learns.sum(dim=0).clamp(min=1)
            optimizer.zero_grad()
            (losses * scale).sum().backward()
            optimizer.step()
            schedule.step()
    return heads.requires_grad_(False)


def accuracy(logits, labels, top=1):
    """Top-`top` accuracy in percent. logits: float [n, num_classes]."""
    require(math.isfinite(logits.sum()), "a classifier became NaN or infinite; try lower --lrs")
    best = logits.topk(min(top, logits.shape[1])).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()


def calibrated_losses(heads, x, labels, num_classes):
    """The cross-entropy of each classifier in the wide layer after temperature scaling (Guo et al.,
    arXiv 1706.04599): that of logits / t, for the best t. On a thousand images, accuracy is too
    coarse to separate neighbouring learning rates. Without the scaling, an overconfident classifier
    loses even if it is right more often. Returns list of float."""
    logits = heads(x).view(len(x), -1, num_classes).transpose(1, 2)
    target = labels[:, None].expand(-1, logits.shape[2])
    losses = []
    for t in torch.logspace(-1, 3, 81).tolist():  # from 0.1 to 1000
        loss = F.cross_entropy(logits / t, target, reduction="none")
        losses.append(loss.mean(dim=0).nan_to_num(1e9, 1e9))  # not chosen if it diverged
    return torch.stack(losses).amin(dim=0).tolist()


def evaluate(backbone, data, args):
    """The protocol at the top of this file. Returns a dict for result.json."""
    labels, num_classes, num_rates = data.train_labels, len(data.classes), len(args.lrs)
    require(num_classes > 1, f"'{args.dataset}' has only one class, so nothing to evaluate")
    train_features = common.extract_features(backbone, data.train_images, args)
    test_features = common.extract_features(backbone, data.test_images, args)

    def features_of(index, generator):
        if args.cached:
            return train_features[index]
        images = data.train_images[index]
        box = common.draw_boxes(len(index), images.shape[1], generator)
        flip = torch.rand(len(index), generator=generator, device=index.device) < 0.5
        return common.extract_features(backbone, images, args, crops=(box, flip))
    generator = torch.Generator().manual_seed(args.seed)
    shuffled = torch.randperm(len(labels), generator=generator).to(labels.device)
    held_out = shuffled[: min(5000, max(1, len(labels) // 10))]
    # Crops are costly, so all classifiers learn from the same ones: first those that choose the
    # learning rate, which ignore the held-out images, then those that are evaluated.
    ignores = labels.new_zeros(len(labels), 2 * num_rates).bool()
    ignores[held_out, :num_rates] = True
    heads = train_linear(
        features_of, backbone.num_features, shuffled, data, args.lrs * 2, args, ignores
    )
    losses = calibrated_losses(heads, train_features[held_out], labels[held_out], num_classes)
    losses = losses[:num_rates]
    best = losses.index(min(losses))
    logits = heads(test_features).unflatten(1, (-1, num_classes))[:, num_rates + best]
    knn = common.knn_predict(test_features, train_features, labels, num_classes)
    return dict(
        linear_top1=accuracy(logits, data.test_labels),
        linear_top5=accuracy(logits, data.test_labels, top=5),
        knn_top1=100 * (knn == data.test_labels).double().mean().item(),
        linear_lr=args.lrs[best],
        held_out_loss=dict(zip(map(str, args.lrs), losses)),
    )


def main():
    args = arguments().parse_args()
    device = common.init_device(args)
    backbone, epoch, args = common.from_rank_zero(load, args)
    if args.export is not None:
        state, padding = backbone.state_dict(), backbone.conv1.padding[0]
        if not getattr(backbone, "is_guess", False):  # in PyTorch's metadata, for read_backbone
            state._metadata["stem_padding"] = padding
        if common.RANK == 0:
            common.write_atomically(args.export, lambda path: torch.save(state, path))
            conv1 = f"nn.Conv2d(3, 64, 3, padding={padding}, bias=False)"
            print(f"At width 64, resnet18 loads it: conv1 = {conv1}, maxpool = fc = nn.Identity().")
            print(f"Images: RGB in 0..1, normalised by mean {common.MEAN} and std {common.STD}.")
        return
    data = common.load_data(args, device)
    backbone.to(device, memory_format=torch.channels_last).requires_grad_(False)
    protocol = {name: getattr(args, name) for name in PROTOCOL}
    result = dict(epoch=epoch, images=args.images, protocol=protocol)
    earlier = common.from_rank_zero(read_result, args)
    if args.untrained:
        earlier = earlier.get("untrained", {})
    is_done = earlier | result == earlier  # the same epoch, images and protocol
    result |= earlier if is_done else evaluate(backbone, data, args)
    if common.RANK == 0:
        figures = f"linear top-1 {result['linear_top1']:.2f} %, kNN {result['knn_top1']:.2f} %"
        try:
            if not is_done:
                write_result(args, dict(untrained=result) if args.untrained else result)
        finally:  # even if it cannot be written
            print(f"{args.run or args.checkpoint}, epoch {epoch}: {figures}{' (stored)' * is_done}")
        if args.json == f"{args.run}/result.json":
            print("Next: python results/table.py", quote(str(Path(args.run).parent)))


def read_result(args):
    """The earlier result, a dict; {} if there is none."""
    return common.read_json(args.json) if args.json and Path(args.json).exists() else {}


def write_result(args, result):
    """Write a dict to RUN_DIR/result.json, or --json. Other entries stay as they are."""
    if args.json:
        text = json.dumps(read_result(args) | result, indent=1, default=float) + "\n"
        common.write_atomically(args.json, lambda path: path.write_text(text))


if __name__ == "__main__":
    common.launch(main)
