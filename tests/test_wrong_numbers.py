"""Never a wrong number with exit code 0: what ordinary use could get wrong without a word."""
import io
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import prepare
import pytest
import table
import torch
from conftest import DATA, ROOT, TINY
from PIL import Image
from test_runs import start

import common
import linear_eval
import simco

QUICK = "--cached --epochs 2 --device cpu --lrs 0.1 1".split()


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def other_data(tmp_path):
    """A directory with a dataset of the same name and shape as TINY's, but with other images."""
    np.savez(tmp_path / "cifar10.npz", **prepare.draw_shapes(256, 256, size=16, seed=1))
    return tmp_path


def test_a_run_knows_its_data(tiny_run, run_script, fails_plainly, other_data, capsys):
    out, wrong = tiny_run("simco"), ["--data", other_data]
    images = read(out / "args.json")["images"]
    assert images.startswith("256 + 256 images, 10 classes, sha256 ")
    assert images in fails_plainly(simco, *TINY, *wrong, "--out", out)
    assert images in fails_plainly(linear_eval, out, *QUICK, *wrong)
    config = ["--config", out / "args.json", "--out", other_data / "new"]
    assert images in fails_plainly(simco, *config, *wrong)
    assert not (out / "result.json").exists() and not (other_data / "new").exists()
    # In another place it is the same data; and on other data, the checkpoint can be evaluated.
    (other_data / "moved").mkdir()
    shutil.copy(f"{DATA.name}/cifar10.npz", other_data / "moved")
    assert run_script(simco, *TINY, "--data", other_data / "moved", "--out", out) == 0
    alone = ["--checkpoint", out / "checkpoint.pth", "--dataset", "cifar10", *QUICK, *wrong]
    assert run_script(linear_eval, *alone, "--json", other_data / "alone.json") == 0
    assert read(other_data / "alone.json")["images"] != images
    # A table does not take two datasets of one name for one. A copied run is no second seed.
    tiny_run("simco", *wrong, "--seed", "1", out=other_data / "other")
    for run in (out, other_data / "other"):
        assert run_script(linear_eval, run, *QUICK, *(wrong if run != out else [])) == 0
    shutil.copytree(out, other_data / "z" / "backup")
    capsys.readouterr()
    assert run_script(table, other_data) == 0
    printed = capsys.readouterr().out
    assert printed.count("| SimCo |") == 2 and printed.count(f"images: {images} |") == 1
    assert "±" not in printed and "z/backup, of the same flags and seed" in printed


def test_result_of_an_earlier_epoch_or_protocol_is_replaced(tiny_run, run_script, capsys):
    out, kept, evaluate = tiny_run("simco"), "untrained", lambda *x: run_script(linear_eval, *x)
    assert evaluate(out, *QUICK, "--untrained") == evaluate(out, *QUICK) == 0
    first = (out / "result.json").read_bytes()
    assert evaluate(out, *QUICK) == evaluate(out, *QUICK, "--untrained") == 0
    assert (out / "result.json").read_bytes() == first
    assert capsys.readouterr().out.count("(stored)") == 2
    (out / "result.json").write_text(json.dumps(read(out / "result.json") | dict(epoch=1)))
    assert evaluate(out, *QUICK) == 0 and read(out / "result.json") == json.loads(first)
    assert evaluate(out, *QUICK, "--epochs", "3") == 0
    assert read(out / "result.json")["protocol"]["epochs"] == 3
    assert read(out / "result.json")[kept] == json.loads(first)[kept]


STAND_IN = """#!/usr/bin/env bash
# A python that only notes what it is to do. Its run has one epoch.
echo "$*" >>calls.txt
case "$*" in *"--epochs 2"*) exit 2 ;; *--out*) mkdir -p runs/x ;; esac
"""


def test_run_all_sh_leaves_it_to_the_scripts_what_is_finished(tmp_path):
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    env = os.environ | dict(PYTHON="./python", METHODS="simco", BATCH_SIZES="32", EPOCHS="1")

    def run_all(**variables):
        (tmp_path / "calls.txt").write_text("")
        process = subprocess.run(["./run_all.sh"], cwd=tmp_path, env=env | variables)
        return process.returncode, (tmp_path / "calls.txt").read_text()

    out = tmp_path / "runs" / "simco-cifar100-bs32-seed0"
    out.mkdir(parents=True)
    (out / "checkpoint.pth").touch()
    (out / "result.json").write_text('{\n "linear_top1": 1\n}')  # where is one, there may be more
    code, calls = run_all(FLAGS="--lr 0.1", EVAL_FLAGS="--cached")
    assert code == 0 and "--epochs 1" in calls and "--lr 0.1" in calls
    assert f"linear_eval.py {out.relative_to(tmp_path)} --cached" in calls
    code, calls = run_all(EPOCHS="2")
    assert code == 2 and "linear_eval.py" not in calls and "table.py" not in calls
    (out / "checkpoint.pth").unlink()  # then its result is believed
    code, calls = run_all()
    assert code == 0 and "simco.py" not in calls and "table.py" in calls


