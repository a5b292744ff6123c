"""Files and folders appear under their names whole or not at all."""

import csv

import pytest

from vllm_wsi.files import new_folder, write_csv


def test_a_file_whose_writing_ends_in_an_error_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("old")
    with pytest.raises(ValueError, match="not in fieldnames"):
        write_csv(path, [{"a": 1}, {"b": 2}], ["a"])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_has_the_columns_of_all_rows_in_the_order_of_their_appearance(tmp_path):
    write_csv(tmp_path / "t.csv", [{"a": 1, "b": "x,y"}, {"a": 2, "c": None}])
    assert (tmp_path / "t.csv").read_bytes() == b'a,b,c\n1,"x,y",\n2,,\n'
    write_csv(tmp_path / "t.csv", [], ["a", "b"])
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"]]


def test_a_folder_gets_its_name_when_it_is_whole_and_an_earlier_half_is_not_mixed_in(tmp_path):
    path = tmp_path / "checkpoint"
    half = tmp_path / "checkpoint.partial"  # as a killed process leaves it
    half.mkdir()
    (half / "half").write_text("x")
    with new_folder(path) as folder:
        (folder / "whole").write_text("x")
        (folder / "whole").chmod(0o600)  # as safetensors leaves it
        assert not path.exists()
    assert (path / "whole").stat().st_mode & 0o777 == path.stat().st_mode & 0o666  # a server of another user reads it
    assert [one.name for one in path.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [path]


def test_of_several_processes_one_alone_makes_and_names_the_folder(tmp_path):
    path = tmp_path / "final"
    with new_folder(path, is_main=False) as folder:
        assert not folder.exists()
    assert not path.exists()
    with new_folder(path) as main, new_folder(path, is_main=False) as other:
        assert main == other
        (other / "shard").write_text("x")
    assert (path / "shard").exists()
