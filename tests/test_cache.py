import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFile
from scipy.ndimage import gaussian_filter

from dlia_utils.data import cache, datasets
from dlia_utils.data.tables import BadData

REPOSITORY = Path(__file__).resolve().parents[1]


def picture(seed, size=(96, 80)):
    noise = gaussian_filter(np.random.default_rng(seed).random(size[::-1]), 4)
    return Image.fromarray((40 + 200 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8))


def make(root, count=6):
    root.mkdir(exist_ok=True)
    paths = [f"{i}.{'png' if i % 3 == 2 else 'jpeg'}" for i in range(count)]
    for i, path in enumerate(paths):
        picture(i).convert("RGB" if i % 2 else "L").save(root / path)
    manifest = pd.DataFrame(
        {
            "path": paths,
            "label": 0,
            "class_name": "a",
            "patient": paths,
            "group": "a",
            "split": "train",
        }
    )
    ignored = pd.DataFrame(columns=["path", "reason"])
    return datasets.Dataset("tiny", root, manifest, ("a",), ignored, True, "argument")


@pytest.fixture
def dataset(tmp_path):
    return make(tmp_path / "images")


def build(dataset, tmp_path, size=24):
    return cache.build(dataset, size=size, root=tmp_path / "cache", progress=False)


def test_pixels_are_those_of_pillow(dataset, tmp_path):
    cached = build(dataset, tmp_path)
    assert isinstance(cached.images, np.memmap) and cached.images.dtype == np.uint8
    assert (
        cached.images.shape == (6, 24, 24)
        and not cached.images.flags.writeable
        and cached.truncated == ()
    )
    for row, path in enumerate(dataset.manifest["path"]):
        expected = _plain(dataset.root / path)
        # Draft decoding of JPEG may differ by a few grey levels, never by structure.
        assert np.abs(expected - cached.images[row]).max() <= (0 if path.endswith("png") else 6)


@pytest.mark.parametrize("rows", [[3, 1], np.array([3, 1]), torch.tensor([3, 1])])
def test_batch(dataset, tmp_path, rows):
    cached = build(dataset, tmp_path)
    batch = cached.batch(rows)
    assert batch.shape == (2, 1, 24, 24) and batch.dtype == torch.float32
    assert torch.equal(batch[1, 0], torch.from_numpy(np.array(cached.images[1])).float() / 255)
    assert cached.batch([]).shape == (0, 1, 24, 24)


def test_second_build_reads_nothing_and_pickle_carries_no_pixels(dataset, tmp_path, monkeypatch):
    first = build(dataset, tmp_path)
    monkeypatch.setattr(cache, "_decode_all", lambda *a, **k: pytest.fail("decoded again"))
    second = build(dataset, tmp_path)
    assert second.path == first.path and second.key == first.key
    assert len(pickle.dumps(second)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(second)).images, first.images)


def test_changed_file_size_and_manifest_give_another_cache(dataset, tmp_path):
    keys = [build(dataset, tmp_path).key, build(dataset, tmp_path, size=16).key]
    picture(99).save(dataset.root / "0.jpeg")
    changed = build(dataset, tmp_path)
    assert abs(changed.images[0] - _plain(dataset.root / "0.jpeg")).max() <= 6
    keys.append(changed.key)
    part = datasets.Dataset(
        **{**vars(dataset), "manifest": dataset.manifest.iloc[::-1].reset_index(drop=True)}
    )
    keys.append(build(part, tmp_path).key)
    assert len(set(keys)) == 4


