"""Datasets and flags: what is read, and what is said about a mistake."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY
from test_runs import assert_same_bits, log_of

import common
import moco_v2
import simmoco


@pytest.fixture
def arrays():
    """A tiny dataset, as `common.read_npz` wants it."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8), np.arange(60) % 2
    values = (images, labels, images[:20], labels[:20], np.array([b"a", b"b"]))
    return dict(zip(common.Dataset._fields, values))


def load(path, *flags):
    """The dataset in DATA/NAME.npz, as a script loads it."""
    flags = ["--data", str(path.parent), "--dataset", path.stem, *flags]
    return common.load_data(moco_v2.arguments().parse_args(flags), torch.device("cpu"))


def test_npz_and_cifar_are_read(arrays, tmp_path, monkeypatch):
    def cifar(root, train, download):
        assert root == str(tmp_path) and download
        images, labels = list(arrays.values())[:2] if train else list(arrays.values())[2:4]
        images = images.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)  # as torchvision's are
        return SimpleNamespace(data=images, targets=labels.tolist(), classes=["a", "b"])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar)
    labels = arrays["train_labels"].astype(np.uint8)  # any integers will do
    np.savez_compressed(tmp_path / "mine.npz", **dict(arrays, train_labels=labels))
    for name in ("cifar10", "mine"):  # from torchvision; from the file
        *tensors, classes = load(tmp_path / name)
        assert all(map(np.array_equal, tensors, arrays.values())) and classes == ["a", "b"]
        assert tensors[1].dtype == torch.int64
    some = load(tmp_path / "mine", "--subset", "9")
    assert some.train_labels.bincount().tolist() == [5, 4] and len(some.test_images) == 20


def test_subset_is_balanced():
    labels = torch.arange(1000) % 10
    assert labels[common.balanced(labels, 10, 105)].bincount().tolist() == [11] * 5 + [10] * 5
    assert torch.equal(common.balanced(labels, 10, 1000), torch.arange(1000))
    several = torch.arange(10**6) % 10**5  # an array of images and classes would have 800 GB
    assert torch.equal(common.balanced(several, 10**5, 2 * 10**5), torch.arange(2 * 10**5))
    uneven = torch.tensor([0] * 17 + [1] * 3)
    assert uneven[common.balanced(uneven, 2, 10)].bincount().tolist() == [7, 3]


def test_no_files_and_no_network(tmp_path, monkeypatch, fails_plainly):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    error = fails_plainly(moco_v2, "--data", tmp_path)
    assert "cifar-100-python.tar.gz" in error and str(tmp_path) in error


def test_damaged_npz(arrays, tmp_path, fails_plainly):
    path, images, labels = tmp_path / "mine.npz", arrays["train_images"], arrays["train_labels"]
    np.savez(path, **arrays)
    damaged = [path.read_bytes()[:20_000], b"", b"not a zip file"]
    wrong = [dict(train_images=images.astype(float)), dict(test_images=images[:20, :8])]
    wrong += [dict(train_images=images.transpose(0, 3, 1, 2)), dict(train_images=images[..., :1])]
    bad_labels = (labels + 1, labels - 1, labels + 0.5, labels[:59], labels[:, None])
    wrong += [dict(train_labels=x) for x in bad_labels]
    wrong += [dict(test_images=images[:0], test_labels=labels[:0]), dict(classes=np.array("a"))]
    for content in [*({**arrays, **x} for x in wrong), dict(images=images)]:
        np.savez(path, **content)
        damaged.append(path.read_bytes())
    flags = f"--dataset mine --data {tmp_path} --batch-size 32 --device cpu --out {tmp_path}/run"
    for content in damaged:
        path.write_bytes(content)
        assert str(path) in fails_plainly(moco_v2, *flags.split())
        assert path.read_bytes() == content and not (tmp_path / "run").exists()


BAD_FLAGS = """
    --epochs=0 --epochs=two --lr=nan --lr=inf --lr=0 --moco-t=-1 --moco-t=0.01 --dt-m=0 --width=4
    --seed=-1 --moco-m=1.5 --batch-size=1 --batch-size=65 --subset=0 --subset=257 --moco-k=0
    --num-negatives=0 --num-negatives=32 --alpha=64 --alpha=0 --bn-splits=5 --bn-splits=32
    --dataset=imagenet --widht=8 --wid=8 --loss=triplet --loss=eqco --config=nowhere""".split()
BAD_FLAGS += ["--dt-m=3 --loss=infonce", "--bn-splits=2 --sync-bn"]
BAD_FLAGS += ["--memory-bank --moco-k=33", "--memory-bank --moco-k=9 --symmetric"]


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_bad_flags(bad, tmp_path, fails_plainly):
    script, (name, _, value) = moco_v2 if "moco-k" in bad else simmoco, bad.partition("=")
    error = fails_plainly(script, *TINY, "--out", tmp_path / "run", *bad.split())
    assert (value if name in ("--dataset", "--config") else name.split()[0]) in error
    assert not (tmp_path / "run").exists()


def test_batch_that_processes_cannot_share(monkeypatch, fails_plainly):
    monkeypatch.setattr(common, "WORLD_SIZE", 3)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    assert "--batch-size" in fails_plainly(moco_v2, *TINY)


def test_config_repeats_a_run(tiny_run, run_script, fails_plainly, tmp_path):
    flags = "--moco-k 40 --head linear --symmetric --seed 3 --subset 96".split()
    out, file = tiny_run("moco_v2", *flags), tmp_path / "args.json"
    again = ["--config", out / "args.json", *TINY[2:4], "--device", "cpu", "--out"]
    for name, flags in (("same", []), ("other", ["--seed", "4"])):
        assert run_script(moco_v2, *again, tmp_path / name, *flags) == 0
    assert_same_bits(out, tmp_path / "same")
    assert log_of(out)[-1]["loss"] != log_of(tmp_path / "other")[-1]["loss"]
    config = json.loads((out / "args.json").read_text())
    bad = dict.fromkeys(("", "[1, 2]", "3", "null", "{}", '{"method"'), str(file))
    wrong = dict(method="simco"), dict(widht=8), dict(epochs=None), dict(batch_size=1)
    for change, word in zip(wrong, (str(file), "--widht", "--epochs", "--batch-size")):
        bad[json.dumps({**config, **change})] = word
    for text, word in bad.items():
        file.write_text(text)
        assert word in fails_plainly(moco_v2, "--config", file, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
