"""LoRA adapters made by peft: served as transformers merges them, and refused where they would change nothing."""

import json
import shutil

import httpx
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.training.settings import LoraSettings
from vllm_wsi.training.start_model import with_lora

from .conftest import KEY, D, make_slide, slide_message
from .test_parity import NEW_TOKENS, ask_transformers, start_engine

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"
DECODER_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checkpoint, a slide, and adapters with one and the same weights under every naming."""
    folder = tmp_path_factory.mktemp("adapters")
    init_checkpoint(folder / "checkpoint", TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=32, seed=4))
    make_slide(folder / "slide.safetensors", 300)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load(folder).language_model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    adapted.save_pretrained(folder / "decoder")
    decoder = load_file(folder / "decoder" / WEIGHTS)
    assert DECODER_KEY in decoder
    rename(folder, "whole", lambda name: name.replace("base_model.model.", "base_model.model.language_model.", 1))
    rename(folder, "headless", lambda name: name.replace("base_model.model.model.", "base_model.model.", 1))
    trained = load(folder)
    trained.language_model = with_lora(trained.language_model, LoraSettings(r=4, alpha=16, target_modules=TARGETS))
    names = {name.replace(".default", "") for name in trained.state_dict() if "lora_" in name}
    rename(folder, "stage", lambda name: f"language_model.{name}")
    assert names == set(load_file(folder / "stage" / WEIGHTS))  # as `vllm-wsi train` has them in its stages
    return folder


def load(folder):
    return SparseWSIForConditionalGeneration.from_pretrained(folder / "checkpoint").eval()


def rename(folder, name, rule, keep=lambda key: True, change=lambda tensor: tensor):
    """Writes another adapter out of the decoder's."""
    shutil.copytree(folder / "decoder", folder / name)
    found = load_file(folder / "decoder" / WEIGHTS)
    save_file({rule(key): change(x).contiguous() for key, x in found.items() if keep(key)}, folder / name / WEIGHTS)
    return folder / name


def wrong_adapters(folder):
    """(adapter, what its refusal says) for every kind that would be left out, wholly or partly."""

    def same(key):
        return key

    other = rename(folder, "other", lambda key: key.replace("self_attn", "attention"))
    yield other, "o_proj to adapt, wanted ones like language_model.model.layers.0."
    yield rename(folder, "deep", lambda key: key.replace("layers.1", "layers.7")), "layers.7."
    yield rename(folder, "gpt", lambda key: key.replace("model.layers", "transformer.h")), "transformer.h.0."
    yield rename(folder, "some", lambda key: key.replace("layers.1.mlp", "layers.1.moe")), "layers.1.moe."
    projector = "base_model.model.projector.linear_1."
    first = "base_model.model.model.layers.0.self_attn.q_proj."
    yield rename(folder, "projector", lambda key: key.replace(first, projector)), "projector.linear_1"
    yield rename(folder, "zero", same, change=torch.zeros_like), "lora_B: found zeros alone"
    yield rename(folder, "empty", same, keep=lambda key: False), "found no weights"
    yield rename(folder, "half", same, keep=lambda key: key != DECODER_KEY), "found no other half"
    yield rename(folder, "small", same, change=lambda x: x[:, :2] if x.shape[0] == 4 else x[:2]), "found shape"
    dora = rename(folder, "magnitude", lambda key: key.replace("lora_B.weight", "lora_magnitude_vector"))
    yield dora, "lora_magnitude_vector, wanted weights of lora_A and lora_B"
    pickle = rename(folder, "pickle", same)
    (pickle / WEIGHTS).rename(pickle / "adapter_model.bin")
    yield pickle, "found adapter_model.bin, a pickle, wanted adapter_model.safetensors"
    damaged = rename(folder, "damaged", same)
    (damaged / WEIGHTS).write_bytes((damaged / WEIGHTS).read_bytes()[:-9])
    yield damaged, "found no safetensors"
    mute = rename(folder, "mute", same)
    config = json.loads((mute / "adapter_config.json").read_text())
    (mute / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    yield mute, "lora_alpha 0"


@pytest.mark.engine
def test_adapters_of_every_naming_answer_as_transformers_merges_them_and_wrong_ones_are_refused(made):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    slide, tokenizer = made / "slide.safetensors", AutoTokenizer.from_pretrained(made / "checkpoint")
    model = load(made)
    plain, _ = ask_transformers(model, tokenizer, [slide], "Which tissue?")
    model.language_model = peft.PeftModel.from_pretrained(model.language_model, made / "decoder").merge_and_unload()
    merged, _ = ask_transformers(model, tokenizer, [slide], "Which tissue?")
    assert merged != plain

    llm = start_engine(made / "checkpoint", made, enable_lora=True, max_lora_rank=8, max_loras=1, max_cpu_loras=2)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)

    def ask(adapter, number):
        request = None if adapter is None else LoRARequest(adapter.name, number, str(adapter))
        message = slide_message(slide.as_uri(), question="Which tissue?")
        return list(llm.chat(message, params, lora_request=request, use_tqdm=False)[0].outputs[0].token_ids)

    for number, name in enumerate(("decoder", "whole", "headless", "stage"), 1):
        assert ask(made / name, number) == merged, name
    for number, (adapter, sentence) in enumerate(wrong_adapters(made), 100):
        with pytest.raises(ValueError, match=f"^LoRA adapter {adapter.name}") as error:
            ask(adapter, number)
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)
    assert ask(None, 0) == plain  # the engine goes on
    assert ask(made / "decoder", 1) == merged


@pytest.mark.server
def test_a_server_answers_400_to_adapters_that_change_nothing_and_loads_the_others(made, checkpoint, shared_server):
    """The shared server's decoder has the shape of the adapters' own."""

    def post(route, **body):
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"{shared_server.api}/{route}", json=body, headers=headers, timeout=120)

    def answer(model):
        body = {"messages": [{"role": "user", "content": "Which tissue?"}], "max_tokens": 8, "temperature": 0}
        return post("chat/completions", model=model, **body).json()["choices"][0]["message"]["content"]

    wrong = rename(made, "elsewhere", lambda key: key.replace("self_attn", "attention"))
    refused = post("load_lora_adapter", lora_name="wrong", lora_path=str(wrong))
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        f"LoRA adapter elsewhere/{WEIGHTS}: base_model.model.model.layers.0.attention.o_proj.lora_A.weight: found no "
        "module language_model.model.layers.0.attention.o_proj to adapt, wanted ones like "
        "language_model.model.layers.0.self_attn.o_proj"
    )
    assert post("load_lora_adapter", lora_name="nosuch", lora_path=str(made / "nosuch")).status_code == 404
    assert post("load_lora_adapter", lora_name="right", lora_path=str(made / "decoder")).status_code == 200
    assert answer("right") != answer(shared_server.model)
    assert post("unload_lora_adapter", lora_name="right").status_code == 200
