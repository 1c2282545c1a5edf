"""The batched augmentation against torchvision's own pipeline, image by image, and its random choices by distribution."""
import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
import torchvision.transforms.v2.functional as V2
from PIL import Image

import common


def some_images(n=600, size=32, seed=0):
    """uint8 [n, size, size, 3]: noise (the hardest case for a resampling filter), smooth fields and drawn shapes."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (n // 3, size, size, 3))
    extreme = random.integers(0, 2, (n // 3, size, size, 3)) * 255  # overshoots everywhere
    smooth = random.integers(0, 256, (n // 3, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    images = torch.from_numpy(np.concatenate([noise, extreme, smooth]).astype(np.uint8))
    return torch.cat([images, common.draw_shapes(200, 10).train_images])


def boxes(n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    box = common.sample_crops(n, size, generator)
    return (*box, torch.rand(n, generator=generator) < 0.5)


def pil_crop_flip(image, top, left, height, width, flip, size):
    image = Image.fromarray(image.numpy())
    if size < 32:  # where an image shrinks, the order of the two passes depends on Pillow's version: ask for width first
        image = image.crop((left, top, left + width, top + height)).resize((size, height), Image.BICUBIC)
        image = image.resize((size, size), Image.BICUBIC)
    else:
        image = TF.resized_crop(image, top, left, height, width, [size, size], Image.BICUBIC)
    return TF.pil_to_tensor(TF.hflip(image) if flip else image)


@pytest.mark.parametrize("size", [32, 24, 48])
def test_crop_and_flip_agree_with_pil(size):
    images = some_images()
    parameters = boxes(len(images), 32)
    # Corner cases: the whole image, one pixel, one row, and a box that touches the far corner.
    for i, special in enumerate([(0, 0, 32, 32), (5, 9, 1, 1), (31, 0, 1, 32), (20, 24, 12, 8)]):
        for field, value in zip(parameters, special):
            field[i] = value
    ours = common.random_resized_crop_flip(common.to_float(images), *parameters, size)
    pil = torch.stack([
        pil_crop_flip(image, *(field[i].item() for field in parameters), size) for i, image in enumerate(images)
    ])  # fmt: skip
    # PIL rounds to 8 bits after each of its two passes: at most half a step times the filter's gain (below 1.6), and half.
    assert (ours * 255 - pil).abs().max() <= 2
    assert (ours * 255 - pil).abs().mean() < 0.3


@pytest.fixture(scope="module")
def colours():
    """float [N, 3, 32, 32], gray, black, white and saturated pixels among them."""
    images = common.to_float(some_images())
    images[0], images[1], images[2] = 0, 1, 0.5
    images[3, 0], images[3, 1:] = 1, 0
    return images


@pytest.mark.parametrize("operation, torchvision_function, low, high", [
    (common.BRIGHTNESS, V2.adjust_brightness, 0.6, 1.4),
    (common.CONTRAST, V2.adjust_contrast, 0.6, 1.4),
    (common.SATURATION, V2.adjust_saturation, 0.6, 1.4),
    (common.HUE, V2.adjust_hue, -0.1, 0.1),
    (common.HUE, V2.adjust_hue, -0.5, 0.5),
])  # fmt: skip
def test_colour_operation_agrees_with_torchvision(colours, operation, torchvision_function, low, high):
    factor = torch.rand(len(colours), generator=torch.Generator().manual_seed(0)) * (high - low) + low
    if operation == common.HUE:
        ours = common.adjust_hue(colours, factor)
    else:
        ours = common.blend(colours, torch.full((len(colours),), operation), factor)
    theirs = torch.stack([torchvision_function(image, f.item()) for image, f in zip(colours, factor)])
    assert (ours - theirs).abs().max() < 1e-3
    assert (ours - colours).abs().mean() > 0.01  # the operation did something


def test_grayscale_agrees_with_torchvision(colours):
    assert (common.to_gray(colours) - V2.rgb_to_grayscale(colours)).abs().max() < 1e-3


def test_jitter_in_every_order_agrees_with_torchvision(colours):
    functions = (V2.adjust_brightness, V2.adjust_contrast, V2.adjust_saturation, V2.adjust_hue)
    orders = list(itertools.permutations(range(4)))
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.4, 0.4, 0.4, 0.1]) * (2 * torch.rand(len(colours), 4, generator=generator) - 1)
    factor = torch.tensor([1.0, 1, 1, 0]) + spread
    order = torch.tensor([orders[i % 24] for i in range(len(colours))])
    ours = common.color_jitter(colours, order, factor)
    for i, image in enumerate(colours):
        for operation in order[i].tolist():
            image = functions[operation](image, factor[i, operation].item())
        assert (ours[i] - image).abs().max() < 1e-3, i


def test_no_jitter_leaves_the_image_alone(colours):
    order = torch.arange(4).expand(len(colours), 4)
    untouched = common.color_jitter(colours, order, torch.tensor([1.0, 1, 1, 0]).expand(len(colours), 4))
    assert (untouched - colours).abs().max() < 1e-6  # what the way to hue and back rounds


@pytest.mark.parametrize("augmentation", ["v2", "v1"])
def test_whole_view_agrees_with_torchvision_pil_pipeline(augmentation):
    """All operations in a row, with the planned parameters, against torchvision on 8-bit PIL images."""
    images = common.draw_shapes(240, 10).train_images
    plan = common.draw_epoch_plan(240, 240, 32, 3, 1, augmentation)
    fields = [field[:, 0] for field in plan[1:]]
    ours = common.augment(images[plan.index], *fields, augmentation)
    functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    normalize = T.Normalize(common.MEAN, common.STD)
    errors = []
    for i, index in enumerate(plan.index):
        top, left, height, width, flip, order, factor, grayscale = (field[i] for field in fields)
        image = Image.fromarray(images[index].numpy())
        image = TF.resized_crop(image, int(top), int(left), int(height), int(width), [32, 32], Image.BICUBIC)
        if grayscale and augmentation == "v1":
            image = TF.rgb_to_grayscale(image, 3)
        if factor.tolist() != [1, 1, 1, 0]:
            for operation in order.tolist():
                image = functions[operation](image, factor[operation].item())
        if grayscale and augmentation == "v2":
            image = TF.rgb_to_grayscale(image, 3)
        image = TF.hflip(image) if flip else image
        errors.append((normalize(TF.to_tensor(image)) - ours[i]).abs().mean() * 0.24)
    # 8-bit PIL rounds after each of seven operations, and its hue has 256 steps: a few steps in 255 are its own noise.
    assert max(errors) < 6 / 255 and sum(errors) / len(errors) < 1.5 / 255


# -- distributions -----------------------------------------------------------------------------------------------------

DRAWS = 20_000
# Kolmogorov-Smirnov: two samples of one distribution, of n draws each, differ in their cumulative shares by more than this
# with a probability below 1e-6 (asymptotic formula; conservative for discrete values).
KS_BOUND = math.sqrt(-math.log(1e-6 / 2) / 2) * math.sqrt(2 / DRAWS)


def ks_distance(a, b):
    a, b = (np.sort(np.asarray(x, dtype=np.float64)) for x in (a, b))
    grid = np.concatenate([a, b])
    return abs(np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(b)).max()


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    image = torch.empty(3, 32, 32)
    theirs = np.array([T.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(DRAWS)], float).T
    ours = torch.stack(common.sample_crops(DRAWS, 32, torch.Generator().manual_seed(1))).double().numpy()
    for statistic in (
        lambda top, left, height, width: top,
        lambda top, left, height, width: left,
        lambda top, left, height, width: height,
        lambda top, left, height, width: width,
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: height / width,
        lambda top, left, height, width: top - left,
        lambda top, left, height, width: top / np.maximum(32 - height, 1),
        lambda top, left, height, width: (left + width) * height,
    ):
        assert ks_distance(statistic(*theirs), statistic(*ours)) < KS_BOUND
    assert ks_distance(theirs[2], ours[2] + 1) > KS_BOUND  # the test would notice one pixel


def chi_square(counts):
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def test_colour_parameters_are_distributed_as_torchvisions():
    plan = common.draw_epoch_plan(DRAWS, 100, 32, seed=0, epoch=0)
    torch.manual_seed(0)
    theirs = [T.ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)) for _ in range(DRAWS)]
    for view in (0, 1):
        factor, order = plan.factor[:, view], plan.order[:, view]
        jittered = (factor != torch.tensor([1.0, 1, 1, 0])).any(dim=1)
        # Shares of yes-or-no choices: within five standard deviations (less than one in a million by chance).
        for chosen, p in ((jittered, 0.8), (plan.flip[:, view], 0.5), (plan.grayscale[:, view], 0.2)):
            assert abs(chosen.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / DRAWS)
        for operation in range(4):
            reference = [params[1 + operation] for params in theirs]
            drawn = factor[jittered, operation].numpy()
            assert ks_distance(reference, drawn) < KS_BOUND * 1.1  # there are 0.8 * DRAWS of ours
        counts = np.unique(order.numpy() @ [64, 16, 4, 1], return_counts=True)[1]
        # Chi-square with 23 degrees of freedom exceeds 71 less than once in a million times.
        assert len(counts) == 24 and chi_square(counts) < 71
    # The two views of an image, and the choices within a view, are independent: correlations as of chance.
    columns = [plan.top, plan.height, plan.flip, plan.factor[..., 0], plan.factor[..., 3], plan.grayscale]
    table = np.array([column[:, view].double().numpy() for column in columns for view in (0, 1)])
    correlation = np.corrcoef(table) - np.eye(len(table))
    correlation[0, 2] = correlation[2, 0] = correlation[1, 3] = correlation[3, 1] = 0  # a high box cannot start low
    assert abs(correlation).max() < 5 / math.sqrt(DRAWS)


def test_moco_v1_jitters_every_image_with_more_hue():
    plan, v2 = (common.draw_epoch_plan(DRAWS, 100, 32, 0, 0, augmentation) for augmentation in ("v1", "v2"))
    assert (plan.factor != torch.tensor([1.0, 1, 1, 0])).any(dim=2).all()
    torch.manual_seed(0)
    theirs = [T.ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.4, 0.4)) for _ in range(DRAWS)]
    for operation in range(4):
        assert ks_distance([params[1 + operation] for params in theirs], plan.factor[:, 0, operation].numpy()) < KS_BOUND
    assert all(torch.equal(a, b) for a, b in zip(plan._replace(factor=v2.factor), v2))  # all else is as in v2


def test_plan_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    plan = common.draw_epoch_plan(1000, 64, 32, seed=5, epoch=2)
    assert len(plan.index) == 960 and len(plan.index.unique()) == 960 and plan.index.max() < 1000
    torch.manual_seed(123)  # the global generator has no part in it
    again = common.draw_epoch_plan(1000, 64, 32, seed=5, epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(plan, again))
    for seed, epoch in ((5, 3), (6, 2), (2, 5)):
        other = common.draw_epoch_plan(1000, 64, 32, seed, epoch)
        assert not torch.equal(plan.index, other.index) and not torch.equal(plan.factor, other.factor)


def test_a_part_of_the_batch_gives_the_same_bits_as_the_whole():
    """So the views do not depend on how many processes share a batch."""
    images = some_images(300)[:256]
    plan = common.draw_epoch_plan(256, 256, 32, seed=0, epoch=0)
    fields = [field[:, 1] for field in plan[1:]]
    whole = common.augment(images[plan.index], *fields)
    for size in (128, 64, 8):
        parts = [common.augment(i, *f) for i, *f in zip(images[plan.index].split(size), *(x.split(size) for x in fields))]
        assert torch.equal(whole, torch.cat(parts))
