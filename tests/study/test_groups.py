"""Which questions of a study are about one slide, and how its tables name the slides."""

import numpy as np
import pytest

from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.questions.finder import FeaturePath
from vllm_wsi.questions.items import multiple_choice
from vllm_wsi.slides import write_features
from vllm_wsi.study.groups import slide_names
from vllm_wsi.study.study import Study


def asked(path):
    return multiple_choice("row 1", FeaturePath(path), "Which?", {"A": "x", "B": "y"}, "A")


def made(root, *names: str):
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def names_of(*paths) -> list[str]:
    return slide_names({"all": [asked(path) for path in paths]})["all"]


def test_files_of_one_name_in_two_folders_are_two_slides_and_named_by_their_folders(tmp_path):
    paths = made(tmp_path, "a/1.h5", "b/1.h5", "a/2.h5", "a/deep/1.h5", "b/deep/1.h5")
    wanted = ["tmp/a/1.h5", "tmp/b/1.h5", "2.h5", "a/deep/1.h5", "b/deep/1.h5"]
    found = names_of(*paths)
    assert [name.replace(tmp_path.name, "tmp") for name in found] == wanted
    assert names_of(*paths[:3]) == ["a/1.h5", "b/1.h5", "2.h5"]


def test_one_file_is_one_slide_however_it_is_reached(tmp_path, monkeypatch):
    first, other = made(tmp_path, "a/1.h5", "b/1.h5")
    (tmp_path / "link.h5").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    relative = first.relative_to(tmp_path)
    found = names_of(first, relative, tmp_path / "b/../a/1.h5", tmp_path / "link.h5", other)
    assert found == ["a/1.h5"] * 4 + ["b/1.h5"]


def test_a_slide_is_called_as_it_was_asked_for_and_not_as_the_file_behind_a_link(tmp_path):
    (blob,) = made(tmp_path, "blobs/0f3a")
    (tmp_path / "1.h5").symlink_to(blob)
    assert names_of(tmp_path / "1.h5") == ["1.h5"]


def test_names_tell_slides_of_all_groups_apart(tmp_path):
    first, other = made(tmp_path, "a/1.h5", "b/1.h5")
    found = slide_names({"short": [asked(first), asked(first)], "long": [asked(other)]})
    assert found == {"short": ["a/1.h5", "a/1.h5"], "long": ["b/1.h5"]}


def test_slides_in_memory_have_their_names(tmp_path):
    items = HaystackWorld().items("test", 3, 64)
    assert slide_names({"64": [*items, items[0]]})["64"] == [item.slides[0].name for item in [*items, items[0]]]


@pytest.mark.slow
def test_intervals_do_not_know_whether_slides_share_a_base_name(tmp_path):
    """Three slides with three questions each: the same files under names of their own, then under one name."""
    options = {"A": "tumour", "B": "stroma", "C": "necrosis", "D": "fat"}
    rows = {}
    for kind, places in (("own", ("1", "2", "3")), ("one", ("a/1", "b/1", "c/1"))):
        items = []
        for number, place in enumerate(places):
            path = tmp_path / kind / f"{place}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_features(path, HaystackWorld().slide("test", number, 64).features().astype(np.float32))
            items += [multiple_choice("row", FeaturePath(path), "Which?", options, letter) for letter in "ABC"]
        rows[kind] = Study(str(DEMO_CHECKPOINT), {"all": items}, tmp_path / "out").k_sweep_rows([4])
    assert rows["one"] == rows["own"]
    (row,) = rows["one"]
    assert row["low"] < row["accuracy"] < row["high"]
