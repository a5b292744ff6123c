"""Several conversations in one sequence: the losses and gradients of each of them alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vllm_wsi.errors import SettingsError
from vllm_wsi.model.chat_renderer import IGNORED, ChatRenderer, EncodedChat
from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.slides import FeatureFile, features_in_memory
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import SlideDataset, TrainingItem
from vllm_wsi.training.grouping import GroupedDataset
from vllm_wsi.training.loading import EpochCallback
from vllm_wsi.training.model import SparseLearnModel, set_trainable
from vllm_wsi.training.settings import LoraSettings
from vllm_wsi.training.shared_prefix import SHARED_PREFIX, attend_to_shared_prefix, branch_mask
from vllm_wsi.training.sparselearn import SparseLearnSettings
from vllm_wsi.training.start_model import with_lora

D = 12


class Slide:
    """Features of an array, by the name of a slide."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.name = f"slide-{n}"
        self.x = np.random.default_rng([n, seed]).standard_normal((n, D)).astype(np.float32)

    def open(self) -> FeatureFile:
        return features_in_memory(self.x, self.name)


def talk(*said: str, slides: tuple = ()) -> SlideItem:
    return SlideItem("talk.json, item 3", slides, tuple(zip(said[::2], said[1::2], strict=True)))


def about(*slides: Slide) -> list[SlideItem]:
    """Conversations that are awkward together: longer and shorter, the same one twice, answers that begin alike."""
    mark = "<image>" * len(slides)
    said = [
        (f"{mark}What is it?", "A tumour."),
        (f"{mark}What is it?", "A tumour."),
        (f"{mark}What is it?", "A tumour, and large."),
        (f"{mark}What", "B"),
        (f"{mark}Which organ is this, and what is its state?", "Breast.", "Why?", "It looks so."),
        (f"{mark}", ""),
    ]
    return [talk(*one, slides=slides) for one in said]


def start(mode: str = "original", decoder: str = "qwen2"):
    model, tokenizer = new_model(
        TinySettings(
            feature_dim=D,
            hidden_size=64,
            scorer_hidden_size=16,
            num_slide_tokens=4,
            max_position_embeddings=1024,
            max_slide_positions=60,
            position_ids=mode,
            decoder=decoder,
        )
    )
    return model, ChatRenderer(tokenizer)


def group(items: list[TrainingItem]) -> TrainingItem:
    """One sequence of items about the same slides."""
    return items[0]._replace(siblings=tuple(EncodedChat(item.ids, item.labels) for item in items[1:]))


def gradients(wrapped: SparseLearnModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}


def loss_and_gradients(wrapped: SparseLearnModel, chat: ChatRenderer, batches: list[list[TrainingItem]], count: int):
    """Over all batches, each with the noise of the same seed."""
    wrapped.zero_grad()
    total = 0.0
    for items in batches:
        torch.manual_seed(5)
        loss = wrapped(**collate(items, chat.slide_token_id, 0), num_items_in_batch=count)["loss"]
        loss.backward()
        total += float(loss.detach())
    return total, gradients(wrapped)


def assert_same(wrapped: SparseLearnModel, chat: ChatRenderer, apart: list, together: list) -> dict[str, torch.Tensor]:
    count = sum(label != IGNORED for items in apart for item in items for label in item.labels)
    wanted, wanted_gradients = loss_and_gradients(wrapped, chat, apart, count)
    found, found_gradients = loss_and_gradients(wrapped, chat, together, count)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        # Scores are standardised: the true gradient of the scorer's last bias is 0, and what is there is rounding.
        largest = max(float(gradient.abs().max()), 0.1)
        assert float((found_gradients[name] - gradient).abs().max()) < 1e-5 * largest, name
    return found_gradients


@pytest.mark.parametrize("mode", ["original", "packed"])
@pytest.mark.parametrize("gate", [None, "none", "scale", "noise"])
def test_a_sequence_of_several_questions_has_their_losses_and_gradients(mode, gate):
    model, chat = start(mode)
    data = SlideDataset(about(Slide(41)), chat, model.config, 1000)
    items = [data[i] for i in range(len(data))]
    settings = None if gate is None else SparseLearnSettings(num_slide_tokens=4, k_start=8, gate=gate)
    wrapped = SparseLearnModel(model, settings)
    found = assert_same(wrapped, chat, [[item] for item in items], [[group(items)]])
    parts = {name.split(".")[1] for name, gradient in found.items() if gradient.any()}
    learns = gate in ("scale", "noise")
    assert parts >= {"projector", "language_model"} | ({"scorer"} if learns else set())


