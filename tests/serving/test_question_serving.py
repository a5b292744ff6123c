"""A checkpoint whose scorer hears the question, served: by unmodified clients, and read once in a slide's life."""

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import quote

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

from vllm_wsi.benchmark.results import read_results
from vllm_wsi.benchmark.tasks import read_task
from vllm_wsi.cli.app import main
from vllm_wsi.model.checkpoint import CALIBRATION, load_calibration, load_selector
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.question_reader import QuestionReader
from vllm_wsi.model.question_text import question_ids, question_text
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.selection.calibration import Calibration, Trust, UsualScores
from vllm_wsi.selection.scorer import scorer_digest
from vllm_wsi.serving import vllm_hooks
from vllm_wsi.serving.engine import OfflineEngine
from vllm_wsi.serving.question_hook import with_question
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.serving.slide_request import SlideRequest
from vllm_wsi.slides import open_features
from vllm_wsi.store.store_settings import StoreSettings

from .conftest import D, make_slide, slide_message
from .test_parity import NEW_TOKENS, ask_vllm, start_engine

K, N = 8, 3000
ASKED = ("Which tissue is this?", "Is there necrosis, and where?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "asked"
    settings = TinySettings(
        feature_dim=D, hidden_size=64, scorer_hidden_size=32, num_slide_tokens=K, scorer_kind="question", seed=3
    )
    init_checkpoint(path, settings)
    slide = make_slide(tmp_path_factory.mktemp("usual") / "usual.safetensors", N, seed=9)
    selector = load_selector(str(path))
    with open_features(slide) as opened:
        usual = selector.select(opened).summary
    fitted = Calibration(
        scorer=scorer_digest(selector.scorer), temperature=1.5, best_weight=3.0, log_patches_weight=-0.1,
        bias=0.5 - 3 * usual.best, enough=0.5, num_slides=300, num_patches=(100, N),
        usual=(
            UsualScores(
                max_patches=N, training_scores=[*usual.quantiles.tolist(), *[usual.best] * 4],
                body_distances=[0.1 * i for i in range(300)], tail_distances=[0.1 * i for i in range(300)],
            ),
        ),
    )  # fmt: skip
    (path / CALIBRATION).write_text(fitted.model_dump_json())
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()


def selected(model, checkpoint, path, question):
    """As transformers' user selects: by the whole model."""
    ids = question_ids(AutoTokenizer.from_pretrained(checkpoint), question_text([question]))
    with open_features(path) as slide, torch.no_grad():
        return model.selector().select(slide, query=model.query(torch.tensor(ids)))


@pytest.mark.engine
def test_served_tokens_equal_transformers_and_follow_the_question(model, checkpoint, tmp_path):
    paths = [make_slide(tmp_path / f"{n}.safetensors", n, seed=n) for n in (5, 700, N)]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    llm = start_engine(checkpoint, tmp_path)
    for question in ASKED:
        for several in ([paths[0]], [paths[2]], paths):
            selections = [selected(model, checkpoint, path, question) for path in several]
            content = [{"type": "image"}] * len(several) + [{"type": "text", "text": question}]
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            wanted = model.generate(
                prompt, selections, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
            )[0].tolist()
            assert ask_vllm(llm, several, question)[0] == wanted, (question, len(several))
    with pytest.raises(ValueError, match="without its question"):
        llm.generate({"prompt": "<|slide|> x", "multi_modal_data": {"image": open_features(paths[0])}})


@pytest.mark.engine
def test_an_offline_engine_says_of_each_response_what_its_own_selection_says(model, checkpoint, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", N, seed=30)
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / CALIBRATION).unlink()
    settings = {"temperature": 0.0, "max_tokens": 2}
    messages = [slide_message(path.as_uri(), question=question) for question in ASKED] + [slide_message()]
    calibration = load_calibration(str(checkpoint), model.selector().scorer)
    wanted = [Trust.of(calibration, selected(model, checkpoint, path, question)) for question in ASKED]
    assert wanted[0].sufficiency != wanted[1].sufficiency
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    engines = [OfflineEngine(str(one), **options, allowed_local_media_path=str(tmp_path)) for one in (checkpoint, bare)]
    for engine, trusts in zip(engines, ([*wanted, Trust(answer_temperature=1.5)], [Trust()] * 3), strict=True):
        responses = engine.complete([{"messages": message, **settings} for message in messages])
        assert json.loads(json.dumps(responses)) == responses  # as a worker of a cluster hands them over
        for response, trust in zip(responses, trusts, strict=True):
            assert response["slide_trust"] == trust._asdict() | {"warnings": list(trust.warnings)}
        gone = engine._trust(slide_message((tmp_path / "gone.safetensors").as_uri()))["slide_trust"]
        assert gone == responses[2]["slide_trust"]  # after its answer: that is kept, without the slide's numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slides")


@pytest.fixture(scope="module")
def server(checkpoint, folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("server")
    options = json.dumps({"selection_store": str(work / "store")})
    args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"]
    args += ["--enable-mm-embeds", "--mm-processor-kwargs", options]
    with VllmServer(checkpoint, folder, work / "server.log", args, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def select(server, url):
    answer = httpx.post(f"{server.api}/wsi/select", json={"url": url})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(client, server, messages):
    answer = client.chat.completions.create(model=server.model, messages=messages, max_tokens=8, temperature=0)
    return answer.choices[0].message.content


@pytest.mark.server
def test_many_questions_at_once_read_a_slide_once_and_each_gets_its_own_patches(
    server, client, folder, model, checkpoint
):
    path = make_slide(folder / "once.safetensors", N, seed=1)
    before = server.metrics()
    questions = [f"Question {i % 16}: what is seen here?" for i in range(64)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda q: ask(client, server, slide_message(path.as_uri(), question=q)), questions))
    assert all(answers[i] == answers[i % 16] for i in range(64))
    after = server.metrics()
    assert after["vllm_wsi:patches_read_total"] - before["vllm_wsi:patches_read_total"] == N
    for question in questions[:3]:
        found = select(server, f"{path.as_uri()}#q={quote(question)}")
        assert found["source"] == "memory"  # the same selection as the chat's
        assert found["indices"] == selected(model, checkpoint, path, question).indices.tolist()


@pytest.mark.server
def test_the_last_user_turn_is_heard_and_a_url_may_name_its_own_question(server, client, folder):
    path = make_slide(folder / "turns.safetensors", N, seed=2)
    url = path.as_uri()
    by_url = [select(server, f"{url}#q={quote(question)}")["indices"] for question in ASKED]
    assert by_url[0] != by_url[1]
    first = slide_message(url, question=ASKED[0])
    turns = [*first, {"role": "assistant", "content": "Colon."}, {"role": "user", "content": ASKED[1]}]
    explicit = [*slide_message(f"{url}#q={quote(ASKED[1])}", question=ASKED[0]), *turns[1:]]
    assert ask(client, server, turns) == ask(client, server, explicit)
    system = [{"role": "system", "content": "Answer briefly."}, *first]
    hits = server.metrics()["vllm_wsi:selection_cache_hits_total"]
    ask(client, server, system)
    assert server.metrics()["vllm_wsi:selection_cache_hits_total"] == hits + 1  # a system prompt is not heard


@pytest.mark.server
def test_without_a_question_the_free_query_chooses_and_embeddings_without_one_are_refused(
    server, client, folder, model
):
    path = make_slide(folder / "free.safetensors", 500, seed=4)
    with open_features(path) as slide:
        wanted = model.selector().select(slide).indices.tolist()
    assert select(server, path.as_uri())["indices"] == wanted
    assert select(server, f"{path.as_uri()}#q=%20")["indices"] == wanted
    part = {"type": "image_embeds", "image_embeds": "AAAA"}
    with pytest.raises(openai.BadRequestError):
        ask(client, server, [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}])


@pytest.mark.server
def test_what_the_calibration_says_of_a_slide_follows_the_question_and_outlives_the_file(
    server, folder, model, checkpoint
):
    path = make_slide(folder / "trusted.safetensors", N, seed=10)
    calibration = load_calibration(str(checkpoint), model.selector().scorer)
    said = []
    for question in ASKED:
        url = f"{path.as_uri()}#q={quote(question)}"
        found, again, more = select(server, url), select(server, url), select(server, f"{url}&k=64")
        wanted = Trust.of(calibration, selected(model, checkpoint, path, question))
        for one in (found, again, more):  # also out of memory, and for another K
            assert {name: one[name] for name in Trust._fields} == wanted._asdict() | {"warnings": list(wanted.warnings)}
        said.append(found)
    assert again["source"] == "memory"
    assert said[0]["sufficiency"] != said[1]["sufficiency"]
    assert said[0]["in_distribution"] == said[1]["in_distribution"]  # whatever is asked
    long = make_slide(folder / "long.safetensors", N + 1, seed=10)
    unchecked = f"Slides of {N + 1} patches were not checked (100 to {N} were)."
    assert select(server, long.as_uri())["warnings"][-1] == unchecked


@pytest.mark.server
def test_an_evaluation_says_of_each_answer_what_its_own_selection_says_and_no_slide_is_read_twice(
    server, folder, tmp_path
):
    features = folder / "evaluated"
    features.mkdir()
    paths = [make_slide(features / f"{n}.safetensors", N, seed=20 + n) for n in range(2)]
    rows = [(path.stem, f" {question} ", *"xy", "A") for path in paths for question in ASKED]
    with open(tmp_path / "q.csv", "w", newline="") as file:
        csv.writer(file).writerows([("Slide", "Question", "A", "B", "Answer"), *rows])
    args = ["eval", "--task", "csv", "--data", str(tmp_path / "q.csv"), "--features", str(features), "--mode", "both",
            "--out", str(tmp_path / "out"), "--baselines", "blind", "--max-tokens", "8"]  # fmt: skip
    before, log = server.metrics(), server.log_path.read_text()
    assert main([*args, "--endpoint", server.api]) == 0
    after = server.metrics()
    for counter, wanted in {"selections": 2, "patches_read": 2 * N}.items():
        name = f"vllm_wsi:{counter}_total"
        assert after[name] - before[name] == wanted, counter
    # One for each answer, and none of them is refused.
    assert server.log_path.read_text()[len(log) :].count('POST /v1/wsi/select HTTP/1.1" 200') == 8
    said = {}
    for question in read_task("csv", tmp_path / "q.csv"):
        url = (features / f"{question.slide}.safetensors").as_uri()
        said[question.key] = select(server, f"{url}#q={quote(question_text([question.text]))}")
        assert said[question.key]["source"] == "memory"
    assert len({one["sufficiency"] for one in said.values()}) == 4
    for mode in ("generate", "choice"):
        _, found = read_results(tmp_path / f"out/{mode}.slide.jsonl")
        assert {key: (row.sufficiency, row.in_distribution) for key, row in found.items()} == {
            key: (one["sufficiency"], one["in_distribution"]) for key, one in said.items()
        }


@pytest.mark.server
@pytest.mark.browser
def test_the_page_shows_the_patches_of_each_question(chromium, server, folder):
    path = make_slide(folder / "seen.safetensors", N, seed=6)
    page = chromium.new_page()
    page.set_default_timeout(30_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{server.root}/wsi/#slide={quote(path.as_uri(), safe='')}")
    from playwright.sync_api import expect

    expect(page.locator("#kept-note")).to_have_text(f"{K} of 3,000", timeout=30_000)
    for question in ASKED:
        page.fill("#question", question)
        page.click("#send")
        expect(page.locator("#kept-note")).to_contain_text(question, timeout=30_000)
        scores = sorted(select(server, f"{path.as_uri()}#q={quote(question)}")["scores"], reverse=True)
        wanted = [f"{rank}{score:.3f}" for rank, score in enumerate(scores, start=1)]
        assert page.locator("#patches button").all_text_contents() == wanted
        trust = select(server, f"{path.as_uri()}#q={quote(question)}")
        expect(page.locator("#trust")).to_contain_text(f"sufficiency {trust['sufficiency']:.2f}")
        expect(page.locator("#trust")).to_contain_text(" ".join(trust["warnings"]) or "stand out enough for an answer")
        expect(page.locator("#send")).to_be_visible(timeout=30_000)
    page.close()
    assert not problems


def test_checkpoints_that_differ_in_token_embeddings_alone_share_no_selection(checkpoint, tmp_path, monkeypatch):
    other = tmp_path / "other"
    model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table += torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(other)
    path = make_slide(tmp_path / "a.safetensors", 800, seed=8)
    monkeypatch.setattr(vllm_hooks, "_current", None)
    monkeypatch.setattr(vllm_hooks, "_services", {})
    settings = StoreSettings(tmp_path / "store", 1 << 30)
    found = []
    for one in (checkpoint, other, checkpoint):
        selector = load_selector(str(one))
        reader = partial(QuestionReader, selector.scorer, str(one), None)
        service = vllm_hooks.service_for(selector, scorer_digest(selector.scorer), 16, settings, reader)
        found.append(service.select(SlideRequest(path, question=ASKED[1])))
    assert found[0].source == "file"
    assert found[1].source == "stored scores"  # the vectors are the same
    assert found[0].digest == found[2].digest != found[1].digest
    assert found[1].selection.indices.tolist() == selected(model, checkpoint, path, ASKED[1]).indices.tolist()
    assert found[1].selection.indices.tolist() != found[0].selection.indices.tolist()


def told(part):
    """The URL of a part, after the hook."""
    [message] = with_question([{"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}])
    image = message["content"][0]["image_url"]
    return image if isinstance(image, str) else image["url"]


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ({"type": "image_url", "image_url": {"url": "file:///a.h5"}}, "file:///a.h5#q=Which%3F"),
        ({"type": "image_url", "image_url": "file:///a.h5"}, "file:///a.h5#q=Which%3F"),
        ({"image_url": "file:///a.h5"}, "file:///a.h5#q=Which%3F"),
        ({"type": "input_image", "image_url": "https://h/a?x=1"}, "https://h/a?x=1#q=Which%3F"),
        ({"image_url": {"url": "s3://b/a#k=64"}}, "s3://b/a#k=64&q=Which%3F"),
        ({"image_url": {"url": "file:///a.h5#q=mine"}}, "file:///a.h5#q=mine"),
        ({"image_url": {"url": "file:///a.h5#q="}}, "file:///a.h5#q="),
        ({"image_url": {"url": ""}}, ""),
    ],
)
def test_every_form_of_a_slides_url_gets_the_question_once(part, wanted):
    assert told(part) == wanted


def test_a_slide_in_a_turn_of_its_own_gets_the_question_of_the_last_turn_that_has_one():
    slide, asked = {"role": "user", "content": [{"image_url": "file:///a.h5"}]}, {"role": "user", "content": "Which?"}
    told = {"role": "user", "content": [{"image_url": "file:///a.h5#q=Which%3F"}]}
    assert with_question([asked, slide]) == [asked, told]
    assert with_question([slide, asked]) == [told, asked]
    half = {"role": "user", "content": "\ud800"}  # of a surrogate pair, as a program may hold it
    assert with_question([slide, half])[0]["content"] == [{"image_url": "file:///a.h5#q=%3F"}]


def test_what_holds_no_url_or_no_question_is_left_as_it_is():
    odd = [
        {"role": "user", "content": "text alone"}, {"role": "user", "content": None}, "x", {"role": "user"},
        {"role": "user", "content": [{"image_url": {"url": 3}}, {"type": "image_embeds", "image_embeds": "A"}, "y"]},
        {"role": "tool", "content": [{"type": "text", "text": "tool"}]},
    ]  # fmt: skip
    assert with_question(odd) == odd
    silent = [{"role": "user", "content": [{"image_url": {"url": "file:///a.h5"}}, {"type": "text", "text": " "}]}]
    assert with_question(silent) == silent
