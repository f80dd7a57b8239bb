"""Corruptions against known truths: constants, formulas, seeds, severities that get worse."""

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from dlia_utils import corrupt
from dlia_utils.data import phantom

CASES = [(name, scale) for name, one in corrupt.CORRUPTIONS.items() for scale in one.levels]
NAMES = list(corrupt.CORRUPTIONS)
RANDOM = ["gaussian_noise", "speckle_noise", "shot_noise", "poisson_dose"]
PLACED = ["motion_blur", "collimation", "marker", "grid_lines"]


@pytest.fixture(scope="module")
def images():
    """Four phantom chest images [4,1,224,224]."""
    rngs = [np.random.default_rng(i) for i in range(4)]
    made = [phantom.chest(r, size=224, pneumonia=i % 2 == 0)[0] for i, r in enumerate(rngs)]
    return torch.from_numpy(np.stack(made))[:, None]


@pytest.fixture(scope="module")
def colour():
    """Colour images of an odd size, [3,3,37,52]."""
    return torch.rand(3, 3, 37, 52, generator=torch.Generator().manual_seed(0))


def run(name, x, severity, *, ids=None, seed=0, scale="imagenet-c"):
    scale = scale if scale in corrupt.SCALES else "imagenet-c"
    ids = range(len(x)) if ids is None else ids
    return corrupt.apply(name, x, severity, seed=seed, ids=ids, scale=scale)


def psnr(x, y):
    return -10 * (x - y).double().square().mean((1, 2, 3)).log10()


def test_the_register():
    assert set(corrupt.THESIS) <= set(NAMES) and len(NAMES) == 14
    for one in corrupt.CORRUPTIONS.values():
        assert set(one.levels) in ({"own"}, set(corrupt.SCALES))
        assert all(len(five) == len(corrupt.SEVERITIES) for five in one.levels.values())
    assert corrupt.CORRUPTIONS["motion_blur"].parameters(5, "imagenet-c") == (20, 15)
    assert corrupt.CORRUPTIONS["gaussian_noise"].parameters(1, "medmnist-c") == (0.04,)
    assert corrupt.CORRUPTIONS["marker"].parameters(1, "imagenet-c") == (0.05,)


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_each_severity_is_worse(images, name, scale):
    found = [run(name, images, severity, scale=scale) for severity in corrupt.SEVERITIES]
    ratios = torch.stack([psnr(images, worse) for worse in found])
    assert (ratios.diff(dim=0) < 0).all(), ratios  # of every image
    likeness = [ssim(worse, images, data_range=1.0) for worse in (found[0], found[-1])]
    assert likeness[0] < 0.9999 and likeness[-1] < likeness[0]
    assert all(worse.min() >= 0 and worse.max() <= 1 for worse in found)


@pytest.mark.parametrize("name", NAMES)
def test_depends_on_seed_and_id_only(colour, name):
    before, torch_state = colour.clone(), torch.get_rng_state()
    x, ids = colour.repeat(3, 1, 1, 1), [5, 3, 8, 2, 100, 2**40, 7, 1, 0]
    whole = run(name, x, 3, ids=ids)
    order = [7, 0, 5]
    assert torch.equal(run(name, x[order], 3, ids=torch.tensor(ids)[order]), whole[order])
    alone = [run(name, x[i : i + 1], 3, ids=[ids[i]])[0] for i in range(len(x))]
    assert torch.equal(torch.stack(alone), whole)
    assert torch.equal(colour, before) and torch.equal(torch.get_rng_state(), torch_state)
    drawn = name in RANDOM + PLACED
    assert torch.equal(whole[0], whole[3]) != drawn
    assert torch.equal(run(name, x, 3, ids=ids, seed=1), whole) != drawn
    same = run(name, colour, 0)
    assert torch.equal(same, colour) and same.data_ptr() != colour.data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_grey_stays_grey_alone_and_among_colour(images, colour, name):
    grey = images[:2, :, 20:57, 60:112]
    one = run(name, grey, 4, ids=[6, 9])
    three = run(name, grey.expand(-1, 3, -1, -1), 4, ids=[6, 9])
    assert torch.equal(three, one.expand(-1, 3, -1, -1)) and three.is_contiguous()
    mixed = run(name, torch.cat([grey.expand(-1, 3, -1, -1), colour]), 4, ids=[6, 9, 0, 1, 2])
    assert torch.equal(mixed[:2], three)


