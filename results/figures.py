"""The pictures of the READMEs.

    pip install matplotlib
    python results/figures.py             # drawings and curves, from results/ and common.py
    python results/figures.py RUN_DIR     # augmented views; nearest neighbours before and after

The first command writes to results/, the second to RUN_DIR, unless --out names another directory.
Neither needs internet access or a GPU. RUN_DIR needs its checkpoint and its images.
"""
import argparse
import math
import statistics
import sys
import threading
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.patches import FancyBboxPatch
from PIL import Image

matplotlib.use("agg")  # only files are written
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

import studies  # noqa: E402
import table  # noqa: E402
from table import BATCH_SIZES, MINIATURE, PUBLISHED  # noqa: E402

import common  # noqa: E402
import linear_eval  # noqa: E402

COLOURS = {name: f"C{i}" for i, name in enumerate(PUBLISHED)}
FORWARD, GRADIENT, FOLLOWS = "0.3", "tab:red", "tab:blue"  # of arrows


# --------------------------------------------------------------------------------------------------
# Drawings


def box(axes, x, y, text, width=3, filled=True):
    """A box around (x, y) with text in it."""
    style, colour = "round,pad=0,rounding_size=0.15", "#e3edf7" if filled else "white"
    corner = (x - width / 2, y - 0.5)
    axes.add_patch(FancyBboxPatch(corner, width, 1, boxstyle=style, fc=colour, ec="0.3"))
    axes.text(x, y, text, ha="center", va="center")


def arrow(axes, start, end, colour, style="-"):
    shape = dict(arrowstyle="-|>", color=colour, ls=style, lw=1.3, shrinkA=0, shrinkB=0)
    axes.annotate("", end, start, arrowprops=shape)


def draw_branch(axes, x, view, vectors, has_gradient):
    """Draw the path of a view up to the loss, and of the gradient back down."""
    box(axes, x, 0.5, view, filled=False)
    box(axes, x, 4.5, vectors, filled=False)
    for low in (1, 3, 5):  # to the encoder, to its output, to the loss
        arrow(axes, (x - 0.2, low), (x - 0.2, low + 1), FORWARD)
        if has_gradient and low > 1:
            arrow(axes, (x + 0.2, low + 1), (x + 0.2, low), GRADIENT)


