"""Tissue of every stain on every glass, by pictures whose tissue is known to the pixel."""

import csv
import io

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from vllm_wsi.cli import main
from vllm_wsi.slides import SlideError, open_features
from vllm_wsi.slides.encode import EncodeSettings
from vllm_wsi.slides.encode_many import Outcome, encode_many, find_jobs, write_summary
from vllm_wsi.slides.glass import clean, find_glass, has_dark_ground, tissue_mask
from vllm_wsi.slides.image import open_image
from vllm_wsi.slides.qc import MASK_COLOUR, PATCH_COLOUR, qc_picture
from vllm_wsi.slides.tissue import find_patches

from .slide_images import tissue_picture, write_ome_tiff, write_tiff

SIDE, PATCH = 1024, 112
GLASS = {"white": (243, 243, 243), "bluish": (226, 230, 243), "yellowish": (243, 238, 218), "grey": (205, 206, 205)}
STAINS = {  # ground of the tissue, and colours of what lies in it, with their share of its pixels
    "H&E": ((225, 165, 205), [((110, 70, 150), 0.2), ((205, 110, 170), 0.3)]),
    "pale H&E": ((236, 214, 230), [((190, 165, 205), 0.1)]),
    "haematoxylin": ((208, 212, 228), [((105, 145, 195), 0.2)]),
    "DAB and haematoxylin": ((206, 214, 228), [((105, 145, 195), 0.15), ((70, 45, 30), 0.05)]),
    "DAB": ((220, 205, 185), [((100, 60, 30), 0.2)]),
    "eosin": ((230, 190, 205), []),
    "trichrome": ((150, 180, 210), [((180, 60, 80), 0.3)]),
    "silver": ((190, 185, 175), [((40, 38, 36), 0.1)]),
}


