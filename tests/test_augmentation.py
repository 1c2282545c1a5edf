"""The batched augmentation against torchvision's, and the distribution of its random choices."""
import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image

import common
import simco

NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])  # factors that change nothing
# In the order of common.BRIGHTNESS, ..., common.HUE.
ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def choices_of(count, augmentation="v2"):
    return common.draw_choices(count, 32, torch.Generator().manual_seed(0), augmentation)


def some_images():
    """uint8 [800, 32, 32, 3]: noise, extremes, smooth fields and drawn shapes."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (200, 32, 32, 3))
    extreme = random.integers(0, 2, (200, 32, 32, 3)) * 255  # the filter overshoots everywhere
    smooth = random.integers(0, 256, (200, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    images = torch.from_numpy(np.concatenate([noise, extreme, smooth]).astype(np.uint8))
    return torch.cat([images, common.draw_shapes(200, 10).train_images])


def pil_crop_flip(image, top, left, height, width, flip, size):
    """uint8 [32, 32, 3] -> PIL image. The width first: the order depends on Pillow's version."""
    image = Image.fromarray(image.numpy()).crop((left, top, left + width, top + height))
    for shape in ((size, height), (size, size)):
        image = image.resize(shape, Image.Resampling.BICUBIC)
    return TF.hflip(image) if flip else image


@pytest.mark.parametrize("size", [32, 24, 48])
def test_crop_and_flip_agree_with_pil(size):
    images = some_images()
    boxes = choices_of(len(images))[:5]
    # The whole image, one pixel, one row, and a box that touches the far corner.
    special = torch.tensor([[0, 0, 32, 32], [5, 9, 1, 1], [31, 0, 1, 32], [20, 24, 12, 8]])
    for field, values in zip(boxes, special.T):
        field[:4] = values
    ours = common.random_resized_crop_flip(common.to_float(images), *boxes, size)
    rows = zip(images, *(field.tolist() for field in boxes))
    theirs = torch.stack([TF.pil_to_tensor(pil_crop_flip(*row, size)) for row in rows])
    # PIL rounds to 8 bits after both passes. The second one amplifies by less than 1.6.
    error = (ours * 255 - theirs).abs()
    assert error.max() <= 2 and error.mean() < 0.3


def test_jitter_agrees_with_torchvision():
    """Each operation, in every order. Also of gray, black, white and saturated pixels."""
    colours = common.to_float(some_images())
    colours[0], colours[1], colours[2] = 0, 1, 0.5
    colours[3, 0], colours[3, 1:] = 1, 0
    orders = torch.tensor(list(itertools.permutations(range(4))))
    operations = orders[torch.arange(len(colours)) % 24]
    uniform = torch.rand(len(colours), 4, generator=torch.Generator().manual_seed(0))
    factor = NEUTRAL + uniform - 0.5  # hue: all around the circle
    ours = common.color_jitter(colours, operations, factor)
    for i, image in enumerate(colours):
        for operation in operations[i].tolist():
            image = ADJUST[operation](image, factor[i, operation].item())
        assert (ours[i] - image).abs().max() < 1e-3, i

    neutral = common.color_jitter(colours, operations, NEUTRAL.expand(len(colours), 4))
    assert (neutral - colours).abs().max() < 1e-6  # what the way to HSV and back rounds


@pytest.mark.parametrize("augmentation", ["v2", "v1"])
def test_view_agrees_with_torchvisions_pil_pipeline(augmentation):
    images, choices = common.draw_shapes(240, 10).train_images, choices_of(240, augmentation)
    ours, errors = common.augment(images, choices, augmentation), []
    for i, (*box, operations, factor, is_gray) in enumerate(zip(*choices)):
        image = pil_crop_flip(images[i], *(x.item() for x in box), 32)
        if is_gray and augmentation == "v1":
            image = TF.rgb_to_grayscale(image, 3)
        for operation in operations.tolist() if (factor != NEUTRAL).any() else ():
            image = ADJUST[operation](image, factor[operation].item())
        if is_gray and augmentation == "v2":
            image = TF.rgb_to_grayscale(image, 3)
        theirs = TF.normalize(TF.to_tensor(image), common.MEAN, common.STD)
        errors.append((theirs - ours[i]).abs().mean() * 0.24)
    # PIL rounds to 8 bits after each of seven operations, and its hue has 256 steps.
    assert max(errors) < 6 / 255 and sum(errors) / len(errors) < 1.5 / 255


DRAWS = 20_000
# Kolmogorov-Smirnov: the cumulative shares of two samples of one distribution, of DRAWS draws each,
# differ by more than this with a probability below 1e-6 (conservative for discrete values).
KS_BOUND = math.sqrt(-math.log(1e-6 / 2) / 2) * math.sqrt(2 / DRAWS)


