"""A text decoder learns of slides: one token more, tied embeddings still tied, parts where the client put them."""

import pytest
import torch

from vllm_wsi.model.chat_renderer import ChatRenderer, takes_parts
from vllm_wsi.model.init_checkpoint import byte_tokenizer
from vllm_wsi.model.slide_token import add_slide_token
from vllm_wsi.questions.items import SlideItem

from .text_decoder import text_decoder, text_tokenizer

SYSTEM = "<|im_start|>system\nYou help.<|im_end|>\n"


def render(tokenizer, *contents):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_and_old_ones_and_ties_stay(tie, dtype):
    decoder, before = text_decoder(tie=tie, dtype=dtype), text_decoder(tie=tie, dtype=dtype)
    torch.manual_seed(99)  # new rows follow from no random state
    assert add_slide_token(decoder, text_tokenizer()) == 258
    for after, old in (
        (decoder.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (decoder.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ):
        assert after.shape == (320, 64)
        assert torch.equal(after[:258], old)
        assert torch.equal(after[258:], old.float().mean(dim=0).to(dtype).expand(62, -1))
    assert (decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight) == tie
    assert decoder.config.vocab_size == 320


def test_no_new_token_is_likelier_than_the_likeliest_old_one():
    decoder = text_decoder(dtype=torch.float32)
    add_slide_token(decoder, text_tokenizer())
    logits = decoder(torch.arange(250)[None]).logits[0]
    assert (logits[:, 258:].max(dim=1).values < logits[:, :258].max(dim=1).values).all()


def test_a_decoder_with_rows_to_spare_and_one_that_has_the_token_keep_their_rows():
    spare = text_decoder(rows=320)
    assert add_slide_token(spare, text_tokenizer()) == 258
    assert torch.equal(spare.model.embed_tokens.weight, text_decoder(rows=320).model.embed_tokens.weight)
    tokenizer = byte_tokenizer()
    template = tokenizer.chat_template
    assert add_slide_token(text_decoder(rows=259), tokenizer) == 258
    assert tokenizer.chat_template == template


def test_a_template_of_strings_takes_parts_in_their_order_and_strings_as_before():
    tokenizer = text_tokenizer()
    plain = render(tokenizer, "a", "b", "c")
    assert not takes_parts(tokenizer)
    add_slide_token(text_decoder(), tokenizer)
    assert takes_parts(tokenizer)
    assert render(tokenizer, "a", "b", "c") == plain
    image, text = {"type": "image"}, {"type": "text", "text": "first "}
    found = render(tokenizer, [text, image, {"type": "text", "text": " second "}, image], [text], "c")
    assert found == (
        f"{SYSTEM}<|im_start|>user\nfirst <|slide|> second <|slide|><|im_end|>\n<|im_start|>assistant\nfirst <|im_end|>"
        "\n<|im_start|>user\nc<|im_end|>\n"
    )


def test_the_renderer_of_training_sees_the_same_prompt_as_a_client_and_labels_the_answer_alone():
    tokenizer = text_tokenizer()
    add_slide_token(text_decoder(), tokenizer)
    renderer = ChatRenderer(tokenizer)
    item = SlideItem(where="x", slides=("a",), turns=(("<image>\nWhich?", "B"),))
    chat = renderer.conversation(item)
    prompt = f"{SYSTEM}<|im_start|>user\n<|slide|>Which?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(renderer.question(item)) == prompt
    assert tokenizer.decode(chat.ids) == f"{prompt}B<|im_end|>\n"
    assert [label for label in chat.labels if label != -100] == tokenizer.encode("B<|im_end|>")
    assert renderer.end_of_turn() == [256]
