"""Datasets: what is read, what is cached, and what a person is told when something is wrong."""
import json
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ALL_SHAPES, METHODS, TINY, draw_shapes
from PIL import Image

import common
import linear_eval
import simco
from common import UserError, load_dataset


def small_arrays(train=60, test=20, classes=4, size=32):
    random = np.random.default_rng(0)
    return dict(
        train_images=random.integers(0, 256, (train, size, size, 3)).astype(np.uint8),
        train_labels=np.arange(train) % classes,
        test_images=random.integers(0, 256, (test, size, size, 3)).astype(np.uint8),
        test_labels=np.arange(test) % classes,
        classes=np.array([f"class{i}" for i in range(classes)]),
    )


def make_folder(root, size=(40, 30), per_class=3):
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                image = Image.new("RGB", size, (label * 200, i * 20, 0))
                image.save(root / split / name / f"{i}.png")


# -- what is read ------------------------------------------------------------------------------------------------------


def test_shapes_are_the_same_everywhere():
    data = ALL_SHAPES
    assert data.train_images.shape == (4096, 32, 32, 3) and data.train_images.dtype == torch.uint8
    assert data.test_images.shape == (1024, 32, 32, 3) and len(data.classes) == 10
    assert torch.equal(data.train_labels.bincount(), torch.tensor([410] * 6 + [409] * 4))
    # The mean when this test was written: a drawing that changed would make demos incomparable.
    assert data.train_images.double().mean().item() == pytest.approx(78.82, abs=0.05)
    again = draw_shapes()
    assert torch.equal(data.test_images, again.test_images)


def test_npz_is_read_and_nothing_else_is_needed(tmp_path):
    arrays = small_arrays()
    np.savez_compressed(tmp_path / "cifar100.npz", **arrays)
    data = load_dataset("cifar100", tmp_path, download=False)
    for key in common.ARRAYS[:4]:
        assert np.array_equal(getattr(data, key).numpy(), arrays[key])
    assert data.classes == arrays["classes"].tolist() and data.train_labels.dtype == torch.int64


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_comes_from_torchvision_once(name, tmp_path, monkeypatch):
    arrays, calls = small_arrays(), []

    def fake(root, train, download):
        calls.append((str(root), train, download))
        split = "train" if train else "test"
        return SimpleNamespace(
            data=arrays[f"{split}_images"], targets=arrays[f"{split}_labels"].tolist(), classes=arrays["classes"].tolist()
        )

    monkeypatch.setattr(torchvision.datasets, name.upper(), fake)
    for _ in range(2):
        data = load_dataset(name, tmp_path)
        assert np.array_equal(data.train_images.numpy(), arrays["train_images"])
    assert calls == [(str(tmp_path), True, True), (str(tmp_path), False, True)]  # the second load read the cache
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.npz"]


def test_folder_is_decoded_cached_and_read_again_when_it_changes(tmp_path, monkeypatch):
    make_folder(tmp_path)
    Image.new("L", (64, 64), 128).save(tmp_path / "train" / "dog" / "gray.jpg")
    data = load_dataset("folder", tmp_path, image_size=16)
    assert data.train_images.shape == (7, 16, 16, 3) and data.test_images.shape == (6, 16, 16, 3)
    assert data.classes == ["cat", "dog"] and data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert data.train_images[1].float().mean(dim=(0, 1)).tolist() == [0, 20, 0]
    with monkeypatch.context() as patch:
        patch.setattr(common, "decode_folder", None)  # unchanged: comes from the cache
        assert torch.equal(load_dataset("folder", tmp_path, image_size=16).train_images, data.train_images)
    Image.new("RGB", (20, 20)).save(tmp_path / "train" / "cat" / "new.png")
    assert len(load_dataset("folder", tmp_path, image_size=16).train_images) == 8
    assert load_dataset("folder", tmp_path, image_size=24).train_images.shape == (8, 24, 24, 3)
    (tmp_path / "train").rename(tmp_path / "elsewhere")  # the .npz alone will do, at its size
    assert load_dataset("folder", tmp_path, image_size=24).train_images.shape == (8, 24, 24, 3)
    with pytest.raises(UserError, match="--image-size 24"):
        load_dataset("folder", tmp_path, image_size=32)


def test_folder_images_are_turned_and_cropped_as_a_person_sees_them(tmp_path):
    make_folder(tmp_path)
    wide = Image.new("RGB", (90, 30), (255, 0, 0))  # the middle third is blue
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to view"
    wide.save(tmp_path / "train" / "cat" / "0.jpg", exif=exif, quality=95)
    first = load_dataset("folder", tmp_path).train_images[0].float()
    assert (first.mean(dim=(0, 1)) - torch.tensor([0.0, 0.0, 254.0])).abs().max() < 12


def test_subset_is_balanced_and_always_the_same():
    data = common.draw_shapes(1000, 10)
    part = data.subset(105)
    counts = part.train_labels.bincount()
    assert len(part.train_labels) == 105 and counts.min() == 10 and counts.max() == 11
    assert torch.equal(part.test_images, data.test_images)
    assert torch.equal(part.train_images, data.subset(105).train_images)
    assert torch.equal(data.subset(1000).train_images, data.train_images)
    uneven = common.Dataset(data.train_images[:20], torch.tensor([0] * 17 + [1] * 3), None, None, ["many", "few"])
    assert uneven.subset(10).train_labels.bincount().tolist() == [7, 3]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_no_files_and_no_network(tmp_path, monkeypatch, fails_plainly):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    line = fails_plainly(simco, "--data", tmp_path, "--out", tmp_path / "run")
    assert "cifar-100-python.tar.gz" in line and "md5 eb9058c3a382ffc7106e4002c42a8d85" in line and str(tmp_path) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing array", "wrong shape", "labels", "pickle"])
