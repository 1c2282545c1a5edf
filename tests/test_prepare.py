"""results/prepare.py: what it draws, what it reads, and what it says about a mistake."""
import prepare
import pytest
from PIL import Image

import common


def test_shapes_are_the_same_everywhere(tmp_path, run_script, fails_plainly):
    path = tmp_path / "new" / "shapes.npz"
    assert run_script(prepare, "shapes", "--out", path) == 0
    data = common.read_npz(path)
    assert data.train_images.shape == (4096, 32, 32, 3) and len(data.test_images) == 1024
    # As when this test was written: otherwise no earlier result could be compared.
    assert data.train_labels.bincount().tolist() == [410] * 6 + [409] * 4
    assert data.train_images.double().mean().item() == pytest.approx(78.820, abs=1e-3)
    assert f"'{path}' exists" in fails_plainly(prepare, "shapes", "--out", path)


@pytest.fixture
def folder(tmp_path):
    """An image of each of two classes; in train/cat, also what needs care."""
    for label, colour in (("cat", (0, 60, 0)), ("dog", (200, 0, 0))):
        for split in ("train", "test"):
            path = tmp_path / "mine" / split / label / "a.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (40, 30), colour).save(path)
    cats, exif, wide = path.parents[2] / "train" / "cat", Image.Exif(), Image.new("RGB", (90, 30))
    wide.paste((0, 0, 255), (30, 0, 60, 15))  # the upper half of the square in the middle
    exif[0x0112] = 6  # to be turned clockwise: then it is the right half
    wide.save(cats / "b.jpg", exif=exif, quality=95)
    Image.new("L", (64, 64), 128).save(cats / "c.png")
    for name in ("notes.txt", ".hidden.png", "../readme.txt"):
        (cats / name).write_text("no image")
    (cats / "more").mkdir()
    return tmp_path / "mine"


PRINTED = """\
mine/train: 4 images in 2 classes
  left out, not in a class: 1 (readme.txt)
  left out, hidden: 1 (cat/.hidden.png)
  left out, not a file: 1 (cat/more)
  left out, not an image: 1 (cat/notes.txt)
mine/test: 2 images in 2 classes
2 of the test images are also training images, so the test is not fair
data/mine.npz: train with --dataset mine --data data
""".splitlines()


def test_folder_is_read(folder, run_script, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert run_script(prepare, "folder", "mine", "--image-size", "16") == 0
    assert capsys.readouterr().out.splitlines() == PRINTED
    data = common.read_npz(folder.parent / "data" / "mine.npz")
    assert data.train_images.shape == (4, 16, 16, 3) and data.test_images.shape == (2, 16, 16, 3)
    assert data.classes == ["cat", "dog"] and data.train_labels.tolist() == [0, 0, 0, 1]
    colour = data.train_images.float().mean(dim=(1, 2))
    assert colour[[0, 2, 3]].tolist() == [[0, 60, 0], [128, 128, 128], [200, 0, 0]]
    turned = data.train_images[1].float()
    for half, blue in ((turned[:, :6], 0), (turned[:, 10:], 254)):
        assert half.mean(dim=(0, 1)).tolist() == pytest.approx([0, 0, blue], abs=12)  # it is JPEG


def damage(folder):
    path = folder / "train" / "dog" / "a.png"
    path.write_bytes(path.read_bytes()[:50])


MISTAKES = {  # what is done to the folder, and the message
    "damaged": (damage, "train/dog/a.png"),
    "odd class": (lambda folder: (folder / "test/dog").rename(folder / "test/wolf"), "dog, wolf"),
    "empty class": (lambda folder: (folder / "test/dog/a.png").unlink(), "test/dog' has no images"),
    "no split": (lambda folder: (folder / "test").rename(folder / "val"), "no directory"),
    "exists": (lambda folder: (folder.parent / "x.npz").touch(), "x.npz' exists"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, folder, fails_plainly):
    change, message = MISTAKES[case]
    change(folder)
    path = folder.parent / "x.npz"
    assert message in fails_plainly(prepare, "folder", folder, "--out", path)
    assert not path.exists() or path.read_bytes() == b""