@pytest.mark.parametrize("decoder", ["qwen2", "qwen3", "llama"])
def test_sequences_of_other_lengths_slides_and_numbers_of_questions_share_a_batch(decoder):
    model, chat = start(decoder=decoder)
    slides = [(Slide(41),), (Slide(1),), (Slide(20), Slide(55)), (Slide(7),)]
    groups = []
    for number, sources in enumerate(slides):
        data = SlideDataset(about(*sources), chat, model.config, 1000)
        groups.append([data[i] for i in range(len(data) if number < 3 else 1)])
    wrapped = SparseLearnModel(model, SparseLearnSettings(num_slide_tokens=4, k_start=8, gate="scale"))
    apart = [item for items in groups for item in items]
    for together in (groups, groups[::-1]):
        assert_same(wrapped, chat, [apart], [[group(items) for items in together]])


@pytest.mark.parametrize("chosen", [(0, 0), (0, 1, 2), (5, 5, 5), (2, 0)])
def test_answers_that_begin_alike_count_once_for_each_question(chosen):
    model, chat = start()
    data = SlideDataset(about(Slide(9)), chat, model.config, 1000)
    items = [data[i] for i in chosen]
    assert_same(SparseLearnModel(model, None), chat, [items], [[group(items)]])


def test_without_a_count_the_loss_is_the_mean_over_all_labelled_tokens():
    model, chat = start()
    data = SlideDataset(about(Slide(9)), chat, model.config, 1000)
    items = [data[i] for i in range(len(data))]
    wrapped = SparseLearnModel(model, None)
    with torch.no_grad():
        apart = wrapped(**collate(items, chat.slide_token_id, 0))["loss"]
        together = wrapped(**collate([group(items)], chat.slide_token_id, 0))["loss"]
    assert float(together) == pytest.approx(float(apart), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_and_gradient_checkpointing_get_the_same_gradients(checkpointing):
    model, chat = start()
    model.language_model = with_lora(model.language_model, LoraSettings(r=4, alpha=8))
    torch.manual_seed(1)
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:  # zero at first, and lora_A then gets no gradient
            nn.init.normal_(parameter, std=0.1)
    wrapped = SparseLearnModel(model, SparseLearnSettings(num_slide_tokens=4, k_start=8))
    set_trainable(wrapped, {"scorer", "projector"})
    if checkpointing:
        wrapped.train()
        wrapped.gradient_checkpointing_enable()
    data = SlideDataset(about(Slide(41)), chat, model.config, 1000)
    items = [data[i] for i in range(len(data))]
    found = assert_same(wrapped, chat, [[item] for item in items], [[group(items)]])
    assert any("lora_A" in name and gradient.any() for name, gradient in found.items())


def test_autocast_changes_a_grouped_loss_by_no_more_than_its_rounding():
    model, chat = start()
    data = SlideDataset(about(Slide(41)), chat, model.config, 1000)
    batch = collate([group([data[i] for i in range(len(data))])], chat.slide_token_id, 0)
    wrapped = SparseLearnModel(model, None)
    exact = float(wrapped(**batch)["loss"].detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss = wrapped(**batch)["loss"]
        loss.backward()
    assert float(loss.detach()) == pytest.approx(exact, rel=0.05)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(wrapped).values())


def test_no_branch_sees_another():
    model, chat = start()
    data = SlideDataset(about(Slide(5)), chat, model.config, 1000)
    wrapped = SparseLearnModel(model, None)
    batch = collate([group([data[i] for i in range(len(data))])], chat.slide_token_id, 0)
    assert batch["branches"].unique().tolist() == [1, 2, 3, 4, 5, 6]
    with torch.no_grad():
        before, labels = wrapped.tail_logits(**batch)
        third = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        third[:, -batch["branches"].shape[1] :] = batch["branches"] == 3
        batch["input_ids"][third] = 7
        after, _ = wrapped.tail_logits(**batch)
    owner = batch["branches"][:, -labels.shape[1] :]
    others = (labels != IGNORED) & (owner != 3)
    own = (labels != IGNORED) & (owner == 3)
    assert torch.equal(after[others], before[others])
    assert not torch.isclose(after[own], before[own]).all(dim=-1).any()


def test_the_mask_by_hand():
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1]])
    mask = branch_mask(attention_mask, torch.tensor([[1, 1, 2, 2], [0, 0, 1, 1]]))
    assert mask.shape == (2, 1, 4, 6)
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]]
    assert mask[1, 0, 2:].int().tolist() == [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]]
    assert mask.any(dim=-1).all()  # a row without a key would be NaN