def methods():
    """The three methods side by side."""
    widths = {"MoCo v2": 11.4, "SimMoCo": 9, "SimCo": 9}
    shape = dict(figsize=(10, 3.7), layout="constrained", width_ratios=list(widths.values()))
    figure, panels = plt.subplots(1, 3, **shape)
    for axes, (title, width) in zip(panels, widths.items()):
        axes.set(xlim=(-0.3, width - 0.3), ylim=(-1.9, 7.9), aspect="equal")
        axes.axis("off")
        axes.text(4, 7.5, title, ha="center", va="center", weight="bold")
        if title == "SimCo":
            draw_branch(axes, 1.5, "view 1", "$q_1$", has_gradient=True)
            draw_branch(axes, 6.5, "view 2", "$q_2$", has_gradient=True)
            box(axes, 4, 2.5, "one encoder $f$", width=8)
            negatives = "Negatives: the other images of the batch."
            gradient = "Gradient flows through both views."
        else:
            draw_branch(axes, 1.5, "view 1", "queries $q$", has_gradient=True)
            draw_branch(axes, 6.5, "view 2", "keys $k$", has_gradient=False)
            box(axes, 1.5, 2.5, "encoder $f_q$")
            box(axes, 6.5, 2.5, "encoder $f_k$")
            arrow(axes, (3, 2.5), (5, 2.5), FOLLOWS, "--")
            negatives = "Negatives: the other keys of the batch."
            gradient = "Gradient flows through the queries."
        box(axes, 4, 6.5, "InfoNCE" if title == "MoCo v2" else "dual temperature", width=8)
        if title == "MoCo v2":
            box(axes, 9.9, 4.5, "queue", width=2)
            arrow(axes, (8, 4.5), (8.9, 4.5), FOLLOWS, "--")
            arrow(axes, (9.5, 5), (8, 6.2), FORWARD)
            negatives = "Negatives: 65 536 keys of earlier batches."
        axes.text(4, -1.1, f"{negatives}\n{gradient}", ha="center", va="center")
    what = {"forward": FORWARD, "gradient": GRADIENT}
    what["no gradient: moving average, keys into the queue"] = FOLLOWS
    for label, colour in what.items():
        style = "--" if colour == FOLLOWS else "-"
        panels[0].plot([], [], style, color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def losses():
    """The gradient norm of each loss, relative to DCL's, as a function of p; by autograd."""
    num_negatives = 255  # of a batch of 256 images
    m = torch.linspace(-9.2, 4.6, 200, dtype=torch.float64)  # log-odds against the positive
    # Two-dimensional vectors with these log-odds, at T = 0.1. All negatives are the same.
    cosine = (math.log(num_negatives) - m) * 0.1 - 0.5  # of query and positive; of negatives -0.5
    q = torch.tensor([[1.0, 0.0]], dtype=m.dtype).expand(len(m), 2)
    k = torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=1)
    queue = torch.tensor([[-0.5, 0.75**0.5]], dtype=m.dtype).expand(num_negatives, 2)

    def gradient(loss, **flags):
        query = q.clone().requires_grad_()
        loss((query * k).sum(dim=1), query @ queue.T, 0.1, **flags).backward()
        return query.grad.norm(dim=1).numpy()

    decoupled = gradient(common.dcl)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    p = torch.sigmoid(-m).numpy()
    axes.plot(p, decoupled / decoupled, "--", color="0.3", label="DCL")
    for dt_m, colour in zip((30, 10, 3, 1), ("#08306b", "#2171b5", "#6baed6", "#9ecae1")):
        length = gradient(common.dual_temperature, dt_m=dt_m) / decoupled
        axes.plot(p, length, color=colour, label=f"dual temperature, dt_m = {dt_m}")
    length = gradient(common.info_nce) / decoupled
    axes.plot(p, length, ":", color="tab:red", lw=2.5, label="InfoNCE, the same as dt_m = 1")
    ticks = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    axes.set(xscale="logit", xlabel="p, with T = 0.1 and 255 negatives of the same cosine")
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set(ylabel="gradient norm, relative to DCL", ylim=(0, 1.05))
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.35))
    return figure


# --------------------------------------------------------------------------------------------------
# Curves of the runs in results/


def draw_curves(axes, flags, style="o-", note=""):
    """Plot the mean kNN over the seeds, with a band from minimum to maximum."""
    for method, colour in COLOURS.items():
        logs = [run["log"] for run in studies.runs_of(method, 256, flags)]
        if not logs:
            continue
        # At the epochs after which all of them were evaluated.
        known = [{x for x in log if log[x].get("knn_top1") is not None} for log in logs]
        epochs = sorted(set.intersection(*known))
        values = [[log[epoch]["knn_top1"] for log in logs] for epoch in epochs]
        label = f"{method}{note}, {len(logs)} seed{'s' if len(logs) > 1 else ''}"
        axes.plot(epochs, [*map(statistics.mean, values)], style, ms=3, color=colour, label=label)
        lowest, highest = [*map(min, values)], [*map(max, values)]
        axes.fill_between(epochs, lowest, highest, color=colour, alpha=0.25, lw=0)


