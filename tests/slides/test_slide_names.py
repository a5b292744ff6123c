"""Which files a folder's slides are, and which image and which features have one name."""

import os
from pathlib import Path

import numpy as np
import pytest
import zarr

from vllm_wsi.errors import SlideError
from vllm_wsi.questions.finder import FeatureFinder, NoFeaturesError
from vllm_wsi.serving.viewer.slide_folder import image_of, list_slides

SLIDECHAT = "0,1,2,patch_name\n0.5,0.5,0.5,0_0.png\n"
NAMED_ALIKE = [
    ("a.h5", "a.svs"),
    ("a.h5", "a.SVS"),
    ("a.h5", "a.ome.tif"),
    ("a.h5", "a.ome.tiff"),
    ("a.h5", "a.ome.btf"),
    ("a.h5", "a.OME.TIF"),
    ("a.ome.h5", "a.ome.tif"),
    ("a.ome.safetensors", "a.ome.tiff"),
    ("a.svs.h5", "a.svs"),
    ("a.b.npz", "a.b.ndpi"),
    ("a.h5ad", "a.mrxs"),
    ("a.parquet", "a.btf"),
]


@pytest.mark.parametrize(("features", "image"), NAMED_ALIKE)
def test_an_image_is_found_from_its_features_and_the_features_from_the_image(features: str, image: str, tmp_path: Path):
    (tmp_path / features).touch()
    (tmp_path / image).touch()
    assert image_of(tmp_path / features, tmp_path) == tmp_path / image
    assert list_slides(tmp_path)["slides"] == [
        {"name": features, "url": (tmp_path / features).as_uri(), "has_image": True}
    ]
    assert FeatureFinder(tmp_path)(image).path == tmp_path / features


def test_a_name_that_no_url_can_hold_is_left_out_of_the_list_and_the_others_are_in_it(tmp_path: Path):
    (tmp_path / "a.h5").touch()
    Path(os.fsdecode(bytes(tmp_path) + b"/\xdcbersicht.h5")).touch()  # Latin-1, from an old share
    assert [slide["name"] for slide in list_slides(tmp_path)["slides"]] == ["a.h5"]


@pytest.mark.parametrize("image", ["b.svs", "a.ome.svs", "a.b.tif", "a", "ome.tif", "a.tif.gz", "aome.tif"])
def test_an_image_of_another_name_is_not_taken(image: str, tmp_path: Path):
    (tmp_path / "a.h5").touch()
    (tmp_path / image).touch()
    assert image_of(tmp_path / "a.h5", tmp_path) is None
    assert list_slides(tmp_path)["slides"][0]["has_image"] is False


def test_several_images_of_one_name_are_named_and_none_is_taken(tmp_path: Path):
    for name in ("a.h5", "a.svs", "a.ome.tif"):
        (tmp_path / name).touch()
    with pytest.raises(
        SlideError, match=r"^a\.h5: found several slide images beside it \(a\.svs, a\.ome\.tif\), wanted"
    ):
        image_of(tmp_path / "a.h5", tmp_path)
    assert list_slides(tmp_path)["slides"][0]["has_image"] is False


def test_one_image_under_two_names_is_one(tmp_path: Path):
    (tmp_path / "a.ome.tif").touch()
    (tmp_path / "a.tif").symlink_to("a.ome.tif")
    assert image_of(tmp_path / "a.h5", tmp_path) == tmp_path / "a.ome.tif"


