"""What is taken for tissue: any stain on any glass, measured against masks that are known pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from vllm_wsi.encoding.image import open_image
from vllm_wsi.encoding.overview import Overview, read_overview, scanned_bounds
from vllm_wsi.encoding.patches import covered, find_patches
from vllm_wsi.encoding.tissue import find_tissue, is_dark_ground
from vllm_wsi.errors import SlideError

from .slide_images import write_ome_tiff, write_tiff

PATCH = 20.0  # edge of a patch in pixels of an overview
NUCLEI = ((90, 50, 130), 0.25)  # colour, and share of the tissue's area


def disc(side: int, radius: float = 0.38, centre: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2


def stained(glass, base, nuclei=(), truth=None, noise=2.0, side=256) -> tuple[np.ndarray, np.ndarray]:
    """(RGB overview, its true mask): glass with a disc of tissue."""
    rng = np.random.default_rng(0)
    truth = disc(side) if truth is None else truth
    picture = np.where(truth[..., None], base, glass).astype(float)
    for colour, share in nuclei:
        picture[truth & (rng.random(truth.shape) < share)] = colour
    return np.clip(picture + rng.normal(0, noise, picture.shape), 0, 255).astype(np.uint8), truth


def everywhere(picture: np.ndarray) -> np.ndarray:
    return np.ones(picture.shape[:2], bool)


def found(picture: np.ndarray, scanned=None):
    return find_tissue(picture, everywhere(picture) if scanned is None else scanned, "a.svs", PATCH)


def precision_and_recall(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    return (mask & truth).sum() / mask.sum(), (mask & truth).sum() / truth.sum()


STAINS = {
    "haematoxylin and eosin": ((243, 243, 243), (225, 150, 190), [NUCLEI]),
    "pale immunohistochemistry on bluish glass": (
        (232, 230, 240), (205, 215, 230), [((105, 145, 195), 0.2), ((70, 45, 30), 0.05)]
    ),
    "strong DAB": ((243, 240, 240), (120, 70, 40), [((70, 45, 30), 0.2)]),
    "haematoxylin alone": ((240, 240, 240), (222, 222, 235), [((150, 160, 205), 0.3)]),
    "eosin alone": ((243, 243, 245), (235, 205, 222), []),
    "pale eosin": ((243, 243, 245), (240, 230, 236), []),
    "very faint": ((240, 240, 242), (233, 230, 238), []),
    "blue trichrome": ((243, 243, 243), (90, 130, 190), [((150, 40, 60), 0.2)]),
    "green trichrome": ((243, 243, 243), (120, 185, 160), [((150, 40, 60), 0.2)]),
    "alcian blue": ((243, 243, 243), (140, 190, 215), [((190, 100, 120), 0.2)]),
    "yellowish glass": ((240, 233, 205), (215, 180, 170), [NUCLEI]),
    "grey glass": ((180, 180, 182), (155, 125, 150), [NUCLEI]),
    "glass at its brightest": ((255, 255, 255), (225, 150, 190), [NUCLEI]),
}  # fmt: skip


@pytest.mark.parametrize("stain", STAINS)
def test_tissue_of_any_stain_is_found_on_any_glass(stain):
    picture, truth = stained(*STAINS[stain])
    tissue = found(picture)
    precision, recall = precision_and_recall(tissue.mask, truth)
    assert precision > 0.95
    assert recall > 0.95
    assert np.abs(np.array(tissue.glass) - STAINS[stain][0]).max() <= 2
    assert tissue.share == pytest.approx(truth.mean(), abs=0.025)


def test_the_colours_of_jpeg_do_not_matter(tmp_path):
    for name, (glass, base, nuclei) in STAINS.items():
        picture, truth = stained(glass, base, nuclei, noise=4)
        Image.fromarray(picture).save(tmp_path / "a.jpg", quality=40)
        precision, recall = precision_and_recall(found(np.asarray(Image.open(tmp_path / "a.jpg"))).mask, truth)
        assert min(precision, recall) > 0.94, name


GLASS = {
    "noise": lambda rng: rng.normal((238, 236, 240), 2, (200, 300, 3)),
    "constant": lambda rng: np.full((200, 300, 3), 243.0),
    "light that falls off": lambda rng: np.linspace(225, 243, 300)[None, :, None] + rng.normal(0, 1.5, (200, 300, 3)),
    "white": lambda rng: np.full((200, 300, 3), 255.0),
}


@pytest.mark.parametrize("glass", GLASS)
def test_glass_alone_holds_no_tissue(glass):
    picture = np.clip(GLASS[glass](np.random.default_rng(0)), 0, 255).astype(np.uint8)
    with pytest.raises(
        SlideError, match=r"^a\.svs: found no tissue, wanted some; --tissue none takes the whole slide$"
    ):
        found(picture)


@pytest.mark.parametrize("shape", ["ramp", "step"])
def test_darker_glass_of_the_same_slide_is_no_tissue(shape):
    picture, truth = stained((243, 243, 243), (225, 150, 190), [NUCLEI])
    light = np.linspace(0.9, 1, 256) if shape == "ramp" else np.where(np.arange(256) < 50, 0.93, 1.0)
    precision, recall = precision_and_recall(found((picture * light[None, :, None]).astype(np.uint8)).mask, truth)
    assert precision > 0.94
    assert recall > 0.99


def test_a_bubble_that_is_brighter_than_the_glass_is_neither_tissue_nor_glass():
    picture, truth = stained((225, 225, 228), (205, 150, 185), [NUCLEI])
    bubble = disc(256, 0.07, (0.1, 0.1))
    picture[bubble] = 251
    tissue = found(picture)
    assert np.abs(np.array(tissue.glass) - (225, 225, 228)).max() <= 2
    assert not (tissue.mask & bubble).any()
    assert min(precision_and_recall(tissue.mask, truth)) > 0.95


def test_a_pale_piece_is_found_beside_a_dark_one():
    dark, pale = disc(256, 0.25, (0.3, 0.3)), disc(256, 0.12, (0.8, 0.8))
    picture, _ = stained((240, 240, 240), (150, 70, 130), [NUCLEI], dark)
    picture[pale] = np.clip(np.random.default_rng(1).normal((226, 219, 229), 3, (pale.sum(), 3)), 0, 255)
    mask = found(picture).mask
    assert mask[dark].mean() > 0.98
    assert mask[pale].mean() > 0.9
    assert (mask & ~dark & ~pale).mean() < 0.02


def test_a_needle_on_much_glass_is_found():
    truth = np.zeros((900, 900), bool)
    truth[440:466, 200:640] = True
    picture, _ = stained((236, 236, 240), (200, 140, 180), [NUCLEI], truth)
    precision, recall = precision_and_recall(found(picture).mask, truth)
    assert precision > 0.85  # it is narrow: its edge is much of it
    assert recall > 0.99


@pytest.mark.parametrize("nuclei", [[NUCLEI], [((105, 145, 195), 0.3), ((70, 45, 30), 0.1)]])
def test_a_picture_of_tissue_alone_is_tissue_alone(nuclei):
    picture, _ = stained((243, 243, 243), (205, 190, 225), nuclei, np.ones((256, 256), bool))
    assert found(picture).mask.all()


def test_that_no_glass_was_found_is_said():
    picture, _ = stained((243, 243, 243), (130, 80, 50), [((70, 45, 30), 0.3)], np.ones((256, 256), bool))
    tissue = found(picture)
    assert tissue.glass is None
    assert "found no glass to compare with" in tissue.warnings


@pytest.mark.parametrize("fill", [0, 240, 250, 255])
@pytest.mark.parametrize("stain", ["haematoxylin and eosin", "pale immunohistochemistry on bluish glass"])
def test_what_the_scanner_wrote_beside_its_scan_is_neither_tissue_nor_the_glass_to_compare_with(fill, stain):
    part, inside = stained(*STAINS[stain])
    picture, truth = np.full((400, 420, 3), fill, np.uint8), np.zeros((400, 420), bool)
    picture[60:316, 50:306], truth[60:316, 50:306] = part, inside
    tissue = found(picture)
    assert np.abs(np.array(tissue.glass) - STAINS[stain][0]).max() <= 2
    assert min(precision_and_recall(tissue.mask, truth)) > 0.95
    assert tissue.share == pytest.approx(inside.mean(), abs=0.04)  # of what was scanned, not of the picture


def test_what_the_reader_calls_unscanned_is_left_out_of_mask_and_share():
    picture, truth = stained((240, 240, 240), (215, 150, 185), [NUCLEI])
    scanned = everywhere(picture)
    scanned[:, 128:] = False
    picture[:, 128:] = 255
    tissue = found(picture, scanned)
    assert not tissue.mask[:, 128:].any()
    assert tissue.share == pytest.approx(truth[:, :128].mean(), abs=0.02)
    with pytest.raises(SlideError, match="found nothing that was scanned"):
        found(picture, ~everywhere(picture))


@pytest.mark.parametrize("colour", [(20, 130, 70), (30, 50, 160), (30, 30, 32)])
def test_pen_marks_are_left_out_and_that_is_said(colour):
    picture, truth = stained((243, 243, 243), (225, 150, 190), [NUCLEI])
    pen = np.zeros_like(truth)
    pen[8:26, 20:230] = True
    picture[pen] = np.clip(np.random.default_rng(2).normal(colour, 4, (pen.sum(), 3)), 0, 255)
    tissue = found(picture)
    assert tissue.mask[pen].mean() < 0.02  # its corners
    assert tissue.ink[pen].mean() > 0.98
    assert min(precision_and_recall(tissue.mask, truth)) > 0.95
    assert any(warning.startswith("left out pen marks on ") for warning in tissue.warnings)


def test_tissue_that_is_as_flat_as_glass_is_doubted():
    flat, _ = stained((243, 243, 243), (220, 190, 210), noise=0.5)
    assert any("as flat as glass" in warning for warning in found(flat).warnings)
    rough, _ = stained(*STAINS["haematoxylin and eosin"])
    assert found(rough).warnings == ()


def test_a_share_far_below_what_the_overview_shows_is_doubted():
    """Fat: thin walls around much that looks like glass."""
    rng = np.random.default_rng(3)
    picture, _ = stained((243, 243, 243), (225, 150, 190), [NUCLEI], disc(256, 0.1))
    lines = np.zeros((256, 256), bool)
    lines[::7], lines[:, ::7] = True, True
    lines &= disc(256, 0.2, (0.75, 0.75))
    picture[lines] = np.clip(rng.normal((232, 205, 222), 4, (lines.sum(), 3)), 0, 255)
    tissue = found(picture)
    assert tissue.rough_share > 2 * tissue.share
    assert any("look like some" in warning for warning in tissue.warnings)


def fluorescence(colours, side=128) -> np.ndarray:
    rng = np.random.default_rng(4)
    picture = np.clip(rng.normal(6, 3, (side, side, 3)), 0, 255)
    for i, colour in enumerate(colours):
        spots = disc(side, 0.3) & (rng.random((side, side)) < 0.4 / (i + 1))
        picture[spots] = np.array(colour) * rng.uniform(0.3, 1, (spots.sum(), 1))
    return picture.astype(np.uint8)


@pytest.mark.parametrize("ground", [0, 8])
@pytest.mark.parametrize("colours", [[(0, 0, 255)], [(255, 255, 255)], [(40, 60, 255), (20, 250, 20), (250, 30, 10)]])
def test_light_on_a_dark_ground_is_told_from_glass(colours, ground):
    picture = fluorescence(colours)
    if not ground:
        picture[picture.max(axis=2) < 25] = 0
    assert is_dark_ground(picture, everywhere(picture))
    assert is_dark_ground(np.zeros_like(picture), everywhere(picture))


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("border", [0, 300])
def test_a_stained_slide_is_no_dark_ground_whatever_black_surrounds_it(stain, border):
    picture, _ = stained(*STAINS[stain])
    picture = np.pad(picture, ((border, border), (0, 0), (0, 0)))
    assert not is_dark_ground(picture, everywhere(picture))


def test_real_tissue_is_told_from_real_glass(shared_data):
    """Tiles of eight classes on glass: all of tumour, stroma and the like, nothing of empty glass."""
    for path in sorted((shared_data / "tiles_kather2016").glob("*/*.tif")):
        tile = np.asarray(Image.open(path).convert("RGB").resize((50, 50), Image.Resampling.BOX))
        picture, truth = np.full((150, 150, 3), (238, 238, 240), np.uint8), np.zeros((150, 150), bool)
        picture[50:100, 50:100], truth[50:100, 50:100] = tile, True
        kind = path.parent.name
        if kind == "08_EMPTY":
            with pytest.raises(SlideError, match="found no tissue"):
                found(picture)
        elif kind not in ("05_DEBRIS", "07_ADIPOSE"):  # these hold glass
            precision, recall = precision_and_recall(found(picture).mask, truth)
            assert precision > 0.9, path
            assert recall > 0.9, path


def test_real_immunohistochemistry_is_found_whole_on_glass(tmp_path):
    from skimage.data import immunohistochemistry

    picture = np.clip(np.random.default_rng(5).normal((235, 232, 238), 1.5, (1280, 1280, 3)), 0, 255).astype(np.uint8)
    picture[384:896, 384:896] = immunohistochemistry()
    with open_image(write_ome_tiff(tmp_path / "a.ome.tif", picture, 0.5)) as image:
        corners = find_patches(image, "a", 0.5, 64).corners
    inside = (np.minimum(corners + 64, 896) - np.maximum(corners, 384)).clip(0).prod(axis=1) / 64**2
    assert inside.min() > 0.6
    assert len(corners) >= 0.85 * (512 / 64) ** 2
    # A field of tissue without any glass, as they are sent for review.
    with open_image(write_ome_tiff(tmp_path / "b.ome.tif", immunohistochemistry(), 0.5)) as image:
        assert len(find_patches(image, "b", 0.5, 64).corners) >= 0.85 * 64


def test_no_patch_of_the_case_that_failed_lies_on_glass(tmp_path):
    picture, truth = stained(*STAINS["pale immunohistochemistry on bluish glass"], noise=4, side=1024)
    with open_image(write_tiff(tmp_path / "a.tiff", picture)) as image:
        corners = find_patches(image, "a", 0.5, 64).corners
    shares = [truth[y : y + 64, x : x + 64].mean() for x, y in corners.tolist()]
    assert min(shares) > 0.65
    assert len(shares) > 0.85 * truth.sum() / 64**2


@pytest.mark.parametrize(("width", "height"), [(64, 64), (65, 64), (127, 191), (1000, 64), (333, 500)])
def test_the_whole_slide_is_tiled_without_gap_or_overlap(tmp_path, width, height):
    with open_image(write_tiff(tmp_path / "a.tiff", np.full((height, width, 3), 200, np.uint8))) as image:
        corners = find_patches(image, "a", 0.5, 64, "none").corners
    wanted = [(x, y) for y in range(0, height - 63, 64) for x in range(0, width - 63, 64)]
    assert corners.tolist() == [list(corner) for corner in wanted]


def test_the_share_of_a_patch_counts_parts_of_the_masks_pixels():
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    overview = Overview(np.zeros((4, 4, 3), np.uint8), mask, 100, 50, (10.0, 10.0))
    corners = np.array([(110, 60), (100, 50), (105, 55), (120, 70), (130, 80)], np.int32)
    assert covered(mask, overview, corners, 20).tolist() == pytest.approx([1, 0.25, 0.5625, 0.25, 0])


def test_bounds_of_the_scan_limit_overview_and_grid():
    class Bounded:
        def __init__(self, image, bounds):
            self.image, self.dimensions = image, image.dimensions
            names = "x", "y", "width", "height"
            self.properties = {f"openslide.bounds-{k}": str(v) for k, v in zip(names, bounds, strict=True)}

        def __getattr__(self, name):
            return getattr(self.image, name)

    from openslide import ImageSlide

    with ImageSlide(Image.new("RGB", (600, 400), (200, 180, 200))) as image:
        assert scanned_bounds(image) == (0, 0, 600, 400)
        assert scanned_bounds(Bounded(image, (100, 50, 300, 200))) == (100, 50, 300, 200)
        assert scanned_bounds(Bounded(image, (-20, 350, 9999, 9999))) == (0, 350, 600, 50)
        for wrong in ((0, 0, 0, 0), (700, 0, 10, 10), ("x", 0, 10, 10)):
            assert scanned_bounds(Bounded(image, wrong)) == (0, 0, 600, 400)
        bounded = Bounded(image, (100, 50, 300, 200))
        overview = read_overview(bounded, "a", 0.5, 64)
        assert (overview.x_px, overview.y_px) == (100, 50)
        corners = find_patches(bounded, "a", 0.5, 64, "none").corners
        assert corners.min(axis=0).tolist() == [100, 50]
        assert (corners + 64 <= [400, 250]).all()
        assert len(corners) == 4 * 3