def stained(stain: str, glass: str, seed: int = 0, share: float = 0.38) -> tuple[np.ndarray, np.ndarray]:
    """(RGB, where the tissue is): a disc of tissue, with a scanner's noise and a shade towards the corners."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    tissue = (x - SIDE / 2) ** 2 + (y - SIDE / 2) ** 2 < (share * SIDE) ** 2
    picture = np.full((SIDE, SIDE, 3), GLASS[glass], np.float32)
    ground, parts = STAINS[stain]
    tint = np.array(GLASS[glass]) / 243  # the stain lies on the glass and is seen through it
    picture[tissue] = np.array(ground) * tint
    for colour, part in parts:
        cells = np.kron(rng.random((SIDE // 8, SIDE // 8)) < part, np.ones((8, 8), bool))
        picture[cells & tissue] = np.array(colour) * tint
    shade = 1 - 0.03 * (((x - SIDE / 2) ** 2 + (y - SIDE / 2) ** 2) / (SIDE**2 / 2))
    picture = picture * shade[..., None] + rng.normal(0, 3, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), tissue


@pytest.mark.parametrize("glass", GLASS)
@pytest.mark.parametrize("stain", STAINS)
def test_every_stain_is_tissue_and_no_glass_is_taken(stain, glass, tmp_path):
    picture, tissue = stained(stain, glass)
    with open_image(write_tiff(tmp_path / "a.tiff", picture)) as image:
        found = find_patches(image, "a", 0.5, PATCH)
    assert found.share == pytest.approx(tissue.mean(), abs=0.03)
    assert found.warning == ""
    shares = [tissue[y : y + PATCH, x : x + PATCH].mean() for x, y in found.patches]
    assert min(shares) >= 0.65
    covered = np.zeros_like(tissue)
    for x, y in found.patches:
        covered[y : y + PATCH, x : x + PATCH] = True
    assert (covered & tissue).sum() > 0.75 * tissue.sum()  # the rest lies in patches with too much glass


@pytest.mark.parametrize("glass", GLASS)
def test_a_slide_of_glass_alone_holds_no_tissue(glass, tmp_path):
    picture, _ = stained("H&E", glass, share=0)
    with (
        open_image(write_tiff(tmp_path / "a.tiff", picture)) as image,
        pytest.raises(SlideError, match="found no tissue"),
    ):
        find_patches(image, "a", 0.5, PATCH)


@pytest.mark.parametrize("stain", ["H&E", "DAB and haematoxylin", "pale H&E"])
def test_a_biopsy_of_two_patches_is_found(stain, tmp_path):
    picture, tissue = stained(stain, "bluish", share=0.12)
    with open_image(write_tiff(tmp_path / "a.tiff", picture)) as image:
        found = find_patches(image, "a", 0.5, PATCH)
    assert 1 <= len(found.patches) <= 6
    assert all(tissue[y : y + PATCH, x : x + PATCH].mean() > 0.6 for x, y in found.patches)


def test_a_slide_that_is_tissue_all_over_is_taken_whole_and_said(tmp_path):
    picture, _ = stained("H&E", "white", share=2)
    with open_image(write_tiff(tmp_path / "a.tiff", picture)) as image:
        found = find_patches(image, "a", 0.5, PATCH)
    assert len(found.patches) == (SIDE // PATCH) ** 2
    assert "no glass was found" in found.warning


def test_what_was_never_scanned_is_neither_glass_nor_tissue(tmp_path):
    picture, tissue = stained("DAB and haematoxylin", "bluish")
    picture[:, :240], picture[:160] = 255, 0
    tissue[:, :240] = tissue[:160] = False
    with open_image(write_tiff(tmp_path / "a.tiff", picture)) as image:
        found = find_patches(image, "a", 0.5, PATCH)
    assert found.share == pytest.approx(tissue.mean(), abs=0.03)
    assert all(tissue[y : y + PATCH, x : x + PATCH].mean() > 0.6 for x, y in found.patches)


def test_dust_on_the_glass_is_no_tissue():
    picture, _ = stained("H&E", "white")
    for x, y in np.random.default_rng(1).integers(0, SIDE - 10, (60, 2)):
        picture[y : y + 9, x : x + 9] = 90
    small = np.asarray(Image.fromarray(picture).resize((SIDE // 8, SIDE // 8), Image.Resampling.BOX))
    mask = clean(tissue_mask(small, find_glass(small)), 6, 0.25 * (PATCH / 8) ** 2)
    assert ndimage.label(mask)[1] == 1  # what lies beside the tissue may join it


def test_real_tissue_of_every_class_is_told_from_real_empty_glass(shared_data):
    """Tiles of one study on a field of its own empty tiles."""
    folder = shared_data / "tiles_kather2016"
    tiles = {path: np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*/*.tif"))}
    empty = [tile for path, tile in tiles.items() if path.parent.name.endswith("EMPTY")]
    assert len(empty) == 3
    missed = []
    for path, tile in tiles.items():
        field = np.concatenate([np.concatenate([empty[(i + j) % 3] for i in range(4)], axis=1) for j in range(4)])
        field = field.copy()
        field[150:300, 150:300] = tile
        share = tissue_mask(field, find_glass(field), 4.0)[170:280, 170:280].mean()
        wanted = share < 0.05 if path.parent.name.endswith("EMPTY") else share > 0.3
        if not wanted:
            missed.append((path.parent.name, path.name, round(float(share), 2)))
    assert [name for name, *_ in missed if not name.endswith("ADIPOSE")] == []


def four_channels(path, names=("DAPI", "CD8", "CD3", "PanCK"), dtype=np.uint8):
    rng = np.random.default_rng(0)
    planes = np.zeros((len(names), 1024, 1024), dtype)
    for plane in planes:
        for x, y in rng.integers(100, 900, (900, 2)):
            plane[y : y + 14, x : x + 14] = rng.integers(90, 255)
    said = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "Channel": {"Name": list(names)}}
    tifffile.imwrite(path, planes, photometric="minisblack", tile=(256, 256), metadata=said, compression="zlib")
    return path


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("DAPI", "CD8", "CD3", "PanCK"), "found 4 channels DAPI, CD8, CD3, PanCK where 8-bit RGB is needed"),
        (("DAPI", "CD8", "CD3"), "found 3 channels DAPI, CD8, CD3 where 8-bit RGB is needed"),
        (("DAPI", "CD8"), "found 2 channels DAPI, CD8 where"),
    ],
)
def test_separate_channels_never_pass_for_red_green_and_blue(names, sentence, tmp_path):
    path = four_channels(tmp_path / "a.ome.tif", names)
    with pytest.raises(SlideError, match=sentence):
        open_image(path)


def test_three_channels_are_taken_in_the_order_that_is_named(tmp_path):
    path = four_channels(tmp_path / "a.ome.tif")
    planes = tifffile.imread(path)
    for chosen, order in (("CD3,dapi,PanCK", (2, 0, 3)), ("3, 1, 0", (3, 1, 0))):
        with open_image(path, chosen) as image:
            pixels = np.asarray(image.read_region((100, 200), 0, (300, 300)).convert("RGB"))
        assert np.array_equal(pixels, np.moveaxis(planes[list(order), 200:500, 100:400], 0, 2))
    for chosen in ("DAPI", "DAPI,CD8", "DAPI,CD8,nosuch", "0,1,4", ""):
        with pytest.raises(SlideError, match="found the channels DAPI, CD8, CD3, PanCK, not three of them"):
            open_image(path, chosen)


def test_channels_that_are_called_red_green_and_blue_are_and_planes_of_rgb_too(tmp_path):
    open_image(four_channels(tmp_path / "a.ome.tif", ("Red", "Green", "Blue"))).close()
    open_image(write_ome_tiff(tmp_path / "b.ome.tif", tissue_picture(640, 512), planar=True)).close()


def test_sixteen_bits_are_refused(tmp_path):
    with pytest.raises(SlideError, match=r"uint16 CYX .* where 8-bit RGB is needed"):
        open_image(four_channels(tmp_path / "a.ome.tif", dtype=np.uint16))


def test_a_dark_ground_is_refused_by_every_reader_until_channels_are_named(tmp_path, capsys):
    planes = tifffile.imread(four_channels(tmp_path / "a.ome.tif"))
    path = write_tiff(tmp_path / "dark.tiff", np.moveaxis(planes[:3], 0, 2).copy())
    run = ["encode", str(path), "--encoder", "colour-texture", "--out", str(tmp_path / "out"), "--patch-px", "64"]
    assert main(run) == 1
    assert "found a dark ground, as fluorescence has, wanted brightfield; --channels" in capsys.readouterr().err
    assert main([*run, "--channels", "0,1,2"]) == 0
    with open_features(tmp_path / "out/dark.safetensors") as slide:
        assert slide.metadata["channels"] == "0,1,2"
        places = slide.read_coords()
    # The cells lie from 100 to 914 px; the field around them is empty.
    assert places.min() >= 60
    assert places.max() + 64 <= 960
    assert has_dark_ground(np.asarray(Image.open(io.BytesIO(png(planes[:3])))))


def png(planes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(planes, 0, 2).copy()).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_picture_of_a_mask_shows_its_outline_and_every_patch(tmp_path):
    picture, _ = stained("DAB and haematoxylin", "bluish")
    with open_image(write_tiff(tmp_path / "a.tiff", picture)) as image:
        found = find_patches(image, "a", 0.5, PATCH)
    shown = qc_picture(found)
    assert shown.shape == (128, 128, 3)
    ring = (shown == MASK_COLOUR).all(axis=2)
    y, x = np.nonzero(ring)
    assert np.hypot(x - 64, y - 64) == pytest.approx(np.full(len(x), 0.38 * 128), abs=3)
    for left, top in (found.patches / 8).round().astype(int).tolist():
        edge = shown[top : top + 14, left : left + 14].reshape(-1, 3).tolist()
        assert list(PATCH_COLOUR) in edge


def test_a_slide_under_two_names_is_encoded_once_and_the_summary_names_the_other(tmp_path):
    folder, out = tmp_path / "slides", tmp_path / "out"
    (folder / "copies").mkdir(parents=True)
    write_tiff(folder / "a.tiff", tissue_picture(640, 512, 1))
    (folder / "copies/b.tiff").write_bytes((folder / "a.tiff").read_bytes())
    (folder / "copies/c.tiff").symlink_to(folder / "a.tiff")
    write_tiff(folder / "other.tiff", tissue_picture(640, 512, 2))
    write_ome_tiff(folder / "d.ome.tif", tissue_picture(640, 512, 3), 0.5)
    (folder / "copies/e.ome.tif").write_bytes((folder / "d.ome.tif").read_bytes())
    settings = EncodeSettings(patch_px=64)
    jobs = find_jobs([folder], out, tmp_path / "qc")
    for workers in (1, 2):
        outcomes = encode_many(jobs, "colour-texture", settings, workers=workers)
        table = {outcome.slide.removeprefix(f"{folder}/"): outcome for outcome in outcomes}
        reasons = {name: outcome.reason for name, outcome in table.items()}
        assert reasons["copies/b.tiff"] == reasons["copies/c.tiff"] == f"the same slide as {folder / 'a.tiff'}"
        assert reasons["d.ome.tif"] == f"the same slide as {folder / 'copies/e.ome.tif'}"
        if workers == 1:
            done = sorted(name for name, outcome in table.items() if outcome.status == "done")
            assert done == ["a.tiff", "copies/e.ome.tif", "other.tiff"]
        (out / "other.safetensors").unlink()
    assert len(list(out.rglob("*.safetensors"))) == 2
    assert sorted(path.name for path in (tmp_path / "qc").rglob("*.png")) == [
        "a.qc.png",
        "e.ome.qc.png",
        "other.qc.png",
    ]


def test_the_summary_says_share_and_count_and_warns(tmp_path):
    picture, tissue = stained("H&E", "white")
    path = write_tiff(tmp_path / "a.tiff", picture)
    (outcome,) = encode_many(find_jobs([path], tmp_path), "colour-texture", EncodeSettings(patch_px=PATCH))
    assert outcome.status == "done"
    assert outcome.tissue_share == pytest.approx(tissue.mean(), abs=0.03)
    with open(write_summary(tmp_path, [outcome, Outcome("b", "failed", reason="x")]), newline="") as file:
        rows = list(csv.DictReader(file))
    assert (int(rows[0]["patches"]), float(rows[0]["tissue_share"])) == (outcome.patches, outcome.tissue_share)
    assert rows[1]["tissue_share"] == ""


def test_patches_that_miss_most_of_the_tissue_are_a_warning(tmp_path):
    picture, _ = stained("H&E", "white", share=0.16)
    with open_image(write_tiff(tmp_path / "a.tiff", picture)) as image:
        found = find_patches(image, "a", 0.5, PATCH, background=0.01)
    assert "% of what the overview shows beside glass" in found.warning
