"""vLLM answers as the transformers model does: same tokens, same log-probabilities."""

import json
import os

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from vllm_wsi.model.checkpoint import load_selector
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.slides import open_features, write_features

from .conftest import D, make_slide, slide_message

pytestmark = pytest.mark.engine
NEW_TOKENS = 12
INPUTS = {"qwen2": ("features",), "qwen3": ("score",), "llama": ("features", "score")}
SUMMARY_TOKENS = {"qwen2": 6, "qwen3": 0, "llama": 0}


def start_engine(checkpoint, media_path, **options):
    from vllm import LLM

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4, "seed": 0}
    settings |= {"limit_mm_per_prompt": {"image": 3}, "allowed_local_media_path": str(media_path)} | options
    llm = LLM(str(checkpoint), **settings)
    if os.environ.get("WSI_TESTS_V2"):  # `test_v2_runner.py`
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        assert any(kind.__module__ == "vllm.v1.worker.gpu.model_runner" for kind in type(runner).__mro__)
    return llm


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return [make_slide(folder / f"{n}.safetensors", n, seed=n) for n in (5, 32, 33, 700, 9000)]


def reference(checkpoint):
    return SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(
        checkpoint
    )


def ask_transformers(model, tokenizer, paths, question):
    """(tokens, log-probabilities of the first token over the vocabulary)."""
    selections = []
    for path in paths:
        with open_features(path) as slide:
            selections.append(model.selector().select(slide))
    content = [{"type": "image"}] * len(paths) + [{"type": "text", "text": question}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    answer = model.generate(
        prompt, selections, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return answer.sequences[0].tolist(), answer.logits[0][0].log_softmax(-1)


def ask_vllm(llm, paths, question):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, logprobs=5)
    message = slide_message(*(path.as_uri() for path in paths), question=question)
    output = llm.chat(message, params, use_tqdm=False)[0].outputs[0]
    return list(output.token_ids), {token: entry.logprob for token, entry in output.logprobs[0].items()}


@pytest.mark.parametrize("position_ids", ["original", "packed"])
@pytest.mark.parametrize("decoder", ["qwen2", "qwen3", "llama"])
def test_greedy_tokens_and_first_logprobs_equal_transformers(decoder, position_ids, slides, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    init_checkpoint(
        checkpoint,
        TinySettings(
            feature_dim=D,
            decoder=decoder,
            hidden_size=64,
            scorer_hidden_size=32,
            max_position_embeddings=2048,
            position_ids=position_ids,
            projector_inputs=INPUTS[decoder],
            summary_tokens=SUMMARY_TOKENS[decoder],
            seed=3,
        ),
    )
    model, tokenizer = reference(checkpoint)
    llm = start_engine(checkpoint, slides[0].parent)
    # The budget of 1024 positions scales the slides of 9000 patches; the last prompts hold several slides.
    prompts = [[path] for path in slides] + [slides[2:4], [slides[4], slides[3], slides[0]]]
    for paths in prompts:
        wanted, logprobs = ask_transformers(model, tokenizer, paths, "Which tissue?")
        found, top = ask_vllm(llm, paths, "Which tissue?")
        names = [path.name for path in paths]
        assert found == wanted, names
        assert all(abs(value - logprobs[token].item()) < 1e-3 for token, value in top.items()), names


def test_vllm_and_transformers_end_an_answer_at_the_same_token(slides, tmp_path):
    from vllm import SamplingParams

    init_checkpoint(tmp_path / "c", TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=32, seed=3))
    free, _ = ask_transformers(*reference(tmp_path / "c"), [slides[3]], "Which tissue?")
    file = tmp_path / "c" / "generation_config.json"
    named = json.loads(file.read_text())
    file.write_text(json.dumps(named | {"eos_token_id": [named["eos_token_id"], free[4]]}))
    model, tokenizer = reference(tmp_path / "c")
    with open_features(slides[3]) as slide:
        selection = model.selector().select(slide)
    content = [{"type": "image"}, {"type": "text", "text": "Which tissue?"}]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    wanted = model.generate(prompt, [selection], max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    assert wanted == free[: free.index(free[4]) + 1]
    message = slide_message(slides[3].as_uri(), question="Which tissue?")
    llm = start_engine(tmp_path / "c", slides[3].parent)
    found = llm.chat(message, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)[0].outputs[0]
    assert (list(found.token_ids), found.finish_reason) == (wanted, "stop")


def test_the_scorer_over_the_whole_slide_is_served_as_transformers_runs_it(slides, tmp_path):
    init_checkpoint(
        tmp_path / "c",
        TinySettings(feature_dim=D, hidden_size=64, scorer_kind="context", scorer_hidden_size=64, seed=5),
    )
    model, tokenizer = reference(tmp_path / "c")
    llm = start_engine(tmp_path / "c", slides[0].parent)
    for path in slides[:4]:
        assert (
            ask_vllm(llm, [path], "Which tissue?")[0] == ask_transformers(model, tokenizer, [path], "Which tissue?")[0]
        )


def test_the_position_mode_changes_the_answer(slides, tmp_path):
    answers = []
    for mode in ("original", "packed"):
        init_checkpoint(
            tmp_path / mode, TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=32, position_ids=mode)
        )
        answers.append(ask_transformers(*reference(tmp_path / mode), [slides[3]], "Which tissue?")[0])
    assert answers[0] != answers[1]


def test_the_kept_patches_change_the_answer(slides, checkpoint):
    model, tokenizer = reference(checkpoint)
    answers = [tuple(ask_transformers(model, tokenizer, [path], "Which tissue?")[0]) for path in slides]
    assert len(set(answers)) == len(answers)


def test_the_real_slide_is_answered_as_by_transformers(shared_data, tmp_path):
    features = shared_data / "features/mopadi_TCGA-AD-6964/features.h5"
    init_checkpoint(tmp_path / "checkpoint", TinySettings(feature_dim=512, hidden_size=64))
    model, tokenizer = reference(tmp_path / "checkpoint")
    llm = start_engine(tmp_path / "checkpoint", features.parent)
    wanted, _ = ask_transformers(model, tokenizer, [features], "Which tissue?")
    assert ask_vllm(llm, [features], "Which tissue?")[0] == wanted


def test_generate_takes_files_selections_arrays_and_tensors_and_agrees_with_chat(checkpoint, slides):
    import numpy as np
    from vllm import SamplingParams

    llm = start_engine(checkpoint, slides[0].parent)
    params = SamplingParams(temperature=0, max_tokens=6)
    path = slides[3]
    content = [{"type": "image"}, {"type": "text", "text": "Which tissue?"}]
    asked = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    with open_features(path) as slide:
        array = slide.read_rows(0, slide.num_patches)
        chosen = load_selector(str(checkpoint)).select(slide)
        answers = [tuple(ask_vllm(llm, [path], "Which tissue?")[0][:6])]
        for item in (slide, chosen, array, np.asfortranarray(array), torch.from_numpy(array), [slide]):
            prompt = {"prompt": asked, "multi_modal_data": {"image": item}}
            answers.append(tuple(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids))
        for item in (path, str(path), [str(path)], {"image_embeds": torch.from_numpy(array)}, None):
            prompt = {
                "prompt": "<|slide|>?",
                "multi_modal_data": {"image": item},
                "multi_modal_uuids": {"image": ["u"]},
            }
            with pytest.raises(ValueError, match="wanted"):
                llm.generate(prompt, params, use_tqdm=False)
    assert len(set(answers)) == 1


def test_two_models_in_one_process_each_use_their_own_scorer(slides, tmp_path):
    engines = []
    for seed in (1, 2):
        init_checkpoint(
            tmp_path / str(seed), TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=32, seed=seed)
        )
        engines.append((start_engine(tmp_path / str(seed), slides[0].parent), reference(tmp_path / str(seed))))
    for llm, (model, tokenizer) in engines:
        wanted, _ = ask_transformers(model, tokenizer, [slides[4]], "Which tissue?")
        assert ask_vllm(llm, [slides[4]], "Which tissue?")[0] == wanted


