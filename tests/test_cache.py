import hashlib
import io
import os
import pickle
import struct
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from scipy.ndimage import gaussian_filter

from dlia_utils import __main__ as cli
from dlia_utils.data import cache, datasets
from dlia_utils.data.tables import BadData, shapes_of


def picture(seed, size=(96, 80)):
    noise = gaussian_filter(np.random.default_rng(seed).random(size[::-1]), 4)
    return Image.fromarray((40 + 200 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8))


def make(root, count=6):
    root.mkdir(exist_ok=True)
    paths = [f"{i}.{'png' if i % 3 == 2 else 'jpeg'}" for i in range(count)]
    for i, path in enumerate(paths):
        picture(i).convert("RGB" if i % 2 else "L").save(root / path)
    return dataset_at(root)


def dataset_at(root):
    """The images in a folder as a data set, its files untouched."""
    manifest = pd.DataFrame({"path": sorted(path.name for path in root.iterdir())})
    return datasets.Dataset("tiny", root, manifest, ("a",), pd.DataFrame(), True, "argument")


@pytest.fixture
def dataset(tmp_path):
    return make(tmp_path / "images")


def build(dataset, tmp_path, **options):
    options = {"size": 24, "progress": False} | options
    return cache.build(dataset, root=tmp_path / "cache", **options)