def ks_distance(a, b):
    a, b = np.sort(np.asarray(a, dtype=float)), np.sort(np.asarray(b, dtype=float))
    grid = np.concatenate([a, b])
    shares = [np.searchsorted(x, grid, "right") / len(x) for x in (a, b)]
    return abs(shares[0] - shares[1]).max()


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    flags = torch.empty(3, 32, 32), (0.08, 1.0), (3 / 4, 4 / 3)
    theirs = np.array([T.RandomResizedCrop.get_params(*flags) for _ in range(DRAWS)]).T
    ours = np.stack(choices_of(DRAWS)[:4])

    def statistics(top, left, height, width):
        relative, corner = top / np.maximum(32 - height, 1), (left + width) * height
        area, aspect = height * width, height / width
        return top, left, height, width, area, aspect, top - left, relative, corner

    for a, b in zip(statistics(*theirs), statistics(*ours)):
        assert ks_distance(a, b) < KS_BOUND
        assert abs(a.mean() - b.mean()) < 5 * math.sqrt((a.var() + b.var()) / DRAWS)


@pytest.mark.parametrize("augmentation, p, hue", [("v2", 0.8, 0.1), ("v1", 1.0, 0.4)])
def test_colours_are_distributed_as_torchvisions(augmentation, p, hue):
    choices = choices_of(DRAWS, augmentation)
    is_jittered = (choices.factor != NEUTRAL).any(dim=1)
    # Five standard deviations: less than one in a million by chance.
    for chosen, share in ((is_jittered, p), (choices.flip, 0.5), (choices.grayscale, 0.2)):
        error = abs(chosen.double().mean() - share)
        assert error <= 5 * math.sqrt(share * (1 - share) / DRAWS)
    torch.manual_seed(0)
    ranges = [(0.6, 1.4)] * 3 + [(-hue, hue)]
    theirs = [T.ColorJitter.get_params(*ranges)[1:] for _ in range(DRAWS)]
    for reference, drawn in zip(np.array(theirs).T, choices.factor[is_jittered].T):
        assert ks_distance(reference, drawn) < KS_BOUND * 1.1  # of "v2" there are 0.8 * DRAWS
    largest = (choices.factor - NEUTRAL).abs().amax(dim=0)
    torch.testing.assert_close(largest, torch.tensor([0.4, 0.4, 0.4, hue]), rtol=1e-3, atol=0)
    orders, counts = choices.operations.unique(dim=0, return_counts=True)
    # Chi-square with 23 degrees of freedom exceeds 71 less than once in a million times.
    assert len(orders) == 24 and ((counts - DRAWS / 24) ** 2 / (DRAWS / 24)).sum() < 71


def test_choices_are_independent():
    """Those of the two views, and those within a view but for the box."""
    choices = choices_of(2 * DRAWS)
    is_jittered = (choices.factor != NEUTRAL).any(dim=1)
    columns = [choices.top, choices.height, choices.flip, choices.grayscale, is_jittered]
    columns += choices.factor[:, [common.BRIGHTNESS, common.HUE]].T
    table = [column[view::2].double().numpy() for view in (0, 1) for column in columns]
    correlation = np.corrcoef(table) - np.eye(len(table))
    for view in (0, 7):
        correlation[view, view + 1] = correlation[view + 1, view] = 0  # a high box starts early
    assert abs(correlation).max() < 5 / math.sqrt(DRAWS)


def test_batches_depend_on_seed_and_epoch_alone():
    data = common.draw_shapes(100, 10)

    def epoch_of(seed, epoch):
        args = simco.arguments().parse_args(["--batch-size", "32", "--seed", str(seed)])
        batches = list(common.batches(data, epoch, args))
        return [torch.cat(parts) for parts in list(zip(*batches))[:3]]  # view1, view2, index

    *views, index = epoch_of(5, 2)
    generator = common.seeded_generator(torch.device("cpu"), 5, 2)
    assert torch.equal(index, torch.randperm(100, generator=generator)[:96])
    choices = common.draw_choices(2 * 96, 32, generator)
    for i, view in enumerate(views):
        expected = common.augment(data.train_images[index], choices.rows(slice(i, None, 2)))
        assert torch.equal(view, expected)
    torch.manual_seed(123)  # the global generator has no part in it
    assert all(map(torch.equal, epoch_of(5, 2), [*views, index]))
    for seed, epoch in ((5, 3), (6, 2), (2, 5)):
        assert not any(map(torch.equal, epoch_of(seed, epoch), [*views, index]))


def test_a_part_of_the_batch_gives_the_same_bits_as_the_whole():
    """So the views do not depend on how many processes share a batch."""
    images, choices = some_images()[:256], choices_of(256)
    whole = common.augment(images, choices)
    for size in (128, 64, 8):
        parts = torch.arange(256).split(size)
        views = [common.augment(images[part], choices.rows(part)) for part in parts]
        assert torch.equal(whole, torch.cat(views))
