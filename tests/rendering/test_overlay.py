"""`vllm-wsi select --geojson --heatmap --montage`: that row, coordinate and pixel belong together."""

import io
import json
import re

import h5py
import numpy as np
import pytest
from PIL import Image

from vllm_wsi.cli.app import main
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.rendering.pictures import CELL, COLUMNS, LABEL
from vllm_wsi.slides import open_features, write_features

from ..encoding.slide_images import write_sparse_tiff, write_tiff

TILE = 512
NAMED_ROWS = (139, 375, 462)  # whose tiles lie beside the real features, under their coordinates


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for d in (48, 64, 512):
        init_checkpoint(folder / str(d), TinySettings(feature_dim=d, hidden_size=64, scorer_hidden_size=32))
    return folder


@pytest.fixture(scope="module")
def tiles(shared_data):
    """Pixels of the three real tiles, by their level-0 corner."""
    found = {}
    for path in (shared_data / "features/mopadi_TCGA-AD-6964").glob("Tile_*.jpg"):
        x, y = map(int, re.findall(r"\d+", path.stem))
        found[x, y] = np.asarray(Image.open(path))
    return found


@pytest.fixture(scope="module")
def real(shared_data):
    return shared_data / "features/mopadi_TCGA-AD-6964/features.h5"


def select(capsys, *arguments: object) -> dict:
    status = main(["select", *map(str, arguments)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return json.loads(printed.out)


def error_of(capsys, *arguments: object) -> str:
    assert main(["select", *map(str, arguments)]) == 1
    printed = capsys.readouterr().err
    assert len(printed.strip().splitlines()) == 1
    return printed


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def test_geojson_of_the_real_slide_puts_each_row_where_its_tile_is(checkpoints, real, tiles, tmp_path, capsys):
    record = select(capsys, real, "--checkpoint", checkpoints / "512", "-k", 777, "--geojson", tmp_path / "a.geojson")
    assert record["patch_size"] == {"value": 512.0, "unit": "px", "source": "guess"}
    collection = json.loads((tmp_path / "a.geojson").read_text())
    assert collection["places"]["coord_unit"] == {"value": "px", "source": record["coord_unit_source"]}
    assert record["coord_unit_source"] == "guess"
    assert collection["places"]["origin"]["source"] == "unknown"
    features = collection["features"]
    assert len(features) == 777
    corners = {}
    for feature in features:
        ring = feature["geometry"]["coordinates"][0]
        assert ring[0] == ring[-1]
        assert ring[2] == [ring[0][0] + TILE, ring[0][1] + TILE]
        corners[feature["properties"]["measurements"]["row"]] = tuple(ring[0])
    assert {corners[row] for row in NAMED_ROWS} == tiles.keys()
    scores = {f["properties"]["measurements"]["row"]: f["properties"]["measurements"]["score"] for f in features}
    assert [scores[row] for row in record["indices"]] == record["scores"]
    best = min(features, key=lambda f: f["properties"]["measurements"]["rank"])
    assert best["properties"]["measurements"]["score"] == max(record["scores"])


def test_the_montage_shows_each_rows_own_pixels(checkpoints, real, tiles, tmp_path, capsys):
    """A slide of the real size that was scanned only where the three real tiles lie."""
    with open_features(real) as slide:
        coords = slide.read_coords()
    size = tuple((coords.max(axis=0) + TILE).tolist())
    places = {(x // TILE, y // TILE): pixels for (x, y), pixels in tiles.items()}
    image = write_sparse_tiff(tmp_path / "slide.tiff", size, places, TILE)
    options = ("-k", 777, "--slide", image, "--montage", tmp_path / "m.png")
    refused = error_of(capsys, real, "--checkpoint", checkpoints / "512", *options)
    assert "the unit of the coordinates (px) and the size of a patch (512 px" in refused
    assert not (tmp_path / "m.png").exists()
    options = (*options, "--accept-guess")
    record = select(capsys, real, "--checkpoint", checkpoints / "512", *options)
    montage = picture(tmp_path / "m.png")
    order = np.argsort(-np.array(record["scores"]), kind="stable")
    rank_of_row = {record["indices"][i]: rank for rank, i in enumerate(order.tolist())}
    for row, (x, y) in zip(NAMED_ROWS, coords[list(NAMED_ROWS)].tolist(), strict=True):
        line, column = divmod(rank_of_row[row], COLUMNS)
        top, left = line * (CELL + LABEL) + 1, column * CELL + 1
        cell = montage[top : top + CELL - 2, left : left + CELL - 2]
        wanted = Image.fromarray(tiles[x, y]).resize((CELL - 2, CELL - 2), Image.Resampling.BILINEAR)
        difference = np.abs(cell.astype(int) - np.asarray(wanted).astype(int))
        assert difference[2:-2, 2:-2].max() <= 1  # at the edge the filter reaches into the neighbouring pixels
    # All other patches lie where nothing was scanned.
    assert (montage == 255).all(axis=2).mean() > 0.9


def test_without_the_slide_image_both_pictures_are_drawn_from_the_coordinates(checkpoints, real, tmp_path, capsys):
    options = ("--montage", tmp_path / "m.png", "--heatmap", tmp_path / "h.png")
    record = select(capsys, real, "--checkpoint", checkpoints / "512", *options)
    assert picture(tmp_path / "m.png").shape == (4 * (CELL + LABEL), 8 * CELL, 3)
    heat = picture(tmp_path / "h.png")
    scale = 2048 / (34304 + TILE)
    for x, y in record["coords"]:
        outline = heat[int(y * scale) + 1, int((x + TILE / 2) * scale)].tolist()
        assert outline == [255, 200, 0]


def test_microns_reach_the_slide_by_its_mpp(checkpoints, tmp_path, capsys, caplog):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "stamp.h5", "w") as file:
        file["feats"] = rng.standard_normal((12, 48)).astype(np.float16)
        file["coords"] = np.array([[x * 256.0, y * 256.0] for y in range(3) for x in range(4)])
        file.attrs.update({"unit": "um", "tile_size_um": 256.0, "stamp_version": "2"})
    arguments = (tmp_path / "stamp.h5", "--checkpoint", checkpoints / "48", "--geojson", tmp_path / "a.geojson")
    assert "mpp: found none with coordinates in microns" in error_of(capsys, *arguments)
    assert not (tmp_path / "a.geojson").exists()
    image = write_tiff(tmp_path / "slide.tiff", np.full((1600, 2200, 3), 250, np.uint8), mpp=0.5)
    for options in (("--mpp", "0.5"), ("--slide", image)):
        select(capsys, *arguments, *options)
        features = json.loads((tmp_path / "a.geojson").read_text())["features"]
        rings = [f["geometry"]["coordinates"][0] for f in features]
        wanted = [[x * 512, y * 512] for y in range(3) for x in range(4)]
        assert np.allclose([ring[0] for ring in rings], wanted)
        assert np.allclose([ring[2] for ring in rings], np.array(wanted) + 512)
    with h5py.File(tmp_path / "stamp.h5", "a") as file:
        file.attrs["mpp"] = 0.25
    with caplog.at_level("WARNING", logger="vllm_wsi"):
        select(capsys, *arguments, "--mpp", "0.5")
    assert "mpp: found 0.25 in the file, but 0.5 was given, which is taken" in caplog.text


def test_what_cannot_be_placed_is_said_in_one_sentence(checkpoints, tmp_path, capsys):
    features = np.random.default_rng(0).standard_normal((40, 48)).astype(np.float32)
    write_features(tmp_path / "bare.safetensors", features)
    arguments = ("--checkpoint", checkpoints / "48", "--geojson", tmp_path / "a.geojson")
    assert "coords: found none" in error_of(capsys, tmp_path / "bare.safetensors", *arguments)
    column = np.stack([np.zeros(40), np.arange(40) * 7], axis=1)
    write_features(tmp_path / "column.safetensors", features, column)
    assert "patch_size_level0: found none" in error_of(capsys, tmp_path / "column.safetensors", *arguments)
    select(capsys, tmp_path / "column.safetensors", *arguments, "--patch-size-level0", 7)
    ring = json.loads((tmp_path / "a.geojson").read_text())["features"][0]["geometry"]["coordinates"][0]
    assert ring[2] == [7, ring[0][1] + 7]


def test_another_slides_image_is_refused(checkpoints, real, shared_data, tmp_path, capsys):
    image = shared_data / "slides/CMU-1-Small-Region.svs"
    arguments = (real, "--checkpoint", checkpoints / "512", "--slide", image, "--montage", tmp_path / "m.png")
    arguments += ("--coord-unit", "px", "--patch-size-level0", 512)
    assert "found 2220 x 2967 px, wanted more, as" in error_of(capsys, *arguments)
    assert not (tmp_path / "m.png").exists()


def test_an_image_of_another_size_than_the_file_says_is_refused(checkpoints, shared_data, tmp_path, capsys):
    """Its patches would all fit on a larger image: a copy at twice the magnification, say."""
    x = np.random.default_rng(0).standard_normal((4, 48)).astype(np.float32)
    corners = np.array([[0, 0], [256, 0], [0, 256], [256, 256]])
    said = {"patch_size_level0": "256", "width": "1000", "height": "1000"}
    write_features(tmp_path / "a.safetensors", x, corners, said)
    image = shared_data / "slides/CMU-1-Small-Region.svs"
    arguments = (tmp_path / "a.safetensors", "--checkpoint", checkpoints / "48", "--slide", image)
    for option, name in (("--heatmap", "h.png"), ("--montage", "m.png"), ("--geojson", "g.geojson")):
        refused = error_of(capsys, *arguments, option, tmp_path / name)
        assert "CMU-1-Small-Region.svs: found 2220 x 2967 px, wanted 1000 x 1000, as" in refused
        assert not (tmp_path / name).exists()
    with h5py.File(tmp_path / "trident.h5", "w") as file:
        file["features"], file["coords"] = x, corners
        file["coords"].attrs.update({"patch_size_level0": 256, "level0_width": 2220, "level0_height": 2967})
    arguments = (tmp_path / "trident.h5", *arguments[1:])
    assert select(capsys, *arguments, "--montage", tmp_path / "m.png")["num_selected"] == 4


def test_what_encode_made_is_drawn_upon_its_own_image_and_upon_no_other(checkpoints, shared_data, tmp_path, capsys):
    image, other = (shared_data / "slides" / name for name in ("CMU-1-Small-Region.svs", "boxes.tiff"))
    assert main(["encode", str(image), "--encoder", "colour-texture", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    features, heat = tmp_path / f"{image.stem}.safetensors", tmp_path / "h.png"
    arguments = (features, "--checkpoint", checkpoints / "64", "--heatmap", heat, "--slide")
    assert "boxes.tiff: found 300 x 250 px, wanted 2220 x 2967, as" in error_of(capsys, *arguments, other)
    assert not heat.exists()
    select(capsys, *arguments, image)
    assert picture(heat).shape == (2048, 1532, 3)


def test_an_image_on_which_a_patch_that_was_not_kept_does_not_lie_is_refused(checkpoints, tmp_path, capsys):
    x = np.random.default_rng(0).standard_normal((4, 48)).astype(np.float32)
    corners = np.array([[0, 0], [512, 0], [0, 512], [512, 512]])
    write_features(tmp_path / "a.safetensors", x, corners, {"patch_size_level0": "512"})
    arguments = (tmp_path / "a.safetensors", "--checkpoint", checkpoints / "48", "-k", 1)
    row = select(capsys, *arguments)["indices"][0]
    corners[:] = 0
    corners[(row + 1) % 4] = 1024, 0
    write_features(tmp_path / "a.safetensors", x, corners, {"patch_size_level0": "512"})
    image = write_tiff(tmp_path / "a.tiff", np.full((768, 1024, 3), 250, np.uint8))
    options = ("--slide", image, "--heatmap", tmp_path / "h.png")
    assert "a.tiff: found 1024 x 768 px, wanted more, as" in error_of(capsys, *arguments, *options)
    write_features(tmp_path / "a.safetensors", x, corners - [1, 0] * (corners > 0), {"patch_size_level0": "512"})
    select(capsys, *arguments, *options)  # it begins on the image: CLAM pads the last patches


def test_the_heat_map_lies_upon_the_slides_own_thumbnail(checkpoints, tmp_path, capsys):
    x = np.random.default_rng(0).standard_normal((4, 48)).astype(np.float32)
    corners = np.array([[0, 0], [256, 0], [0, 256], [256, 256]])
    write_features(tmp_path / "a.safetensors", x, corners, {"patch_size_level0": "256"})
    image = write_tiff(tmp_path / "a.tiff", np.full((768, 1024, 3), (10, 200, 30), np.uint8))
    options = ("--checkpoint", checkpoints / "48", "-k", 1, "--slide", image, "--heatmap", tmp_path / "h.png")
    record = select(capsys, tmp_path / "a.safetensors", *options)
    heat = picture(tmp_path / "h.png")
    assert heat.shape == (1536, 2048, 3)
    assert (heat[:, 1030:] == (10, 200, 30)).all()  # beside the patches the slide is seen as it is
    assert (heat[1030:] == (10, 200, 30)).all()
    assert not (heat[100, 100] == (10, 200, 30)).all()
    left, top = (corners[record["indices"][0]] * 2).tolist()
    assert heat[top + 1, left + 100].tolist() == [255, 200, 0]


def test_what_the_user_says_fills_what_the_file_does_not_and_is_never_set_against_it(checkpoints, tmp_path, capsys):
    x = np.random.default_rng(0).standard_normal((4, 48)).astype(np.float32)
    corners = np.array([[0, 0], [256, 0], [0, 256], [256, 256]])
    write_features(tmp_path / "said.safetensors", x, corners, {"patch_size_level0": "256"})
    with h5py.File(tmp_path / "unsaid.h5", "w") as file:
        file["feats"], file["coords"] = x, corners
    image = write_tiff(tmp_path / "a.tiff", np.full((1024, 1024, 3), 250, np.uint8))
    pictures = ("--slide", image, "--heatmap", tmp_path / "h.png", "--geojson", tmp_path / "a.geojson")
    said = (tmp_path / "said.safetensors", "--checkpoint", checkpoints / "48", *pictures)
    assert select(capsys, *said)["patch_size"] == {"value": 256.0, "unit": "px", "source": "file"}
    assert select(capsys, *said, "--patch-size-level0", 257)["patch_size"]["source"] == "given"  # rounded elsewhere
    assert "found 256 px in the file, but 512 was given" in error_of(capsys, *said, "--patch-size-level0", 512)
    assert "coordinates in px by the file, but um was given" in error_of(capsys, *said, "--coord-unit", "um")
    unsaid = (tmp_path / "unsaid.h5", "--checkpoint", checkpoints / "48", *pictures)
    assert "the unit of the coordinates (px) and the size of a patch" in error_of(capsys, *unsaid)
    assert "about the size of a patch" in error_of(capsys, *unsaid, "--coord-unit", "px")
    record = select(capsys, *unsaid, "--coord-unit", "um", "--mpp", 0.5, "--patch-size-level0", 512)
    assert (record["coord_unit"], record["coord_unit_source"]) == ("um", "given")
    assert record["patch_size"] == {"value": 512.0, "unit": "px", "source": "given"}
    rings = [f["geometry"]["coordinates"][0] for f in json.loads((tmp_path / "a.geojson").read_text())["features"]]
    assert sorted(ring[0] for ring in rings) == [[0, 0], [0, 512], [512, 0], [512, 512]]


@pytest.mark.parametrize("converted", [False, True])
def test_a_unit_that_corrects_a_guess_places_the_files_own_numbers(converted, checkpoints, tmp_path, capsys):
    """Patches of 224 level-0 pixels look like STAMP's first format, whose numbers are 256 / 224 microns each."""
    grid = np.stack(np.meshgrid(np.arange(10), np.arange(10)), axis=-1).reshape(-1, 2) * 224
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file["feats"] = np.random.default_rng(0).standard_normal((100, 48)).astype(np.float32)
        file["coords"] = grid
    if converted:
        assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 0
        capsys.readouterr()
        path = tmp_path / "out" / "m.safetensors"
    image = write_tiff(tmp_path / "m.tiff", np.full((2240, 2240, 3), 250, np.uint8))
    arguments = (path, "--checkpoint", checkpoints / "48", "-k", 100, "--geojson", tmp_path / "m.geojson", "--mpp", 0.5)
    upon = ("--slide", image, "--montage", tmp_path / "m.png", "--heatmap", tmp_path / "h.png")

    def edges() -> list[tuple[list[float], list[float]]]:
        rings = [f["geometry"]["coordinates"][0] for f in json.loads((tmp_path / "m.geojson").read_text())["features"]]
        return [(ring[0], ring[2]) for ring in rings]

    guessed = select(capsys, *arguments)
    assert (guessed["coord_unit"], guessed["coord_unit_source"]) == ("um", "guess")
    assert guessed["patch_size"] == {"value": 256.0, "unit": "um", "source": "guess"}
    assert np.allclose(edges()[99], ([4608, 4608], [5120, 5120]))
    record = select(capsys, *arguments, *upon, "--coord-unit", "px", "--patch-size-level0", 224)
    assert record["coords"] == grid.tolist()
    assert edges() == [([x, y], [x + 224, y + 224]) for x, y in grid.tolist()]
    record = select(capsys, *arguments, "--coord-unit", "px")
    assert record["patch_size"] == {"value": 224.0, "unit": "px", "source": "guess"}
    assert edges()[99] == ([2016, 2016], [2240, 2240])
    assert "about the size of a patch (224 px" in error_of(capsys, *arguments, *upon, "--coord-unit", "px")
    record = select(capsys, *arguments, "--coord-unit", "um")
    assert record["coords"] == grid.tolist()
    assert edges()[99] == ([4032, 4032], [4480, 4480])


def test_a_slide_with_bounds_is_drawn_whole_and_exported_as_qupath_crops_it(checkpoints, tmp_path, capsys):
    x = np.random.default_rng(0).standard_normal((2, 48)).astype(np.float32)
    said = {
        "patch_size_level0": "256",
        "bounds_x": "1024",
        "bounds_y": "512",
        "bounds_width": "9",
        "bounds_height": "9",
    }
    write_features(tmp_path / "a.safetensors", x, np.array([[1024, 512], [2048, 768]]), said)
    arguments = (tmp_path / "a.safetensors", "--checkpoint", checkpoints / "48", "--geojson", tmp_path / "a.geojson")
    for options, corners in (((), [[0, 0], [1024, 256]]), (("--geojson-origin", "slide"), [[1024, 512], [2048, 768]])):
        record = select(capsys, *arguments, *options)
        assert record["coords"] == [[1024, 512], [2048, 768]]
        collection = json.loads((tmp_path / "a.geojson").read_text())
        assert [f["geometry"]["coordinates"][0][0] for f in collection["features"]] == corners
        assert collection["places"]["origin"]["bounds"] == [1024, 512]
    image = write_tiff(tmp_path / "a.tiff", np.full((4096, 4096, 3), 250, np.uint8))
    assert "found an origin of 1024, 512 in the file and 0, 0 in the slide's image" in error_of(
        capsys, *arguments, "--slide", image
    )