def _plain(path):
    """The reference: what Pillow makes of the file, without draft decoding."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((24, 24), Image.Resampling.BILINEAR)).astype(
            int
        )


def test_bad_files_are_listed_together_before_decoding(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(
        cache, "_decode_all", lambda *a, **k: pytest.fail("decoded before the check")
    )
    (dataset.root / "1.jpeg").write_bytes(b"")
    (dataset.root / "4.jpeg").write_text("not an image")
    with pytest.raises(
        BadData, match=r"2 unusable files:\n  1.jpeg: empty.*\n  4.jpeg: not an image"
    ):
        build(dataset, tmp_path)
    (dataset.root / "0.jpeg").unlink()
    with pytest.raises(BadData, match="0.jpeg: cannot be read"):
        build(dataset, tmp_path)


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("name", ["3.jpeg", "5.png"])
def test_truncated_but_decodable_is_used_and_counted(dataset, tmp_path, caplog, name):
    before = _plain(dataset.root / name)
    cut(dataset.root / name, 0.93)
    cached = build(dataset, tmp_path)
    assert cached.truncated == (name,) and "1 truncated images are used" in caplog.text
    assert abs(cached.images[int(name[0]), :15] - before[:15]).max() <= 6
    assert build(dataset, tmp_path).truncated == (name,)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_truncated_beyond_use_is_refused_and_leaves_no_cache(dataset, tmp_path):
    cut(dataset.root / "1.jpeg", 0.5)
    cut(dataset.root / "3.jpeg", 0.6)
    with pytest.raises(
        BadData, match=r"2 unusable(.|\n)*1.jpeg: truncated(.|\n)*3.jpeg: truncated"
    ):
        build(dataset, tmp_path)
    assert not list((tmp_path / "cache").rglob("*.npy")) and not list(
        (tmp_path / "cache").rglob("meta.json")
    )


def test_examine_lists_every_kind_of_bad_file_at_once(dataset, tmp_path):
    whole = (dataset.root / "0.jpeg").read_bytes()
    (dataset.root / "0.jpeg").write_bytes(whole[:-20])
    (dataset.root / "1.jpeg").write_bytes(b"")
    half = (dataset.root / "3.jpeg").read_bytes()
    (dataset.root / "3.jpeg").write_bytes(half[: len(half) // 2])
    problems, truncated = cache.examine(dataset, progress=False)
    assert problems["path"].tolist() == ["1.jpeg", "3.jpeg"] and truncated == ("0.jpeg",)
    assert problems["problem"].str.contains("empty|truncated").all()


def test_sixteen_bits_are_refused(dataset, tmp_path):
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(dataset.root / "2.png")
    with pytest.raises(BadData, match="2.png: more than 8 bits"):
        build(dataset, tmp_path)


def test_padded_images_keep_their_aspect(dataset, tmp_path):
    cached = cache.build(dataset, size=24, fit="pad", root=tmp_path / "cache", progress=False)
    assert cached.fit == "pad" and cached.shapes.dtype == np.int32
    assert cached.shapes.tolist() == [[80, 96]] * 6
    for row, path in enumerate(dataset.manifest["path"]):
        with Image.open(dataset.root / path) as image:
            expected = np.asarray(
                image.convert("L").resize((24, 20), Image.Resampling.BILINEAR), dtype=float
            )
        assert np.abs(expected - cached.images[row, :20]).max() <= (
            0 if path.endswith("png") else 6
        )
        assert (cached.images[row, 20:] == 0).all()


@pytest.mark.parametrize("fit", ["squash", "pad"])
@pytest.mark.parametrize("size", [(200, 80), (80, 200), (101, 100), (300, 7)])
def test_scale_finds_a_mark_again(tmp_path, fit, size):
    (tmp_path / "images").mkdir()
    width, height = size
    x1, y1, x2, y2 = width // 2, height // 3, width - 1, height  # a bright box on black
    film = np.zeros((height, width), np.uint8)
    film[y1:y2, x1:x2] = 255
    Image.fromarray(film).save(tmp_path / "images" / "0.png")
    one = make(tmp_path / "images", count=1)
    one = replace(one, manifest=one.manifest.assign(path="0.png"))
    cached = cache.build(one, size=64, fit=fit, root=tmp_path / "cache", progress=False)
    (sx, sy), pixels = cached.scale([0])[0], cached.images[0] > 127
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert found == pytest.approx([x1 * sx, y1 * sy, x2 * sx, y2 * sy], abs=1)
    assert fit == "pad" or (sx, sy) == (64 / width, 64 / height)
    assert (
        cached.scale([]).shape == (0, 2) and cached.scale(torch.tensor([0, 0])).dtype == np.float64
    )


def test_fit_is_part_of_the_key_and_checked(dataset, tmp_path):
    squashed = build(dataset, tmp_path)
    padded = cache.build(dataset, size=24, fit="pad", root=tmp_path / "cache", progress=False)
    assert squashed.key != padded.key and squashed.fit == "squash"
    stats = [(path, os.stat(dataset.root / path)) for path in dataset.manifest["path"]]
    text = "1 24" + "".join(f"\n{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    assert (
        squashed.key == hashlib.sha256(text.encode()).hexdigest()[:20]
    )  # As before there was a fit.
    for wrong in ({"fit": "crop", "size": 24}, {"size": 4}):
        with pytest.raises(ValueError, match="at least 8 pixels, squash or pad"):
            cache.build(dataset, root=tmp_path / "cache", **wrong)


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_images_stored_on_their_side_are_turned_upright(dataset, tmp_path, fit):
    upright = picture(5, size=(96, 64))
    exif = Image.Exif()
    exif[0x0112] = 8
    upright.transpose(Image.Transpose.ROTATE_270).save(
        dataset.root / "0.jpeg", exif=exif, quality=95
    )
    upright.save(dataset.root / "1.jpeg", quality=95)
    cached = cache.build(dataset, size=48, fit=fit, root=tmp_path / "cache", progress=False)
    assert cached.shapes[:2].tolist() == [[64, 96]] * 2
    assert np.abs(cached.images[0].astype(int) - cached.images[1]).max() <= 6


SLOW_BUILD = """
import sys, time
sys.path[:0] = [{repository!r}, {tests!r}]
from pathlib import Path
import test_cache
from dlia_utils.data import cache, datasets
plain = cache._decode
def slowly(path, size, fit, **options):
    with open({calls!r}, "a") as file:
        file.write(path.name + "\\n")
    time.sleep({pause})
    return plain(path, size, fit, **options)
