"""Device and CPU threads: what is asked for, what is measured; files are whole or not there."""

import ctypes
import platform
from functools import partial

import pandas as pd
import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dlia_utils import device, files, objectives, train
from dlia_utils.attacks import evaluate
from dlia_utils.explain import attribution, drift


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """An answer of its own for each test, and the threads as they were."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.choose_threads.cache_clear()
    yield
    device.choose_threads.cache_clear()
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "asked", "gpu", "note"),
    [(2, "2", False, "OMP_NUM_THREADS=2"), (1, "", False, "1 CPU thread"), (2, "", True, "")],
)
def test_where_the_number_is_settled_nothing_is_measured(threads, asked, gpu, note, monkeypatch):
    monkeypatch.setattr(device, "slowdown", lambda _: pytest.fail("measured"))
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    torch.set_num_threads(threads)
    assert device.choose_threads() == (threads, note) and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("ratio", "number", "note"),
    [
        (0.7, 2, "2 CPU threads (1.4 times as fast as one)"),
        (3.2, 1, "1 of 2 CPU threads: 2 would be 3.2 times as slow on this busy machine"),
    ],
)
def test_all_threads_are_kept_where_they_are_faster(ratio, number, note, monkeypatch):
    calls = []
    monkeypatch.setattr(device, "slowdown", lambda most: calls.append(most) or ratio)
    torch.set_num_threads(2)
    assert device.choose_threads() == device.choose_threads() == (number, note)
    assert torch.get_num_threads() == number and calls == [2], "measured once a process"


@pytest.mark.parametrize(
    ("free", "each", "images"), [(16e9, 50e6, 128), (1e9, 6e8, 1), (140e9, 1e6, device.MOST)]
)
def test_attacks_take_what_half_of_a_gpus_memory_holds(free, each, images, monkeypatch):
    model, x = nn.Linear(2, 2), torch.rand(9, 1, 1, 2)
    assert device.fitting_batch(model, x) == device.MODEST
    monkeypatch.setattr(device, "device_of", lambda model, images: torch.device("cuda"))
    monkeypatch.setattr(device, "step_bytes", lambda model, images, gpu: each)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (int(free), int(2 * free)))
    assert device.fitting_batch(model, x) == images


def test_products_are_in_tf32_for_the_duration_on_a_gpu_alone():
    before = torch.get_float32_matmul_precision()
    for kind, within in (("cpu", before), ("cuda", "high")):
        with pytest.raises(KeyError), device.tf32(torch.device(kind)):
            assert torch.get_float32_matmul_precision() == within
            raise KeyError
        assert torch.get_float32_matmul_precision() == before


def test_measuring_leaves_random_numbers_and_threads_as_they_were(monkeypatch):
    monkeypatch.setattr(device, "SECONDS", 0.01)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    with torch.no_grad():  # whoever calls it may have switched gradients off
        assert device.slowdown(2) > 0 and not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == 2


def test_flags_come_back_and_a_model_without_weights_lies_where_its_images_do():
    images = torch.zeros(1, device="meta")
    assert device.device_of(torch.nn.BatchNorm2d(1, affine=False), images).type == "cpu"
    assert device.device_of(torch.nn.Identity(), images).type == "meta"
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm2d(1).eval())
    with pytest.raises(KeyError), device.evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training and not model[1].training


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = files.write_text("old", tmp_path / "deep" / "a.txt")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("power cut")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


KEPT = [["007", "7"], [2**53 + 1, 3], [0.5, 1e300], [2**60 + 1, None], [0.1, None], ["x", "y"]]


@pytest.mark.parametrize("cells", KEPT, ids=str)
def test_a_table_comes_back_to_the_last_digit(cells, tmp_path):
    table = pd.DataFrame({"id": pd.Series(cells, dtype=object), "value": [0.1, 2]})
    back = files.read_csv(files.write_csv(table, tmp_path / "t.csv"))
    assert back["value"].tolist() == [0.1, 2] and back["value"].dtype == float
    told = [None if pd.isna(one) else type(cells[0])(one) for one in back["id"]]
    assert told == cells and (back["id"].dtype == float) == (cells[0] in (0.5, 0.1))


# ------------------------------------------------------------------------------- memory goes back


def resident():
    return psutil.Process().memory_info().rss / 2**20


def test_memory_between_blocks_in_use_goes_back_where_glibc_would_keep_it():
    blocks = [b"x" * size for size in [100_000] * 2_000]  # 200 MB
    few, full = blocks[::100], resident()
    del blocks
    kept = resident()
    device.release_memory(at_once=True)
    released = resident()
    if "glibc" in platform.libc_ver():
        assert full - kept < 20 and kept - released > 100 and len(few) == 20


def test_memory_is_not_given_back_again_at_once(monkeypatch):
    trimmed = []
    monkeypatch.setattr(device, "malloc_trim", lambda: trimmed.append)
    monkeypatch.setattr(device, "released", [-99.0])
    for now in (0.0, 3.0, 11.0, 12.0, 30.0):
        monkeypatch.setattr(device.time, "monotonic", lambda now=now: now)
        device.release_memory()
    assert trimmed == [0, 0, 0]


def test_elsewhere_nothing_happens(monkeypatch):
    device.malloc_trim.cache_clear()
    for error in (AttributeError, OSError, TypeError):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, error=error: (_ for _ in ()).throw(error))
        device.release_memory(at_once=True)
        device.malloc_trim.cache_clear()


def test_training_attacks_and_maps_give_memory_back(monkeypatch, tmp_path):
    given = []
    for module in (train, evaluate, attribution, drift):
        give = partial(lambda name, at_once=False: given.append((name, at_once)), module.__name__)
        monkeypatch.setattr(module, "release_memory", give)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1] * 2)
    data = TensorDataset(x, y)
    options = {"run_dir": tmp_path, "epochs": 3, "progress": False}
    train.fit(net, objectives.cross_entropy(), data, data, **options)
    evaluate.robust(net, (x, y), [1 / 255], attacks=["fgsm"], progress=False)
    attribution.explain("saliency", net, x)
    drift.measure(net, x, y, range(4), names=["gaussian_noise"], severities=[1])
    names = [name.rpartition(".")[2] for name, _ in given]
    assert names == ["train"] * 3 + ["evaluate", "attribution", "drift"]
    assert [at_once for _, at_once in given] == [False, False, True] + [False] * 3
