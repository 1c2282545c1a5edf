"""Write a dataset to an .npz file, which the scripts take as --dataset NAME:

    python results/prepare.py shapes                      # data/shapes.npz, the demo's: drawn
    python results/prepare.py folder my_images            # data/my_images.npz, of your own images
    python results/prepare.py folder my_images --image-size 64 --out data/mine.npz

A folder is my_images/train/CLASS/IMAGE and my_images/test/CLASS/IMAGE. The images are resized and
cropped to squares; 16-bit ones are scaled to 8 bits, what is transparent becomes white, and of an
animation the first frame is taken. What is left out is printed. Without labels, put all images into
one class; then no accuracy is reported. The .npz file has the arrays
train_images (uint8 [N, S, S, 3]), train_labels (integers [N]), test_images, test_labels, classes.
"""
import argparse
import hashlib
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402


def to_rgb(image):
    """A PIL image, upright and in mode RGB."""
    # PIL opens 16-bit gray in mode I;16, but PGM, and in some versions PNG, in mode I (32 bits).
    is_16_bit = image.mode == "I" and image.format in ("PNG", "PPM")
    is_16_bit = is_16_bit or image.mode.startswith("I;16")
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError("its pixels have 32 bits or a sign; save it as unsigned 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258, how many bits; 262, whether 0 is white
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        values = np.asarray(image)
        gray = values / (2 ** tags.get(258, (16,))[0] - 1)
        gray = 1 - gray if tags.get(262) == 0 else gray
        gray = np.where(values == image.info.get("transparency"), 1, gray)
        return Image.fromarray((255 * gray).round().astype(np.uint8)).convert("RGB")
    if image.mode.upper().endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(size, path):
    """uint8 [size, size, 3], or the reason why there is no image: a str."""
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "not a file"
    try:
        with Image.open(path) as image:
            image = ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC)
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # each format fails in its own way
        raise OSError(f"cannot read the image '{path}': {error}") from None
    return np.asarray(image)


def digest(image):
    return hashlib.sha256(image.tobytes()).digest()


def read_split(folder, size):
    """The images, labels and classes of a directory of directories. Prints what was found."""
    common.require(folder.is_dir(), f"there is no directory '{folder}'")
    known = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    common.require(known, f"'{folder}' has no directories of images, one for each class")
    images, labels, left_out, seen = [], [], defaultdict(list), set()
    left_out["not in a class"] = sorted(set(folder.iterdir()) - set(known))
    for label, directory in enumerate(known):
        paths = sorted(directory.iterdir())
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(partial(read_image, size), paths))
        for path, image in zip(paths, found):
            if isinstance(image, str):
                left_out[image].append(path)
                continue
            file = path.stat().st_dev, path.stat().st_ino
            if file in seen:
                left_out["the same file as another"].append(path)
            else:
                seen.add(file)
                images.append(image)
                labels.append(label)
        fault = f"'{directory}' has no images but those of other classes"
        common.require(label in labels[-1:], fault)
    print(f"{folder}: {len(images)} images in {len(known)} classes")
    copies = len(images) - len(set(map(digest, images)))
    if copies > 0:
        print(f"  kept, although equal to another image: {copies}")
    for reason, paths in left_out.items():
        if paths:
            some = ", ".join(str(path.relative_to(folder)) for path in paths[:3])
            print(f"  left out, {reason}: {len(paths)} ({some}{', ...' * (len(paths) > 3)})")
    return np.stack(images), np.array(labels), np.array([path.name for path in known])


def read_folder(root, size):
    *train, train_classes = read_split(Path(root, "train"), size)
    *test, test_classes = read_split(Path(root, "test"), size)
    odd = ", ".join(sorted({*train_classes} ^ {*test_classes}))
    common.require(not odd, f"'{root}': only one of train and test has the class {odd}")
    known = set(map(digest, train[0]))
    again = sum(digest(image) in known for image in test[0])
    if again > 0:
        print(f"{again} of the test images are also training images, so the test is not fair")
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=("shapes", "folder"))
    parser.add_argument("folder", nargs="?", help="with train/CLASS/IMAGE and test/CLASS/IMAGE")
    size = dict(type=common.number(int, 1), metavar="S", help="of a folder; if not given: 32")
    parser.add_argument("--image-size", **size)
    parser.add_argument("--out", metavar="FILE", help="if not given: data/NAME.npz")
    args = parser.parse_args()
    is_folder = args.what == "folder"
    common.require(is_folder == (args.folder is not None), "say which folder, or only: shapes")
    common.require(is_folder or args.image_size is None, "shapes are 32x32: drop --image-size")
    name = Path(args.folder).resolve().name if is_folder else "shapes"
    path = Path(args.out or f"data/{name}.npz")
    common.require(path.suffix == ".npz", f"--out '{path}' must end in .npz")
    is_cifar = path.stem in ("cifar10", "cifar100")
    common.require(not is_cifar, f"'{path}' would be taken for the real {path.stem}; choose --out")
    common.require(not path.exists(), f"'{path}' exists; choose another --out")
    arrays = read_folder(args.folder, args.image_size or 32) if is_folder else draw_shapes()
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    common.write_atomically(path, write)
    print(f"{path}: train with --dataset {quote(path.stem)} --data {quote(str(path.parent))}")


if __name__ == "__main__":
    common.launch(main)
