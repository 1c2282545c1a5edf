"""The batched augmentation against torchvision's, and the distribution of its random choices."""
import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from conftest import drawn
from PIL import Image

import common
import simco

NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])  # factors that change nothing
# In the order of common.BRIGHTNESS, ..., common.HUE.
ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def params_of(count, augmentation="v2", size=32):
    return common.draw_params(count, size, torch.Generator().manual_seed(0), augmentation)


def some_images(size=32):
    """uint8 [800, size, size, 3]: noise, extremes, smooth fields and drawn shapes."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (200, size, size, 3))
    extreme = random.integers(0, 2, (200, size, size, 3)) * 255  # the filter overshoots everywhere
    smooth = random.integers(0, 256, (200, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    images = torch.from_numpy(np.concatenate([noise, extreme, smooth]).astype(np.uint8))
    return torch.cat([images, drawn(200, 10, size).train_images])


def pil_crop_flip(image, box, flip):
    """uint8 [S, S, 3] -> PIL image. The width first: the order depends on Pillow's version."""
    size, (top, left, height, width) = len(image), box.tolist()
    image = Image.fromarray(image.numpy()).crop((left, top, left + width, top + height))
    for shape in ((size, height), (size, size)):
        image = image.resize(shape, Image.Resampling.BICUBIC)
    return TF.hflip(image) if flip else image


@pytest.mark.parametrize("size", [32, 48])
def test_crop_and_flip_agree_with_pil(size):
    images = some_images(size)
    box, flip = params_of(len(images), size=size)[:2]
    # The whole image, one pixel, one row, and a box that touches the far corner.
    special = [0, 0, size, size], [5, 9, 1, 1], [size - 1, 0, 1, size], [size - 12, size - 8, 12, 8]
    box[:4] = torch.tensor(special)
    ours = common.crop_resize_flip(common.to_float(images), box, flip)
    pil_images = map(pil_crop_flip, images, box, flip)
    theirs = torch.stack([TF.pil_to_tensor(image) for image in pil_images])
    # PIL resizes to 8 bits twice, and rounds. The second pass amplifies by less than 1.6.
    error = (ours * 255 - theirs).abs()
    assert error.max() <= 2 and error.mean() < 0.3


def test_jitter_agrees_with_torchvision():
    """Each operation, in every order. Also of gray, black, white and saturated pixels."""
    colours = common.to_float(some_images())
    colours[0], colours[1], colours[2] = 0, 1, 0.5
    colours[3, 0], colours[3, 1:] = 1, 0
    orders = torch.tensor(list(itertools.permutations(range(4))))
    order = orders[torch.arange(len(colours)) % 24]
    uniform = torch.rand(len(colours), 4, generator=torch.Generator().manual_seed(0))
    factor = NEUTRAL + uniform - 0.5  # hue: all around the circle
    factor[-24:] = NEUTRAL
    ours = common.color_jitter(colours, order, factor)
    for i, image in enumerate(colours):
        for operation in order[i].tolist():
            image = ADJUST[operation](image, factor[i, operation].item())
        assert (ours[i] - image).abs().max() < 1e-3, i


@pytest.mark.parametrize("augmentation", ["v2", "v1"])
def test_view_agrees_with_torchvisions_pil_pipeline(augmentation):
    images, params = drawn(240, 10, 32).train_images, params_of(240, augmentation)
    ours, errors = common.augment(images, params, augmentation), []
    is_jittered = (params.factor != NEUTRAL).any(dim=1)
    for i, (box, flip, order, factor, is_gray) in enumerate(zip(*params)):
        image = pil_crop_flip(images[i], box, flip)
        if is_gray and augmentation == "v1":
            image = TF.rgb_to_grayscale(image, 3)
        for operation in order.tolist() if is_jittered[i] else ():
            image = ADJUST[operation](image, factor[operation].item())
        if is_gray and augmentation == "v2":
            image = TF.rgb_to_grayscale(image, 3)
        theirs = TF.normalize(TF.to_tensor(image), common.MEAN, common.STD)
        errors.append((theirs - ours[i]) * torch.tensor(common.STD)[:, None, None] * 255)
    errors = torch.stack(errors)  # in levels of 255
    size, sign = errors.abs().mean(dim=(1, 2, 3)), errors.mean(dim=(1, 2, 3))
    assert size.max() < 6 and size.mean() < 1.5  # PIL's hue has 256 steps
    # PIL truncates after brightness, contrast and saturation: each makes a view half a level
    # darker, but where a value is at its limit. The other operations have no such bias.
    assert -1.5 < sign[is_jittered].mean() < -1
    assert not (~is_jittered).any() or sign[~is_jittered].mean().abs() < 0.1


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
    ours = params_of(DRAWS).box.T.numpy()

    def statistics(top, left, height, width):
        relative, corner = top / np.maximum(32 - height, 1), (left + width) * height
        area, aspect = height * width, height / width
        return top, left, height, width, area, aspect, top - left, relative, corner

    for a, b in zip(statistics(*theirs), statistics(*ours)):
        assert ks_distance(a, b) < KS_BOUND


