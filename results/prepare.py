"""Write a dataset to an .npz file, which the scripts take as --dataset NAME:

    python results/prepare.py shapes                      # data/shapes.npz, the demo's: drawn
    python results/prepare.py folder my_images            # data/my_images.npz, of your own images
    python results/prepare.py folder my_images --image-size 64 --out data/mine.npz

A folder is my_images/train/CLASS/IMAGE and my_images/test/CLASS/IMAGE. The images are resized and
cropped to squares. Without labels, put all images into one class: only the probe and the evaluation
use the classes. The file has the arrays train_images (uint8 [N, S, S, 3]), train_labels (integers
[N]), test_images, test_labels and classes.
"""
import argparse
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402


def read_image(size, path):
    """uint8 [size, size, 3], or the reason why there is none: a str."""
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "not a file"
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # each format fails in its own way
        raise OSError(f"cannot read the image '{path}': {error}") from None
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def read_split(folder, size):
    """The images, labels and classes of a directory of directories. Prints what was found."""
    common.require(folder.is_dir(), f"there is no directory '{folder}'")
    known = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    images, labels = [], []
    left_out = Counter("not in a class" for path in folder.iterdir() if path not in known)
    for label, path in enumerate(known):
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(partial(read_image, size), sorted(path.iterdir())))
        left_out.update(image for image in found if isinstance(image, str))
        found = [image for image in found if not isinstance(image, str)]
        common.require(found, f"'{path}' has no images")
        images += found
        labels += [label] * len(found)
    common.require(known, f"'{folder}' has no directories of images, one for each class")
    print(f"{folder}: {len(images)} images in {len(known)} classes", end="")
    print("".join(f"; left out, {reason}: {n}" for reason, n in left_out.items()))
    return np.stack(images), np.array(labels), np.array([path.name for path in known])


def read_folder(root, size):
    *train, train_classes = read_split(Path(root, "train"), size)
    *test, test_classes = read_split(Path(root, "test"), size)
    odd = ", ".join(sorted({*train_classes} ^ {*test_classes}))
    common.require(not odd, f"'{root}': only one of train and test has the class {odd}")
    return dict(zip(common.Dataset._fields, (*train, *test, train_classes)))


def draw_shapes(train=4096, test=1024, size=32, seed=0):
    """Ten classes of shapes in two tones. Position, size, brightness, tint and, a little, rotation
    vary within a class. The augmentation varies all of these but the rotation."""
    count = train + test
    random = np.random.RandomState(seed)  # numpy promises that its stream never changes
    radius = random.uniform(6, 11, count)
    angle = np.deg2rad(random.uniform(-15, 15, count))
    centre = random.uniform(size * 0.36, size * 0.64, (2, count))
    dark = random.uniform(0.2, 0.3, count)
    tones = np.stack([dark + random.uniform(0.35, 0.45, count), dark])  # of shape and ground
    tones = tones[..., None] + random.uniform(-0.02, 0.02, (2, count, 3))

    # Coordinates of all pixels, [count, size, size], in which a shape has radius 1.
    pixels = np.arange(size) + 0.5
    x, y = pixels - centre[0, :, None, None], pixels[:, None] - centre[1, :, None, None]
    cos, sin, radius = (values[:, None, None] for values in (np.cos(angle), np.sin(angle), radius))
    u, v = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius

    def plus(u, v):
        upright = np.minimum(0.3 - abs(u), 0.95 - abs(v))
        return np.maximum(upright, np.minimum(0.3 - abs(v), 0.95 - abs(u)))

    depth = dict(  # how far inside the shape a point is; negative: outside
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
    inside = np.empty((count, size, size))
    for label, depth_of in enumerate(depth.values()):
        inside[label::10] = depth_of(u[label::10], v[label::10])
    inside = (inside * radius + 0.5).clip(0, 1)[..., None]  # with a soft edge of one pixel
    images = tones[0][:, None, None] * inside + tones[1][:, None, None] * (1 - inside)
    images = (images * 255).round().astype(np.uint8)
    labels = np.arange(count) % 10
    return dict(
        train_images=images[:train],
        train_labels=labels[:train],
        test_images=images[train:],
        test_labels=labels[train:],
        classes=np.array(list(depth)),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("shapes", "folder"))
    parser.add_argument("folder", nargs="?", help="with train/CLASS/IMAGE and test/CLASS/IMAGE")
    parser.add_argument("--image-size", default=32, type=common.number(int, 1), help="in pixels")
    parser.add_argument("--out", metavar="FILE", help="if not given: data/NAME.npz")
    args = parser.parse_args()
    is_folder = args.what == "folder"
    common.require(is_folder == (args.folder is not None), "say which folder, or only: shapes")
    name = Path(args.folder).resolve().name if is_folder else "shapes"
    path = Path(args.out or f"data/{name}.npz")
    common.require(path.suffix == ".npz", f"--out '{path}' must end in .npz")
    common.require(not path.exists(), f"'{path}' exists; choose another --out")
    arrays = read_folder(args.folder, args.image_size) if is_folder else draw_shapes()
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    common.write_atomically(path, write)
    print(f"{path}: train with --dataset {path.stem} --data {path.parent}")


if __name__ == "__main__":
    common.launch(main)
