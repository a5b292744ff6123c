"""A hard stage trains on the patches that are served: clean, K of them, at the places that service gives them."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vllm_wsi.errors import SettingsError, SlideError
from vllm_wsi.haystack.recipe import GENERATORS
from vllm_wsi.model.chat_renderer import IGNORED, ChatRenderer
from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.question_text import question_ids, question_text
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.slides import FeatureFile, features_in_memory
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import SlideDataset
from vllm_wsi.training.grouping import GroupedDataset
from vllm_wsi.training.hard_selection import HardSelection
from vllm_wsi.training.model import SparseLearnModel
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.train import train

D, K = 12, 8


class Slide:
    """Features of an array, and how often they were read."""

    def __init__(self, x: np.ndarray) -> None:
        self.name, self.x, self.num_reads = f"slide-{len(x)}", x.astype(np.float32), 0

    def open(self) -> FeatureFile:
        self.num_reads += 1
        return features_in_memory(self.x, self.name)


def normal(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, D))


def with_ties(n: int) -> np.ndarray:
    return np.repeat(normal(3), n, axis=0)[:n]


def with_broken_patches(n: int) -> np.ndarray:
    """Of the best, one that is not finite, and one too large for a score."""
    x = normal(n)
    x[n // 2], x[n // 3] = np.nan, normal(7)[0] * 1e16
    return x


def talk(slide: Slide) -> SlideItem:
    return SlideItem(f"about {slide.name}", (slide,), (("<image>\nWhich?", "B"), ("Why?", "So.")))


def start(mode: str = "original", scorer: str = "patch", summary_tokens: int = 0):
    settings = TinySettings(
        feature_dim=D, hidden_size=64, num_slide_tokens=K, scorer_hidden_size=16, scorer_kind=scorer,
        max_position_embeddings=512, max_slide_positions=60, position_ids=mode,
        projector_inputs=("features",) if summary_tokens or scorer != "patch" else ("features", "score"),
        summary_tokens=summary_tokens,
    )  # fmt: skip
    model, tokenizer = new_model(settings)
    return model.eval(), ChatRenderer(tokenizer), tokenizer


def batch_of(model, chat, tokenizer, *slides: Slide, max_patches: int = 5000):
    data = SlideDataset([talk(slide) for slide in slides], chat, model.config, max_patches)
    data.selection = HardSelection(model.scorer, K, summary_tokens=model.config.summary_tokens)
    items = [data[number] for number in range(len(slides))]
    return items, collate(items, chat.slide_token_id, tokenizer.pad_token_id)


def served_loss(model, chat, slides) -> torch.Tensor:
    """Mean over all answers' tokens, by the way of service: the selector opens the slide, `prepare` lays it out."""
    losses = []
    for slide in slides:
        selection = model.selector().select(slide.open())
        ids, labels = (torch.tensor(row) for row in chat.conversation(talk(slide)))
        embeddings, positions = model.prepare(ids, [selection])
        logits = model(inputs_embeds=embeddings, position_ids=positions).logits[0]
        places = (labels != IGNORED).nonzero()[:, 0]
        before = places + selection.num_tokens - 1 - 1
        losses.append(F.cross_entropy(logits[before], labels[places], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("scorer", ["patch", "context"])
@pytest.mark.parametrize("mode", ["original", "packed"])
@pytest.mark.parametrize("make", [normal, with_ties, with_broken_patches])
def test_the_loss_of_a_hard_stage_is_that_of_the_served_prompt(mode, make, scorer):
    model, chat, tokenizer = start(mode, scorer)
    slides = [Slide(make(n)) for n in (K + 1, 41, 2100)]
    if make is not with_broken_patches:
        slides += [Slide(make(n)) for n in (1, K - 1, K)]
    _, batch = batch_of(model, chat, tokenizer, *slides)
    assert batch["features"].shape[1] == K
    with torch.no_grad():
        found, wanted = SparseLearnModel(model, None)(**batch)["loss"], served_loss(model, chat, slides)
    assert abs(float(found - wanted)) < 1e-5


@pytest.mark.parametrize("mode", ["original", "packed"])
@pytest.mark.parametrize("make", [normal, with_ties, with_broken_patches])
def test_the_summary_tokens_of_a_hard_stage_are_those_of_the_served_prompt(mode, make):
    model, chat, tokenizer = start(mode, summary_tokens=3)
    slides = [Slide(make(n)) for n in (1, K - 4, K - 3, K - 2, K, K + 1, 41, 2100) if n > 7 or make is normal]
    items, batch = batch_of(model, chat, tokenizer, *slides)
    for item, slide in zip(items, slides, strict=True):
        wanted = model.selector().select(slide.open())
        assert torch.equal(item.slides[0].indices, wanted.indices)
        assert torch.equal(item.slides[0].features, wanted.rows)
        assert item.slides[0].num_summary == wanted.num_summary_tokens
    with torch.no_grad():
        found, wanted = SparseLearnModel(model, None)(**batch)["loss"], served_loss(model, chat, slides)
    assert abs(float(found - wanted)) < 1e-5


@pytest.mark.parametrize("mode", ["original", "packed"])
@pytest.mark.parametrize("n", [1, K - 1, K, K + 1, 41, 2100])
def test_each_question_about_a_slide_has_the_patches_that_service_shows_it(mode, n):
    model, chat, tokenizer = start(mode, "question")
    model.requires_grad_(False)
    slide = Slide(normal(n))
    items = [SlideItem(text, (slide,), ((f"<image>\n{text}", "B"),)) for text in ("Which?", "Is it red, and where?")]
    data = SlideDataset(items, chat, model.config, 5000)
    data.selection = HardSelection(model.scorer, K, model.get_input_embeddings().weight)
    shown = [data[0], data[1], data[0]]
    losses = []
    for item, one in zip(items, shown, strict=False):
        query = model.query(torch.tensor(question_ids(chat.tokenizer, question_text([item.question]))))
        selection = model.selector().select(slide.open(), query=query)
        assert torch.equal(one.slides[0].indices, selection.indices)
        ids, labels = (torch.tensor(row) for row in chat.conversation(item))
        embeddings, positions = model.prepare(ids, [selection])
        logits = model(inputs_embeds=embeddings, position_ids=positions).logits[0]
        places = (labels != IGNORED).nonzero()[:, 0]
        losses.append(F.cross_entropy(logits[places + len(selection.indices) - 2], labels[places], reduction="none"))
    assert torch.equal(shown[2].slides[0].indices, shown[0].slides[0].indices)
    if n in (41, 2100):
        assert shown[0].slides[0].indices.tolist() != shown[1].slides[0].indices.tolist()
    batch = collate(shown[:2], chat.slide_token_id, tokenizer.pad_token_id)
    with torch.no_grad():
        found = SparseLearnModel(model, None)(**batch)["loss"]
    assert abs(float(found - torch.cat(losses).mean())) < 1e-5


def test_ties_are_kept_in_the_order_of_service():
    model, chat, tokenizer = start()
    slide = Slide(with_ties(100))
    (item,), _ = batch_of(model, chat, tokenizer, slide)
    assert torch.equal(item.slides[0].indices, model.selector().select(slide.open()).indices)


def test_a_slide_is_thinned_only_beyond_max_patches():
    model, chat, tokenizer = start()
    slide = Slide(normal(300))
    wanted = model.selector().select(slide.open()).indices
    (whole,), _ = batch_of(model, chat, tokenizer, slide, max_patches=300)
    (thinned,), _ = batch_of(model, chat, tokenizer, slide, max_patches=40)
    assert torch.equal(whole.slides[0].indices, wanted)
    assert not torch.equal(thinned.slides[0].indices, wanted)
    assert len(thinned.slides[0].indices) == K
    assert whole.slides[0].num_patches == thinned.slides[0].num_patches == 300
    assert (whole.slides[0].num_candidates, thinned.slides[0].num_candidates) == (300, 40)


def test_a_slide_is_read_once_unless_its_rows_or_places_are_drawn():
    model, chat, _ = start()
    for max_patches, stretch, reads in ((300, 0, 1), (40, 0, 3), (300, 1000, 3)):
        slide = Slide(normal(300))
        data = SlideDataset([talk(slide)] * 3, chat, model.config, max_patches, stretch)
        data.selection = HardSelection(model.scorer, K)
        places = [data[number].slides[0].indices for number in range(3)]
        assert slide.num_reads == reads
        assert torch.equal(places[0], places[1]) == (reads == 1)


def test_questions_that_share_a_sequence_share_the_kept_patches():
    model, chat, tokenizer = start()
    slide = Slide(normal(300))
    data = SlideDataset([talk(slide)] * 3, chat, model.config, 300)
    data.selection = HardSelection(model.scorer, K)
    grouped = GroupedDataset(data, 3)
    (item,) = (grouped[number] for number in range(len(grouped)))
    assert len(item.siblings) == 2
    assert slide.num_reads == 1
    assert torch.equal(item.slides[0].indices, model.selector().select(slide.open()).indices)
    losses = []
    for items in ([item], [data[number] for number in range(3)]):
        batch = collate(items, model.config.slide_token_id, tokenizer.pad_token_id)
        losses.append(SparseLearnModel(model, None)(**batch)["loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_later_training_of_the_scorer_changes_no_selection():
    model, chat, _ = start()
    slide, other = Slide(normal(300)), Slide(normal(300))
    data = SlideDataset([talk(slide), talk(other)], chat, model.config, 300)
    data.selection = HardSelection(model.scorer, K)
    before = data[0].slides[0].indices
    with torch.no_grad():
        for parameter in model.scorer.parameters():
            parameter.neg_()
    assert torch.equal(data[1].slides[0].indices, before)


def test_a_slide_without_a_finite_score_is_refused_by_its_name():
    model, chat, tokenizer = start()
    with pytest.raises(SlideError, match="slide-9: features: found no patch with a finite score, wanted at least one"):
        batch_of(model, chat, tokenizer, Slide(normal(9) * 1e18))


def stage(**changes):
    generate = {"name": "haystack", "count": 64, "num_patches": 24, "feature_dim": D}
    return {
        "name": "hard",
        "data": {"generate": generate, "stretch_positions": 500, "mix_positions": True},
        "train": ["projector"],
        "selection": "hard",
        "lora": {"r": 2, "alpha": 4},
        "steps": 4,
        "batch_size": 4,
        "learning_rate": {"projector": 1e-2, "lora": 1e-2},
        "trainer": {"logging_steps": 1},
    } | changes


def settings(*stages, **model) -> TrainSettings:
    new = {"feature_dim": D, "hidden_size": 64, "num_layers": 1, "num_slide_tokens": 4} | model
    return TrainSettings.of({"model": {"new": new}, "stages": list(stages)}, "run.yaml")


@pytest.mark.slow
def test_a_run_ends_with_a_hard_stage_that_leaves_the_scorer_alone(tmp_path):
    gate = {"num_slide_tokens": 4, "k_start": 8}
    rates = {"scorer": 1e-2, "denoiser": 1e-2, "projector": 1e-2}
    soft = {"name": "soft", "train": ["scorer", "projector"], "sparselearn": gate, "learning_rate": rates}
    soft = {key: value for key, value in stage(**soft).items() if key not in ("selection", "lora")}
    out = tmp_path / "run"
    of_these = {"num_slide_tokens": 6, "summary_tokens": 2}  # the gate learns to keep the other four
    after = load_file(train(settings(soft, stage(), **of_these), out, GENERATORS) / "model.safetensors")
    earlier = load_file(out / "stages" / "0-soft" / "final" / "trainable.safetensors")
    for part, same in (("scorer", True), ("projector", False)):
        named = [name for name in after if name.startswith(f"{part}.")]
        assert named
        assert all(torch.equal(after[name], earlier[f"model.{name}"]) == same for name in named)
    rows = [row for row in csv.DictReader(open(out / "log.csv", newline="")) if row["stage"] == "hard"]
    assert len(rows) == 4
    assert all(row["tau"] == "" for row in rows)


def test_a_model_with_summary_tokens_ends_with_the_stage_that_shows_them(tmp_path):
    plain = {key: value for key, value in stage().items() if key != "selection"}
    with pytest.raises(
        SettingsError, match="hard: selection: found None in the last stage of a model with 2 summary_t"
    ):
        train(settings(stage(), plain, summary_tokens=2), tmp_path / "run", GENERATORS)
    assert not (tmp_path / "run" / "settings.json").exists()  # the mended settings may be run there
    missing = stage(data={"questions": [str(tmp_path / "no.json")], "features": str(tmp_path)})
    with pytest.raises(OSError, match=r"no\.json"):
        train(settings(missing), tmp_path / "run", GENERATORS)
    assert not (tmp_path / "run" / "settings.json").exists()
    gate = plain | {"name": "soft", "sparselearn": {"num_slide_tokens": 4}, "learning_rate": RATES}
    with pytest.raises(SettingsError, match="soft: num_slide_tokens: found 4, wanted 2, as the model keeps patches"):
        train(settings(gate, stage(), summary_tokens=2), tmp_path / "run", GENERATORS)


RATES = dict.fromkeys(("scorer", "denoiser", "projector", "lora"), 1e-2)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"sparselearn": {"num_slide_tokens": 4}}, "found hard beside sparselearn, wanted a frozen scorer"),
        ({"train": ["scorer"]}, "found hard beside a scorer to train, wanted a frozen scorer"),
    ],
)
def test_a_scorer_does_not_learn_in_a_hard_stage(change, found):
    with pytest.raises(SettingsError, match=found):
        settings(stage(**change, learning_rate=RATES))