def test_run_without_its_checkpoint_is_not_trained_again(tiny_run, fails_plainly):
    out = tiny_run("simco")
    (out / "checkpoint.pth").unlink()
    (out / "result.json").write_text("{}")
    log = (out / "log.jsonl").read_text()
    assert "lost its checkpoint" in fails_plainly(simco, *TINY, "--out", out)
    (out / "result.json").unlink()
    assert "or its checkpoint" in fails_plainly(simco, *TINY, "--out", out)
    assert (out / "log.jsonl").read_text() == log
    # A crash before the first checkpoint leaves two lines of log. Then it begins anew.
    (out / "log.jsonl").write_text("".join(log.splitlines(keepends=True)[:2]))
    tiny_run("simco", out=out)
    assert len((out / "log.jsonl").read_text().splitlines()) == 3


def test_log_that_was_cut(tiny_run, run_script, capsys):
    out = tiny_run("simco")
    assert run_script(linear_eval, out, *QUICK) == 0
    log = (out / "log.jsonl").read_text()
    for text, note in ((log[:-9], "2 lines, the last of epoch 1"), (log, "")):
        (out / "log.jsonl").write_text(text)
        capsys.readouterr()
        assert run_script(table, out) == 0
        printed = capsys.readouterr().out
        assert note in printed and ("Log with gaps" in printed) == bool(note)
        assert (" | – | " in printed) == bool(note)


ROTTEN = [("bn1.running_var", float("nan")), ("bn1.running_var", float("inf"))]
ROTTEN += [("layer4.1.conv2.weight", float("inf")), ("layer4.1.bn2.weight", 1e30)]  # its square


@pytest.mark.parametrize(["name", "value"], ROTTEN)
def test_numbers_that_are_not_finite_are_not_scored(name, value, fails_plainly, tmp_path):
    state, path = common.resnet18(8).state_dict(), tmp_path / "x.pth"
    state[name].fill_(value)
    torch.save(state, path)
    data = ["--dataset", "cifar10", "--data", DATA.name, "--subset", "64"]
    assert "NaN or infinite" in fails_plainly(linear_eval, "--checkpoint", path, *data, *QUICK)


def test_probe_and_classifier_that_diverged(fails_plainly, monkeypatch, tmp_path):
    with pytest.raises(SystemExit):
        linear_eval.accuracy(torch.tensor([[0.0, float("nan")]]), torch.tensor([0]))
    heads = torch.nn.Linear(2, 4, bias=False).requires_grad_(False)  # two classifiers
    heads.weight.copy_(torch.tensor([[float("nan")] * 2] * 2 + [[1.0, 0.0], [0.0, 1.0]]))
    losses = linear_eval.calibrated_losses(heads, torch.eye(2), torch.arange(2), 2)
    assert losses[0] > 1e6 and losses[1] < 1 and json.dumps(losses)  # the second is chosen
    extract = common.extract_features
    monkeypatch.setattr(common, "extract_features", lambda *x: extract(*x) * 1e39)
    monkeypatch.setattr(common, "effective_rank", lambda features: 1)
    error = fails_plainly(simco, *TINY, "--epochs", "1", "--out", tmp_path / "run")
    assert "the probe became NaN" in error


def test_one_class_has_no_accuracy(run_script, fails_plainly, tmp_path):
    arrays = prepare.draw_shapes(64, 64, size=16)
    arrays = arrays | {x: 0 * arrays[x] for x in ("train_labels", "test_labels")}
    np.savez(tmp_path / "one.npz", **arrays | dict(classes=np.array(["all"])))
    flags = [*TINY, "--dataset", "one", "--data", tmp_path, "--out", tmp_path / "run"]
    assert run_script(simco, *flags) == 0
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        assert not {"knn_top1", "probe_top1"} & json.loads(line).keys()
    assert "only one class" in fails_plainly(linear_eval, tmp_path / "run", *QUICK)


