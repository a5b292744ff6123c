import numpy as np
import pytest

from vllm_wsi.benchmark.parsing import parse_label
from vllm_wsi.errors import SettingsError, SetupError, SlideError
from vllm_wsi.tissue.kather import KATHER, TISSUES, KatherSlide, kather_items, kather_pool

from .kather_tiles import write_tiles


def test_one_slide_is_left_out_with_all_its_tiles_and_the_others_set_the_scale(tmp_path):
    write_tiles(tmp_path)
    train, test = (kather_pool(tmp_path, "02", side) for side in ("train", "test"))
    assert set(train.patients[train.rows]) == {"01"}
    assert set(test.patients[test.rows]) == {"02"}
    seen = train.views[0][train.rows].astype(np.float64)
    assert np.abs(seen.mean(axis=0)).max() < 1e-3
    assert seen.std(axis=0)[:4] == pytest.approx([1] * 4, abs=1e-3)
    assert (train.views[0][:, 4] == 0).all()  # a feature that does not vary
    assert np.array_equal(train.views[0], test.views[0])


@pytest.mark.parametrize("num_patches", [4, 5, 20, 44, 45])
def test_a_slide_has_n_different_tiles_of_its_pool(tmp_path, num_patches):
    pool = kather_pool(write_tiles(tmp_path), "01", "test")
    for number in range(20):
        slide = KatherSlide(pool, num_patches, number)
        rows = slide.draw().rows
        assert len(rows) == len(np.unique(rows)) == num_patches
        assert set(rows) <= set(pool.rows)
        assert np.array_equal(rows, KatherSlide(pool, num_patches, number).draw().rows)


def test_a_slide_that_is_too_short_or_too_long_is_refused(tmp_path):
    pool = kather_pool(write_tiles(tmp_path), "01", "test")
    for num_patches in (3, 46):
        with pytest.raises(SettingsError, match=f"num_patches: found {num_patches}, wanted 4 to 45"):
            KatherSlide(pool, num_patches, 0)


def test_answers_agree_with_the_tiles_and_key_patches_are_those_of_the_tissue(tmp_path):
    write_tiles(tmp_path)
    items = kather_items(data=tmp_path, leave_out="01", count=30, num_patches=16, questions_per_slide=9)
    for item in items:
        (slide,) = item.slides
        assert np.array_equal(item.key_patches, np.flatnonzero(slide.tissues == item.tissue))
        asked = item.asked
        for label, answer in asked.answers.items():
            assert parse_label(answer, asked.options).label == label
        if asked.kind == "tissue_choice":
            present = {list(TISSUES.values())[tissue] for tissue in np.unique(slide.tissues)}
            assert [text in present for text in asked.options.values()].count(True) == 1
            assert asked.options[asked.gold] in present
        else:
            assert (asked.gold == "A") == bool(len(item.key_patches))
    kinds = [item.asked.kind for item in items]
    assert kinds.count("tissue_presence") == 240
    assert 0 < kinds.count("tissue_choice") <= 30


def test_eight_questions_share_one_slide(tmp_path):
    items = kather_items(data=write_tiles(tmp_path), leave_out="01", count=2, num_patches=16)
    assert len({item.slides for item in items[:8]}) == 1
    assert {item.tissue for item in items[:8]} == set(range(8))


def test_a_file_that_is_missing_or_another_is_told(tmp_path):
    with pytest.raises(SetupError, match=f"found no {KATHER} in it"):
        kather_pool(tmp_path, "01")
    np.savez(tmp_path / KATHER, X=np.zeros((2, 3)))
    with pytest.raises(SlideError, match="found no readable X, y, classes and slide"):
        kather_pool(tmp_path, "01")
    write_tiles(tmp_path)
    with pytest.raises(SettingsError, match="leave_out: found '11', wanted one of 01, 02"):
        kather_pool(tmp_path, "11")


def test_the_real_set_has_eight_classes_on_ten_slides(tissue_folder):
    pool = kather_pool(tissue_folder, "03", "test")
    assert pool.views[0].shape == (5000, 84)
    assert len(np.unique(pool.patients)) == 10
    assert len(pool.rows) == 740
    slide = KatherSlide(pool, 128, 0)
    assert len(slide.tissues) == 128
