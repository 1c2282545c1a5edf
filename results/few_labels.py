"""How many labels are enough? Linear classifiers on few labels of each class, for a run and for its
network before training.

    python results/few_labels.py RUN_DIR                          # 1, 10 and 100 of each class
    python results/few_labels.py RUN_DIR --labels-per-class 1 5 50 all

The mean and the standard deviation of five draws, on features without crops, at the learning rate
that linear_eval.py finds best for all labels. Written to RUN_DIR/result.json, too.
"""
import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import table  # noqa: E402
from table import in_words  # noqa: E402

import common  # noqa: E402
import linear_eval  # noqa: E402


def number_or_all(text):
    return text if text == "all" else str(common.number(int, 1)(text))


def few_labels(backbone, data, counts, args):
    """{count: top-1 accuracies in percent, one for each of five draws}."""
    labels, num_classes = data.train_labels, len(data.classes)
    rate = linear_eval.evaluate(backbone, data, args)["linear_lr"]
    train = common.extract_features(backbone, data.train_images, args)
    test = common.extract_features(backbone, data.test_images, args)
    top1, none = {count: [] for count in counts}, labels.new_zeros(len(labels), 1).bool()
    for count in top1:
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
            size = len(labels) if count == "all" else int(count) * num_classes
            index = order[common.balanced(labels[order], num_classes, size)]
            draw = Namespace(**{**vars(args), "seed": seed})
            head = linear_eval.train_linear(
                lambda rows, _: train[rows], backbone.num_features, index, data, [rate], draw, none
            )
            top1[count].append(linear_eval.accuracy(head(test), data.test_labels))
    return top1


def main():
    parser = linear_eval.arguments()
    counts = dict(default=["1", "10", "100"], nargs="+", type=number_or_all, metavar="N")
    parser.add_argument("--labels-per-class", **counts, help="numbers, or all")
    args = parser.parse_args()
    args.cached = True
    common.require(args.run and not args.untrained, "name a RUN_DIR; its start is evaluated, too")
    common.require(args.export is None, "--export is for linear_eval.py")
    device = common.init_device(args)
    backbone, epoch, args = linear_eval.load(args)
    run = table.read_args(args.run)
    start = linear_eval.untrained(run.seed, run.width, run.stem_padding)
    data = common.load_data(args, device)
    fewest = data.train_labels.bincount(minlength=len(data.classes)).min().item()
    for count in args.labels_per_class:
        enough = count == "all" or int(count) <= fewest
        common.require(enough, f"{count} labels: there is a class of {fewest} training images")
    protocol = {name: getattr(args, name) for name in linear_eval.PROTOCOL}
    same, top1 = dict(epoch=epoch, images=args.images, protocol=protocol), {}
    for name, network in dict(trained=backbone, untrained=start).items():
        network.to(device, memory_format=torch.channels_last).requires_grad_(False)
        top1[name] = few_labels(network, data, args.labels_per_class, args)
    if common.RANK == 0:
        try:
            few = linear_eval.read_result(args).get("labels_per_class", {})
            if few | same == few:  # then what there is of other counts stays
                top1 = {name: few[name] | top1[name] for name in top1}
            linear_eval.write_result(args, dict(labels_per_class=same | top1))
        finally:  # even if it cannot be written
            print("labels per class        trained      untrained")
            for count, trained in top1["trained"].items():
                untrained = in_words(top1["untrained"][count])
                print(f"{count:>16}{in_words(trained):>15}{untrained:>15}")


if __name__ == "__main__":
    common.launch(main)