def test_damaged_npz(damage, tmp_path, fails_plainly):
    path = tmp_path / "cifar100.npz"
    arrays = small_arrays()
    if damage == "missing array":
        del arrays["test_labels"]
    elif damage == "wrong shape":
        arrays["train_images"] = arrays["train_images"].transpose(0, 3, 1, 2)
    elif damage == "labels":
        arrays["train_labels"] += 1
    elif damage == "pickle":
        arrays["train_labels"] = np.array([object()] * 60)
    np.savez(path, **arrays)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"not a zip file")
    before = path.read_bytes()
    assert str(path) in fails_plainly(simco, "--data", tmp_path, "--out", tmp_path / "run")
    assert path.read_bytes() == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("problem, words", [
    ("no train", "train"), ("no test", "test"), ("no classes", "class"), ("other classes", "bird"),
    ("broken image", "1.png"),
])  # fmt: skip
def test_bad_folder(problem, words, tmp_path, fails_plainly):
    make_folder(tmp_path)
    if problem == "no train":
        (tmp_path / "train").rename(tmp_path / "training")
    elif problem == "no test":
        (tmp_path / "test").rename(tmp_path / "testing")
    elif problem == "no classes":
        (tmp_path / "train").rename(tmp_path / "old")
        (tmp_path / "train").mkdir()
    elif problem == "other classes":
        (tmp_path / "train" / "cat").rename(tmp_path / "train" / "bird")
    else:
        (tmp_path / "train" / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    line = fails_plainly(simco, "--dataset", "folder", "--data", tmp_path, "--batch-size", "2", "--out", tmp_path / "run")
    assert words in line and not (tmp_path / "run").exists() and not (tmp_path / "folder.npz").exists()


def test_unknown_dataset(fails_plainly):
    line = fails_plainly(simco, "--dataset", "imagenet")
    assert "imagenet" in line and "cifar100" in line
    with pytest.raises(UserError, match="imagenet"):
        load_dataset("imagenet", ".")


def test_a_data_directory_that_cannot_be_written_to_is_good_enough(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path)

    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", no_room)
    assert len(load_dataset("folder", tmp_path).train_images) == 6
    assert "not cached" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flags, words", [
    ("--epochs 0", "--epochs"), ("--epochs two", "--epochs"), ("--moco-t 0", "--moco-t"), ("--moco-t -0.1", "--moco-t"),
    ("--moco-t nan", "--moco-t"), ("--lr 0", "--lr"), ("--batch-size 65", "64"), ("--batch-size 1", "--batch-size"),
    ("--subset 5000", "4096"), ("--widht 3", "--widht"), ("--seed -1", "--seed"), ("--device cuda", "CUDA"),
])  # fmt: skip
def test_bad_flags(method, flags, words, tmp_path, fails_plainly):
    if words == "CUDA" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert words in fails_plainly(METHODS[method], *TINY, "--out", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method, flags", [
    ("simco", "--dt-m 0"), ("simmoco", "--dt-m -1"), ("simmoco", "--moco-m 1.5"), ("moco_v2", "--moco-k 0"),
])  # fmt: skip
def test_bad_flags_of_one_method(method, flags, tmp_path, fails_plainly):
    assert flags.split()[0] in fails_plainly(METHODS[method], *TINY, "--out", tmp_path / "run", *flags.split())


def test_batch_that_processes_cannot_share(monkeypatch, fails_plainly):
    monkeypatch.setattr(common, "world_size", lambda: 3)
    assert "3 processes" in fails_plainly(simco, *TINY)


def test_out_is_something_else(tmp_path, fails_plainly, tiny_run):
    (tmp_path / "notes.txt").write_text("mine")
    assert "neither empty nor a run" in fails_plainly(simco, *TINY, "--out", tmp_path)
    assert "is a file" in fails_plainly(simco, *TINY, "--out", tmp_path / "notes.txt")
    out = tiny_run("simmoco")
    before = {path: path.read_bytes() for path in out.iterdir()}
    line = fails_plainly(simco, *TINY, "--out", out, "--lr", "0.5")
    assert "lr 0.03 (now 0.5)" in line and "method simmoco (now simco)" in line
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("damage", ["text", "truncated", "other dict", "pickled object", "other network"])
def test_a_checkpoint_that_is_none(damage, tiny_run, fails_plainly):
    out = tiny_run("simco", "--epochs", "3")
    path = out / "checkpoint.pth"
    (out / "checkpoint.previous.pth").unlink()  # which a run would go on from
    if damage == "text":
        path.write_text("hello")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "other dict":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "pickled object":
        torch.save({"epoch": 1, "model": SimpleNamespace(), "optimizer": {}}, path)
    else:
        state = common.load_checkpoint(path)
        torch.save(dict(state, epoch=1, model={"a": torch.zeros(1)}), path)
    before = path.read_bytes()
    assert "checkpoint" in fails_plainly(simco, *TINY, "--out", out, "--epochs", "3")
    assert path.read_bytes() == before
    assert "checkpoint" in fails_plainly(linear_eval, out)


def test_linear_eval_on_what_is_no_run(tmp_path, fails_plainly, tiny_run):
    assert "no run directory" in fails_plainly(linear_eval, tmp_path)
    assert "no run directory" in fails_plainly(linear_eval, tmp_path / "nowhere")
    assert "RUN_DIR" in fails_plainly(linear_eval)
    assert "result.json" in fails_plainly(linear_eval, "--table", tmp_path)
    out = tiny_run("simco")
    (out / "checkpoint.pth").unlink()
    assert "no checkpoint.pth yet" in fails_plainly(linear_eval, out)
    (out / "args.json").write_text(json.dumps({"method": "simco"}))
    assert "args.json" in fails_plainly(linear_eval, out)
