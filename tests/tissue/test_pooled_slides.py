import numpy as np
import pytest

from vllm_wsi.errors import SettingsError
from vllm_wsi.selection.baselines import make_policy
from vllm_wsi.tissue.pooled_slides import NaturalSlide, PatchPool, PooledSlide, natural_slides


def pool_of(num_tumour=10, num_other=30, views=1, rows=None):
    """Features tell view and row: [view, row]."""
    n = num_tumour + num_other
    features = [np.stack((np.full(n, view), np.arange(n)), axis=1).astype(np.float16) for view in range(views)]
    return PatchPool(
        "pool",
        "test@1",
        tuple(features),
        np.arange(n) < num_tumour,
        np.array([f"p{row % 4}" for row in range(n)]),
        np.stack((np.arange(n) * 50 + 1, np.full(n, 101)), axis=1),
        np.arange(n) if rows is None else rows,
    )


def read(slide):
    with slide.open() as opened:
        return opened.read_rows(0, opened.num_patches)


@pytest.mark.parametrize(
    ("num_patches", "share", "tumour"),
    [(20, 0, 0), (20, 0.01, 1), (20, 0.3, 6), (1, 1, 1), (1, 0, 0), (10, 1, 10), (40, 0.25, 10), (7, 0.5, 4)],
)
def test_a_slide_has_the_tumour_that_was_asked_and_no_patch_twice(num_patches, share, tumour):
    slide = PooledSlide(pool_of(), num_patches, share, 0)
    x = read(slide)
    assert len(x) == len(np.unique(x[:, 1])) == num_patches
    assert np.array_equal(slide.key_patches, np.flatnonzero(x[:, 1] < 10))
    assert len(slide.key_patches) == slide.num_tumour == tumour
    assert slide.share == tumour / num_patches
    assert slide.num_repeated == 0


def test_a_slide_beyond_all_there_are_takes_each_patch_in_another_view_and_says_so():
    slide = PooledSlide(pool_of(views=3), 100, 0.25, 0)
    x = read(slide)
    assert slide.num_repeated == 100 - 40
    assert len(np.unique(x, axis=0)) == 100  # no view of a patch twice
    assert np.bincount(x[x[:, 1] < 10][:, 0].astype(int)).tolist() == [10, 10, 5]
    assert np.bincount(x[x[:, 1] >= 10][:, 0].astype(int)).tolist() == [30, 30, 15]


def test_training_draws_any_view_and_still_none_twice():
    slide = PooledSlide(pool_of(views=3), 100, 0.25, 0, any_view=True)
    x = read(slide)
    assert len(np.unique(x, axis=0)) == 100
    first = read(PooledSlide(pool_of(views=3), 20, 0.25, 0, any_view=True))
    assert set(first[:, 0]) == {0, 1, 2}


@pytest.mark.parametrize(("num_patches", "share", "kind"), [(41, 0.3, "tumour"), (41, 0.1, "other"), (11, 1, "tumour")])
def test_more_than_all_views_hold_is_refused(num_patches, share, kind):
    with pytest.raises(SettingsError, match=rf"num_patches: found {num_patches} .* {kind} patches: pool has"):
        PooledSlide(pool_of(), num_patches, share, 0)


def test_the_longest_slide_without_repeats_fits_and_one_more_does_not():
    pool = pool_of()
    for share in (0.0, 0.01, 0.25, 0.3, 1.0):
        most = pool.most_patches(share)
        assert PooledSlide(pool, most, share, 0).num_repeated == 0
        with pytest.raises(SettingsError):
            PooledSlide(pool, most + 4, share, 0)


def test_slides_follow_from_their_number_alone():
    same = [read(PooledSlide(pool_of(), 20, 0.2, 3)) for _ in range(2)]
    assert np.array_equal(*same)
    assert not np.array_equal(same[0], read(PooledSlide(pool_of(), 20, 0.2, 4)))


def test_a_slide_holds_patches_of_its_own_side_alone():
    rows = np.arange(5, 25)
    x = read(PooledSlide(pool_of(rows=rows), 20, 0.25, 0))
    assert set(x[:, 1]) == set(range(5, 25))


def test_rows_read_in_parts_are_those_read_at_once_and_places_lie_on_a_grid():
    slide = PooledSlide(pool_of(views=2), 50, 0.2, 1)
    with slide.open() as opened:
        parts = [opened.read_rows(start, min(start + 7, 50)) for start in range(0, 50, 7)]
        coords = opened.read_coords()
        assert (opened.coord_unit, opened.metadata["patch_size_level0"], opened.metadata["mpp"]) == ("px", "50", "4.0")
        assert (opened.metadata["width"], opened.metadata["height"]) == ("400", "350")
    assert np.array_equal(np.concatenate(parts), read(slide))
    assert coords[:9].tolist() == [[50 * (i % 8), 50 * (i // 8)] for i in range(9)]


def test_a_policy_selects_from_a_slide_and_its_places_are_no_guess():
    slide = PooledSlide(pool_of(), 30, 0.2, 0)
    with slide.open() as opened:
        selection = make_policy("top-norm", 4).select(opened)
    assert sorted(selection.features[:, 1].tolist()) == np.sort(read(slide)[:, 1])[-4:].tolist()
    assert selection.guesses("slide") == []  # the file says where the patches lie


def test_a_natural_slide_is_one_patients_patches_at_their_places():
    pool = pool_of(rows=np.arange(0, 38))
    slides = natural_slides(pool)
    assert [slide.name for slide in slides] == [f"pool-patient-p{i}" for i in range(4)]
    slide = slides[2]
    assert np.array_equal(read(slide)[:, 1], np.arange(2, 38, 4))
    assert slide.key_patches.tolist() == [0, 1]
    assert slide.share == 2 / 9
    with slide.open() as opened:
        assert np.array_equal(opened.read_coords(), pool.coords_px[2:38:4])
    assert [len(natural_slides(pool, least)) for least in (9, 10, 11)] == [4, 2, 0]
    with pytest.raises(SettingsError, match="patient: found 'x', wanted one of pool"):
        NaturalSlide(pool, "x")
