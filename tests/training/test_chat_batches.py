"""From conversations to batches: token ids as vLLM sends them, labels, positions, and the loss over them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vllm_wsi.errors import CheckpointError, SlideError
from vllm_wsi.model.chat_renderer import IGNORED, ChatRenderer
from vllm_wsi.model.config import SLIDE_TOKEN
from vllm_wsi.model.init_checkpoint import TURN_END, byte_tokenizer, new_model
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.questions.finder import FeaturePath
from vllm_wsi.questions.items import QuestionError, SlideItem, multiple_choice
from vllm_wsi.selection.positions import SlideSpan, prompt_positions
from vllm_wsi.selection.selection import Selection
from vllm_wsi.slides import FeatureFile, features_in_memory, write_features
from vllm_wsi.study.answering import choose
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import SlideDataset, TrainingItem, TrainingSlide
from vllm_wsi.training.model import SparseLearnModel

D = 12
QWEN_STYLE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
FORGETFUL = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if loop.last or message.role == 'user' %}{{ message.content }}{% else %}(left out){% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PRIMED = QWEN_STYLE.replace("assistant\\n' }}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}")
SYSTEM = "<|im_start|>system\nYou are helpful.<|im_end|>\n"


class Slide:
    """Features of an array, by the name of a slide."""

    def __init__(self, n: int, seed: int = 0, d: int = D) -> None:
        self.name = f"slide-{n}"
        self.x = np.random.default_rng([n, seed]).standard_normal((n, d)).astype(np.float32)

    def open(self) -> FeatureFile:
        return features_in_memory(self.x, self.name)


def encoder(template: str | None = None) -> ChatRenderer:
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return ChatRenderer(tokenizer)


def talk(*said: str, slides: tuple = (), where: str = "talk.json, item 3") -> SlideItem:
    return SlideItem(where, slides, tuple(zip(said[::2], said[1::2], strict=True)))


def ids_of(chat: ChatRenderer, text: str) -> list[int]:
    return chat.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def checkpoint():
    model, tokenizer = new_model(
        TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=16, max_position_embeddings=2048)
    )
    return model.eval(), ChatRenderer(tokenizer)


@pytest.mark.parametrize(
    ("question", "parts", "text"),
    [
        ("<image>\nWhat is it?", "<|slide|>What is it?", "<|slide|>\nWhat is it?"),
        ("What is it?\n<image>", "What is it?<|slide|>", "<|slide|>\nWhat is it?"),
        ("<image>\nWhich?\nA. x\nB. y", "<|slide|>Which?\nA. x\nB. y", "<|slide|>\nWhich?\nA. x\nB. y"),
        ("<image>\n<image>\nSame?", "<|slide|><|slide|>Same?", "<|slide|>\n<|slide|>\nSame?"),
        ("Is <image> like <image>?", "Is <|slide|> like <|slide|>?", "<|slide|>\n<|slide|>\nIs \n like \n?"),
        ("<image>", "<|slide|>", "<|slide|>"),
    ],
)
def test_question_ids_are_those_that_vllm_sends(question, parts, text):
    ours, stringly = encoder(), encoder(QWEN_STYLE)
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert ours.question(talk(question, "x")) == ids_of(ours, f"<|im_start|>user\n{parts}{end}")
    assert stringly.question(talk(question, "x")) == ids_of(stringly, f"{SYSTEM}<|im_start|>user\n{text}{end}")


@pytest.mark.parametrize("template", [None, QWEN_STYLE])
def test_a_conversation_begins_with_its_question_as_it_is_asked_alone(template):
    chat, item = encoder(template), talk("<image>\nWhat is it?", "Ein Tumör.", "Which?", "Breast.")
    ids, labels = chat.conversation(item)
    asked = chat.question(item)
    assert ids[: len(asked)] == asked
    assert set(labels[: len(asked)]) == {IGNORED}


@pytest.mark.parametrize("template", [None, QWEN_STYLE])
@pytest.mark.parametrize("answers", [["B"], ["Ein Tumör: 組織."], ["One.", "Two\nlines.", "3"]])
def test_the_answers_and_their_end_of_turn_tokens_alone_are_labelled(template, answers):
    chat = encoder(template)
    said = [text for number, answer in enumerate(answers) for text in (f"Question {number}?", answer)]
    said[0] = "<image>\n" + said[0]
    ids, labels = chat.conversation(talk(*said))
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    labelled = [label for label in labels if label != IGNORED]
    assert labelled == ids_of(chat, "".join(answer + TURN_END for answer in answers))
    assert ids.count(chat.slide_token_id) == 1
    # No labelled run is split: one for each answer.
    starts = sum(now != IGNORED and before == IGNORED for before, now in pairwise(labels))
    assert starts == len(answers)


@pytest.mark.parametrize("template", [None, QWEN_STYLE])
def test_pieces_of_a_conversation_have_the_ids_of_the_whole(template):
    chat = encoder(template)
    ids, _ = chat.conversation(talk("<image>\nWhat?", "A tumour.", "Which?", "Breast."))
    turns = ["user\n" + ("<|slide|>What?" if template is None else "<|slide|>\nWhat?"), "assistant\nA tumour."]
    turns += ["user\nWhich?", "assistant\nBreast."]
    text = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    assert ids == ids_of(chat, text if template is None else SYSTEM + text)


@pytest.mark.parametrize(("template", "turns"), [(FORGETFUL, 2), (PRIMED, 1)])
def test_a_template_that_changes_earlier_turns_is_refused(template, turns):
    item = talk(*["<image>\nWhat?", "A tumour."] * turns)
    with pytest.raises(CheckpointError, match=r"talk\.json, item 3: the chat template changes earlier turns"):
        encoder(template).conversation(item)
    encoder(template).question(item)


def test_a_tokenizer_without_a_template_or_a_slide_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="found no chat template"):
        ChatRenderer(tokenizer)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with pytest.raises(CheckpointError, match=r"found <\|slide\|> as \[.*\], wanted one special token"):
        ChatRenderer(PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=QWEN_STYLE))


def test_letters_are_the_tokens_that_their_answers_begin_with():
    for texts in ([], ["assistant\nA. Apple\nB. Bee B C D"] * 9):
        tokenizer = byte_tokenizer(texts)
        chat = ChatRenderer(tokenizer)
        for letter, token in zip("ABCD", chat.first_ids("ABCD"), strict=True):
            ids, labels = chat.conversation(talk("<image>\nWhich?", letter))
            assert [ids[i] for i, label in enumerate(labels) if label != IGNORED] == [token, tokenizer.eos_token_id]


def dataset(checkpoint, *items: SlideItem, most: int = 50, **options) -> SlideDataset:
    model, chat = checkpoint
    return SlideDataset(items, chat, model.config, most, **options)


def strata_of(rows: torch.Tensor, n: int, k: int = 50) -> list[int]:
    """Which of min(k, n) equal parts of n rows each row lies in."""
    k = min(k, n)
    return (np.searchsorted(np.arange(k + 1) * n // k, rows.numpy(), "right") - 1).tolist()


@pytest.mark.parametrize("n", [1, 49, 50, 51, 997])
def test_a_training_slide_holds_its_rows_and_their_places(checkpoint, n):
    source = Slide(n)
    (slide,) = dataset(checkpoint, talk("<image>\nWhat?", "x", slides=(source,)))[0].slides
    assert strata_of(slide.indices, n) == list(range(min(n, 50)))
    assert torch.equal(slide.features, torch.from_numpy(source.x)[slide.indices])
    assert slide.num_patches == n


def test_a_slide_longer_than_a_chunk_is_read_whole(checkpoint):
    _, chat = checkpoint
    wide = new_model(TinySettings(feature_dim=1024, hidden_size=32, num_layers=1, scorer_hidden_size=0))[0].config
    source = Slide(4999, d=1024)
    item = talk("<image>\nWhat?", "x", slides=(source,))
    (slide,) = SlideDataset([item], chat, wide, 333)[0].slides
    assert len(slide.indices) == 333
    assert torch.equal(slide.features, torch.from_numpy(source.x)[slide.indices])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_training_slide_has_the_files_own_bits(checkpoint, dtype):
    class Half(Slide):
        def open(self) -> FeatureFile:
            x = torch.from_numpy(self.x).to(getattr(torch, dtype))
            raw = x.view(torch.uint16).numpy() if dtype == "bfloat16" else x.numpy()
            return features_in_memory(raw, self.name, dtype)

    source = Half(70)
    (slide,) = dataset(checkpoint, talk("<image>\nWhat?", "x", slides=(source,)))[0].slides
    assert slide.features.dtype == getattr(torch, dtype)
    assert torch.equal(slide.features, torch.from_numpy(source.x).to(slide.features.dtype)[slide.indices])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_patches_that_are_not_finite_are_dropped_and_the_others_keep_their_places(checkpoint, value):
    source = Slide(30)
    source.x[[0, 7, 29], [1, 5, 11]] = value
    (slide,) = dataset(checkpoint, talk("<image>\nWhat?", "x", slides=(source,)))[0].slides
    kept = [row for row in range(30) if row not in (0, 7, 29)]
    assert slide.indices.tolist() == kept
    assert torch.equal(slide.features, torch.from_numpy(source.x[kept]))
    assert slide.num_patches == 30
    source.x[:, 3] = value
    with pytest.raises(SlideError, match="slide-30: found no patch with finite features"):
        dataset(checkpoint, talk("<image>\nWhat?", "x", slides=(source,)))[0]


@pytest.mark.parametrize(("n", "most"), [(1, 50), (49, 50), (50, 50), (700, 50)])
def test_stretched_positions_are_increasing_rows_of_a_slide_of_up_to_that_length(checkpoint, n, most):
    item = talk("<image>\nWhat?", "x", slides=(Slide(n),))
    data = dataset(checkpoint, *[item] * 40, most=most, stretch_positions=1000)
    lengths = []
    for number in range(40):
        (slide,) = data[number].slides
        assert (torch.diff(slide.indices) > 0).all()
        assert slide.indices[0] >= 0
        assert slide.indices[-1] < slide.num_patches
        assert n <= slide.num_patches <= 1000
        assert len(slide.indices) == len(slide.features) == min(n, most)
        lengths.append(slide.num_patches)
    assert len(set(lengths)) > 20
    assert sum(length < (1000 * n) ** 0.5 for length in lengths) in range(8, 33)  # evenly over the logarithm


def test_a_slide_as_long_as_the_stretch_keeps_its_places(checkpoint):
    (slide,) = dataset(checkpoint, talk("<image>\nWhat?", "x", slides=(Slide(60),)), stretch_positions=60)[0].slides
    assert slide.num_patches == 60
    assert strata_of(slide.indices, 60) == list(range(50))


def test_mixed_positions_are_packed_in_about_half_of_the_items(checkpoint):
    model, _ = checkpoint
    items = [talk("<image>\nWhat?", "x", slides=(Slide(3),))] * 200
    mixed = dataset(checkpoint, *items, mix_positions=True)
    budgets = [mixed[i].budget for i in range(200)]
    assert set(budgets) == {0, model.config.max_slide_positions}
    assert 70 < budgets.count(0) < 130
    plain = dataset(checkpoint, *items)
    assert {plain[i].budget for i in range(200)} == {model.config.max_slide_positions}


def test_an_item_is_the_same_for_the_same_seed_and_another_for_another(checkpoint):
    item = talk("<image>\nWhat?", "x", slides=(Slide(20),))
    one, again, other = (dataset(checkpoint, *[item] * 3, stretch_positions=2000, seed=s) for s in (1, 1, 2))
    places = [[tuple(data[i].slides[0].indices.tolist()) for i in range(3)] for data in (one, again, other)]
    assert places[0] == places[1]
    assert len({*places[0], *places[2]}) == 6


def bare(chat: ChatRenderer, n: int, *said: str, budget: int = 1000, **slide) -> TrainingItem:
    return TrainingItem([training_slide(n, **slide)], *chat.conversation(talk(*said)), budget)


def training_slide(n: int, longer: int = 0, seed: int = 0) -> TrainingSlide:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(n + seed))
    indices = torch.randperm(n + longer, generator=torch.Generator().manual_seed(n))[:n].sort().values
    return TrainingSlide(x, indices, n + longer, n)


def test_prompts_are_padded_on_the_left_and_slides_on_the_right():
    chat = encoder()
    items = [bare(chat, 5, "<image>\nWhat is it?", "x"), bare(chat, 31, "<image>\nWhich?", "A long answer.")]
    batch = collate(items, chat.slide_token_id, 7)
    lengths = [len(item.ids) + n - 1 for item, n in zip(items, (5, 31), strict=True)]
    assert batch["input_ids"].shape == (2, max(lengths))
    assert batch["features"].shape == (2, 31, D)
    assert batch["features"].dtype == torch.float32
    assert batch["patch_mask"].sum(dim=1).tolist() == [5, 31]
    assert not batch["features"][0, 5:].any()
    for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
        padding = max(lengths) - length
        assert batch["attention_mask"][row].tolist() == [0] * padding + [1] * length
        assert (batch["input_ids"][row, :padding] == 7).all()
        assert (batch["labels"][row, :padding] == IGNORED).all()
        place = item.ids.index(chat.slide_token_id)
        n = len(item.slides[0].features)
        wanted = item.ids[:place] + [chat.slide_token_id] * n + item.ids[place + 1 :]
        assert batch["input_ids"][row, padding:].tolist() == wanted
        assert batch["labels"][row, padding:].tolist() == [IGNORED] * (n - 1) + item.labels
        assert torch.equal(batch["features"][row, :n], item.slides[0].features)
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "position_ids", "labels")} == {torch.int64}


@pytest.mark.parametrize("budget", [0, 20, 60, 1000])
def test_positions_are_those_of_the_served_prompt_with_several_slides_too(budget):
    chat = encoder()
    slides = [training_slide(9, longer=40), training_slide(1), training_slide(17, longer=3)]
    ids, labels = chat.conversation(talk("Is <image> like <image>\nor <image>?", "Yes.", "Why?", "So."))
    short = bare(chat, 3, "<image>\nWhat?", "x", budget=budget)
    batch = collate([short, TrainingItem(slides, ids, labels, budget)], chat.slide_token_id, 0)
    spans, start, seen = [], 0, 0
    for token in ids:
        if token == chat.slide_token_id:
            spans.append(SlideSpan(start, slides[seen].indices, slides[seen].num_patches))
            start, seen = start + len(slides[seen].indices), seen + 1
        else:
            start += 1
    positions, _ = prompt_positions(start, spans, budget)
    assert torch.equal(batch["position_ids"][1], positions)
    assert (batch["input_ids"][1] == chat.slide_token_id).sum() == 27
    assert batch["patch_mask"].sum(dim=1).tolist() == [3, 9, 1, 17]
    assert batch["labels"][1][batch["labels"][1] != IGNORED].tolist() == ids_of(chat, "Yes.<|im_end|>So.<|im_end|>")
    if budget == 0:
        assert positions.tolist() == list(range(start))


def loss_by_hand(model, items: list[TrainingItem]) -> tuple[torch.Tensor, int]:
    """Sum and number of the labelled tokens' negative log-likelihoods, prompt by prompt as it is served."""
    total, count = torch.zeros(()), 0
    for item in items:
        chosen = [Selection(s.indices, torch.zeros(len(s.indices)), s.features, s.num_patches, 0) for s in item.slides]
        embeddings, positions = model.prepare(torch.tensor(item.ids), chosen)
        logits = model(inputs_embeds=embeddings, position_ids=positions).logits[0]
        labels = torch.tensor(item.labels)
        added = embeddings.shape[1] - len(labels)
        places = (labels != IGNORED).nonzero()[:, 0]
        total = total + F.cross_entropy(logits[places + added - 1], labels[places], reduction="sum")
        count += len(places)
    return total, count