@pytest.mark.parametrize("name", ["a", "a.ome", "a.ome.tif", "a.ome.h5", "a.h5"])
def test_features_are_found_by_each_name_of_their_slide(name: str, tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.ome.h5").touch()
    assert FeatureFinder(tmp_path)(name).path == tmp_path / "deep" / "a.ome.h5"


def test_features_of_exactly_the_name_go_before_those_of_an_image_of_the_name(tmp_path: Path):
    for name in ("a.h5", "a.ome.h5"):
        (tmp_path / name).touch()
    finder = FeatureFinder(tmp_path)
    assert [finder(name).path.name for name in ("a", "a.ome", "a.ome.tif")] == ["a.h5", "a.ome.h5", "a.ome.h5"]


def test_two_features_of_one_name_are_named(tmp_path: Path):
    for name in ("a.h5", "a.npz"):
        (tmp_path / name).touch()
    with pytest.raises(SlideError, match=r"found several files of slide 'a' \(a\.h5, a\.npz\), wanted one"):
        FeatureFinder(tmp_path)("a")


def test_a_folder_that_is_there_is_the_only_one_that_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("centreA/1.h5", "centreA/3.h5", "centreB/2.h5", "centreB/3.h5", "4.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    finder = FeatureFinder(tmp_path)
    for name in ("centreB/1", "centreB/1.svs", "centreB/1.h5", "./centreB/1", "centreA/../centreB/1", "centreB/4"):
        with pytest.raises(NoFeaturesError, match=f"found no features of slide '{name}' in that folder of "):
            finder(name)
    found = {name: str(finder(name).path.relative_to(tmp_path)) for name in ("centreA/1.svs", "centreB/3", "1", "4")}
    assert found == {"centreA/1.svs": "centreA/1.h5", "centreB/3": "centreB/3.h5", "1": "centreA/1.h5", "4": "4.h5"}
    for foreign in ("SlideChat/train/1.csv", "/somewhere/else/1.svs", "../features/1", str(tmp_path.parent / "1")):
        assert finder(foreign).path == tmp_path / "centreA/1.h5"
    for name in ("centreA/5.ome.h5", "centreB/5.h5"):
        (tmp_path / name).touch()
    assert FeatureFinder(tmp_path)("centreB/5.ome.tif").path == tmp_path / "centreB/5.h5"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoFeaturesError, match="in that folder"):
        FeatureFinder(Path("."))("centreB/1")
    roundabout = tmp_path / "centreA/.."
    assert FeatureFinder(roundabout)("centreB/2.svs").path == roundabout / "centreB/2.h5"


def test_tables_and_indices_beside_features_are_no_slides(tmp_path: Path):
    written = {
        "encode_summary.csv": "slide,status,patches\n", "labels.csv": "0,1\n1,2\n", "empty.csv": "",
        "a.index.npz": "", "notes.txt": "", "bags_config.json": "{}", "a.csv": SLIDECHAT, "B.CSV": SLIDECHAT,
        "bom.csv": "\ufeff" + SLIDECHAT, "quoted.csv": '"0","1","2","patch_name"\n',
    }  # fmt: skip
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    os.mkfifo(tmp_path / "pipe.csv")
    names = ["B.CSV", "a.csv", "bom.csv", "quoted.csv"]
    assert [slide["name"] for slide in list_slides(tmp_path)["slides"]] == names
    with pytest.raises(NoFeaturesError):
        FeatureFinder(tmp_path)("encode_summary")


def test_a_zarr_store_is_one_slide_whose_insides_are_not_listed(tmp_path: Path):
    zarr.save_group(tmp_path / "a.zarr", features=np.ones((3, 4), "f4"))
    np.save(tmp_path / "a.zarr" / "inside.npy", np.ones((3, 4), "f4"))
    (tmp_path / "a.svs").touch()
    (tmp_path / "no-store.zarr").mkdir()
    np.save(tmp_path / "no-store.zarr" / "b.npy", np.ones((3, 4), "f4"))
    found = {slide["name"]: slide["has_image"] for slide in list_slides(tmp_path)["slides"]}
    assert found == {"a.zarr": True, "no-store.zarr/b.npy": False}
    finder = FeatureFinder(tmp_path)
    assert [finder(name).path.name for name in ("a", "a.zarr", "a.svs", "b")] == ["a.zarr"] * 3 + ["b.npy"]
