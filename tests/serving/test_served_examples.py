"""The examples that ask a server, each as a reader runs it, on the `shared_server`."""

import re

import httpx
import pytest

from ..examples.running import run_example
from .conftest import KEY, make_slide, slide_message
from .grid_slides import CELL, make_grid_slide

pytestmark = pytest.mark.server
QUESTION = "Which tumour is present on this slide?"
FOLLOW_UP = "What does this slide show?"


@pytest.fixture(scope="module")
def folder(shared_folder):
    folder = shared_folder / "examples"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def slide(folder) -> str:
    """URL of a slide with places."""
    make_grid_slide(folder)
    return (folder / "grid.safetensors").as_uri()


@pytest.fixture
def answer_of(client, shared_server):
    """messages -> what the official client is answered."""

    def ask(messages) -> str:
        said = client.chat.completions.create(
            model=shared_server.model, messages=messages, temperature=0, max_tokens=64
        )
        return said.choices[0].message.content

    return ask


def run(name, server, slide, cwd, *arguments) -> str:
    return run_example(name, "--server", server.api, "--slide", slide, *arguments, cwd=cwd, OPENAI_API_KEY=KEY)


def test_chat_prints_the_servers_answer_about_the_named_slide(shared_server, answer_of, folder, slide):
    other = make_slide(folder / "other.safetensors", 300, seed=3).as_uri()
    wanted = [answer_of(slide_message(url, question=QUESTION)) for url in (slide, other)]
    assert wanted[0] != wanted[1]
    assert [run("chat.py", shared_server, url, folder) for url in (slide, other)] == [f"{one}\n" for one in wanted]


def test_the_evidence_is_that_of_the_answer_in_the_servers_order(shared_server, answer_of, folder, slide):
    said = run("stream_with_evidence.py", shared_server, slide, folder)
    answer, _, evidence = said.partition("\nthe model was given ")
    assert answer == f"answer: {answer_of(slide_message(slide, question=QUESTION))}"
    found = httpx.post(
        f"{shared_server.api}/wsi/select", json={"url": slide}, headers={"Authorization": f"Bearer {KEY}"}
    ).json()
    assert evidence.startswith(f"32 of {found['num_patches']} patches; the best five:\n")
    rows = re.findall(rf"patch +(\d+)  score ([+-][\d.]+)  x (\d+), y (\d+), {CELL} x {CELL} px\n", evidence)
    best = sorted(zip(found["scores"], found["indices"], found["coords"], strict=True), reverse=True)[:5]
    assert rows == [(str(row), f"{score:+.3f}", str(x), str(y)) for score, row, (x, y) in best]
    assert evidence.endswith("trust: nothing is said, since the checkpoint has no calibration\n")


def test_langchain_passes_on_the_slide_and_the_conversation(shared_server, answer_of, folder, slide):
    first = slide_message(slide, question=QUESTION)
    answer = answer_of(first)
    again = answer_of([*first, {"role": "assistant", "content": answer}, {"role": "user", "content": FOLLOW_UP}])
    assert run("langchain_client.py", shared_server, slide, folder) == f"{answer}\n{again}\n"