@pytest.mark.parametrize("mode", ["original", "packed"])
@pytest.mark.parametrize("capped", [13, 1000])
def test_the_loss_over_all_patches_is_that_of_the_served_prompts(mode, capped):
    model, tokenizer = new_model(
        TinySettings(
            feature_dim=D,
            hidden_size=64,
            scorer_hidden_size=16,
            max_position_embeddings=512,
            max_slide_positions=60,
            position_ids=mode,
        )
    )
    chat = ChatRenderer(tokenizer)
    items = [
        talk("<image>\nWhat is it?", "B", slides=(Slide(41),)),
        talk("<image>\nWhat is it?", "A tumour.", "Which?", "Breast.", slides=(Slide(1),)),
        talk("Is <image> like <image>?", "No.", slides=(Slide(20), Slide(55))),
    ]
    data = SlideDataset(items, chat, model.config, capped)
    made = [data[i] for i in range(3)]
    wrapped = SparseLearnModel(model.eval(), None)
    with torch.no_grad():
        batch = collate(made, chat.slide_token_id, tokenizer.pad_token_id)
        found = wrapped(**batch)["loss"]
        total, count = loss_by_hand(model, made)
        assert abs(float(found - total / count)) < 1e-5 * float(found)
        over_seven = wrapped(**batch, num_items_in_batch=7)["loss"]
        assert float(over_seven) == pytest.approx(float(total) / 7, rel=1e-5)


