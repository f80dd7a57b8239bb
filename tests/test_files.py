"""Files: a full disk is said in words, whatever library meets it; a damaged file is named."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from harm import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from dlia_utils import files


def arrays(value, path):
    with files.atomic_path(path) as temporary:
        np.savez(temporary, value=value)


def tree(value, path):
    files.write_text(value, path.parent / "source" / "a.txt")
    with full_disk():
        files.copy_tree(path.parent / "source", path)


WRITERS = {
    "a.txt": partial(files.write_text, "x" * 9999),
    "a.json": partial(files.write_json, {"x": "x" * 9999}),
    "a.csv": partial(files.write_csv, pd.DataFrame({"x": range(3000)})),
    "a.pt": partial(files.write_torch, {"x": torch.zeros(3000)}),
    "a.npz": partial(arrays, np.zeros(3000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_with_the_folder_and_the_older_file_stays(tmp_path, name):
    (tmp_path / name).write_text("older")
    with full_disk(), pytest.raises(files.NoSpace) as told:
        WRITERS[name](tmp_path / name)
    assert f"no space left in {tmp_path}" in str(told.value) and "delete" not in str(told.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"], "nothing is left beside"
    WRITERS[name](tmp_path / name)


def test_a_full_disk_is_said_when_a_folder_is_copied(tmp_path):
    with pytest.raises(files.NoSpace, match="no space left in"):
        tree("x" * 9999, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_link_that_leads_back_does_not_stop_a_copy(tmp_path):
    files.write_text("1", tmp_path / "source" / "deep" / "a.txt")
    (tmp_path / "source" / "deep" / "loop").symlink_to(tmp_path / "source")
    (tmp_path / "source" / "b.txt").symlink_to(tmp_path / "source" / "deep" / "a.txt")
    copied = files.copy_tree(tmp_path / "source", tmp_path / "copy")
    found = sorted(path.relative_to(copied).as_posix() for path in copied.rglob("*"))
    assert found == ["b.txt", "deep", "deep/a.txt"] and not (copied / "b.txt").is_symlink()


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_checkpoint_is_read_unchanged_or_refused(tmp_path_factory, place, bit, cut):
    path, content = tmp_path_factory.mktemp("a") / "last.pt", {"x": torch.arange(40.0)}
    files.write_torch(content, path)
    raw = bytearray(path.read_bytes())
    at = int(place * len(raw))
    raw[at] ^= 1 << bit
    path.write_bytes(raw[:at] if cut else raw)
    try:
        assert torch.equal(files.read_torch(path, "copy it again")["x"], content["x"])
    except files.Damaged as error:
        assert str(path) in str(error) and "copy it again" in str(error)


@pytest.mark.parametrize("content", ["", 'a\n"1', "a\n1,2\n1,2,3", "\xff\xfe,1"])
def test_a_damaged_table_is_named_with_the_fix(tmp_path, content):
    path = tmp_path / "results.csv"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(files.Damaged, match="results.csv is damaged.*delete it"):
        files.read_csv(path)


JSON = {"empty": "", "text": "hello", "list": "[1]", "number": "3", "null": "null"}
JSON |= {"deep": "[" * 100_000, "cut": '{"a": ', "other encoding": '{"\xfc": 1}'}


@pytest.mark.parametrize("kind", JSON)
def test_a_damaged_record_is_named_with_the_fix(tmp_path, kind):
    path = tmp_path / "key.json"
    path.write_text(JSON[kind], encoding="latin-1")
    with pytest.raises(files.Damaged, match="key.json is damaged.*delete it"):
        files.read_json(path)
    assert files.read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize("name", ["a b", "\xfcber 100 %", "a?b#c{d}", "'q' \"q\"", "[x]", "b.old"])
def test_odd_names_of_one_part_are_names(name):
    assert files.one_part(name, "RUN_NAME") == name


BAD = ["", " ", ".", "..", "../up", "/abs", "a/b", "a\\b", "a\nb", ".hidden", "x" * 300, 5]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_name_of_one_part_is_refused(name):
    with pytest.raises(ValueError, match="RUN_NAME .* cannot name a folder: no /"):
        files.one_part(name, "RUN_NAME")


def test_two_folders_are_put_aside_in_one_second(tmp_path):
    for content in "ab":
        files.write_text(content, tmp_path / "run" / "a.txt")
        assert files.put_aside(tmp_path / "run").suffix == ".old"
    assert sorted(path.read_text() for path in tmp_path.glob("run.*.old/a.txt")) == ["a", "b"]