def curves():
    """kNN over the epochs, with all images and in miniature."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"all images: width 64, or 16": "", f"in miniature: {MINIATURE}": MINIATURE}
    for axes, (title, flags) in zip(panels, titles.items()):
        draw_curves(axes, flags)
        axes.set(title=title, xlabel="epoch")
    draw_curves(panels[0], "width 16", style="o:", note=" at width 16")
    for axes in panels:
        axes.legend(loc="lower right")
    panels[0].set(ylabel="kNN top-1 on the test set, percent")
    return figure


def draw_measured(axes, flags, measure, style):
    """A line over the batch size for each method."""
    for method, colour in COLOURS.items():
        points = []
        for size in BATCH_SIZES:
            runs = studies.runs_of(method, size, flags)
            values = [run[measure] for run in runs if run[measure] is not None]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else 0
                points.append((size, statistics.mean(values), deviation))
        axes.errorbar(*(zip(*points) if points else ([], [])), fmt=style, color=colour, ms=4)


def batch_sizes():
    """Accuracy over the batch size, published and measured, on one scale in both panels."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.7), sharex=True, layout="constrained")
    left, right = panels
    styles = {"published": "^--", "measured, probe": "s-", "measured, linear": "o:"}
    published_style, *measured_styles = styles.values()
    for method, published in PUBLISHED.items():
        accuracies = [float(accuracy) for accuracy in published]
        left.plot(BATCH_SIZES, accuracies, published_style, color=COLOURS[method], ms=4)
    for measure, style in zip(("probe", "linear"), measured_styles):
        draw_measured(left, "", measure, style)
        draw_measured(right, MINIATURE, measure, style)
    left.set(title="full size: 200 epochs", ylabel="top-1 on the test set, percent")
    right.set(title=f"in miniature: {MINIATURE}")
    span = max(high - low for low, high in (axes.get_ylim() for axes in panels))
    for axes in panels:
        middle = sum(axes.get_ylim()) / 2
        axes.set(xlabel="batch size", xscale="log", ylim=(middle - span / 2, middle + span / 2))
        axes.set_xticks(BATCH_SIZES, BATCH_SIZES)
        axes.minorticks_off()
    for name, colour in COLOURS.items():
        right.plot([], [], color=colour, label=name)
    for label, style in styles.items():
        right.plot([], [], style, color="grey", ms=4, label=label)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# --------------------------------------------------------------------------------------------------
# Photographs of a run


def show(axes, image, title):
    """An image, [3, H, W] in 0..1, without axes."""
    axes.imshow(image.permute(1, 2, 0).numpy(force=True), interpolation="nearest")
    axes.set_title(title, fontsize=7.5)
    axes.axis("off")


def describe(params, augmentation):
    """What `common.augment` does to one view, in order. params: `common.ViewParams` of one row."""
    top, left, height, width = params.box[0].tolist()
    lines = [f"crop {width}×{height} at ({left}, {top})" + (", flip" if params.flip else "")]
    names = ("brightness ×{:.2f}", "contrast ×{:.2f}", "saturation ×{:.2f}", "hue {:+.3f}")
    order, factor = params.order[0].tolist(), params.factor[0].tolist()
    jitter = [names[operation].format(factor[operation]) for operation in order]
    if factor != [1, 1, 1, 0]:
        lines += [", ".join(jitter[:2]), ", ".join(jitter[2:])]
    if params.grayscale:
        lines.insert(1 if augmentation == "v1" else len(lines), "gray")
    return "\n".join(lines)


def views(data, image, augmentation):
    """A training image and twelve of its views, each with what was done to it."""
    count = len(data.train_images)
    common.require(0 <= image < count, f"--image must be from 0 to {count - 1}")
    images = data.train_images[image, None].cpu()
    generator = common.seeded_generator("cpu", 0)
    params = common.draw_params(12, images.shape[1], generator, augmentation)
    augmented = common.augment(images.expand(12, -1, -1, -1), params, augmentation)
    mean, std = (torch.tensor(x)[:, None, None] for x in (common.MEAN, common.STD))
    figure = plt.figure(figsize=(10, 6.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4))
    show(left.subplots(), common.to_float(images)[0], "the image")
    for i, axes in enumerate(right.subplots(3, 4).flatten()):
        text = describe(common.ViewParams(*(x[i : i + 1] for x in params)), augmentation)
        show(axes, (augmented[i] * std + mean).clamp(0, 1), text)
    return figure