def test_a_slide_token_as_padding_changes_no_loss(checkpoint):
    model, chat = checkpoint
    items = [bare(chat, 5, "<image>\nWhat is it?", "x"), bare(chat, 31, "<image>\nWhich?", "A long answer.")]
    wrapped = SparseLearnModel(model, None)
    with torch.no_grad():
        losses = [wrapped(**collate(items, chat.slide_token_id, pad))["loss"] for pad in (0, chat.slide_token_id)]
    assert torch.equal(*losses)


def test_bad_items_are_all_named_before_training(checkpoint, tmp_path):
    write_features(tmp_path / "good.safetensors", np.ones((3, D), np.float32))
    write_features(tmp_path / "wide.safetensors", np.ones((3, D + 1), np.float32))
    (tmp_path / "text.csv").write_text("no features")
    names = ["good.safetensors", "wide.safetensors", "gone.h5", "text.csv"]
    items = [
        talk("<image>\nWhat?", "x", slides=(FeaturePath(tmp_path / name),), where=f"q.json, item {number}")
        for number, name in enumerate(names)
    ]
    with pytest.raises(QuestionError) as caught:
        dataset(checkpoint, *items).check()
    wide, gone, text = caught.value.problems
    assert wide.startswith("q.json, item 1: ")
    assert f"found d = {D + 1}, wanted {D}" in wide
    assert gone.startswith("q.json, item 2: ")
    assert "gone.h5" in gone
    assert text.startswith("q.json, item 3: ")
    assert "text.csv" in text
    dataset(checkpoint, items[0]).check()


