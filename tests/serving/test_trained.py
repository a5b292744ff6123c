"""A minute of training teaches a scorer what to keep; vLLM then answers from its checkpoint as transformers does."""

import pytest
import torch
from transformers import AutoTokenizer

from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT, GENERATORS
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.slides import open_features
from vllm_wsi.study.answering import choose
from vllm_wsi.study.judge import judge, judge_blind, select_all
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.train import train

from .conftest import slide_message
from .test_parity import start_engine

pytestmark = pytest.mark.engine
STEPS = 80


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The demo checkpoint with a scorer that knows nothing."""
    path = tmp_path_factory.mktemp("untrained") / "checkpoint"
    model = SparseWSIForConditionalGeneration.from_pretrained(DEMO_CHECKPOINT)
    model.scorer = seeded_scorer(feature_dim=model.config.feature_dim, seed=11, **model.config.scorer)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(DEMO_CHECKPOINT).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(untrained, tmp_path_factory):
    stage = {
        "name": "scorer",
        "data": {
            "generate": {"name": "haystack", "count": STEPS * 16, "num_patches": 256, "first": 500_000},
            "stretch_positions": 131072,
            "mix_positions": True,
        },
        "train": ["scorer", "projector"],
        "sparselearn": {"denoiser": "none"},
        "steps": STEPS,
        "batch_size": 16,
        "learning_rate": {"scorer": 4e-3, "projector": 1e-3},
    }
    settings = TrainSettings.model_validate({"model": {"checkpoint": str(untrained)}, "stages": [stage]})
    return train(settings, tmp_path_factory.mktemp("trained") / "run", GENERATORS)


def accuracy(checkpoint) -> tuple[float, float]:
    """Of the learned selection, and blind."""
    model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()
    encoder = ChatRenderer(AutoTokenizer.from_pretrained(checkpoint))
    items = HaystackWorld().items("test", 96, 1000)
    chosen = select_all(items, {"learned": model.selector()}, 32)["learned"]
    return judge(model, encoder, items, chosen, 32).correct.mean(), judge_blind(model, encoder, items).mean()


def test_a_short_run_raises_accuracy_far_above_the_blind_baseline(untrained, trained):
    before, blind = accuracy(untrained)
    after, _ = accuracy(trained)
    assert blind < 0.4
    assert before < 0.6
    assert after > 0.85


def test_the_trained_checkpoint_answers_the_same_in_vllm_and_in_transformers(trained, tmp_path):
    from vllm import SamplingParams

    slides = [HaystackWorld().slide("test", number, 3000) for number in range(8)]
    paths = [slide.write(tmp_path / f"{slide.name}.safetensors") for slide in slides]
    model = SparseWSIForConditionalGeneration.from_pretrained(trained).eval()
    encoder = ChatRenderer(AutoTokenizer.from_pretrained(trained))
    llm = start_engine(trained, tmp_path)
    right = 0
    for slide, path in zip(slides, paths, strict=True):
        question = slide.question(0)
        message = slide_message(path.as_uri(), question=question)
        found = llm.chat(message, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)[0].outputs[0]
        with open_features(path) as opened:
            selection = model.selector().select(opened)
        prompt = torch.tensor(encoder.question(slide.item()))
        wanted = model.generate(prompt, [selection], max_new_tokens=2, do_sample=False)[0].tolist()
        assert list(found.token_ids) == wanted
        (choice,) = choose(model, encoder, [slide.item()], [[selection]])
        assert found.text == choice.option
        right += choice.option == slide.item().answer
    assert right >= 7
