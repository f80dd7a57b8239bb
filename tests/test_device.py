"""Device and CPU threads: what is asked for, what is measured; files are whole or not there."""

import pandas as pd
import pytest
import torch

from dlia_utils import device, files


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
