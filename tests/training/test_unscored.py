"""A patch without a finite score has no part in training, as it has none in service; scores are fp32."""

import pytest
import torch

from vllm_wsi.errors import SlideError
from vllm_wsi.model.chat_renderer import IGNORED
from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.selection.scorer import frozen_scorer, score_slides, seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import features_in_memory
from vllm_wsi.training.model import SparseLearnModel
from vllm_wsi.training.sparselearn import SparseLearnSettings

D, K = 12, 4
BROKEN = [1e16, 1e30, float("nan"), float("inf")]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_with(scorer: str = "patch", gate: str | None = "none") -> SparseLearnModel:
    inputs = ("features", "score") if (scorer, gate) == ("patch", None) else ("features",)
    new = TinySettings(feature_dim=D, hidden_size=64, num_layers=1, num_slide_tokens=K, scorer_kind=scorer,
                       scorer_hidden_size=16, projector_inputs=inputs)  # fmt: skip
    model, _ = new_model(new)
    if gate is None:
        return SparseLearnModel(model, None)
    settings = SparseLearnSettings(num_slide_tokens=K, gate=gate, denoiser="none", k_start=K)
    return SparseLearnModel(model, settings)


def batch_of(model: SparseLearnModel, features: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """One prompt: the slide's tokens, then two of text, of which the last is the answer. `rows` are the places."""
    n, slide = features.shape[1], model.model.config.slide_token_id
    ids = torch.tensor([[slide] * n + [70, 71]])
    positions = torch.cat((rows, torch.tensor([50, 51])))[None]
    labels = torch.tensor([[IGNORED] * n + [IGNORED, 71]])
    return {
        "features": features,
        "num_candidates": torch.tensor([n]),
        "patch_mask": torch.ones(1, n, dtype=torch.bool),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": positions,
        "labels": labels,
    }


@pytest.mark.parametrize("scorer", ["patch", "context"])
@pytest.mark.parametrize("value", BROKEN)
def test_training_leaves_out_the_patches_that_service_drops(value, scorer):
    made = seeded_scorer(scorer, D, 16, seed=1)
    features = normal(30, D)
    features[7, :] = value * normal(D, seed=3)
    features[20, 5] = value
    selection = SlideSelector(frozen_scorer(made), 30).select(features_in_memory(features.numpy()))
    scores, mask, _ = score_slides(made, features[None], torch.ones(1, 30, dtype=torch.bool))
    assert mask[0].nonzero()[:, 0].tolist() == selection.indices.tolist()
    assert torch.allclose(scores[mask], selection.scores, atol=1e-5)


# The context scorer has a finite score for a patch of 1e16, and service keeps it.
@pytest.mark.parametrize(
    ("scorer", "value"), [*(("patch", value) for value in BROKEN), ("context", BROKEN[2]), ("context", BROKEN[3])]
)
@pytest.mark.parametrize("gate", [None, "noise", "none", "scale"])
def test_a_broken_patch_changes_neither_loss_nor_gradients(value, gate, scorer):
    model = model_with(scorer, gate)
    features, rows = normal(1, 30, D), torch.arange(30)
    features[0, 11] = value * normal(D, seed=3)
    rest = torch.cat((rows[:11], rows[12:]))
    found = []
    for x, places in ((features, rows), (features[:, rest], rest)):
        model.zero_grad()
        torch.manual_seed(3)
        noise = torch.randn(1, 30, D)[:, places]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda like, noise=noise: noise)
            loss = model(**batch_of(model, x, places))["loss"]
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (wanted, wanted_gradients) = found
    assert loss == pytest.approx(wanted, abs=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted_gradients[name], atol=1e-5), name
    assert any(name.startswith("model.scorer.") for name in gradients) == (gate in ("noise", "scale"))


@pytest.mark.parametrize("gate", [None, "noise"])
def test_a_slide_without_a_score_ends_the_training_in_a_sentence(gate):
    model = model_with(gate=gate)
    batch = batch_of(model, normal(1, 5, D) * 1e17, torch.arange(5))
    with pytest.raises(SlideError, match="slide 1 of 1 in the batch: features: found no patch with a finite score"):
        model(**batch)


@pytest.mark.parametrize("scorer", ["patch", "context"])
def test_under_autocast_the_scores_are_those_of_fp32(scorer, monkeypatch):
    model = model_with(scorer, "noise")
    batch = batch_of(model, normal(1, 4096, D), torch.arange(4096))
    gated = []
    monkeypatch.setattr(model.sparselearn, "forward", lambda *given: gated.append(given) or (_ for _ in ()).throw(Stop))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad(), pytest.raises(Stop):
            model.tail_logits(**batch)
    (features, scores, *_), (features_autocast, scores_autocast, *_) = gated
    assert torch.equal(scores, scores_autocast)
    assert len(scores.unique()) > 4000
    assert torch.equal(features, features_autocast)


class Stop(Exception):
    """Behind the gate nothing is needed."""
