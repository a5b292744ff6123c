"""Leakage by perturbation, on an untrained checkpoint: what moves a kept patch when a dropped one changes."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.study.judge import select_all
from vllm_wsi.study.leakage import NUM_PERTURBED, measure_leakage
from vllm_wsi.study.soft import judge_soft, served_gate
from vllm_wsi.training.dataset import SlideDataset
from vllm_wsi.training.sparselearn import SparseLearn, SparseLearnSettings

K = 32


@pytest.fixture(scope="module")
def demo():
    model = SparseWSIForConditionalGeneration.from_pretrained(DEMO_CHECKPOINT).eval()
    return model, ChatRenderer(AutoTokenizer.from_pretrained(DEMO_CHECKPOINT))


def leakage(demo, num_patches=(80, 120), tau_end=0.1, seed=0, **switches):
    model, renderer = demo
    world = HaystackWorld()
    items = [world.slide("test", number, n).item() for number, n in enumerate(num_patches)]
    torch.manual_seed(1)
    gate = SparseLearn(64, SparseLearnSettings(num_slide_tokens=K, tau_end=tau_end, **switches))
    if gate.denoiser is not None:  # as it is made it changes nothing
        torch.nn.init.normal_(gate.denoiser.out.weight, std=0.1)
        torch.nn.init.normal_(gate.denoiser.down.weight, std=0.1)
    chosen = select_all(items, {"learned": model.selector()}, K)["learned"]
    dataset = SlideDataset(items, renderer, model.config, 4096)
    return measure_leakage(model, served_gate(model, gate), dataset, chosen, seed)


@pytest.mark.parametrize("gate", ["noise", "scale", "none"])
@pytest.mark.parametrize("denoiser", ["diagonal", "none"])
def test_no_kept_patch_moves_behind_a_denoiser_that_sees_each_alone(demo, gate, denoiser):
    found = leakage(demo, gate=gate, denoiser=denoiser)
    assert found.alpha_held.shape == (2 * NUM_PERTURBED * K,)
    assert (found.alpha_held == 0).all()


@pytest.mark.parametrize("gate", ["noise", "scale", "none"])
def test_kept_patches_move_behind_a_denoiser_that_sees_all(demo, gate):
    found = leakage(demo, tau_end=1.0, gate=gate, denoiser="global")
    per_perturbation = found.alpha_held.reshape(-1, K)
    assert (per_perturbation.max(axis=1) > 1e-6).mean() > 0.5
    assert np.isfinite(found.alpha_held).all()


def test_kept_patches_move_a_little_through_the_scores_of_the_slide_whatever_the_denoiser(demo):
    found = leakage(demo, denoiser="diagonal", tau_end=1.0)
    assert 0 < found.rescored.mean() < 0.5


def test_without_a_gate_scores_move_nothing(demo):
    assert (leakage(demo, gate="none", denoiser="none").rescored == 0).all()


def test_gumbels_noise_is_the_same_before_and_after(demo):
    assert (leakage(demo, relaxation="gumbel").alpha_held == 0).all()


def test_a_slide_that_is_kept_whole_or_nearly_so(demo):
    found = leakage(demo, num_patches=(K - 1, K), denoiser="global")
    assert (found.num_slides, len(found.alpha_held), len(found.rescored)) == (0, 0, 0)
    assert found.columns()["leakage_max"] == ""
    found = leakage(demo, num_patches=(K, K + 1), denoiser="global", gate="none")
    assert (found.num_slides, len(found.alpha_held)) == (1, K)
    assert found.columns()["leakage_max"] > 0


def test_columns_are_mean_and_most_and_repeat_with_the_seed(demo):
    found = leakage(demo, tau_end=1.0, denoiser="global")
    columns = found.columns()
    assert columns["leakage_slides"] == 2
    assert columns["leakage_mean"] == pytest.approx(found.alpha_held.mean(), rel=0.01)
    assert columns["leakage_max"] == pytest.approx(found.alpha_held.max(), rel=0.01)
    assert 0 < columns["leakage_mean"] < columns["leakage_max"]
    assert leakage(demo, tau_end=1.0, denoiser="global").columns() == columns
    assert leakage(demo, tau_end=1.0, denoiser="global", seed=1).columns() != columns


def test_soft_mass_is_that_on_the_patches_that_are_served(demo):
    """Gumbel's alpha is 0 or 1: its own K best hold all of it, the served ones do not."""
    model, renderer = demo
    items = HaystackWorld().items("test", 2, 200)
    chosen = select_all(items, {"learned": model.selector()}, K)["learned"]
    shares = {}
    for relaxation, tau in (("lapsum", 1e-4), ("lapsum", 2.0), ("gumbel", 2.0)):
        settings = SparseLearnSettings(num_slide_tokens=K, denoiser="none", relaxation=relaxation, tau_end=tau)
        shares[relaxation, tau] = judge_soft(model, renderer, items, SparseLearn(64, settings), chosen).mass_on_hard
    assert shares["lapsum", 1e-4] == pytest.approx(1)
    assert (shares["lapsum", 2.0] < 0.9).all()
    assert (shares["gumbel", 2.0] < 0.9).all()
    assert (shares["gumbel", 2.0] > K / 200).all()
