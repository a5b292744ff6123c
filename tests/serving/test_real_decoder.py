"""A real language model in vLLM: tokenizer, chat template, tied embeddings, grouped heads; LoRA, caching, streaming.

Scorer, projector and adapter are random.
"""

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from vllm_wsi.model.assemble import ADAPTER_FOLDER, assemble
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.lora import LowRank, merge_lora, read_lora
from vllm_wsi.model.modeling import SlideProjector, SparseWSIForConditionalGeneration
from vllm_wsi.model.slide_token import add_slide_token
from vllm_wsi.model.trained_parts import BaseDecoder, TrainedParts, write_trained_parts
from vllm_wsi.model.weight_files import weights_sha256
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.slides import open_features

from .conftest import D, make_slide, slide_message
from .test_parity import start_engine

pytestmark = pytest.mark.engine
NEW_TOKENS = 10
QUESTION = "Describe what you see in one short sentence."
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def parts(smollm2, tmp_path_factory):
    """A directory of random trained parts, whose adapter and slides change answers and leave them language."""
    decoder = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    slide_token_id = add_slide_token(decoder, tokenizer)
    config = SparseWSIConfig(
        text_config=decoder.config, feature_dim=D, encoder="test@1", slide_token_id=slide_token_id,
        scorer={"hidden_size": 32}, projector={"hidden_size": 64},
    )  # fmt: skip
    torch.manual_seed(0)
    projector = SlideProjector.from_config(config)
    scorer = seeded_scorer(feature_dim=D, seed=1, **config.scorer)
    weights = {f"scorer.{name}": one for name, one in scorer.state_dict().items()}
    weights |= {f"projector.{name}": one for name, one in projector.state_dict().items()}
    modules = dict(decoder.named_modules())
    lora = {}
    for name in [f"model.layers.{layer}.{one}" for layer in range(30) for one in ADAPTED]:
        rows, columns = modules[name].weight.shape
        lora[name] = LowRank(torch.randn(4, columns) / columns**0.5, torch.randn(rows, 4) * 0.2)
    base = BaseDecoder("smollm2-135m-instruct", None, weights_sha256(str(smollm2)))
    ends = GenerationConfig(eos_token_id=2, pad_token_id=2)
    folder = tmp_path_factory.mktemp("parts") / "trained"
    write_trained_parts(folder, TrainedParts(config, base, weights, lora, tokenizer.chat_template, ends), "# card\n")
    return folder


@pytest.fixture(scope="module")
def apart(parts, tmp_path_factory):
    """The checkpoint over the decoder as it is; its adapter lies beside."""
    return assemble(parts, tmp_path_factory.mktemp("apart") / "checkpoint", merge=False)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return [make_slide(folder / f"{n}.safetensors", n, seed=n) for n in (1, 32, 3000)]


@pytest.fixture(scope="module")
def llm(apart, slides):
    return start_engine(apart, slides[0].parent, block_size=32, enable_lora=True, max_lora_rank=8, max_model_len=1024)


def load(checkpoint):
    return SparseWSIForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain(apart):
    return load(apart)


def adapter_request(folder):
    from vllm.lora.request import LoRARequest

    return LoRARequest("trained", 1, str(folder))


def ask_vllm(llm, messages, adapter=None):
    """(output, log-probabilities of the likeliest first tokens)"""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=5)
    output = llm.chat(messages, params, use_tqdm=False, lora_request=adapter)[0]
    return output, {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}


def ask_transformers(model, prompt, paths):
    """(tokens, log-probabilities of the first one over the vocabulary)"""
    selections = []
    for path in paths:
        with open_features(path) as slide:
            selections.append(model.selector().select(slide))
    answer = model.generate(
        prompt, selections, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return answer.sequences[0].tolist(), answer.logits[0][0].log_softmax(-1)


def once(ids, token):
    """The ids with each run of slide tokens as one."""
    return [one for place, one in enumerate(ids) if one != token or place == 0 or ids[place - 1] != token]


def same(top, logprobs, within):
    return all(abs(value - logprobs[token].item()) < within for token, value in top.items())


def test_the_same_prompt_tokens_and_first_logprobs_as_in_training_and_transformers(llm, plain, apart, slides):
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(apart))
    said = set()
    for path in slides:
        prompt = renderer.question(SlideItem("x", (path,), ((f"<image>\n{QUESTION}", ""),)))
        wanted, logprobs = ask_transformers(plain, prompt, [path])
        found, top = ask_vllm(llm, slide_message(path.as_uri(), question=QUESTION))
        assert once(list(found.prompt_token_ids), renderer.slide_token_id) == prompt, path.name
        assert list(found.outputs[0].token_ids) == wanted, path.name
        assert same(top, logprobs, 1e-3), path.name
        said.add(tuple(wanted))
    assert len(said) > 1  # the slides are seen
    assert "named SmolLM" in renderer.tokenizer.decode(prompt)