def test_only_runs_that_are_shown_hide_their_copies(tiny_run, run_script, tmp_path, capsys):
    out = tiny_run("simco")
    assert run_script(linear_eval, out, *QUICK, "--untrained") == 0
    shutil.copytree(out, tmp_path / "z")
    assert run_script(linear_eval, tmp_path / "z", *QUICK) == 0
    # A run of an earlier version does not know its images: at least no second seed.
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "z", old)
    (tmp_path / "linked").symlink_to(old, target_is_directory=True)
    for name in ("args.json", "result.json"):
        (old / name).write_text(json.dumps({**read(old / name), "images": None}))
    capsys.readouterr()
    assert run_script(table, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "| 1 |\n" in printed and "±" not in printed and printed.count("| SimCo |") == 1
    assert "same flags and seed" in printed
    config = read(old / "args.json")
    (old / "args.json").write_text(json.dumps(config | dict(seed=1)))
    assert run_script(table, tmp_path) == 0
    assert "Perhaps trained on other images: " in capsys.readouterr().out


def test_our_files_know_their_stem_padding(tiny_run, run_script, fails_plainly, tmp_path, capsys):
    for padding, method in ((1, "simmoco"), (2, "moco_v2")):
        out = tiny_run(method, "--stem-padding", padding)
        exported = tmp_path / f"{padding}.pth"
        assert run_script(linear_eval, out, "--export", exported) == 0
        assert str(common.MEAN) in capsys.readouterr().out
        for path in (out / "checkpoint.pth", exported):
            backbone, _ = linear_eval.read_backbone(path)
            assert backbone.conv1.padding == (padding, padding)
            assert "guess" not in capsys.readouterr().out
            flags = ["--checkpoint", path, "--stem-padding", 3 - padding, "--dataset", "shapes"]
            assert f"trained with stem padding {padding}" in fails_plainly(linear_eval, *flags)
    torch.save(dict(torch.load(exported)), exported)  # somebody else's
    linear_eval.read_backbone(exported)
    assert "stem padding 1 (a guess" in capsys.readouterr().out
    again = tmp_path / "again.pth"  # as which it is exported
    assert run_script(linear_eval, "--checkpoint", exported, "--export", again) == 0
    linear_eval.read_backbone(again)
    assert capsys.readouterr().out.count("a guess") == 2


def started(script, *flags, **variables):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, ROOT / script, *map(str, flags)]
    return subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=60)


def test_what_other_programs_leave_in_the_environment(tmp_path):
    alone = started("simco.py", *TINY, "--out", tmp_path / "run", RANK="1", WORLD_SIZE="4")
    assert alone.returncode == 0 and "1 x" in alone.stdout
    joins = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="x", MASTER_PORT="1")
    fails = started("simco.py", "--config", "nowhere", **joins)
    assert fails.returncode == 2 and "nowhere" in fails.stderr


def test_nothing_is_lost_to_a_character(tiny_run, monkeypatch):
    out = tiny_run("simco")
    result = dict(linear_top1=1.0, knn_top1=1.0, epoch=2, untrained=dict(linear_top1=2.0))
    (out / "result.json").write_text(json.dumps(result))
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp932")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "argv", ["table.py", str(out)])
    common.launch(table.main)
    screen.seek(0)
    assert "| untrained |" in screen.read()


def test_result_is_printed_even_if_it_cannot_be_written(tiny_run, run_script, monkeypatch, capsys):
    out = tiny_run("simco")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.Path, "write_text", no_space)
    capsys.readouterr()
    assert run_script(linear_eval, out, *QUICK) == 2
    printed = capsys.readouterr()
    assert "kNN" in printed.out and "No space left" in printed.err


def test_home_directory_and_paths_with_spaces(run_script, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run_script(simco, *TINY, "--out=~/my runs/x") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"Next: python linear_eval.py '{tmp_path}/my runs/x' --cached")
    assert run_script(linear_eval, "~/my runs/x", *QUICK) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Next: python results/table.py '{tmp_path}/my runs'"
    assert [path.name for path in tmp_path.iterdir()] == ["my runs"]


FULL = """
from tensorboard.summary.writer.record_writer import RecordWriter
from unittest import mock
full = OSError(28, "No space left on device")
RecordWriter.write = mock.Mock(side_effect=[None, None, full, *[None] * 99])
"""


def test_tensorboard_that_cannot_write(tmp_path):
    """It writes in a thread, whose error is raised in ours, too, and must be said only once."""
    process = start(FULL, "simco.py", *TINY, "--out", tmp_path)
    error = process.communicate()[1]
    assert process.returncode == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and "No space left on device" in error


