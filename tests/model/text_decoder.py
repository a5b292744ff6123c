"""A small text decoder that has never heard of slides, built as SmolLM2 is: tied embeddings, grouped heads, strings."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STRING_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You help.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def text_tokenizer():
    """Bytes and the marks of a turn: 258 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_end|>", "<|im_start|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>",
        chat_template=STRING_TEMPLATE,
    )  # fmt: skip


def text_decoder(seed=0, tie=True, dtype=torch.bfloat16, rows=258):
    config = LlamaConfig(
        vocab_size=rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=tie, bos_token_id=None,
        eos_token_id=256, pad_token_id=256, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype)


def write_text_decoder(path, **options):
    """Writes decoder and tokenizer as a plain checkpoint; returns its path."""
    text_decoder(**options).save_pretrained(path)
    text_tokenizer().save_pretrained(path)
    return path