def picture_of_neighbours(train, test, data, count=8, k=5):
    """`count` test images, spread over the classes, each followed by its k nearest training images,
    framed in green if they have its class. train, test: the features, float [n, D]. Returns the
    picture, float [3, H, W] in 0..1; the labels of its rows, int64 [count]; and how many of the k
    neighbours have the right class over the whole test set, in percent."""
    chunks, k = F.normalize(test, dim=1).split(500), min(k, len(train))
    found = [(chunk @ F.normalize(train, dim=1).T).topk(k, dim=1).indices for chunk in chunks]
    neighbours = torch.cat(found)  # [n, k]
    same = data.train_labels[neighbours] == data.test_labels[:, None]
    rows = data.test_labels.argsort(stable=True)
    rows = rows[torch.arange(count) * len(rows) // count]
    images = [data.test_images[rows, None], data.train_images[neighbours[rows]]]
    images = common.to_float(torch.cat(images, dim=1).flatten(0, 1))
    framed = F.pad(images, (2, 2, 2, 2), value=1.0)
    green = torch.tensor([0.0, 0.7, 0.2], device=images.device)[:, None, None]
    framed[F.pad(same[rows], (1, 0)).flatten()] = green  # but for the test images
    framed[:, :, 2:-2, 2:-2] = images
    picture = torchvision.utils.make_grid(framed, nrow=k + 1, padding=1, pad_value=1)
    return picture, data.test_labels[rows], 100 * same.float().mean().item()


def neighbours(features, data):
    """Test images and their nearest training images. features: {name: those of train, of test}."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 6.4), layout="constrained")
    for axes, (name, (train, test)) in zip(panels, features.items()):
        picture, labels, same = picture_of_neighbours(train, test, data)
        axes.imshow(picture.permute(1, 2, 0).numpy(force=True), interpolation="nearest")
        right = f": {same:.1f} % of all neighbours right" if len(data.classes) > 1 else ""
        axes.set_title(name + right, fontsize=11)
        side, width = picture.shape[1] / len(labels), picture.shape[2]
        names = [data.classes[label] for label in labels.tolist()]
        axes.set_yticks([side * (row + 0.5) for row in range(len(names))], names)
        axes.set_xticks((side / 2, (side + width) / 2), ("test image", "nearest training images"))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(False)
    return figure


def of_run(run, data_directory, image):
    """The pictures of a run, {name: figure}. Adds neighbours, and test features for the projector,
    to its TensorBoard events."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    args = linear_eval.arguments().parse_args([str(run)])
    device = common.init_device(args)
    args.data = data_directory
    backbone, _, args = linear_eval.load(args)
    run_args = table.read_args(run)
    start = linear_eval.untrained(run_args.seed, run_args.width, run_args.stem_padding)
    data, features = common.load_data(args, device), {}
    pictures = dict(views=views(data, image, run_args.augmentation))
    for name, network in dict(untrained=start, trained=backbone).items():
        network.to(device, memory_format=torch.channels_last)
        images = data.train_images, data.test_images
        features[name] = [common.extract_features(network, x, args) for x in images]
    threading.excepthook = lambda _: None  # errors of TensorBoard's thread are this one's, too
    names = [data.classes[label] for label in data.test_labels[:2000].tolist()]
    small = common.to_float(data.test_images[:2000])
    with SummaryWriter(run) as board:
        board.add_embedding(features["trained"][1][:2000], names, small, tag="test_features")
        for name, (train, test) in features.items():
            board.add_image(f"neighbours/{name}", picture_of_neighbours(train, test, data)[0])
    return dict(pictures, neighbours=neighbours(features, data))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", metavar="RUN_DIR", help="make the pictures of this run")
    parser.add_argument("--data", metavar="DIR", help="of its dataset; default: as in the run")
    parser.add_argument("--image", default=0, type=int, help="the training image to show views of")
    parser.add_argument("--out", metavar="DIR", help="default: RUN_DIR, or results/")
    args = parser.parse_args()
    own = args.data is not None or args.image != 0
    common.require(args.run or not own, "--data and --image go with a RUN_DIR")
    is_there = Path(args.out or args.run or RESULTS).is_dir()
    common.require(is_there, f"there is no directory '{args.out or args.run}'")
    style = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False}
    style |= {"axes.spines.right": False, "font.size": 10, "figure.dpi": 100}
    plt.rcParams.update(style | {"svg.hashsalt": "figures"})  # the same file every time
    if args.run is None:
        drawings = (methods, losses, curves, batch_sizes)
        figures = {f"{drawing.__name__}.svg": drawing() for drawing in drawings}
    else:
        photographs = of_run(args.run, args.data, args.image)
        figures = {f"{name}.png": figure for name, figure in photographs.items()}
    for name, figure in figures.items():
        path = Path(args.out or args.run or RESULTS, name)
        if path.suffix == ".svg":
            figure.savefig(path, metadata={"Date": None})
        else:  # 256 colours are enough, and a third of the bytes
            figure.canvas.draw()
            image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
            image.quantize().save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    common.launch(main)