@pytest.mark.parametrize("name", NAMES)
def test_any_size_and_type(name):
    for shape in ((1, 1, 1), (1, 9, 250), (3, 28, 28)):
        x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
        worst = run(name, x, 5)
        assert worst.shape == x.shape and worst.min() >= 0 and worst.max() <= 1
    x = (torch.arange(256) / 256).reshape(1, 1, 16, 16)  # exact in all of them
    for dtype in (torch.float64, torch.float16):
        found = run(name, x.to(dtype), 2)
        assert found.dtype == dtype and (found.float() - run(name, x, 2)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "fog"}, "no 'fog', .*: gaussian_noise, "),
        ({"ids": [1]}, "ids must be 2 integers"),
        ({"severity": -1}, r"severity must be a whole number in \[0,5\]"),
        ({"severity": 2.5}, "severity"),
        ({"images": torch.full((2, 1, 4, 4), math.nan)}, "before normalisation"),
    ],
)
def test_wrong_input_is_refused(change, message):
    given = {"name": "contrast", "images": torch.zeros(2, 1, 4, 4), "severity": 1}
    with pytest.raises(ValueError, match=message):
        corrupt.apply(**(given | {"seed": 0, "ids": [0, 1]} | change))


def test_noise_has_the_published_size_and_a_severity_scales_it():
    x = torch.full((2, 1, 200, 200), 0.5)
    for severity, sigma in ((1, 0.08), (2, 0.12)):
        assert (run("gaussian_noise", x, severity) - x).std() == pytest.approx(sigma, rel=0.02)
    assert (run("speckle_noise", x, 1) - x).std() == pytest.approx(0.15 * 0.5, rel=0.02)
    shot = run("shot_noise", x, 1) - x
    assert shot.std() == pytest.approx(math.sqrt(0.5 / 60), rel=0.02) and abs(shot.mean()) < 2e-3
    mild, more = (run("gaussian_noise", x, severity, scale="medmnist-c") - x for severity in (1, 5))
    assert torch.allclose(2 * mild, more, atol=1e-6)


def test_dose_is_noisier_where_the_image_is_white():
    x = torch.tensor([0.2, 0.8]).reshape(1, 1, 2, 1).repeat(1, 1, 1, 40_000)
    noise = (run("poisson_dose", x, 1) - x)[0, 0]
    relative = (corrupt.DENSITY * x[0, 0, :, 0]).exp().div(1600).sqrt()  # first order
    assert torch.allclose(noise.std(1), relative / corrupt.DENSITY, rtol=0.05)
    assert noise.mean(1).abs().max() < 2e-3


def test_brightness_against_hsv_and_contrast_keeps_the_mean(colour):
    found = run("brightness", colour, 3)
    for y, x in ((0, 0), (11, 30), (36, 51)):
        h, s, v = colorsys.rgb_to_hsv(*colour[1, :, y, x].tolist())
        expected = colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1))
        assert found[1, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)
    found = run("contrast", colour, 1)
    assert torch.allclose(found.mean((2, 3)), colour.mean((2, 3)), atol=1e-5)
    assert torch.allclose(found.std((2, 3)), 0.4 * colour.std((2, 3)), atol=1e-5)


def test_motion_blur_of_a_point():
    x = torch.zeros(1, 1, 224, 224)
    x[0, 0, 112, 112] = 1
    for severity, (radius, sigma) in ((1, (10, 3)), (5, (20, 15))):
        found = run("motion_blur", x, severity)[0, 0]
        weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
        on = np.sort(found[found > 0].numpy())[::-1]
        assert on == pytest.approx(weights / weights.sum(), abs=1e-6)
        down, right = (np.ptp(part.numpy()) for part in (found > 0).nonzero().T)
        assert math.hypot(down, right) == pytest.approx(2 * radius, abs=1) and right >= down
    assert torch.allclose(run("motion_blur", torch.full_like(x, 0.3), 5), torch.tensor(0.3))


def test_veil_lowers_contrast_and_leaves_a_flat_image(images):
    flat = torch.full((1, 1, 40, 30), 0.4)
    assert torch.allclose(run("scatter_veil", flat, 5), flat, atol=1e-5)
    veiled = run("scatter_veil", images, 3)
    light = [torch.exp(-corrupt.DENSITY * x).mean((1, 2, 3)) for x in (images, veiled)]
    assert torch.allclose(*light, rtol=0.05)
    fine = [x.diff(dim=3).abs().mean() for x in (images, veiled)]
    assert fine[1] < 0.7 * fine[0]