def test_slides_stand_where_the_client_put_them_in_a_conversation(llm, plain, apart, slides):
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(apart))
    first, second = ({"type": "image_url", "image_url": {"url": path.as_uri()}} for path in slides[1:])
    content = [{"type": "text", "text": "Before: "}, first, {"type": "text", "text": " After: "}, second]
    messages = [
        {"role": "system", "content": "You compare slides."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "They differ."},
        {"role": "user", "content": "How?"},
    ]
    text = (
        "<|im_start|>system\nYou compare slides.<|im_end|>\n"
        "<|im_start|>user\nBefore: <|slide|> After: <|slide|><|im_end|>\n"
        "<|im_start|>assistant\nThey differ.<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = renderer.tokenizer.encode(text, add_special_tokens=False)
    found, top = ask_vllm(llm, messages)
    assert once(list(found.prompt_token_ids), renderer.slide_token_id) == prompt
    wanted, logprobs = ask_transformers(plain, prompt, slides[1:])
    assert list(found.outputs[0].token_ids) == wanted
    assert same(top, logprobs, 1e-3)


def test_a_question_asked_again_comes_from_the_prefix_cache_and_is_answered_alike(llm, slides):
    message = slide_message(slides[2].as_uri(), question="How many patches are these? Answer briefly.")
    first, _ = ask_vllm(llm, message)
    second, _ = ask_vllm(llm, message)
    assert second.num_cached_tokens > first.num_cached_tokens
    assert second.num_cached_tokens >= len(second.prompt_token_ids) // 32 * 32 - 32
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_the_trained_adapter_over_the_plain_decoder_answers_as_the_merged_checkpoint(
    llm, plain, apart, parts, slides, tmp_path
):
    """Exactly as a merge in fp32; within bf16's rounding, as the checkpoint that `assemble` writes."""
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(apart))
    prompt = renderer.question(SlideItem("x", (slides[2],), ((f"<image>\n{QUESTION}", ""),)))
    message = slide_message(slides[2].as_uri(), question=QUESTION)
    found, top = ask_vllm(llm, message, adapter_request(apart / ADAPTER_FOLDER))
    whole = load(apart)
    merge_lora(whole.language_model, read_lora(parts), "parts")
    wanted, logprobs = ask_transformers(whole, prompt, [slides[2]])
    assert list(found.outputs[0].token_ids) == wanted
    assert same(top, logprobs, 1e-3)
    _, rounded = ask_transformers(load(assemble(parts, tmp_path / "merged")), prompt, [slides[2]])
    _, without = ask_transformers(plain, prompt, [slides[2]])
    assert same(top, rounded, 0.1)
    assert not same(top, without, 0.3)


@pytest.mark.server
def test_a_server_streams_what_it_answers_and_takes_the_parts_as_an_adapter(apart, parts, slides, tmp_path):
    args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"]
    args += ["--block-size", "32", "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"trained={parts}"]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    message = slide_message(slides[2].as_uri(), question=QUESTION)
    with (
        VllmServer(apart, slides[0].parent, tmp_path / "log", args, env) as server,
        openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=120) as client,
    ):
        answers = {}
        for model in (server.model, "trained"):
            ask = {"model": model, "messages": message, "temperature": 0, "max_tokens": 24}
            whole = client.chat.completions.create(**ask).choices[0]
            chunks = [one for one in client.chat.completions.create(**ask, stream=True) if one.choices]
            pieces = [one.choices[0].delta.content or "" for one in chunks]
            assert "".join(pieces) == whole.message.content
            assert chunks[-1].choices[0].finish_reason == whole.finish_reason
            assert len(pieces) > 3
            answers[model] = whole.message.content
        assert answers[server.model] != answers["trained"]
        assert server.metrics()["vllm:prefix_cache_hits_total"] >= 2 * 32
