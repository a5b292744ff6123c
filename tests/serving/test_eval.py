"""`vllm-wsi eval` end to end with the demo checkpoint: our server, dropped connections, a kill, `vllm run-batch`."""

import asyncio
import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import httpx
import pytest

from vllm_wsi.benchmark.results import read_results
from vllm_wsi.benchmark.slide_trust import confidence
from vllm_wsi.cli.app import main
from vllm_wsi.haystack.generator import LETTERS, HaystackWorld
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.selection.calibration import USUAL
from vllm_wsi.serving.server_process import VllmServer

from ..examples.running import run_example

pytestmark = pytest.mark.server
SLIDES, PATCHES = 12, 1000
ENGINE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Slides of haystack, and questions about them in every schema."""
    root = tmp_path_factory.mktemp("bench")
    (root / "features").mkdir()
    slides = [HaystackWorld().slide("test", number, PATCHES) for number in range(SLIDES)]
    tcga, bcnb, vqa, wsi_bench, multipath = [], [], [], [], []
    for number, slide in enumerate(slides):
        slide.write(root / f"features/{number}.safetensors")
        item = slide.item()
        stem, letter = item.question.split("\n")[1], item.answer
        choice = {"Question": stem, **item.options, "Answer": letter}
        tcga.append({"ID": number, "Slide": number, "Tumor": "T", "Broad Category": f"b{number % 2}",
                     "Narrow Category": "n", **choice})  # fmt: skip
        bcnb.append({"Slide": number, "Task": "task", **choice})
        texts = list(item.options.values())
        vqa.append({"Id": str(number), "Question": stem, "Choice": texts, "Answer": item.options[letter]})
        vqa.append({"Id": str(number), "Question": stem, "Answer": slide.finding_name})
        inline = "\n".join([stem, *(f"{key}. {text}" for key, text in item.options.items())])
        said = [{"from": "human", "value": f"<image>\n{inline}"}, {"from": "gpt", "value": letter}]
        wsi_bench.append({"id": number, "image": f"X/{number}.pt", "conversations": said})
        row = {"benchmark_name": "b", "benchmark_id": number, "image_path": f"{number}.svs", "prompt": stem}
        row |= {"answer": LETTERS.index(letter) + 1, "options": json.dumps(texts), "metric_type": "accuracy"}
        multipath.append(row)
    for name, rows in {"slidebench-tcga": tcga, "slidebench-bcnb": bcnb, "multipathqa": multipath}.items():
        with open(root / f"{name}.csv", "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    (root / "csv.csv").write_bytes((root / "slidebench-tcga.csv").read_bytes())
    (root / "wsi-vqa.json").write_text(json.dumps(vqa))
    (root / "wsi-bench.json").write_text(json.dumps(wsi_bench))
    return root


@pytest.fixture(scope="module")
def server(bench, tmp_path_factory):
    with VllmServer(DEMO_CHECKPOINT, bench, tmp_path_factory.mktemp("log") / "server.log", ENGINE) as running:
        yield running


def command(bench, out, *args, task="slidebench-tcga"):
    data = next(bench.glob(f"{task}.*"))
    return ["eval", "--task", task, "--data", str(data), "--features", str(bench / "features"), "--out", str(out),
            "--max-tokens", "8", *args]  # fmt: skip


def overall(out, part="closed"):
    lines = json.loads((out / "summary.json").read_text())["table"]
    return {(line["mode"], line["arm"].split()[0]): line for line in lines
            if line["by"] == "all" and line["part"] == part}  # fmt: skip


def assert_trust_is_the_servers(bench, server, rows):
    """The numbers of each slide are those of /v1/wsi/select, and its confidence is at the checkpoint's temperature."""
    for row in rows.values():
        url = (bench / f"features/{row.slide}.safetensors").as_uri()
        said = httpx.post(f"{server.api}/wsi/select", json={"url": url}, timeout=60).json()
        assert (row.sufficiency, row.in_distribution) == (said["sufficiency"], said["in_distribution"])
        assert 0 <= row.sufficiency <= 1
        assert row.confidence == confidence(row.label, row.logprobs, said["answer_temperature"])


