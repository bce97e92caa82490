import os
import stat
from pathlib import Path

import numpy as np
import pytest

from npg.runs.files import Table, count_rows, cut_rows, read_columns, read_rows, replacing, write_rows


def test_a_file_is_replaced_as_one(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("end", [OSError, KeyboardInterrupt])
def test_what_is_not_whole_leaves_the_old_file(end: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as partial:
            partial.write_text("ne")
            raise end

    with pytest.raises(end):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_gains_the_columns_that_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table = Table(path)
    assert not path.exists()
    table.append({"step": 1, "loss": 0.5})
    table.append({"loss": 0.25, "step": 2})
    assert path.read_text().splitlines() == ["step,loss", "1,0.5", "2,0.25"]
    again = Table(path)
    again.append({"step": 3})
    again.append({"step": 4, "eval": 7.0})
    again.append({"eval": 8.0, "step": 5, "loss": 0.1})
    assert path.read_text().splitlines() == ["step,loss,eval", "1,0.5,", "2,0.25,", "3,,", "4,,7.0", "5,0.1,8.0"]
    assert read_rows(path)[3] == {"step": "4", "loss": "", "eval": "7.0"}


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assert read_columns(path) == {}
    assert read_rows(path) == []
    write_rows(path, [{"a": 1, "b": 2.5}, {"a": 3, "b": -1}])
    columns = read_columns(path)
    assert list(columns) == ["a", "b"]
    np.testing.assert_array_equal(columns["b"], [2.5, -1.0])
    path.write_text("#{}\n" + path.read_text())
    np.testing.assert_array_equal(read_columns(path, skip=1)["a"], [1.0, 3.0])
    path.write_text("a,b\n")
    assert [len(column) for column in read_columns(path).values()] == [0, 0]


@pytest.mark.parametrize("torn", ["", "3", "3,", "3,4", "3,45.6", '3,"4', "3,4\r"])
def test_an_incomplete_last_row_is_left_out(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(f"a,b\r\n1,2\r\n{torn}".encode())  # a number that was cut is a number
    assert read_rows(path) == [{"a": "1", "b": "2"}]
    np.testing.assert_array_equal(read_columns(path)["a"], [1.0])


def test_a_row_is_not_appended_to_an_incomplete_one(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for content, kept in (("a,b\n1,2\n3", [["1", "2"]]), ("a,b\n1,2\n", [["1", "2"]]), ("a,b\n1,2", []), ("a,", [])):
        path.write_text(content)
        Table(path).append({"a": 4, "b": 5})
        assert [list(row.values()) for row in read_rows(path)] == [*kept, ["4", "5"]]


def test_an_empty_cell_is_not_a_number(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_rows(path, [{"a": 1}, {"a": 2, "b": 3}])
    np.testing.assert_array_equal(read_columns(path)["b"], [np.nan, 3.0])


def test_rows_are_replaced_as_one(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_rows(path, [{"a": 1}, {"a": 2, "b": 3}])
    assert path.read_text().splitlines() == ["a,b", "1,", "2,3"]
    write_rows(path, [{"c": 1}])
    assert path.read_text().splitlines() == ["c", "1"]
    assert list(tmp_path.iterdir()) == [path]


def test_rows_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    cut_rows(path, 3)
    assert not path.exists()
    path.write_text("#{}\na,b\n1,2\n3,4\n5,6\n7")
    assert count_rows(path, skip=1) == 3
    cut_rows(path, 3, skip=1)  # a torn row after them
    assert path.read_text() == "#{}\na,b\n1,2\n3,4\n5,6\n"
    cut_rows(path, 9, skip=1)
    assert count_rows(path, skip=1) == 3
    cut_rows(path, 1, skip=1)
    assert path.read_text() == "#{}\na,b\n1,2\n"
    cut_rows(path, 0, skip=1)
    assert path.read_text() == "#{}\na,b\n"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(stat.S_ISDIR(os.fstat(file).st_mode)), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("name"), replace(*names)))
    with replacing(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert events == [False, "name", True]
