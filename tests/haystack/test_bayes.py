"""The Bayes limit: its densities are those that the world draws from, and no other ranking keeps more evidence."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from vllm_wsi.errors import SlideError
from vllm_wsi.haystack.bayes import BayesPolicy, evidence_log_ratio
from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.selection.baselines import make_policy

SMALL = {"feature_dim": 5, "num_common": 3, "num_distractors": 2}


def by_the_textbook(x, world):
    """The log ratio, type by type, from SciPy's normal densities."""
    d, c = world.feature_dim, world.centres.astype(float)
    rest = 1 - world.lookalike_rate
    evidence = [(1 / 4, c[3 + i], world.noise) for i in range(4)]
    background = [(rest * (1 - world.distractor_rate) / 3, c[i], world.noise) for i in range(3)]
    background.append((rest * world.distractor_rate / 2, 2.5 * c[7], 2.5 * world.noise))
    background.append((rest * world.distractor_rate / 2, c[8], 0.2))
    background += [(world.lookalike_rate / 4, c[9 + i], world.noise) for i in range(4)]

    def log_density(types):
        each = [multivariate_normal(mean, deviation**2 * np.eye(d)).logpdf(x) for _, mean, deviation in types]
        return logsumexp(np.array(each).T, b=[weight for weight, *_ in types], axis=1)

    return log_density(evidence) - log_density(background)


@pytest.mark.parametrize("knobs", [{}, {"noise": 2.0}, {"lookalike_rate": 0.03}, {"shift_degrees": 40.0}])
def test_the_log_ratio_is_that_of_the_worlds_densities(knobs):
    world = HaystackWorld(**SMALL, **knobs)
    x = world.slide("test", 0, 200).features()
    assert np.allclose(evidence_log_ratio(x, world), by_the_textbook(x, world), atol=1e-6)


def test_the_densities_fit_what_the_world_draws():
    """Under the background's own density the ratio of densities has mean 1, whatever the evidence's density is."""
    world = HaystackWorld(feature_dim=4, noise=3.0, distractor_rate=0.4, lookalike_rate=0.2)
    ratios = []
    for number in range(200):
        slide = world.slide("train", number, 500)
        ratio = np.exp(evidence_log_ratio(slide.features(), world))
        ratios.append(np.delete(ratio, slide.key_patches))
    assert np.concatenate(ratios).mean() == pytest.approx(1, abs=0.05)


def recall(world, policy, n, slides):
    found = []
    for number in range(slides):
        source = world.slide("validation", number, n)
        with source.open() as slide:
            found.append(np.isin(source.key_patches, policy.select(slide).indices.numpy()).mean())
    return float(np.mean(found))


def test_it_keeps_all_evidence_of_100000_patches():
    world = HaystackWorld()
    assert recall(world, BayesPolicy(32, world), 100_000, 3) == 1


def test_it_keeps_more_than_one_who_takes_the_world_for_another():
    world = HaystackWorld(noise=2.0)
    right, wrong = BayesPolicy(32, world), BayesPolicy(32, HaystackWorld(noise=2.0, shift_degrees=45))
    assert recall(world, right, 4000, 8) > 0.85 > 0.5 > recall(world, wrong, 4000, 8)


def test_it_is_a_policy_as_the_others_are():
    world = HaystackWorld(**SMALL)
    with world.slide("test", 0, 40).open() as slide:
        for k in (1, 39, 40, 41):
            kept = BayesPolicy(k, world).select(slide)
            assert len(kept.indices) == min(k, 40)
            assert torch.equal(kept.indices, kept.indices.unique())
        assert torch.equal(
            BayesPolicy(40, world).select(slide).indices,
            make_policy("oracle", 40, rows=range(40)).select(slide).indices,
        )
        with pytest.raises(SlideError, match="d = 5, wanted 64, as the world has it"):
            BayesPolicy(4).select(slide)