@pytest.mark.parametrize("augmentation, p, hue", [("v2", 0.8, 0.1), ("v1", 1.0, 0.4)])
def test_colours_are_distributed_as_torchvisions(augmentation, p, hue):
    params = params_of(DRAWS, augmentation)
    is_jittered = (params.factor != NEUTRAL).any(dim=1)
    # Five standard deviations: less than one in a million by chance.
    for chosen, share in ((is_jittered, p), (params.flip, 0.5), (params.grayscale, 0.2)):
        error = abs(chosen.double().mean() - share)
        assert error <= 5 * math.sqrt(share * (1 - share) / DRAWS)
    torch.manual_seed(0)
    ranges = [(0.6, 1.4)] * 3 + [(-hue, hue)]
    theirs = [T.ColorJitter.get_params(*ranges)[1:] for _ in range(DRAWS)]
    for reference, ours in zip(np.array(theirs).T, params.factor[is_jittered].T):
        assert ks_distance(reference, ours) < KS_BOUND * 1.1  # of "v2" there are 0.8 * DRAWS
    largest = (params.factor - NEUTRAL).abs().amax(dim=0)
    torch.testing.assert_close(largest, torch.tensor([0.4, 0.4, 0.4, hue]), rtol=1e-3, atol=0)
    orders, counts = params.order.unique(dim=0, return_counts=True)
    # Chi-square with 23 degrees of freedom exceeds 71 less than once in a million times.
    assert len(orders) == 24 and ((counts - DRAWS / 24) ** 2 / (DRAWS / 24)).sum() < 71

    # All of this is drawn independently for the two views and within a view.
    columns = [params.box[:, 2], params.flip, params.grayscale, *params.factor.T]
    columns += [is_jittered] if p < 1 else []
    table = [column[view::2].double().numpy() for view in (0, 1) for column in columns]
    assert abs(np.corrcoef(table) - np.eye(len(table))).max() < 5 / math.sqrt(DRAWS / 2)


def test_batches_depend_on_seed_and_epoch_alone():
    data = drawn(100, 10)

    def epoch_of(seed, epoch):
        args = simco.arguments().parse_args(["--batch-size", "32", "--seed", str(seed)])
        batches = list(common.batches(data, epoch, args))
        return [torch.cat(parts) for parts in list(zip(*batches))[:4]]  # views, index, labels

    *views, index, labels = epoch_of(5, 2)
    generator = common.seeded_generator(torch.device("cpu"), 5, 2)
    assert torch.equal(index, torch.randperm(100, generator=generator)[:96])
    assert torch.equal(labels, data.train_labels[index])
    params = common.draw_params(2 * 96, 16, generator)
    for i, view in enumerate(views):  # at once, but the same bits: nothing depends on the batch
        own = common.ViewParams(*(x[i::2] for x in params))
        assert torch.equal(view, common.augment(data.train_images[index], own))
    torch.manual_seed(123)  # the global generator has no part in it
    assert all(map(torch.equal, epoch_of(5, 2), [*views, index, labels]))
    for seed, epoch in ((5, 3), (6, 2), (2, 5)):
        assert not any(map(torch.equal, epoch_of(seed, epoch), [*views, index, labels]))