def test_two_engines_of_one_checkpoint_each_keep_their_own_k(checkpoint, slides):
    token = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("<|slide|>")
    engines = {
        k: start_engine(checkpoint, slides[0].parent, mm_processor_kwargs={"num_slide_tokens": k}) for k in (9, 5)
    }
    for k, llm in engines.items():
        output = llm.chat(slide_message(slides[3].as_uri()), use_tqdm=False)[0]
        assert list(output.prompt_token_ids).count(token) == k


def test_a_follow_up_question_finds_the_slide_in_the_prefix_cache_and_answers_alike(checkpoint, slides):
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=8)
    llm = start_engine(checkpoint, slides[0].parent, block_size=32)
    plain = start_engine(checkpoint, slides[0].parent, block_size=32, enable_prefix_caching=False)
    for question in ("Which tissue is this?", "And which grade?"):
        message = slide_message(*(path.as_uri() for path in slides[3:5]), question=question)
        found, wanted = (engine.chat(message, greedy, use_tqdm=False)[0] for engine in (llm, plain))
        assert list(found.outputs[0].token_ids) == list(wanted.outputs[0].token_ids)
    assert found.num_cached_tokens >= 32


@pytest.mark.parametrize("cached", [True, False], ids=["with caches", "without"])
def test_slides_of_several_dtypes_in_one_batch_and_in_one_prompt_are_answered_as_by_transformers(
    cached, checkpoint, tmp_path
):
    """A patch above the largest fp16 number is no infinity because another request's slide is fp16."""
    from vllm import SamplingParams

    low = make_slide(tmp_path / "low.safetensors", 100, 0, dtype="float16")
    x = np.random.default_rng(1).standard_normal((100, D))
    loud, exact = tmp_path / "loud.safetensors", tmp_path / "exact.safetensors"
    write_features(loud, (x * 1e5).astype(np.float32), None, {"encoder": "test@1"})
    write_features(exact, x, None, {"encoder": "test@1"})
    options = {} if cached else {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    llm, question = start_engine(checkpoint, tmp_path, **options), "Which tissue?"
    model, tokenizer = reference(checkpoint)
    prompts = [[low], [loud], [exact], [low, loud], [exact, low, loud]]
    wanted = [ask_transformers(model, tokenizer, paths, question)[0] for paths in prompts]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    messages = [slide_message(*(path.as_uri() for path in paths), question=question) for paths in prompts]
    assert [list(one.outputs[0].token_ids) for one in llm.chat(messages, params, use_tqdm=False)] == wanted
    assert [ask_vllm(llm, paths, question)[0] for paths in prompts] == wanted


def test_prompts_in_pieces_and_preempted_requests_answer_as_each_alone(checkpoint, slides):
    from vllm import SamplingParams

    long = SamplingParams(temperature=0, max_tokens=64, min_tokens=64)
    messages = [slide_message(path.as_uri(), question=question) for path in slides for question in ("Why?", "And?")]
    alone = start_engine(checkpoint, slides[0].parent, max_num_seqs=1)
    wanted = [alone.chat(message, long, use_tqdm=False)[0].outputs[0].token_ids for message in messages]
    tight = start_engine(
        checkpoint, slides[0].parent, max_model_len=256, block_size=32, num_gpu_blocks_override=10,
        enable_chunked_prefill=True, max_num_batched_tokens=48, enable_prefix_caching=False, disable_log_stats=False,
    )  # fmt: skip
    found = [one.outputs[0].token_ids for one in tight.chat(messages, long, use_tqdm=False)]
    assert found == wanted
    assert sum(one.value for one in tight.get_metrics() if one.name == "vllm:num_preemptions") > 0


def test_a_tokenizer_without_the_slide_token_ends_the_start_with_one_sentence(checkpoint, slides, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"slide_token_id": 258', '"slide_token_id": 259'))
    with pytest.raises(RuntimeError, match=r"tokenizer: found <\|slide\|> as \[258\], wanted \[259\]"):
        start_engine(tmp_path, slides[0].parent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slide_tokens": 0}, "num_slide_tokens: found 0"),
        ({"num_slide_tokens": 512}, "num_slide_tokens: found 512"),
        (
            {"slide_tokens": 3},
            "found slide_tokens, wanted some of num_slide_tokens, selection_device, device",
        ),
        ({"selection_device": "tpu"}, "device: found 'tpu'"),
    ],
)
def test_wrong_server_options_end_the_start_with_one_sentence(checkpoint, slides, options, message):
    with pytest.raises(RuntimeError, match=message):
        start_engine(checkpoint, slides[0].parent, mm_processor_kwargs=options)