def test_both_modes_and_all_baselines(bench, server, tmp_path):
    out = tmp_path / "out"
    assert main(command(bench, out, "--endpoint", server.api, "--mode", "both")) == 0
    found = overall(out)
    assert len(found) == 10
    for mode in ("generate", "choice"):
        assert found[mode, "slide"]["accuracy"] >= 11 / 12
        assert found[mode, "slide"]["unparsed"] == found[mode, "slide"]["errors"] == 0
        for baseline in ("blind", "random-32", "uniform-32"):
            assert found[mode, baseline]["accuracy"] <= 9 / 12, (mode, baseline)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["run"]["versions"]["server"].startswith("0.")
    assert summary["encoders"][0].startswith("haystack@0")
    _, rows = read_results(out / "choice.slide.jsonl")
    assert all(row.rule == "logprobs" and set(row.logprobs) == set("ABCD") for row in rows.values())
    assert_trust_is_the_servers(bench, server, rows)
    assert all(0.25 <= row.confidence <= 1 for row in rows.values())
    in_distribution = [row.in_distribution for row in rows.values()]
    assert_trust_is_the_servers(bench, server, read_results(out / "generate.slide.jsonl")[1])
    for baseline in ("blind", "random-32", "uniform-32"):
        _, rows = read_results(out / f"choice.{baseline}.jsonl")
        assert all(row.sufficiency is row.in_distribution is None for row in rows.values())
        assert all(0.25 <= row.confidence <= 1 for row in rows.values())
    asked, blind = found["choice", "slide"], found["choice", "blind"]
    assert asked["confidence_answers"] == asked["sufficiency_answers"] == asked["slides_told"] == SLIDES
    assert asked["slides_unlike"] == sum(one < USUAL for one in in_distribution) < SLIDES / 2  # of the same generator
    assert asked["confidence_aurc"] < blind["confidence_aurc"]
    assert 0 <= asked["calibration_error"] <= 1
    assert "| choice | slide | confidence | 12 |" in (out / "summary.md").read_text()


@pytest.mark.parametrize("task", ["slidebench-bcnb", "wsi-vqa", "wsi-bench", "csv", "multipathqa"])
def test_every_schema(bench, server, tmp_path, task):
    out = tmp_path / "out"
    assert main(command(bench, out, "--endpoint", server.api, "--baselines", "constant", task=task)) == 0
    found = overall(out)["generate", "slide"]
    assert (found["asked"], found["missing"], found["errors"]) == (SLIDES, 0, 0)
    if task != "multipathqa":  # the demo knows letters, not numbers
        assert found["accuracy"] >= 11 / 12
    if task == "wsi-vqa":
        assert overall(out, "open")["generate", "slide"]["asked"] == SLIDES


class DroppingProxy:
    """Forwards connections to a port; half of them end before the answer does. It counts the requests that came."""

    def __init__(self, port):
        self._target, self._rng, self.dropped = port, random.Random(0), 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        drop = self._rng.random() < 0.5
        self.dropped += drop

        async def pump(source, sink, limit):
            left = limit
            try:
                while left > 0 and (data := await source.read(min(left, 65536))):
                    left -= len(data)
                    sink.write(data)
                    await sink.drain()
            except OSError:
                pass
            sink.close()

        await asyncio.gather(pump(reader, up_writer, 1 << 40), pump(up_reader, writer, 100 if drop else 1 << 40))
        writer.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


def test_a_connection_that_drops_costs_no_answer(bench, server, tmp_path):
    with DroppingProxy(server.port) as proxy:
        args = ["--baselines", "none", "--retries", "12", "--concurrency", "4"]
        url = f"http://127.0.0.1:{proxy.port}/v1"
        assert main(command(bench, tmp_path / "out", "--endpoint", url, "--model", server.model, *args)) == 0
    assert proxy.dropped >= 1
    assert overall(tmp_path / "out")["generate", "slide"]["accuracy"] >= 11 / 12