def test_collimation_blackens_borders_and_not_the_middle(images):
    found = run("collimation", images, 5)
    assert torch.equal(found[..., 50:174, 50:174], images[..., 50:174, 50:174])
    for edge in (found[..., 0, :], found[..., -1, :], found[..., 0], found[..., -1]):
        assert edge.max() == 0
    lit = (found > 0).float().mean((1, 2, 3))
    assert ((lit > 0.45) & (lit < 0.75)).all() and len(lit.unique()) == len(lit)


def test_marker_stands_in_an_upper_corner():
    found = run("marker", torch.zeros(20, 1, 120, 200), 4)[:, 0]
    sides = found[:, :, :100].amax((1, 2)) < found[:, :, 100:].amax((1, 2))
    assert set(sides.tolist()) == {True, False}
    for picture, right in zip(found, sides, strict=True):
        rows, columns = (picture > 0.5).nonzero().T
        assert rows.min() > 2 and rows.max() < 40 and picture.max() == 1
        assert columns.min() > 150 if right else columns.max() < 50
        assert np.ptp(rows.numpy()) + 1 == pytest.approx(0.17 * 120, abs=4)


def test_grid_lines_have_one_frequency():
    found = run("grid_lines", torch.full((6, 1, 224, 224), 0.5), 5)[:, 0] - 0.5
    for one in torch.fft.fft2(found).abs():
        down, right = np.unravel_index(one[:112].argmax().item(), (112, 224))
        frequency = math.hypot(min(down, 224 - down), min(right, 224 - right)) / 224
        assert 1 / 6.2 < frequency < 1 / 2.9
    assert found.abs().max() <= 0.0901
    assert torch.allclose(found.std((1, 2)), torch.tensor(0.09 / 2**0.5), atol=2e-3)


def test_resampling_and_bit_depth_and_jpeg_are_pillows(images, colour):
    image = images[0, 0, :220, :200]
    stored = Image.fromarray(image.numpy()).resize((100, 110), Image.Resampling.BOX)
    expected = np.asarray(stored.resize((200, 220), Image.Resampling.NEAREST))
    assert np.abs(run("resampling", image[None, None], 2)[0, 0].numpy() - expected).max() < 1e-5
    assert len(run("bit_depth", images, 5).unique()) == 4
    assert (run("bit_depth", images, 1) - images).abs().max() <= 0.5 / 63 + 1e-6
    file, pixels = io.BytesIO(), colour[0].mul(255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=15)
    found = run("jpeg", colour[:1], 3)[0].permute(1, 2, 0).numpy()
    assert np.allclose(found, np.asarray(Image.open(file)) / 255, atol=1e-6)


class Rows(list):
    """(x, y, row) as `augment.CachedImages` gives them; rows are not positions."""

    def __init__(self, images):
        super().__init__((x, i % 2, 50 - i) for i, x in enumerate(images))

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_train_augmentor_draws_the_thesis_list(images):
    augmentor = corrupt.TrainAugmentor(Rows(images))
    found = [augmentor.choice(row) for row in range(6000)]
    clean = sum(name is None for name, _ in found) / len(found)
    assert clean == pytest.approx(5 / 30, abs=0.015)
    cells = set(found) - {(None, 0)}
    shares = [found.count(cell) / len(found) for cell in cells]
    assert len(cells) == 25 and shares == pytest.approx([1 / 30] * 25, abs=0.01)
    augmentor.set_epoch(1)
    assert [augmentor.choice(row) for row in range(100)] != found[:100]
    assert augmentor.dataset.epoch == 1


def test_train_augmentor_is_fixed_by_seed_epoch_and_row(images):
    data = Rows(images[..., ::8, ::8].repeat(3, 1, 1, 1))
    augmentor = corrupt.TrainAugmentor(data, names=["gaussian_noise"])
    seen = {}
    for epoch, workers in ((0, 0), (1, 0), (0, 2)):
        augmentor.set_epoch(epoch)
        loader = DataLoader(augmentor, batch_size=5, num_workers=workers)
        x, y, rows = (torch.cat(part) for part in zip(*loader, strict=True))
        assert rows.tolist() == [50 - i for i in range(12)] and y.tolist() == [0, 1] * 6
        assert torch.equal(x, seen.setdefault(epoch, x))
    noisy = [[not torch.equal(seen[e][i], data[i][0]) for i in range(12)] for e in (0, 1)]
    both = np.flatnonzero(np.all(noisy, axis=0))
    assert noisy[0] != noisy[1] and len(both)
    assert not any(torch.equal(seen[0][i], seen[1][i]) for i in both)
