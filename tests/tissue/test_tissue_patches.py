import zipfile

import numpy as np
import pytest

from vllm_wsi.errors import SettingsError, SetupError, SlideError
from vllm_wsi.tissue.folds import patient_folds, rows_of_side
from vllm_wsi.tissue.tissue_patches import IDC_PATCHES, IDC_SLIDE, read_patches

from .tissue_archives import write_archive


def test_the_real_archives_hold_what_their_notes_say_less_the_patches_that_are_too_small(tissue_folder):
    patches, slide = read_patches(tissue_folder), read_patches(tissue_folder, IDC_SLIDE)
    assert (len(patches) + patches.num_left_out, patches.num_left_out) == (8748, 82)
    assert len(np.unique(patches.patients)) == 237
    assert 0.2 < patches.labels.mean() < 0.3
    assert (len(slide), int(slide.labels.sum()), slide.num_left_out) == (478, 197, 0)
    assert set(slide.patients) == {"14082"}
    assert "14082" not in set(patches.patients)


def test_pictures_are_read_in_the_order_of_the_index(tissue_folder):
    slide = read_patches(tissue_folder, IDC_SLIDE)
    from PIL import Image

    with zipfile.ZipFile(tissue_folder / IDC_SLIDE) as archive:
        x, y = slide.coords_px[100]
        (name,) = (name for name in archive.namelist() if f"_x{x}_y{y}_" in name)
        with archive.open(name) as file, Image.open(file) as image:
            wanted = np.asarray(image.convert("RGB"))
    assert np.array_equal(slide.images[100], wanted)
    assert name.endswith(f"_{int(slide.labels[100])}.png")


def test_a_patch_below_50_px_is_left_out_and_counted(tmp_path):
    write_archive(tmp_path / IDC_PATCHES, [2, 0], small=3)
    patches = read_patches(tmp_path)
    assert (len(patches), patches.num_left_out) == (14, 3)
    assert patches.images.shape == (14, 50, 50, 3)
    dark = patches.images.mean(axis=(1, 2, 3)) < 150
    assert np.array_equal(dark, patches.labels)


@pytest.mark.parametrize("name", [IDC_PATCHES, IDC_SLIDE])
def test_a_folder_that_is_not_there_or_lacks_the_archive_is_told_in_a_sentence(tmp_path, name):
    with pytest.raises(SetupError, match=r"nowhere: found no such folder, wanted .*idc_patches\.zip"):
        read_patches(tmp_path / "nowhere", name)
    with pytest.raises(SetupError, match=f"found no {name} in it, wanted"):
        read_patches(tmp_path, name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [line.replace("patient,", "who,", 1) for line in lines], "found no column patient"),
        (lambda lines: [*lines[:-1], lines[-1].replace(",0,p1", ",2,p1")], "line 15: label: found '2', wanted 0 or 1"),
        (lambda lines: [*lines[:-1], lines[-1].replace("p1,", "p1,-", 1)], "wanted a patient and whole pixels"),
        (lambda lines: [*lines, "p1,1,1,0,p1/no.png"], "found no 'p1/no.png' in the archive"),
    ],
)
def test_an_index_that_does_not_fit_is_told_by_its_line(tmp_path, edit, message):
    write_archive(tmp_path / IDC_PATCHES, [2, 0], edit=edit)
    with pytest.raises(SlideError, match=message):
        read_patches(tmp_path)


def test_a_file_that_is_no_archive_or_holds_no_index_or_no_png_is_told(tmp_path):
    path = tmp_path / IDC_PATCHES
    path.write_bytes(b"no zip")
    with pytest.raises(SlideError, match="found no readable zip archive"):
        read_patches(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"")
    with pytest.raises(SlideError, match=r"found no index\.csv"):
        read_patches(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"GIF89a")
        archive.writestr("index.csv", "patient,x,y,label,file\np,1,1,0,a.png\n")
    with pytest.raises(SlideError, match=r"a\.png: found no PNG header"):
        read_patches(tmp_path)


def test_a_picture_that_breaks_off_is_told_when_it_is_read(tmp_path):
    path = write_archive(tmp_path / "whole.zip", [1, 0])
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / IDC_PATCHES, "w") as cut:
        for name in whole.namelist():
            data = whole.read(name)
            cut.writestr(name, data[:80] if name == "p1/3.png" else data)
    patches = read_patches(tmp_path)
    with pytest.raises(SlideError, match=r"p1/3\.png: found no readable picture"):
        _ = patches.images


def test_no_patient_is_in_two_folds_and_folds_have_like_shares_of_tumour(tissue_folder):
    patches = read_patches(tissue_folder)
    folds = patient_folds(patches.patients, patches.labels, 3, seed=1)
    sides = [set(patches.patients[folds == fold]) for fold in range(3)]
    assert [len(side) for side in sides] == [79, 79, 79]
    assert len(set.union(*sides)) == 237
    share = [np.mean([patches.labels[patches.patients == one].mean() for one in sorted(side)]) for side in sides]
    assert max(share) - min(share) < 0.02
    again = patient_folds(patches.patients, patches.labels, 3, seed=1)
    other = patient_folds(patches.patients, patches.labels, 3, seed=2)
    assert np.array_equal(folds, again)
    assert not np.array_equal(folds, other)


def test_the_sides_of_a_fold_share_nothing_and_leave_nothing_out():
    patients = np.repeat(["a", "b", "c", "d", "e"], [1, 4, 2, 3, 5])
    folds = patient_folds(patients, np.arange(15) % 4 == 0, 2)
    train, test, both = (rows_of_side(folds, 0, side) for side in ("train", "test", "all"))
    assert set(patients[train]) & set(patients[test]) == set()
    assert np.array_equal(np.sort(np.concatenate((train, test))), both)
    assert len(both) == 15
    assert np.array_equal(rows_of_side(folds, 1, "test"), train)


def test_folds_and_sides_that_are_not_there_are_refused():
    patients, labels = np.array(["a", "b"]), np.array([True, False])
    for num_folds in (0, 1, 3):
        with pytest.raises(SettingsError, match=rf"num_folds: found {num_folds}, wanted 2 to 2"):
            patient_folds(patients, labels, num_folds)
    folds = patient_folds(patients, labels, 2)
    with pytest.raises(SettingsError, match="fold: found 2, wanted 0 to 1"):
        rows_of_side(folds, 2, "test")
    with pytest.raises(SettingsError, match="side: found 'valid', wanted one of train, test, all"):
        rows_of_side(folds, 0, "valid")