def image_of(folder, run_script, size=4):
    """What prepare.py makes of the only image in a directory: uint8 [size, size, 3]."""
    path = folder.parent / f"{folder.name}.npz"
    shutil.copytree(folder / "train", folder / "test", symlinks=True)
    assert run_script(prepare, "folder", folder, "--image-size", size, "--out", path) == 0
    (image,) = common.read_npz(path).train_images
    return image.numpy()


IMAGES = {  # an image, its file's ending, and what becomes of it
    "16-bit gray": (Image.fromarray(np.full((4, 4), 25700, np.uint16)), "png", 100),
    "16-bit TIFF": (Image.fromarray(np.full((4, 4), 12850, np.uint16)), "tif", 50),
    "12-bit TIFF": (Image.fromarray(np.full((4, 4), 0x8888, np.uint16)), "tif", 0x88),
    "16-bit negative": (Image.fromarray(np.full((4, 4), 65535, np.uint16)), "tif", 0),
    "16-bit PGM": (Image.fromarray(np.full((4, 4), 25700, np.uint16)), "pgm", 100),
    "transparent": (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "png", 255),
    "gray, half transparent": (Image.new("LA", (4, 4), (0, 128)), "png", 127),
    "16-bit, transparent": (Image.fromarray(np.zeros((4, 4), np.uint16)), "png", 255),
    "GIF": (Image.new("L", (4, 4), 80), "gif", 80),
    "JPEG by another name": (Image.new("L", (4, 4), 80), "jfif", 80),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_are_what_they_look_like(case, tmp_path, run_script):
    image, ending, gray = IMAGES[case]
    (tmp_path / "x" / "train" / "cat").mkdir(parents=True)
    path = tmp_path / "x" / "train" / "cat" / f"a.{ending}"
    image.save(path, **(dict(transparency=0) if case == "16-bit, transparent" else {}))
    tag = {"12-bit TIFF": (258, 12), "16-bit negative": (262, 0)}.get(case)
    if tag is not None:  # PIL writes 16 bits, black is 0; the tag is an entry of 12 bytes
        entry = struct.pack("<HH", tag[0], 3) + struct.pack("<I", 1)
        before, _, after = path.read_bytes().partition(entry)
        path.write_bytes(before + entry + struct.pack("<H", tag[1]) + after[2:])
    assert (image_of(tmp_path / "x", run_script) == gray).all()


def test_images_that_cannot_be_read_and_links(tmp_path, run_script, fails_plainly, capsys):
    cats = tmp_path / "x" / "train" / "cat"
    cats.mkdir(parents=True)
    (cats.parent / ".ipynb_checkpoints").mkdir()
    Image.new("L", (4, 4), 9).save(cats / "a.png")
    (cats / "loop").symlink_to(cats)
    (cats / "b.png").symlink_to(cats / "a.png")
    (cats / "c.png").hardlink_to(cats / "a.png")
    (cats / "d.png").symlink_to(cats / "nowhere")
    assert (image_of(tmp_path / "x", run_script) == 9).all()
    printed = capsys.readouterr().out
    for words in ("train: 1 images in 1 classes", "not a file: 2 (cat/d.png, cat/loop)"):
        assert words in printed
    for words in ("same file as another: 2 (cat/b.png, cat/c.png)", "also training images"):
        assert words in printed
    Image.fromarray(np.zeros((4, 4), np.float32)).save(cats / "c.tif")
    error = fails_plainly(prepare, "folder", tmp_path / "x", "--out", tmp_path / "y.npz")
    assert "c.tif" in error and "32 bits" in error
    flags = ["shapes", "--image-size", "64", "--out", tmp_path / "y.npz"]
    assert "drop --image-size" in fails_plainly(prepare, *flags)


def test_messages_name_what_is_wrong(fails_plainly, tmp_path):
    arrays = prepare.draw_shapes(64, 64, size=16)
    flags = [*TINY, "--dataset", "bad", "--data", tmp_path, "--out", tmp_path / "run"]
    np.savez(tmp_path / "bad.npz", **arrays | dict(train_labels=arrays["train_labels"] + 1))
    assert "labels must be 64 integers from 0 to 9, not [64] [10]" in fails_plainly(simco, *flags)
    np.savez(tmp_path / "bad.npz", **arrays)
    assert "--subset 65: 'bad' has 64" in fails_plainly(simco, *flags, "--subset", "65")
    error = fails_plainly(simco, *flags, "--subset", "16")
    assert "--batch-size 32: there are only 16" in error
    config = tmp_path / "config.json"
    config.write_text('[["method", "simco"]]')  # which dict() would take
    assert str(config) in fails_plainly(simco, "--config", config, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