def plain(path, size=(24, 24)):
    """The reference: what Pillow makes of the file, without draft decoding."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize(size, Image.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize("fit, height", [("squash", 24), ("pad", 20)])
def test_pixels_are_those_of_pillow(dataset, tmp_path, fit, height):
    cached = build(dataset, tmp_path, fit=fit)
    assert isinstance(cached.images, np.memmap) and cached.images.dtype == np.uint8
    assert cached.images.shape == (6, 24, 24) and not cached.images.flags.writeable
    assert cached.truncated == () and cached.shapes.tolist() == [[80, 96]] * 6
    for row, path in enumerate(dataset.manifest["path"]):
        # Draft decoding of JPEG may differ by a few grey levels, never by structure.
        away = np.abs(plain(dataset.root / path, (24, height)) - cached.images[row, :height])
        assert away.max() <= (0 if path.endswith("png") else 6)
        assert (cached.images[row, height:] == 0).all()


def test_batch(dataset, tmp_path):
    cached = build(dataset, tmp_path)
    for rows in ([3, 1], np.array([3, 1]), torch.tensor([3, 1])):
        batch = cached.batch(rows)
        assert batch.shape == (2, 1, 24, 24) and batch.dtype == torch.float32
        assert torch.equal(batch[1, 0], torch.from_numpy(np.array(cached.images[1])).float() / 255)
    assert cached.batch([]).shape == (0, 1, 24, 24)


def test_second_build_reads_nothing_and_pickle_carries_no_pixels(dataset, tmp_path, monkeypatch):
    first = build(dataset, tmp_path)
    monkeypatch.setattr(cache, "_decode_all", lambda *a, **k: pytest.fail("decoded again"))
    second = build(dataset, tmp_path)
    assert second.path == first.path and len(pickle.dumps(second)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(second)).images, first.images)


def test_changed_file_size_fit_and_manifest_give_another_cache(dataset, tmp_path):
    first = build(dataset, tmp_path)
    stats = [(path, os.stat(dataset.root / path)) for path in dataset.manifest["path"]]
    text = "2 24" + "".join(f"\n{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    assert first.key == hashlib.sha256(text.encode()).hexdigest()[:20]  # as it always was
    keys = [build(dataset, tmp_path, **options).key for options in ({"size": 16}, {"fit": "pad"})]
    picture(99).save(dataset.root / "0.jpeg")
    changed = build(dataset, tmp_path)
    assert abs(changed.images[0] - plain(dataset.root / "0.jpeg")).max() <= 6
    turned = replace(dataset, manifest=dataset.manifest.iloc[::-1].reset_index(drop=True))
    assert len({first.key, *keys, changed.key, build(turned, tmp_path).key}) == 5


def test_bad_files_are_listed_together_before_decoding(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_decode_all", lambda *a, **k: pytest.fail("decoded first"))
    (dataset.root / "1.jpeg").write_bytes(b"")
    (dataset.root / "4.jpeg").write_text("not an image")
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(dataset.root / "2.png")
    for problem in (r"1.jpeg: empty", "2.png: more than 8 bits", "4.jpeg: not an image"):
        with pytest.raises(BadData, match=rf"3 unusable files:(.|\n)*  {problem}") as error:
            build(dataset, tmp_path)
    assert error.value.problems["path"].tolist() == ["1.jpeg", "2.png", "4.jpeg"]
    (dataset.root / "0.jpeg").unlink()
    with pytest.raises(BadData, match="0.jpeg: cannot be read"):
        build(dataset, tmp_path)


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("name", ["3.jpeg", "5.png"])
def test_truncated_but_decodable_is_used_and_counted(dataset, tmp_path, caplog, name):
    before = plain(dataset.root / name)
    cut(dataset.root / name, 0.93)
    cached = build(dataset, tmp_path)
    assert cached.truncated == (name,) and "1 truncated images are used" in caplog.text
    assert abs(cached.images[int(name[0]), :15] - before[:15]).max() <= 6
    assert build(dataset, tmp_path).truncated == (name,)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_truncated_beyond_use_is_refused_and_leaves_no_cache(dataset, tmp_path):
    cut(dataset.root / "1.jpeg", 0.5)
    cut(dataset.root / "3.jpeg", 0.6)
    both = r"2 unusable(.|\n)*1.jpeg: truncated(.|\n)*3.jpeg: truncated"
    with pytest.raises(BadData, match=both):
        build(dataset, tmp_path)
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert left <= {"lock"}


@pytest.mark.parametrize("fit", ["squash", "pad"])
@pytest.mark.parametrize("size", [(200, 80), (80, 200), (101, 100), (300, 7)])
def test_scale_finds_a_mark_again(tmp_path, fit, size):
    (tmp_path / "images").mkdir()
    width, height = size
    x1, y1, x2, y2 = width // 2, height // 3, width - 1, height  # a bright box on black
    image = np.zeros((height, width), np.uint8)
    image[y1:y2, x1:x2] = 255
    Image.fromarray(image).save(tmp_path / "images" / "0.png")
    cached = build(dataset_at(tmp_path / "images"), tmp_path, size=64, fit=fit)
    (sx, sy), pixels = cached.scale([0])[0], cached.images[0] > 127
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert found == pytest.approx([x1 * sx, y1 * sy, x2 * sx, y2 * sy], abs=1)
    assert fit == "pad" or (sx, sy) == (64 / width, 64 / height)
    assert cached.scale([]).shape == (0, 2)


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_images_stored_on_their_side_are_turned_upright(dataset, tmp_path, fit):
    upright, exif = picture(5, size=(96, 64)), Image.Exif()
    exif[0x0112] = 8
    turned = upright.transpose(Image.Transpose.ROTATE_270)
    turned.save(dataset.root / "0.jpeg", exif=exif, quality=95)
    upright.save(dataset.root / "1.jpeg", quality=95)
    cached = build(dataset, tmp_path, size=48, fit=fit)
    assert cached.shapes[:2].tolist() == [[64, 96]] * 2
    assert np.abs(cached.images[0].astype(int) - cached.images[1]).max() <= 6


@pytest.mark.parametrize("lost", ["meta.json", "shapes.npy"])
def test_a_killed_build_is_not_taken_for_complete(dataset, tmp_path, lost):
    cached = build(dataset, tmp_path)
    expected = np.array(cached.images)
    (cached.path / lost).unlink()
    (cached.path / ".images.1.tmp.npy").touch()
    np.save(cached.path / "images.npy", np.zeros_like(expected))
    assert np.array_equal(build(dataset, tmp_path).images, expected)
    left = {path.name for path in cached.path.iterdir()} - {"lock"}
    assert left == {"images.npy", "meta.json", "shapes.npy"}


# --- files that Pillow would read wrongly, or not at all


def chunk(kind, content, crc=0):
    """A chunk of a PNG; with `crc` its check sum is wrong."""
    sums = struct.pack(">I", zlib.crc32(kind + content) ^ crc)
    return struct.pack(">I", len(content)) + kind + content + sums


def png(pixels, *extra, colour=0, side=None, crc=0):
    """A PNG of the bytes as they are: Pillow writes neither 16-bit colour nor damaged files."""
    height, width = side or pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels)
    content = chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(rows), crc)
    return b"".join((b"\x89PNG\r\n\x1a\n", *content, chunk(b"IEND", b"")))


def saved(kind, image=None, **options):
    buffer = io.BytesIO()
    (image or picture(3)).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(value):
    """The EXIF block of a JPEG whose orientation is `value`: a number, or a text."""
    number = isinstance(value, int)
    held = struct.pack("<HHIHH", 0x0112, 3, 1, value, 0) if number else b"\x12\x01\2\0\4\0\0\0abc\0"
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + held + b"\0\0\0\0"


GREY = np.arange(80 * 96, dtype=np.uint8).reshape(80, 96)
DEEP = np.linspace(0, 4095, 80 * 96).astype(np.uint16).reshape(80, 96)  # 12 bits in 16
UNPACKS = zlib.compress(bytes(3_000_000))
TURNED = {"tiffinfo": {274: 6}}
BAD_HEADERS = {  # what is found before anything is decoded: content and problem
    "colour16": (png(np.stack([DEEP] * 3, -1), colour=2), "more than 8 bits"),
    "greyalpha16": (png(np.stack([DEEP] * 2, -1), colour=4), "more than 8 bits"),
    "alpha16": (png(np.stack([DEEP] * 4, -1), colour=6), "more than 8 bits"),
    "grey16": (png(DEEP), "more than 8 bits"),
    "tiff16": (cv2.imencode(".tif", np.stack([DEEP] * 3, -1))[1].tobytes(), "more than 8 bits"),
    "float": (saved("TIFF", picture(1).convert("F")), "more than 8 bits"),
    "bomb": (png(GREY, side=(60_000, 60_000)), "its size is more than 100 million"),
    "large": (png(GREY, side=(10_001, 10_000)), "10000 x 10001 is more than 100 million pixels"),
    "text": (png(GREY, chunk(b"zTXt", b"a\0\0" + UNPACKS)), "holds a text or colour profile"),
    "profile": (png(GREY, chunk(b"iCCP", b"a\0\0" + UNPACKS)), "holds a text or colour profile"),
    "header": (png(GREY, chunk(b"tEXt", b"a\0b", crc=1)), "damaged: copy it again"),
    "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image (BMP, GIF,"),
    "frames": (saved("GIF", save_all=True, append_images=[picture(4)]), "holds 2 images"),
    "pages": (saved("TIFF", save_all=True, append_images=[picture(4)]), "holds 2 images"),
    "side": (saved("TIFF", **TURNED), "lies on its side (orientation 6)"),
    "empty": (b"", "empty file (0 bytes)"),
}
BAD_PIXELS = {
    "sum": (png(GREY, crc=1), "damaged: copy it again"),
    "flipped": (png(GREY)[:-40] + b"?" + png(GREY)[-39:], "damaged: copy it again"),
    "half": (saved("JPEG")[: len(saved("JPEG")) // 2], "truncated"),
    "broken": (saved("TIFF", compression="tiff_lzw").replace(b"a", b"?"), "cannot be decoded"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unusable_files_are_all_named_with_what_is_wrong(tmp_path, capsys):
    root = tmp_path / "mine"
    root.mkdir()
    make(root / "normal")
    make(root / "flu")
    for name, (content, _) in (BAD_HEADERS | BAD_PIXELS).items():
        (root / "flu" / f"{name}.png").write_bytes(content)
    dataset = datasets.from_folder(root)
    found = dict(datasets.check(dataset).to_numpy())
    assert {Path(path).stem for path in found} == set(BAD_HEADERS)
    assert shapes_of(root, found) == [None] * len(found)
    assert cli.main(["data", "check", str(root)]) == 1
    printed = capsys.readouterr().out
    assert f"{len(BAD_HEADERS | BAD_PIXELS)} unusable files" in printed
    for name, (_, problem) in (BAD_HEADERS | BAD_PIXELS).items():
        assert f"flu/{name}.png: {problem}" in printed


@pytest.mark.parametrize("value, shape", [("text", (80, 96)), (6, (96, 80)), (9, (80, 96))])
def test_odd_exif_is_no_obstacle(tmp_path, value, shape):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpeg").write_bytes(saved("JPEG", exif=exif(value)))
    cached = build(dataset_at(tmp_path / "images"), tmp_path)
    assert tuple(cached.shapes[0]) == shape and cached.truncated == ()


def test_images_of_one_grey_value_are_named(dataset, tmp_path, caplog):
    Image.new("L", (96, 80), 255).save(dataset.root / "2.png")
    for _ in range(2):  # when decoded, and when opened again
        assert build(dataset, tmp_path, fit="pad").flat == ("2.png",)
        assert "1 images are used that show one grey value only: look at 2.png" in caplog.text
        caplog.clear()


def claims(monkeypatch, error):
    """A disk that answers so; on a full one a write to a mapped file kills the process."""

    def answer(*_):
        raise error

    monkeypatch.setattr(os, "posix_fallocate", answer, raising=False)


def test_a_full_disk_is_told_in_words_before_anything_is_decoded(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_opened", lambda *a, **k: pytest.fail("decoded first"))
    claims(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="(?i)no space left.*cache/images/tiny-24-") as error:
        build(dataset, tmp_path)
    told = f"{error.value} {error.value.__cause__}"
    assert "the decoded images need 3,456 bytes there; make room" in told and "DLIA_CACHE" in told
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {"lock"}


@pytest.mark.parametrize("error", [AttributeError(), OSError(95, "not supported")])
def test_room_is_filled_where_it_cannot_be_claimed(dataset, tmp_path, monkeypatch, error):
    claims(monkeypatch, error)
    monkeypatch.setattr(cache, "_fitted", lambda *_: (np.zeros((24, 24), np.uint8), False))
    assert os.stat(build(dataset, tmp_path).path / "images.npy").st_blocks * 512 >= 6 * 24**2


EXACT = {"L": ("PNG", "BMP", "TIFF"), "1": ("PNG", "BMP", "TIFF"), "RGB": ("PNG", "BMP", "WEBP")}
EXACT |= {"P": ("PNG", "GIF", "TIFF"), "LA": ("PNG", "TIFF"), "RGBA": ("PNG", "WEBP")}
EXACT |= {"CMYK": ("TIFF",), "I;16": ("PNG", "TIFF"), "F": ("TIFF",), "I": ("TIFF",)}


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(st.data())
def test_any_mode_is_read_exactly_or_refused(data):
    mode = data.draw(st.sampled_from(sorted(EXACT)))
    kind, side = data.draw(st.sampled_from(EXACT[mode])), data.draw(st.integers(8, 11))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (side, side, bands), dtype=np.uint8).squeeze()
    if mode in ("1", "P", "F", "I", "I;16"):
        image = Image.fromarray(pixels).convert(mode)
    else:
        image = Image.fromarray(pixels, mode)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "images")
        root.mkdir()
        image.save(root / "0.png", kind, **{"lossless": True} if kind == "WEBP" else {})
        if mode in ("I;16", "F", "I"):
            with pytest.raises(BadData, match="0.png: more than 8 bits"):
                build(dataset_at(root), Path(folder))
        else:
            cached = build(dataset_at(root), Path(folder), size=side)
            weights = np.array([0.299, 0.587, 0.114])
            colour = np.asarray(image.convert("RGB"), float) @ weights
            assert np.abs(cached.images[0] - colour).max() <= 1
            assert cached.shapes.tolist() == [[side, side]]