def test_a_killed_run_goes_on(bench, server, tmp_path):
    out = tmp_path / "out"
    args = command(bench, out, "--endpoint", server.api, "--concurrency", "1", "--mode", "both")
    process = subprocess.Popen([sys.executable, "-m", "vllm_wsi.cli", *args])
    results = out / "generate.slide.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (results.is_file() and results.read_bytes().count(b"\n") >= 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results.read_bytes()
    finished = server.metrics()["vllm:request_success_total"]
    assert main(args) == 0
    files = sorted(out.glob("*.jsonl"))
    assert len(files) == 8
    for path in files:
        keys = [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]]
        assert sorted(keys, key=int) == [str(number) for number in range(SLIDES)]
    whole = before[: before.rfind(b"\n") + 1]
    assert results.read_bytes().startswith(whole)
    asked = server.metrics()["vllm:request_success_total"] - finished
    assert asked <= 8 * SLIDES - (whole.count(b"\n") - 1)


def test_run_batch_end_to_end(bench, tmp_path):
    out, requests, answers = tmp_path / "out", tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    model = str(DEMO_CHECKPOINT)
    args = ["--mode", "both", "--baselines", "blind,constant", "--model", model]
    assert main(command(bench, out, *args, "--export-batch", str(requests))) == 0
    assert len(requests.read_text().splitlines()) == 4 * SLIDES
    run = [sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", "-i", str(requests), "-o", str(answers)]
    run += ["--model", model, "--allowed-local-media-path", str(bench), *ENGINE]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert main(command(bench, out, *args, "--import-batch", str(answers))) == 0
    found = overall(out)
    assert found["generate", "slide"]["accuracy"] >= 11 / 12
    assert found["choice", "slide"]["accuracy"] >= 11 / 12
    assert found["choice", "blind"]["accuracy"] <= 9 / 12
    _, rows = read_results(out / "generate.slide.jsonl")
    assert Counter(row.status for row in rows.values()) == {"answered": SLIDES}
    _, rows = read_results(out / "choice.slide.jsonl")
    assert all(row.logprobs and row.confidence is row.sufficiency is None for row in rows.values())


def test_offline(bench, server, tmp_path):
    out = tmp_path / "out"
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8}
    args = ["--offline", str(DEMO_CHECKPOINT), "--mode", "both", "--baselines", "blind", "--engine-args"]
    run = [sys.executable, "-m", "vllm_wsi.cli", *command(bench, out, *args, json.dumps(engine))]
    done = subprocess.run(run, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = overall(out)
    for mode in ("generate", "choice"):
        assert found[mode, "slide"]["accuracy"] >= 11 / 12
        assert found[mode, "blind"]["accuracy"] <= 9 / 12
    _, rows = read_results(out / "choice.slide.jsonl")
    assert all(set(row.logprobs) == set("ABCD") for row in rows.values())
    assert_trust_is_the_servers(bench, server, rows)
    assert_trust_is_the_servers(bench, server, read_results(out / "generate.slide.jsonl")[1])
    _, rows = read_results(out / "choice.blind.jsonl")
    assert all(row.confidence and row.sufficiency is None for row in rows.values())
    assert (done.stdout + done.stderr).count(f"selected 32 of {PATCHES} patches") == SLIDES  # each is read once


def test_the_examples_answer_rightly_by_their_defaults_and_say_what_the_server_says_of_trust(bench, server):
    """examples/README.md's own slides, made where the examples look for them."""
    folder = bench / "examples"
    folder.mkdir()
    made = run_example("make_slides.py", cwd=folder)
    right = [line.split()[-1] for line in made.splitlines()]
    slides = sorted((folder / "slides").iterdir())
    assert run_example("chat.py", "--server", server.api, cwd=folder) == f"{right[0]}\n"
    assert len({*right}) > 1
    other = next(number for number, finding in enumerate(right) if finding != right[0])
    url = slides[other].as_uri()
    said = run_example("stream_with_evidence.py", "--server", server.api, "--slide", url, cwd=folder)
    assert said.startswith(f"answer: {right[other]}\nthe model was given 32 of 10,000 patches")
    trust = httpx.post(f"{server.api}/wsi/select", json={"url": url}, timeout=60).json()
    assert f"sufficiency {trust['sufficiency']:.2f}," in said
    assert f"in distribution {trust['in_distribution']:.2f}," in said
    assert all(f"warning: {one}\n" in said for one in trust["warnings"])
    assert said.count("warning: ") == len(trust["warnings"])
