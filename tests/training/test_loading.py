"""Epochs of a long slide, workers that read them, and the look at the slides before training."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers.trainer_callback import TrainerState

from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.questions.finder import FeaturePath
from vllm_wsi.questions.items import QuestionError, SlideItem
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.slides import FeatureFile, features_in_memory, write_features
from vllm_wsi.training import loading, slide_check
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import SlideDataset
from vllm_wsi.training.hard_selection import HardSelection
from vllm_wsi.training.loading import EpochCallback, num_workers
from vllm_wsi.training.slide_check import SlideMemory
from vllm_wsi.training.slide_reading import draw_from_strata

D = 6


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("k", "n"), [(1, 2), (1, 999), (5, 6), (5, 9), (5, 10), (50, 997), (4096, 4097), (7, 100_000)])
def test_one_row_is_drawn_of_each_stratum(k, n):
    bounds = np.arange(k + 1) * n // k
    for seed in range(20):
        rows = draw_from_strata(k, n, rng(seed))
        assert rows.dtype == np.int64
        assert (bounds[:-1] <= rows).all()
        assert (rows < bounds[1:]).all()
        assert np.array_equal(rows, np.unique(rows))
        assert np.array_equal(rows, draw_from_strata(k, n, rng(seed)))


@pytest.mark.parametrize(("k", "n"), [(1, 1), (5, 1), (5, 4), (5, 5), (10_240, 10_240)])
def test_a_slide_that_is_no_longer_is_taken_whole_and_draws_nothing(k, n):
    before = rng()
    assert draw_from_strata(k, n, before).tolist() == list(range(n))
    assert before.random() == rng().random()


@pytest.mark.parametrize(("k", "n"), [(5, 6), (5, 13), (3, 30)])
def test_every_row_has_its_turn(k, n):
    one = rng()
    counts = np.bincount(np.concatenate([draw_from_strata(k, n, one) for _ in range(600)]), minlength=n)
    assert counts.min() > 0.6 * 600 * k / (n + k)  # within a stratum all rows alike


class Numbered:
    """A slide whose features say their row."""

    def __init__(self, n: int) -> None:
        self.name, self.n = f"slide-{n}", n

    def open(self) -> FeatureFile:
        return features_in_memory(np.arange(self.n * D, dtype=np.float32).reshape(self.n, D), self.name)


def talk(*slides, where: str = "talk.json, item 0") -> SlideItem:
    return SlideItem(where, slides, ((f"{'<image>' * len(slides)}\nWhat?", "x"),))


@pytest.fixture(scope="module")
def checkpoint():
    model, tokenizer = new_model(TinySettings(feature_dim=D, hidden_size=32, num_layers=1, scorer_hidden_size=0))
    return model.config, ChatRenderer(tokenizer)


def dataset(checkpoint, *items: SlideItem, most: int = 20, **options) -> SlideDataset:
    config, renderer = checkpoint
    return SlideDataset(items, renderer, config, most, **options)


def rows_of(data: SlideDataset, epoch: int) -> list[list[int]]:
    data.set_epoch(epoch)
    return [slide.indices.tolist() for number in range(len(data)) for slide in data[number].slides]


def test_an_epoch_takes_other_rows_than_the_one_before_and_always_the_same(checkpoint):
    items = [talk(Numbered(300), Numbered(47)), talk(Numbered(300))]
    data = dataset(checkpoint, *items)
    epochs = [rows_of(data, epoch) for epoch in range(3)]
    every = [tuple(rows) for epoch in epochs for rows in epoch]
    assert len(set(every)) == len(every) == 9  # of two items with one slide too
    assert rows_of(data, 1) == epochs[1]
    assert rows_of(dataset(checkpoint, *items), 2) == epochs[2]
    assert rows_of(dataset(checkpoint, *items, seed=1), 0) != epochs[0]
    (slide,) = data[1].slides
    assert torch.equal(slide.features, slide.indices[:, None] * D + torch.arange(D))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_read_the_epoch_that_was_set(checkpoint, persistent):
    data = dataset(checkpoint, *[talk(Numbered(300))] * 5)
    wanted = [rows_of(data, epoch) for epoch in range(3)]
    loader = DataLoader(data, 1, num_workers=2, persistent_workers=persistent, collate_fn=list)
    for epoch in (0, 1, 2, 1):
        data.set_epoch(epoch)
        assert [item.slides[0].indices.tolist() for (item,) in loader] == wanted[epoch]


@pytest.mark.parametrize("is_hard", [False, True])
def test_workers_make_the_batches_that_the_process_itself_makes(checkpoint, is_hard):
    data = dataset(checkpoint, *[talk(Numbered(n)) for n in (300, 7, 300, 41)])
    if is_hard:
        data.selection = HardSelection(seeded_scorer("patch", D, 4, seed=0), num_slide_tokens=5)
    make = partial(collate, slide_token_id=data.config.slide_token_id, pad_token_id=0)
    wanted = list(DataLoader(data, 2, collate_fn=make))
    found = list(DataLoader(data, 2, collate_fn=make, num_workers=1, timeout=120))
    assert len(found) == len(wanted) == 2
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("said", "epoch"), [(None, 0), (0, 0), (0.99, 0), (1.0, 1), (2.5, 2)])
def test_the_callback_tells_the_dataset_the_epoch_that_begins(said, epoch):
    class Told:
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data = Told()
    EpochCallback(data).on_epoch_begin(None, TrainerState(epoch=said), None)
    assert data.epoch == epoch


def test_workers_are_this_processes_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(loading.os, "cpu_count", lambda: 12)
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(loading, "LEAST_SHARED_MEMORY", 0)
    assert [num_workers(asked) for asked in (0, 1, 30, None)] == [0, 1, 30, loading.MAX_WORKERS]
    for processes, wanted in (("2", 6), ("12", 1), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert num_workers(None) == wanted
    monkeypatch.setattr(loading, "LEAST_SHARED_MEMORY", 1 << 60)
    assert (num_workers(None), num_workers(3)) == (0, 3)
    monkeypatch.setattr(loading, "LEAST_SHARED_MEMORY", 0)
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: False)
    assert (num_workers(None), num_workers(3)) == (0, 3)


@pytest.fixture
def slides(tmp_path):
    """Items about a good file, a slide of another size, and one without a finite patch."""
    sizes = {
        "good": (np.ones((3, D)), "uni"),
        "wide": (np.ones((3, D + 1)), "uni"),
        "nan": (np.full((3, D), np.nan), ""),
    }
    for name, (features, encoder) in sizes.items():
        write_features(tmp_path / f"{name}.safetensors", features.astype(np.float32), metadata={"encoder": encoder})
    return [talk(FeaturePath(tmp_path / f"{name}.safetensors"), where=f"q.json, item {name}") for name in sizes]


@pytest.fixture
def opened(monkeypatch):
    """Names of the feature files that are opened."""
    names: list[str] = []
    before = FeaturePath.open

    def open_and_note(self):
        names.append(self.path.stem)
        return before(self)

    monkeypatch.setattr(FeaturePath, "open", open_and_note)
    return names


def test_good_files_are_looked_at_once_until_they_change(checkpoint, slides, opened, tmp_path):
    path = tmp_path / "slides.json"
    for _ in range(2):
        found = dataset(checkpoint, *slides).problems(memory=SlideMemory(path))
        assert [problem.split(":")[0] for problem in found] == ["q.json, item wide", "q.json, item nan"]
    # A slide without a finite patch is read again: it may be mended under the same name and time.
    assert opened == ["good", "wide", "nan", "nan"]
    good = tmp_path / "good.safetensors"
    write_features(good, np.full((3, D), np.nan, np.float32))
    found = dataset(checkpoint, slides[0]).problems(memory=SlideMemory(path))
    assert "found no patch with finite features" in found[0]
    write_features(good, np.ones((30, D), np.float32))
    data = dataset(checkpoint, slides[0])
    assert data.problems(memory=SlideMemory(path)) == []
    assert "the longest 30" in data.thinning()
    again = dataset(checkpoint, slides[0])
    assert again.problems(memory=SlideMemory(path)) == []
    assert again.thinning() == data.thinning()
    assert opened[4:] == ["good", "good"]


def test_what_was_only_opened_is_read_when_reading_is_asked_for(checkpoint, slides, opened, tmp_path):
    memory = SlideMemory(tmp_path / "slides.json")
    for read, wanted in ((False, 1), (False, 1), (True, 2), (False, 2), (True, 2)):
        assert dataset(checkpoint, slides[0]).problems(read, memory=memory) == []
        assert len(opened) == wanted


def test_remembered_slides_are_held_against_the_encoder_too(checkpoint, slides, opened, tmp_path):
    config, renderer = checkpoint
    path = tmp_path / "slides.json"
    other = type(config)(**(config.to_dict() | {"encoder": "uni_v2"}))
    for _ in range(2):
        (problem,) = SlideDataset(slides[:1], renderer, other, 20).problems(memory=SlideMemory(path))
        assert "good.safetensors: encoder: found features of 'uni', wanted 'uni_v2'" in problem
    assert opened == ["good"]


def test_remembered_slides_are_held_against_the_size_of_patches_too(checkpoint, tmp_path):
    config, renderer = checkpoint
    metadata = {"encoder": "uni", "patch_size_level0": "224", "mpp": "0.5"}
    features = np.ones((20, config.feature_dim), np.float32)
    write_features(tmp_path / "small.safetensors", features, metadata=metadata)
    item = talk(FeaturePath(tmp_path / "small.safetensors"), where="small")
    other = type(config)(**(config.to_dict() | {"encoder": None, "patch_um": 200.0}))
    for _ in range(2):
        memory = SlideMemory(tmp_path / "slides.json")
        (problem,) = SlideDataset([item], renderer, other, 20).problems(memory=memory)
        assert "small.safetensors: patches: found an edge of 112 um, wanted 200 um" in problem


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 0, "slides": []}', '{"version": 2, "slides": [[1, 2]]}'])
def test_a_damaged_memory_is_begun_anew(checkpoint, slides, opened, tmp_path, text):
    path = tmp_path / "slides.json"
    path.write_text(text)
    assert dataset(checkpoint, slides[0]).problems(memory=SlideMemory(path)) == []
    assert json.loads(path.read_text())["version"] == slide_check.VERSION
    assert dataset(checkpoint, slides[0]).problems(memory=SlideMemory(path)) == []
    assert opened == ["good"]


def test_a_check_that_is_stopped_remembers_what_it_read(checkpoint, slides, tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    path = tmp_path / "slides.json"
    read = SlideMemory.facts

    def stop_at_the_second(self, source, *arguments):
        return stop(self) if source.path.stem == "wide" else read(self, source, *arguments)

    monkeypatch.setattr(SlideMemory, "facts", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        dataset(checkpoint, *slides).problems(memory=SlideMemory(path))
    assert len(json.loads(path.read_text())["slides"]) == 1


def test_check_raises_what_problems_says(checkpoint, slides):
    with pytest.raises(QuestionError) as caught:
        dataset(checkpoint, *slides).check()
    assert caught.value.problems == dataset(checkpoint, *slides).problems()


def slidechat(path, n: int) -> FeaturePath:
    header = ",".join([*map(str, range(D)), "patch_name"])
    lines = [",".join([*map(str, row), "1_2.jpeg"]) for row in rng().standard_normal((n, D)).tolist()]
    path.write_text("\n".join([header, *lines]))
    return FeaturePath(path)


def test_a_slow_format_is_told_with_what_converting_would_save(checkpoint, slides, tmp_path):
    quick, csv = slides[0], talk(slidechat(tmp_path / "a.csv", 50))
    data = dataset(checkpoint, quick, csv)
    assert data.problems(read=False) == []
    said = data.slow_reading()
    assert said.startswith("a.csv is a SlideChat csv: its 20 patches took ")
    assert "`vllm-wsi convert FEATURES --out DIR`" in said
    alone = dataset(checkpoint, quick)
    assert alone.problems() == []
    assert alone.slow_reading() is None
