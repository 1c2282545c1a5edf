"""Datasets: what is read, and what is said about a mistake."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY
from PIL import Image

import common
import moco_v2


@pytest.fixture
def arrays():
    """A tiny dataset, as `common.read_npz` wants it."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8), np.arange(60) % 2
    values = (images, labels, images[:20], labels[:20], np.array(["a", "b"]))
    return dict(zip(common.Dataset._fields, values))


@pytest.fixture
def folder(tmp_path):
    """Three images of each of two classes."""
    for split, red, name in itertools.product(("train", "test"), (0, 200), "012"):
        path = tmp_path / split / ("dog" if red else "cat") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (red, 20 * int(name), 0)).save(path)
    return tmp_path


def test_shapes_are_the_same_everywhere():
    data = common.draw_shapes()
    assert data.train_images.shape == (4096, 32, 32, 3) and data.train_images.dtype == torch.uint8
    assert len(data.test_images) == 1024 and len(data.classes) == 10
    # As when this test was written: otherwise no earlier result could be compared.
    assert data.train_labels.bincount().tolist() == [410] * 6 + [409] * 4
    assert data.train_images.double().mean().item() == pytest.approx(78.820, abs=1e-3)


def test_npz_and_cifar_are_read(arrays, tmp_path, monkeypatch):
    def cifar(root, train, download):
        assert root == tmp_path and download
        images, labels = list(arrays.values())[:2] if train else list(arrays.values())[2:4]
        return SimpleNamespace(data=images, targets=labels.tolist(), classes=["a", "b"])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar)
    labels = arrays["train_labels"].astype(np.uint8)  # any integers will do
    np.savez_compressed(tmp_path / "cifar100.npz", **dict(arrays, train_labels=labels))
    for name in ("cifar10", "cifar100"):  # from torchvision; from the file
        *tensors, classes = common.load_dataset(name, tmp_path)
        assert all(map(np.array_equal, tensors, arrays.values())) and classes == ["a", "b"]
        assert tensors[1].dtype == torch.int64


def test_folder_is_read(folder):
    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 0, 255), (30, 0, 60, 15))  # the upper half of the square in the middle
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: then it is the right half
    wide.save(folder / "train" / "cat" / "turned.jpg", exif=exif, quality=95)
    Image.new("L", (64, 64), 128).save(folder / "train" / "dog" / "gray.png")
    data = common.load_dataset("folder", folder, image_size=16)
    assert data.train_images.shape == (8, 16, 16, 3) and data.test_images.shape == (6, 16, 16, 3)
    assert data.classes == ["cat", "dog"] and data.train_labels.tolist() == [0] * 4 + [1] * 4
    colour = data.train_images.float().mean(dim=(1, 2))
    assert colour[1].tolist() == [0, 20, 0] and colour[7].tolist() == [128, 128, 128]
    right_half = data.train_images[3][:, 10:].float().mean(dim=(0, 1))
    assert (right_half - torch.tensor([0, 0, 254])).abs().max() < 12  # JPEG is not exact


def test_subset_is_balanced():
    data = common.draw_shapes(1000, 10)
    assert data.subset(105).train_labels.bincount().tolist() == [11] * 5 + [10] * 5
    assert torch.equal(data.subset(1000).train_images, data.train_images)
    labels = torch.tensor([0] * 17 + [1] * 3)
    uneven = data._replace(train_images=data.train_images[:20], train_labels=labels, classes="ab")
    assert uneven.subset(10).train_labels.bincount().tolist() == [7, 3]


def test_no_files_and_no_network(tmp_path, monkeypatch, fails_plainly):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    error = fails_plainly(moco_v2, "--data", tmp_path)
    assert "cifar-100-python.tar.gz" in error and "eb9058c3a382ffc7106e4002c42a8d85" in error


def test_damaged_npz(arrays, tmp_path, fails_plainly):
    images, path = arrays["train_images"], tmp_path / "cifar100.npz"
    np.savez(path, **arrays)
    damaged = [path.read_bytes()[:100_000], b"", b"not a zip file"]
    transposed = dict(arrays, train_images=images.transpose(0, 3, 1, 2))
    for wrong in (dict(train_images=images), transposed, dict(arrays, train_labels=np.arange(60))):
        np.savez(path, **wrong)
        damaged.append(path.read_bytes())
    for content in damaged:
        path.write_bytes(content)
        assert str(path) in fails_plainly(moco_v2, "--data", tmp_path, "--out", tmp_path / "run")
        assert path.read_bytes() == content and not (tmp_path / "run").exists()


def test_bad_folder(folder, fails_plainly):
    flags = f"--dataset folder --data {folder} --batch-size 2 --out {folder}/run".split()
    for name, message in (("train", "/train'"), ("test", "/test'"), ("train/dog", "class dog")):
        (folder / name).rename(folder / "away")
        assert message in fails_plainly(moco_v2, *flags)
        (folder / "away").rename(folder / name)
    image = folder / "train" / "dog" / "1.png"
    image.write_bytes(image.read_bytes()[:50])
    assert str(image) in fails_plainly(moco_v2, *flags) and not (folder / "run").exists()


BAD_FLAGS = """--dataset=imagenet --epochs=0 --epochs=two --lr=nan --seed=-1 --moco-t=0.01
    --moco-k=0 --moco-m=1.5 --dt-m=3 --alpha=64 --loss=eqco --bn-splits=5 --bn-splits=32
    --subset=5000 --batch-size=1 --batch-size=65 --widht=3 @nowhere/args.json""".split()
BAD_FLAGS += ["--bn-splits=2 --sync-bn", "--moco-k=33 --memory-bank", "--memory-bank --symmetric"]


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_bad_flags(bad, tmp_path, fails_plainly):
    flags = [*TINY, "--moco-k=9", "--out", tmp_path / "run", *bad.split()]
    name = bad.strip("@").split("=")[0].split()[0]
    assert name in fails_plainly(moco_v2, *flags) and not (tmp_path / "run").exists()


def test_batch_that_processes_cannot_share(monkeypatch, fails_plainly):
    monkeypatch.setattr(common, "world_size", lambda: 3)
    assert "--batch-size" in fails_plainly(moco_v2, *TINY)
