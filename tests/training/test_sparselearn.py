"""SparseLearn's training path: the gates, the denoisers, the schedules, padding, and where gradients go."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from vllm_wsi.selection.scorer import PatchScorer, seeded_scorer
from vllm_wsi.training.soft_topk import soft_topk
from vllm_wsi.training.sparselearn import (
    ALPHA_FLOOR,
    Denoiser,
    Gated,
    SparseLearn,
    SparseLearnSettings,
    hard_topk,
    standardise,
)

D, K = 24, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patches(*shape: int, seed: int = 0) -> Tensor:
    return nn.functional.layer_norm(normal(*shape, seed=seed), shape[-1:])


def everywhere(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def make(feature_dim: int = D, tau: float = 0.5, k: int = K, **settings) -> SparseLearn:
    """With k and tau as they are at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = SparseLearn(feature_dim, SparseLearnSettings(num_slide_tokens=k, **{"denoiser": "none", **settings}))
    made.num_slide_tokens.fill_(k)
    made.tau.fill_(tau)
    return made


def seeded(module: SparseLearn, features: Tensor, scores: Tensor, mask: Tensor, seed: int = 5) -> Gated:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return module(features, scores, mask)


def randomised(module: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module


def test_the_noise_gate_keeps_the_variance_of_each_patch_whatever_its_alpha():
    x, mask = patches(1, 43, 8192), everywhere(1, 43)
    gated, alpha = seeded(make(8192, k=17, tau=0.3), x, normal(1, 43), mask)
    assert alpha.min() < 0.05
    assert alpha.max() > 0.95
    assert ((alpha > 0.2) & (alpha < 0.8)).sum() > 5
    assert (gated.square().mean(dim=-1) - 1).abs().max() < 0.1
    # What is left of the patch itself is sqrt(alpha).
    assert ((gated * x).mean(dim=-1) - alpha.sqrt()).abs().max() < 0.06


@pytest.mark.parametrize("n", [1, K - 1, K])
def test_a_slide_of_at_most_k_patches_passes_the_noise_gate_bit_for_bit(n):
    x = patches(2, n, D)
    gated, alpha = make()(x, normal(2, n), everywhere(2, n))
    assert torch.equal(gated, x)
    assert torch.equal(alpha, torch.ones(2, n))


def test_at_the_hard_end_kept_patches_are_clean_and_the_others_are_noise_alone():
    module, scores, mask = make(tau=1e-5), normal(1, 61), everywhere(1, 61)
    x, other = patches(1, 61, D), patches(1, 61, D, seed=1)
    gated, alpha = seeded(module, x, scores, mask)
    kept = hard_topk(scores, K, mask).bool()
    assert torch.equal(alpha, kept.float())
    assert torch.equal(gated[kept], x[kept])
    assert torch.equal(gated[~kept], seeded(module, other, scores, mask).features[~kept])
    assert 0.9 < gated[~kept].std() < 1.1


def test_noise_is_fresh_in_each_call_and_follows_torchs_seed():
    module, x, scores, mask = make(), patches(1, 50, D), normal(1, 50), everywhere(1, 50)
    one, other = module(x, scores, mask), module(x, scores, mask)
    assert torch.equal(one.alpha, other.alpha)
    assert (one.features != other.features).any(dim=-1).all()
    assert torch.equal(seeded(module, x, scores, mask).features, seeded(module, x, scores, mask).features)


def test_the_scale_gate_is_alpha_times_the_patch_and_draws_nothing():
    x, scores, mask = patches(3, 33, D), normal(3, 33), everywhere(3, 33)
    before = torch.get_rng_state()
    gated, alpha = make(gate="scale")(x, scores, mask)
    assert torch.equal(gated, alpha[..., None] * x)
    assert torch.equal(alpha, soft_topk(standardise(scores, mask), K, 0.5, mask))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_gate_every_patch_passes_as_it_is():
    x = patches(3, 33, D)
    assert torch.equal(make(gate="none")(x, normal(3, 33), everywhere(3, 33)).features, x)


@pytest.mark.parametrize("is_global", [False, True])
def test_an_untrained_denoiser_changes_no_bit(is_global):
    x = normal(2, 37, 128)
    assert torch.equal(Denoiser(128, is_global)(x, everywhere(2, 37)), x)


@pytest.mark.parametrize("is_global", [False, True])
def test_gradients_reach_the_untrained_denoisers_last_layers_alone(is_global):
    denoiser = Denoiser(64, is_global)
    (denoiser(normal(2, 9, 64), everywhere(2, 9)) * normal(2, 9, 64, seed=1)).sum().backward()
    assert denoiser.out.weight.grad.abs().max() > 0
    assert denoiser.down.weight.grad.abs().max() > 0
    assert not denoiser.value.weight.grad.any()
    assert not denoiser.up.weight.grad.any()


def encoder_layer(denoiser: Denoiser, query_key: nn.Linear) -> nn.TransformerEncoderLayer:
    """Torch's own pre-norm block with the denoiser's weights."""
    d = denoiser.value.in_features
    layer = nn.TransformerEncoderLayer(d, denoiser.num_heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
    layer.self_attn.in_proj_weight.data = torch.cat((query_key.weight, denoiser.value.weight))
    layer.self_attn.in_proj_bias.data = torch.cat((query_key.bias, denoiser.value.bias))
    layer.self_attn.out_proj, layer.linear1, layer.linear2 = denoiser.out, denoiser.up, denoiser.down
    layer.norm1, layer.norm2 = denoiser.value_norm, denoiser.mlp_norm
    return layer


@pytest.mark.parametrize("d", [24, 128])
def test_the_diagonal_denoiser_is_ordinary_attention_with_an_identity_mask(d):
    denoiser, x = randomised(Denoiser(d)), normal(3, 17, d)
    layer = encoder_layer(denoiser, randomised(nn.Linear(d, 2 * d), seed=9))
    others = ~torch.eye(17, dtype=torch.bool)
    wanted = layer(x, src_mask=others)
    assert torch.allclose(denoiser(x, everywhere(3, 17)), wanted, atol=1e-5 * wanted.detach().abs().max().item())


@pytest.mark.parametrize("d", [24, 128])
def test_the_global_denoiser_is_torchs_own_pre_norm_encoder_block(d):
    denoiser, x = randomised(Denoiser(d, is_global=True)), normal(3, 17, d)
    mask = everywhere(3, 17)
    mask[1, 5:] = False
    wanted = encoder_layer(denoiser, denoiser.query_key)(x, src_key_padding_mask=~mask)
    assert torch.allclose(denoiser(x, mask)[mask], wanted[mask], atol=1e-5 * wanted.detach().abs().max().item())


def test_no_patch_changes_a_bit_of_another_in_the_diagonal_denoiser():
    denoiser, x, mask = randomised(Denoiser(D)), normal(1, 41, D), everywhere(1, 41)
    before = denoiser(x, mask)
    for j in (0, 7, 40):
        changed = x.clone()
        changed[:, j] = 1e3 * normal(D, seed=j)
        moved = (denoiser(changed, mask) != before).any(dim=-1)[0]
        assert moved.nonzero().flatten().tolist() == [j]


def test_patches_mix_in_the_global_denoiser_but_never_with_padding():
    denoiser, x, mask = randomised(Denoiser(D, is_global=True)), normal(2, 41, D), everywhere(2, 41)
    mask[1, 29:] = False
    before = denoiser(x, mask)
    changed = x.clone()
    changed[:, 3] *= -1
    assert (denoiser(changed, mask) != before).any(dim=-1)[0].all()
    for content in (torch.zeros(()), torch.tensor(-1e6), 1e4 * normal(2, 41, D, seed=1)):
        padded = torch.where(mask[..., None], x, content)
        assert torch.equal(denoiser(padded, mask)[mask], before[mask])
    assert torch.allclose(before[1, :29], denoiser(x[1:, :29], everywhere(1, 29))[0], atol=1e-4)


def gradients(scorer: PatchScorer, module: SparseLearn, shown: Tensor, scored: Tensor) -> list[Tensor | None]:
    scorer.zero_grad()
    mask = everywhere(*scored.shape[:2])
    gated = seeded(module, shown, scorer(scored, mask), mask).features
    if not gated.requires_grad:
        return [None for _ in scorer.parameters()]
    (gated * normal(*gated.shape, seed=11)).sum().backward()
    return [parameter.grad for parameter in scorer.parameters()]


@pytest.mark.parametrize("denoiser", ["none", "diagonal", "global"])
@pytest.mark.parametrize("relaxation", ["lapsum", "gumbel"])
@pytest.mark.parametrize("gate", ["noise", "scale"])
def test_a_loss_on_the_gated_patches_teaches_every_weight_of_the_scorer(gate, relaxation, denoiser):
    scorer, x = seeded_scorer("patch", D, 16, seed=2), patches(2, 45, D)
    found = gradients(scorer, make(gate=gate, relaxation=relaxation, denoiser=denoiser), x, x)
    *weights, last_bias = found
    assert all(gradient.isfinite().all() and gradient.abs().max() > 1e-4 for gradient in weights)
    assert last_bias.abs().max() < 1e-3  # a shift of all scores of a slide changes nothing


def test_the_scorer_learns_through_the_noise_itself_too():
    scorer, x = seeded_scorer("patch", D, 16, seed=2), patches(2, 45, D)
    nothing = torch.zeros_like(x)
    assert gradients(scorer, make(), nothing, x)[0].abs().max() > 1e-4
    assert not gradients(scorer, make(gate="scale"), nothing, x)[0].any()


@pytest.mark.parametrize("denoiser", ["none", "diagonal"])
def test_without_a_gate_the_scorer_learns_nothing(denoiser):
    scorer, x = seeded_scorer("patch", D, 16, seed=2), patches(2, 45, D)
    assert gradients(scorer, make(gate="none", denoiser=denoiser), x, x) == [None] * 6


@pytest.mark.parametrize("tau", [1e-4, 0.1, 2.0])
@pytest.mark.parametrize("relaxation", ["lapsum", "gumbel"])
def test_gradients_are_finite_where_shares_vanish(relaxation, tau):
    scores = normal(2, 300).mul(50).requires_grad_()
    module = make(relaxation=relaxation, tau=tau)
    (module(patches(2, 300, D), scores, everywhere(2, 300)).features * normal(2, 300, D)).sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("relaxation", ["lapsum", "gumbel"])
@pytest.mark.parametrize("gate", ["noise", "scale", "none"])
def test_a_patch_reaches_the_others_through_its_score_alone(gate, relaxation):
    module = make(gate=gate, relaxation=relaxation, denoiser="diagonal")
    randomised(module.denoiser)
    x, scores, mask = patches(2, 45, D), normal(2, 45), everywhere(2, 45)
    before = seeded(module, x, scores, mask)
    changed = x.clone()
    best = int(scores[0].argmax())
    changed[0, best] *= -3
    after = seeded(module, changed, scores, mask)
    assert torch.equal(after.alpha, before.alpha)
    moved = (after.features != before.features).any(dim=-1)
    assert moved.nonzero().tolist() == [[0, best]]


def test_a_higher_score_takes_from_all_others_of_its_slide_and_of_no_other_slide():
    module, x, mask = make(), patches(2, 45, D), everywhere(2, 45)
    scores = normal(2, 45)
    before = module(x, scores, mask).alpha
    scores[0, 9] += 2
    after = module(x, scores, mask).alpha
    assert after[0, 9] > before[0, 9]
    assert torch.equal(after[1], before[1])
    assert torch.allclose(after.sum(dim=-1), torch.tensor(float(K)), atol=1e-4)


def test_scores_are_standardised_over_the_patches_of_each_slide():
    scores, mask = normal(3, 50) * torch.tensor([[1.0], [100.0], [0.01]]) + 7, everywhere(3, 50)
    mask[1, 31:] = False
    mask[2, ::2] = False
    found = standardise(scores, mask)
    for row in range(3):
        own = scores[row, mask[row]]
        wanted = (own - own.mean()) / (own.var(correction=0) + 1e-6).sqrt()
        assert torch.allclose(found[row, mask[row]], wanted, atol=1e-4)
        assert not found[row, ~mask[row]].any()


def test_equal_scores_and_single_patches_standardise_to_0():
    assert not standardise(torch.full((2, 9), 3.0), everywhere(2, 9)).any()
    assert not standardise(torch.tensor([[5.0]]), everywhere(1, 1)).any()
    assert not standardise(normal(1, 4), ~everywhere(1, 4)).any()


@pytest.mark.parametrize("content", [1e4, -3e38, math.nan, math.inf])
@pytest.mark.parametrize("relaxation", ["lapsum", "gumbel"])
def test_scores_of_padding_change_no_bit(relaxation, content):
    module, x, scores, mask = make(relaxation=relaxation), patches(3, 40, D), normal(3, 40), everywhere(3, 40)
    mask[0, 33:], mask[1, 3:] = False, False
    before = seeded(module, x, scores, mask)
    after = seeded(module, x, scores.masked_fill(~mask, content), mask)
    assert torch.equal(after.alpha, before.alpha)
    assert torch.equal(after.features[mask], before.features[mask])
    assert not before.alpha[~mask].any()
    assert torch.equal(before.alpha[1, :3], torch.ones(3))
    assert torch.allclose(before.alpha.sum(dim=-1), torch.tensor([K, 3.0, K]), atol=1e-4)


@pytest.mark.parametrize("denoiser", ["none", "diagonal", "global"])
@pytest.mark.parametrize("gate", ["noise", "scale"])
def test_finite_features_of_padding_change_no_bit_and_others_none_but_in_the_global_denoiser(gate, denoiser):
    module, x, scores, mask = make(gate=gate, denoiser=denoiser), patches(2, 40, D), normal(2, 40), everywhere(2, 40)
    if module.denoiser is not None:
        randomised(module.denoiser)
    mask[0, 33:] = False
    before = seeded(module, x, scores, mask).features[mask]
    contents = [torch.zeros(()), 1e6 * normal(2, 40, D, seed=1)]
    if denoiser != "global":
        contents += [torch.tensor(math.inf), torch.tensor(math.nan)]
    for content in contents:
        padded = torch.where(mask[..., None], x, content)
        assert torch.equal(seeded(module, padded, scores, mask).features[mask], before)


@pytest.mark.parametrize("denoiser", ["none", "diagonal", "global"])
def test_a_padded_slide_has_the_output_of_the_slide_alone(denoiser):
    module = make(denoiser=denoiser, gate="scale")
    if module.denoiser is not None:
        randomised(module.denoiser)
    x, scores, mask = patches(1, 40, D), normal(1, 40), everywhere(1, 40)
    mask[0, 29:] = False
    whole, alone = module(x, scores, mask), module(x[:, :29], scores[:, :29], mask[:, :29])
    assert torch.allclose(whole.alpha[:, :29], alone.alpha, atol=1e-6)
    assert torch.allclose(whole.features[:, :29], alone.features, atol=1e-3)


def test_tau_falls_on_a_cosine_and_stays():
    settings = SparseLearnSettings(tau_start=2.0, tau_end=0.1, tau_fraction=0.8)
    taus = [settings.tau(step / 1000) for step in range(1001)]
    assert taus[0] == 2.0
    assert taus[400] == pytest.approx(1.05)
    assert taus[800:] == [pytest.approx(0.1)] * 201
    assert all(later < earlier for earlier, later in pairwise(taus[:801]))
    assert settings.tau(0.2) == pytest.approx(0.1 + 1.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert SparseLearnSettings(tau_fraction=0.0).tau(0.0) == pytest.approx(0.1)


def test_k_falls_geometrically_and_stays():
    settings = SparseLearnSettings(num_slide_tokens=32, k_start=256, k_fraction=0.6)
    kept = [settings.k(step / 1000) for step in range(1001)]
    assert kept[0] == 256
    assert kept[200] in (127, 128)  # rounded down, as the power falls
    assert kept[400] in (63, 64)
    assert kept[600:] == [32] * 401
    assert all(later <= earlier for earlier, later in pairwise(kept))
    assert all(type(k) is int for k in kept)
    assert SparseLearnSettings(k_fraction=0.0).k(0.0) == 32


@pytest.mark.parametrize(("start", "end"), [(257, 31), (100, 7), (33, 32), (1000, 1)])
def test_k_of_any_ends_never_falls_below_the_last(start, end):
    kept = [SparseLearnSettings(num_slide_tokens=end, k_start=start).k(step / 777) for step in range(778)]
    assert (kept[0], kept[-1], min(kept)) == (start, end, end)


@pytest.mark.parametrize("start", [1, 31, 32])
def test_k_is_constant_where_it_starts_no_higher_than_it_ends(start):
    settings = SparseLearnSettings(num_slide_tokens=32, k_start=start)
    assert {settings.k(step / 50) for step in range(51)} == {32}


def test_tau_and_k_travel_in_the_state_dict():
    module = SparseLearn(D, SparseLearnSettings())
    assert (float(module.tau), int(module.num_slide_tokens)) == (2.0, 256)
    module.set_progress(0.4)
    state = module.state_dict()
    resumed = SparseLearn(D, SparseLearnSettings())
    resumed.load_state_dict(state)
    assert float(resumed.tau) == pytest.approx(1.05)
    assert int(resumed.num_slide_tokens) == int(module.num_slide_tokens) < 128
    assert not {"tau", "num_slide_tokens"} & {name for name, _ in resumed.named_parameters()}


def test_a_denoiser_goes_on_from_one_of_its_own_kind_alone():
    trained = SparseLearn(D, SparseLearnSettings())
    randomised(trained.denoiser)
    again = SparseLearn(D, SparseLearnSettings(num_slide_tokens=9), trained)
    for one, other in zip(trained.denoiser.parameters(), again.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one is not other
    assert not SparseLearn(D, SparseLearnSettings(denoiser="global"), trained).denoiser.down.weight.any()
    assert SparseLearn(D, SparseLearnSettings(denoiser="none"), trained).denoiser is None


def test_the_gate_stays_in_eval_mode():
    module, x, scores, mask = make(), patches(1, 99, D), normal(1, 99), everywhere(1, 99)
    wanted, found = seeded(module.train(), x, scores, mask), seeded(module.eval(), x, scores, mask)
    assert torch.equal(found.features, wanted.features)
    assert not torch.equal(found.features, x)


def test_progress_changes_how_many_patches_pass():
    module, x, scores, mask = (
        SparseLearn(D, SparseLearnSettings()),
        patches(1, 999, D),
        normal(1, 999),
        everywhere(1, 999),
    )
    for progress, k in ((0.0, 256), (0.31, 87), (0.6, 32), (1.0, 32)):
        module.set_progress(progress)
        assert module(x, scores, mask).alpha.sum().item() == pytest.approx(k, abs=1e-3)


@pytest.mark.parametrize("tau", [0.1, 0.7, 2.0])
def test_gumbel_shares_are_exactly_0_or_1_and_sum_to_k(tau):
    module, x, scores = make(relaxation="gumbel", tau=tau, gate="scale"), patches(5, 200, D), normal(5, 200)
    mask = everywhere(5, 200)
    mask[0, 150:], mask[1, 5:] = False, False
    gated, alpha = module(x, scores, mask)
    assert set(alpha.unique().tolist()) == {0.0, 1.0}
    assert alpha.sum(dim=-1).tolist() == [K, 5, K, K, K]
    assert torch.equal(gated, x * alpha[..., None])


def test_gumbel_keeps_patches_of_the_noise_gate_bit_for_bit():
    module, x, mask = make(relaxation="gumbel"), patches(5, 200, D), everywhere(5, 200)
    gated, alpha = module(x, normal(5, 200), mask)
    assert torch.equal(gated[alpha == 1], x[alpha == 1])
    assert (gated[alpha == 0] != x[alpha == 0]).any(dim=-1).all()


def test_gumbel_draws_other_patches_in_each_call_and_the_better_ones_more_often():
    module, scores = make(relaxation="gumbel"), normal(1, 60).sort().values
    x, mask = patches(1, 60, D), everywhere(1, 60)
    shares = torch.stack([module(x, scores, mask).alpha[0] for _ in range(100)])
    assert len(shares.unique(dim=0)) > 50
    assert shares[:, 40:].sum() > 3 * shares[:, :40].sum()


def test_gumbel_has_the_gradient_of_the_soft_shares():
    scores, weights, mask = normal(2, 80).requires_grad_(), normal(2, 80, seed=1), everywhere(2, 80)
    module = make(relaxation="gumbel")
    (seeded(module, patches(2, 80, D), scores, mask).alpha * weights).sum().backward()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        uniform = torch.rand(2, 80).clamp(1e-9, 1 - 1e-7)
    again = scores.detach().clone().requires_grad_()
    soft = soft_topk(standardise(again, mask) - 0.5 * torch.log(-torch.log(uniform)), K, 0.5, mask)
    (soft * weights).sum().backward()
    assert scores.grad.abs().max() > 1e-3
    assert torch.allclose(scores.grad, again.grad, atol=1e-6)


def test_hard_topk_prefers_the_lower_row_in_a_tie():
    scores = torch.tensor([[1.0, 2, 2, 0, 2, 2], [5, 5, 5, 5, 5, 5]])
    assert hard_topk(scores, 3, everywhere(2, 6)).tolist() == [[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0]]
    many = torch.randint(0, 3, (4, 5001), generator=torch.Generator().manual_seed(0)).float()
    found = hard_topk(many, 31, everywhere(4, 5001))
    for row in range(4):
        best = (many[row] == 2).nonzero().flatten()
        assert torch.equal(found[row].nonzero().flatten(), best[:31])


def test_hard_topk_keeps_the_best_of_the_mask_alone():
    scores, mask = normal(4, 99), torch.rand(4, 99, generator=torch.Generator().manual_seed(1)) > 0.4
    scores[0, ~mask[0]] = 1e9
    mask[3] = False
    mask[3, [2, 50]] = True
    found = hard_topk(scores, 31, mask)
    for row in range(3):
        own = mask[row].nonzero().flatten()
        kept = own[scores[row, own].topk(31).indices].sort().values
        assert torch.equal(found[row].nonzero().flatten(), kept)
    assert found[3].nonzero().flatten().tolist() == [2, 50]
    assert set(found.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("n", [1, K - 1, K, K + 1])
def test_hard_topk_keeps_all_patches_where_there_are_no_more_than_k(n):
    assert hard_topk(normal(2, n), K, everywhere(2, n)).sum(dim=-1).tolist() == [min(n, K)] * 2


@pytest.mark.parametrize("gate", ["noise", "scale", "none"])
@pytest.mark.parametrize("denoiser", ["none", "diagonal", "global"])
def test_under_autocast_half_precision_comes_out_as_the_same_fp32(gate, denoiser):
    module = make(gate=gate, denoiser=denoiser)
    if module.denoiser is not None:
        randomised(module.denoiser)
    x, scores, mask = patches(2, 40, D).bfloat16(), normal(2, 40).bfloat16(), everywhere(2, 40)
    wanted = seeded(module, x.float(), scores.float(), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = seeded(module, x, scores, mask)
    assert found.features.dtype == found.alpha.dtype == torch.float32
    assert torch.equal(found.alpha, wanted.alpha)
    assert torch.equal(found.features, wanted.features)


def test_signal_and_noise_share_the_variance_at_every_alpha():
    module, x, mask = make(gate="noise", tau=0.1), torch.zeros(1, 500, 2048), everywhere(1, 500)
    gated, alpha = module(x, normal(1, 500), mask)
    assert (gated.square().mean(dim=-1) - (1 - alpha)).abs().max() < 0.2
    assert not gated[alpha > 1 - ALPHA_FLOOR].any()