def test_the_mask_of_a_prefix_with_a_gap_by_hand():
    mask = branch_mask(torch.tensor([[0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1]]), torch.tensor([[1, 2], [0, 1]]))
    assert mask.shape == (2, 1, 6, 6)
    rows = [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0]]
    assert mask[0, 0].int().tolist() == [*rows, [0, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1]]
    assert mask.any(dim=-1).all()


def test_a_patch_that_is_left_out_of_the_attention_is_seen_by_no_token():
    model, chat = start()
    data = SlideDataset(about(Slide(9)), chat, model.config, 1000)
    items = [data[i] for i in range(len(data))]
    wrapped = SparseLearnModel(model, None)
    losses = []
    for made in (items, [group(items)]):
        batch = collate(made, chat.slide_token_id, 0)
        for row, ids in zip(batch["attention_mask"], batch["input_ids"], strict=True):
            row[(ids == chat.slide_token_id).nonzero()[[0, 4], 0]] = 0
        # Their tokens are no patches then: the projector's places are those of the patches that are left.
        batch["patch_mask"][:, [0, 4]] = False
        with torch.no_grad():
            losses.append(float(wrapped(**batch)["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with torch.no_grad():
        whole = float(wrapped(**collate([group(items)], chat.slide_token_id, 0))["loss"])
    assert abs(whole - losses[0]) > 1e-4


def test_siblings_that_differ_before_their_slide_are_refused():
    model, chat = start()
    said = [("Which?<image>", "x"), ("What?<image>", "y")]
    data = SlideDataset([talk(*one, slides=(Slide(5),)) for one in said], chat, model.config, 1000)
    with pytest.raises(ValueError, match="siblings: found ids that differ before the last slide token"):
        collate([group([data[0], data[1]])], chat.slide_token_id, 0)


def test_a_batch_without_siblings_is_laid_out_as_ever():
    model, chat = start()
    grouped = GroupedDataset(SlideDataset(about(Slide(5)), chat, model.config, 1000), 1)
    batch = collate([grouped[0], grouped[1]], chat.slide_token_id, 0)
    assert "branches" not in batch
    assert model.language_model.config._attn_implementation == "sdpa"


def numbered(chat: ChatRenderer, config, counts: list[int], **options) -> SlideDataset:
    """As many questions about each slide as `counts` says; each answer is its question's number."""
    slides = [Slide(n + 3) for n in range(len(counts))]
    asked = [slide for slide, count in zip(slides, counts, strict=True) for _ in range(count)]
    items = [talk(f"<image>{number}?", str(number), slides=(slide,)) for number, slide in enumerate(asked)]
    return SlideDataset(items, chat, config, 1000, **options)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 36])
def test_every_question_is_once_in_an_epoch_with_others_of_its_slide(count):
    model, chat = start()
    data = numbered(chat, model.config, [count, 1, count])
    grouped = GroupedDataset(data, 8)
    assert len(grouped) == 2 * -(-count // 8) + 1
    seen, sizes = [], []
    for number in range(len(grouped)):
        item = grouped[number]
        chats = [(item.ids, item.labels), *item.siblings]
        answers = [chat.tokenizer.decode([one for one in labels if one != IGNORED][:-1]) for _, labels in chats]
        assert len({data.items[int(answer)].slides for answer in answers}) == 1
        source = data.items[int(answers[0])].slides[0]
        assert torch.equal(item.slides[0].features, torch.from_numpy(source.x))
        seen += map(int, answers)
        sizes.append(len(chats))
    assert sorted(seen) == list(range(2 * count + 1))
    of_long = [size for size in sizes if size > 1] or [1]
    assert max(of_long) <= 8
    assert max(of_long) - min(of_long) <= 1
    assert grouped.summary() == f"{2 * count + 1} conversations go in {len(grouped)} sequences of up to 8"


def test_each_epoch_draws_other_rows_of_a_long_slide_for_the_questions_that_share_it():
    model, chat = start()
    data = numbered(chat, model.config, [0] * 10 + [20])  # about a slide of 13 patches
    data.max_patches = 3
    grouped = GroupedDataset(data, 20)
    rows = []
    for epoch in range(4):
        EpochCallback(grouped).on_epoch_begin(None, type("State", (), {"epoch": epoch}), None)
        (item,) = (grouped[number] for number in range(len(grouped)))
        rows.append(tuple(item.slides[0].indices.tolist()))
    assert len(set(rows)) > 1


def test_each_epoch_and_seed_draws_other_companions_and_each_again_the_same():
    model, chat = start()
    data = numbered(chat, model.config, [20, 20])

    def drawn(seed: int, epoch: int) -> list[tuple]:
        grouped = GroupedDataset(data, 5, seed)
        EpochCallback(grouped).on_epoch_begin(None, type("State", (), {"epoch": epoch}), None)
        return [(tuple(item.ids), item.siblings) for item in (grouped[i] for i in range(len(grouped)))]

    assert drawn(0, 1) == drawn(0, 1.75)  # a resumed run is within its epoch
    assert drawn(0, None) == drawn(0, 0)
    ways = [drawn(0, 0), drawn(0, 1), drawn(0, 2), drawn(1, 0)]
    assert all(len(way) == 8 for way in ways)
    assert all(one != other for n, one in enumerate(ways) for other in ways[:n])


def test_what_cannot_share_a_prefix_stays_alone():
    model, chat = start()
    one, other = Slide(5), Slide(6)
    items = [
        talk("<image>What?", "x", slides=(one,)),
        talk("What?<image>", "x", slides=(one,)),
        talk("Which?<image>", "x", slides=(one,)),
        talk("<image><image>Same?", "x", slides=(one, other)),
        talk("<image><image>Same?", "x", slides=(other, one)),
        talk("<image>Who?", "x", slides=(one,)),
        talk("<image>is <image>?", "x", slides=(one, other)),
        talk("What?<image>", "y", slides=(one,)),
        talk("Hello?", "x"),
        talk("Hello?", "y"),
    ]
    data = SlideDataset(items, chat, model.config, 1000)
    grouped = GroupedDataset(data, 8)
    pairs = {(tuple(data[a].ids), tuple(data[b].ids)) for a, b in ((0, 5), (5, 0), (1, 7), (7, 1))}
    made = [grouped[i] for i in range(len(grouped))]
    assert len(made) == 8
    assert sum(len(item.siblings) for item in made) == 2
    assert all((tuple(item.ids), tuple(item.siblings[0].ids)) in pairs for item in made if item.siblings)
    wrapped = SparseLearnModel(model, SparseLearnSettings(num_slide_tokens=4, k_start=8, gate="scale"))
    apart = [data[i] for i in range(len(data))]
    assert_same(wrapped, chat, [apart], [made])


def test_positions_are_drawn_once_for_a_sequence():
    model, chat = start()
    data = numbered(chat, model.config, [24], stretch_positions=500, mix_positions=True)
    grouped = GroupedDataset(data, 6)
    budgets, lengths = set(), set()
    for number in range(len(grouped)):
        item = grouped[number]
        budgets.add(item.budget)
        lengths.add(item.slides[0].num_patches)
        apart = [item._replace(siblings=())] + [
            item._replace(ids=sibling.ids, labels=sibling.labels, siblings=()) for sibling in item.siblings
        ]
        assert_same(SparseLearnModel(model, None), chat, [apart], [[item]])
    assert budgets == {0, 60}
    assert len(lengths) > 1


def test_the_attention_of_a_shared_prefix_is_ordinary_where_no_prefix_is_shared(tmp_path):
    model, _ = start()
    plain = model.language_model
    shared = copy.deepcopy(plain)
    attend_to_shared_prefix(shared)
    assert shared.config._attn_implementation == SHARED_PREFIX
    ids = torch.arange(40).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        for attention_mask in (None, mask):
            wanted = plain(input_ids=ids, attention_mask=attention_mask).logits
            assert torch.equal(shared(input_ids=ids, attention_mask=attention_mask).logits, wanted)
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
        assert torch.equal(shared.generate(ids, **options), plain.generate(ids, **options))
    shared.save_pretrained(tmp_path)
    assert SHARED_PREFIX not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda sizes: Qwen2ForCausalLM(Qwen2Config(**sizes, use_sliding_window=True, max_window_layers=1)), "sliding"),
        (lambda sizes: MistralForCausalLM(MistralConfig(**sizes, sliding_window=16)), "sliding_attention"),
        (lambda sizes: Qwen2ForCausalLM(Qwen2Config(**sizes, attn_implementation="eager")), "the attention 'eager'"),
    ],
)
def test_a_decoder_that_one_mask_does_not_govern_is_refused(make, found):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    decoder = make(sizes | {"num_attention_heads": 2, "num_key_value_heads": 1})
    with pytest.raises(
        SettingsError, match=rf"questions_per_sequence: found \w+ with .*{found}.*, wanted 1, or a decoder"
    ):
        attend_to_shared_prefix(decoder)
