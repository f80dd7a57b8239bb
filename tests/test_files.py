"""Nothing is half-written: a failing writer leaves the old file and no litter."""

import pandas as pd
import pytest

from dlia_utils import files


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    path = files.write_text("old", tmp_path / "deep" / "a.txt")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("power cut")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_csv_and_json_round_trip(tmp_path):
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    assert pd.read_csv(files.write_csv(table, tmp_path / "t.csv")).equals(table)
    assert files.write_json({"b": 1, "a": (1, 2)}, tmp_path / "t.json").read_text().startswith("{")