cache._decode = slowly
dataset = test_cache.dataset_at(Path({images!r}))
print(cache.build(dataset, size=24, root={root!r}, progress=False).key)
"""


def dataset_at(root):
    """The data set that `make` wrote to `root`, its files untouched."""
    paths = sorted(path.name for path in root.iterdir())
    manifest = pd.DataFrame({"path": paths})
    return datasets.Dataset("tiny", root, manifest, ("a",), pd.DataFrame(), True, "argument")


def start(dataset, tmp_path, pause):
    code = SLOW_BUILD.format(
        repository=str(REPOSITORY),
        tests=str(REPOSITORY / "tests"),
        calls=str(tmp_path / "calls"),
        images=str(dataset.root),
        root=str(tmp_path / "cache"),
        pause=pause,
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the other process did not get that far"
        time.sleep(0.02)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL exists on POSIX only")
def test_killed_build_is_not_taken_for_complete(dataset, tmp_path):
    process = start(dataset, tmp_path, pause=30)
    wait_for(lambda: (tmp_path / "calls").exists())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (folder,) = (tmp_path / "cache" / "images").iterdir()
    assert list(folder.glob(".images.*.tmp.npy")) and not (folder / "meta.json").exists()
    cached = build(dataset_at(dataset.root), tmp_path)
    assert cached.path == folder and all(cached.images[row].std() > 0 for row in range(6))
    assert sorted(path.name for path in folder.iterdir() if path.name != "lock") == [
        "images.npy",
        "meta.json",
        "shapes.npy",
    ]


def test_images_without_meta_are_decoded_again(dataset, tmp_path):
    cached = build(dataset, tmp_path)
    expected = np.array(cached.images)
    (cached.path / "meta.json").unlink()
    np.save(cached.path / "images.npy", np.zeros_like(expected))
    assert np.array_equal(build(dataset, tmp_path).images, expected)
    assert json.loads((cached.path / "meta.json").read_text())["size"] == 24


def test_two_processes_decode_once(dataset, tmp_path):
    processes = [start(dataset, tmp_path, pause=0.1) for _ in range(2)]
    keys = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(keys) == 1 and "" not in keys
    assert sorted((tmp_path / "calls").read_text().split()) == sorted(dataset.manifest["path"])