def test_a_conversation_that_the_template_rewrites_is_named_before_training(checkpoint):
    model, _ = checkpoint
    item = talk("<image>\nWhat?", "x", "Why?", "So.", slides=(Slide(3),))
    with pytest.raises(QuestionError) as caught:
        SlideDataset([item], encoder(FORGETFUL), model.config, 50).check()
    (problem,) = caught.value.problems
    assert problem.startswith("talk.json, item 3: the chat template changes")


def test_choices_in_a_batch_are_those_of_each_question_alone(checkpoint):
    model, chat = checkpoint
    slides = [Slide(n) for n in (1, 5, 40, 77)] * 9
    options = {"A": "lymphoma", "B": "melanoma", "C": "sarcoma"}
    items = [multiple_choice(f"item {i}", s, "Which?" * (i % 3 + 1), options, "A") for i, s in enumerate(slides)]
    selections = [[model.selector().select(slide.open())] for slide in slides]
    together = choose(model, chat, items, selections)
    assert len(together) == 36
    for number in (0, 6, 11, 35):
        (alone,) = choose(model, chat, items[number : number + 1], selections[number : number + 1])
        assert alone.option == together[number].option
        assert alone.logprobs == pytest.approx(together[number].logprobs, abs=1e-4)
    for item, selected, choice in zip(items, selections, together, strict=True):
        embeddings, positions = model.prepare(torch.tensor(chat.question(item)), selected)
        with torch.no_grad():
            logits = model(inputs_embeds=embeddings, position_ids=positions).logits[0, -1]
        wanted = logits[chat.first_ids("ABC")].log_softmax(dim=0)
        assert list(choice.logprobs.values()) == pytest.approx(wanted.tolist(), abs=1e-4)
        assert choice.option == max(choice.logprobs, key=lambda letter: choice.logprobs[letter])
        assert sum(np.exp(list(choice.logprobs.values()))) == pytest.approx(1, abs=1e-5)


def test_the_slide_token_of_the_tokenizer_is_that_of_the_checkpoint(checkpoint):
    model, chat = checkpoint
    assert chat.slide_token_id == model.config.slide_token_id
    assert chat.tokenizer.convert_ids_to_tokens(chat.slide_token_id) == SLIDE_TOKEN
