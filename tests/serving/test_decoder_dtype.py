"""vLLM serves a checkpoint of a bf16 decoder with an fp32 scorer and projector, in the decoder's own dtype."""

import pytest
import torch
from transformers import AutoTokenizer

from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.slides import open_features

from .conftest import D, make_slide, slide_message

pytestmark = pytest.mark.engine


def test_a_bf16_decoder_is_served_in_bf16_and_answers_as_in_transformers(tmp_path):
    from vllm import LLM, SamplingParams

    model, tokenizer = new_model(TinySettings(feature_dim=D, hidden_size=64, num_layers=2, initializer_range=0.2))
    model.language_model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    path = make_slide(tmp_path / "slide.safetensors", 700)
    llm = LLM(
        str(tmp_path / "checkpoint"), enforce_eager=True, max_model_len=512, max_num_seqs=2, seed=0,
        allowed_local_media_path=str(tmp_path), max_logprobs=-1, gpu_memory_utilization=0.2,
    )  # fmt: skip
    assert llm.llm_engine.model_config.dtype == torch.bfloat16
    asked = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
    (answer,) = llm.chat(slide_message(path.as_uri(), question="Which tumour?"), asked, use_tqdm=False)
    found = {token: one.logprob for token, one in answer.outputs[0].logprobs[0].items()}

    loaded = SparseWSIForConditionalGeneration.from_pretrained(tmp_path / "checkpoint").eval()
    prompt = AutoTokenizer.from_pretrained(tmp_path / "checkpoint").apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which tumour?"}]}],
        add_generation_prompt=True, return_dict=False,
    )  # fmt: skip
    with open_features(path) as slide:
        embeddings, positions = loaded.prepare(torch.tensor(prompt), [loaded.selector().select(slide)])
    with torch.no_grad():
        wanted = loaded(inputs_embeds=embeddings, position_ids=positions).logits[0, -1].float().log_softmax(dim=0)
    assert loaded.dtype == torch.bfloat16
    # Measured: 0.08; fp32 differs from bf16 by as much. Log-probabilities of the vocabulary deviate by 1.5.
    assert max(abs(found[token] - float(wanted[token])) for token in found) < 0.2
    assert len(found) == len(wanted)
    assert wanted.std() > 1
