"""Slides selected ahead of time: by `warm`, by `encode --warm`, and what `store` tells of them."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from vllm_wsi.cli.app import main
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.slides import open_features, write_features
from vllm_wsi.store.store_settings import StoreSettings
from vllm_wsi.store.warm import WarmSettings, find_features, warm_many

D = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "c"
    init_checkpoint(
        path, TinySettings(feature_dim=D, hidden_size=32, scorer_hidden_size=16, encoder="colour-texture@1")
    )
    return path


@pytest.fixture
def folder(tmp_path):
    """Five slides in three formats, below two folders; one holds nothing that can be read."""
    root = tmp_path / "slides"
    (root / "inner").mkdir(parents=True)
    for i, name in enumerate(("a.safetensors", "inner/b.safetensors")):
        x = np.random.default_rng(i).standard_normal((50 + i, D)).astype(np.float16)
        write_features(root / name, x, np.arange(2 * len(x)).reshape(-1, 2), {"encoder": "colour-texture@1"})
    np.save(root / "c.npy", np.random.default_rng(3).standard_normal((7, D)).astype(np.float32))
    (root / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    return root


def rows(path):
    with open(path, newline="") as file:
        return {Path(row["slide"]).name: (row["status"], row["patches"]) for row in csv.DictReader(file)}


def test_each_slide_is_selected_once_and_a_second_run_goes_on(checkpoint, folder, tmp_path, capsys):
    command = ["warm", str(folder), "--checkpoint", str(checkpoint), "--store", str(tmp_path / "store")]
    command += ["--summary", str(tmp_path / "summary.csv")]
    assert main([*command, "--workers", "2"]) == 1  # one is broken
    assert "3 done, 0 skipped, 1 failed" in capsys.readouterr().out
    done = {"a.safetensors": ("done", "50"), "b.safetensors": ("done", "51"), "c.npy": ("done", "7")}
    assert rows(tmp_path / "summary.csv") == done | {"broken.safetensors": ("failed", "0")}
    (folder / "broken.safetensors").unlink()
    os.utime(folder / "a.safetensors")  # another state
    assert main([*command, "--workers", "1"]) == 0
    assert "1 done, 2 skipped, 0 failed" in capsys.readouterr().out
    assert rows(tmp_path / "summary.csv")["a.safetensors"] == ("done", "50")
    assert main([*command, "-k", "5"]) == 0
    assert "3 done" in capsys.readouterr().out


def test_a_slide_that_is_named_twice_is_selected_once(folder):
    (folder / "link.npy").symlink_to(folder / "c.npy")
    found = find_features([folder / "c.npy", folder])
    assert sorted(path.name for path in found) == ["a.safetensors", "b.safetensors", "broken.safetensors", "c.npy"]


def test_what_is_wrong_for_all_slides_is_said_once(checkpoint, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLLM_WSI_STORE", raising=False)
    assert main(["warm", str(folder), "--checkpoint", str(checkpoint)]) == 1
    assert "--store: found no folder, wanted one, here or in VLLM_WSI_STORE" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_WSI_STORE", str(tmp_path / "store"))
    assert main(["warm", str(folder), "--checkpoint", str(tmp_path / "none")]) == 1
    assert "found no checkpoint that loads" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["warm", str(tmp_path / "empty"), "--checkpoint", str(checkpoint)]) == 1
    assert "found no feature files, wanted at least one" in capsys.readouterr().err


def test_encode_selects_what_it_has_just_written(checkpoint, shared_data, tmp_path, capsys):
    image, out, store = shared_data / "slides/CMU-1-Small-Region.svs", tmp_path / "out", tmp_path / "store"
    command = ["encode", str(image), "--encoder", "colour-texture", "--out", str(out), "--warm", str(checkpoint)]
    assert main([*command, "--store", str(store)]) == 0
    (file,) = out.glob("*.safetensors")
    settings = WarmSettings(str(checkpoint), StoreSettings(store, 1 << 30))
    (outcome,) = warm_many([file], settings)
    assert (outcome.status, outcome.reason) == ("skipped", "is in the store already")


def test_encode_for_a_checkpoint_that_does_not_fit_warns_and_keeps_the_features(tmp_path, shared_data, capsys):
    init_checkpoint(tmp_path / "c", TinySettings(feature_dim=32, hidden_size=32, scorer_hidden_size=16))
    image, out = shared_data / "slides/CMU-1-Small-Region.svs", tmp_path / "out"
    command = ["encode", str(image), "--encoder", "colour-texture", "--out", str(out), "--warm", str(tmp_path / "c")]
    assert main([*command, "--store", str(tmp_path / "store")]) == 0
    assert "found d = 64, wanted 32" in capsys.readouterr().err
    with open_features(next(out.glob("*.safetensors"))) as slide:
        assert slide.feature_dim == 64


def test_store_counts_checks_and_prunes(checkpoint, folder, tmp_path, capsys):
    (folder / "broken.safetensors").unlink()
    store = tmp_path / "store"
    assert main(["warm", str(folder), "--checkpoint", str(checkpoint), "--store", str(store)]) == 0
    capsys.readouterr()
    assert main(["store", str(store)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [
        ["selections", "3"],
        ["slides'", "scores"],
        ["unfinished", "files"],
    ]
    victim = next(store.glob("*/*.scores.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert main(["store", str(store), "--check"]) == 0
    assert "checked: 5 good, 1 damaged or foreign and removed" in capsys.readouterr().out
    (victim.parent / "notes.txt").touch()
    assert main(["store", str(store), "--prune-gib", "0"]) == 1
    printed = capsys.readouterr().out
    assert "other files" in printed
    assert printed.splitlines()[0].split()[:2] == ["selections", "0"]
    assert (victim.parent / "notes.txt").exists()
    assert main(["store", str(tmp_path / "none")]) == 1
    assert "found no folder, wanted a selection store" in capsys.readouterr().err
