"""`vllm-wsi eval` against a small stand-in for a server: resumption, retries, missing slides, modes, the report."""

import csv
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pytest

from vllm_wsi.benchmark.report import compare, measure
from vllm_wsi.benchmark.results import ResultsFile, Row, read_results
from vllm_wsi.cli.app import main
from vllm_wsi.errors import SettingsError
from vllm_wsi.slides import open_features, write_features
from vllm_wsi.stats import holm


class FakeServer:
    """Answers `answer`; every `drop`-th connection is dropped without a word.

    Args:
        select: (status, JSON) for each POST /v1/wsi/select, of its body; None: as most servers, it has no such route.
    """

    def __init__(self, answer="B", drop=0, delay=0.0, logprobs=True, select=None):
        self.asked, self.bodies, self._lock, count = Counter(), [], threading.Lock(), iter(range(1, 10**9))
        self.selected = []  # bodies of /v1/wsi/select
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._reply(200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/v1/wsi/select":
                    fake.selected.append(body)
                    self._reply(*((404, {"detail": "Not Found"}) if select is None else select(body)))
                    return
                with fake._lock:
                    number = next(count)
                if drop and number % drop == 0:
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return
                time.sleep(delay)
                parts = body["messages"][0]["content"]
                with fake._lock:
                    fake.asked[json.dumps(parts)] += 1
                    fake.bodies.append(body)
                if body.get("logprobs") and not logprobs:
                    self._reply(400, {"error": {"message": "logprobs are not supported", "code": 400}})
                    return
                choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
                if body.get("logprobs"):
                    top = [{"token": token, "logprob": value} for token, value in
                           (("The", -0.1), (" B", -2.0), ("A", -1.9), ("B", -2.0))]  # fmt: skip
                    choice["logprobs"] = {"content": [{"token": "The", "logprob": -0.1, "top_logprobs": top}]}
                self._reply(200, {"id": "x", "object": "chat.completion", "choices": [choice]})

            def _reply(self, status, value):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def bench(tmp_path):
    """20 questions about 10 slides, of which slide 9 has no features; B is right 12 times."""
    folder = tmp_path / "features"
    folder.mkdir()
    for number in range(9):
        features = np.random.default_rng(number).standard_normal((40 << number, 4)).astype(np.float16)
        coords = np.stack([np.arange(len(features)), np.zeros(len(features))], axis=1)
        write_features(folder / f"{number}.safetensors", features, coords, {"encoder": "test@1"})
    with open(tmp_path / "q.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Slide", "Task", "Question", "A", "B", "C", "D", "Answer"])
        for number in range(20):
            letter = "B" if number < 12 else "A"
            writer.writerow([number % 10, f"task {number % 2}", f"Question {number}?", "x", "y", "z", "", letter])
    return tmp_path


def command(bench, *args, out="out"):
    return ["eval", "--task", "slidebench-bcnb", "--data", str(bench / "q.csv"), "--features",
            str(bench / "features"), "--out", str(bench / out), "--concurrency", "4", *args]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_whole_run_with_baselines(bench, capsys):
    with FakeServer() as server:
        assert main(command(bench, "--endpoint", server.url, "--mode", "both")) == 0
    said = capsys.readouterr().out
    assert "generate slide (closed): 11 of 18 right, 61.1 %" in said
    assert "2 questions not asked: 1 slides without usable features, such as 9" in said
    summary = json.loads((bench / "out/summary.json").read_text())
    assert summary["missing_slides"] == ["9"]
    assert summary["encoders"] == ["test@1"]
    assert summary["run"]["model"] == "fake"
    assert {"task", "data_sha256", "prompt_sha256", "seed", "versions", "endpoint"} <= set(summary["run"])
    table = {(line["mode"], line["arm"]): line for line in summary["table"] if line["by"] == "all"}
    assert len(table) == 10
    assert table["generate", "constant B"]["accuracy"] == pytest.approx(11 / 18)
    line = table["choice", "slide"]
    assert (line["questions"], line["missing"], line["asked"], line["correct"]) == (20, 2, 18, 11)  # " B" and "B"
    assert line["accuracy_of_all"] == pytest.approx(11 / 20)
    assert line["chance"] == pytest.approx(1 / 3)
    rows = lines(bench / "out/choice.slide.jsonl")
    assert "run" in rows[0]
    assert len(server.selected) == 1  # a server without the route is asked once, whatever arms and modes there are
    trust = [(row["confidence"], row["sufficiency"], row["in_distribution"]) for row in rows[1:] if row["logprobs"]]
    both = 2 * np.exp(-2)
    assert trust == [(pytest.approx(both / (both + np.exp(-1.9))), None, None)] * 18
    assert "sufficiency_aurc" not in line
    assert line["confidence_answers"] == 18
    assert line["confidence_aurc"] == pytest.approx(7 / 18)  # the same confidence everywhere
    assert rows[1]["logprobs"]["B"] == pytest.approx(-2 + np.log(2))
    assert "C" not in rows[1]["logprobs"]
    bins = [line["group"] for line in summary["table"] if (line["by"], line["mode"], line["arm"]) == ("patches", "generate", "slide")]  # fmt: skip  # noqa: E501
    assert bins == ["<64", "64-128", "128-256", "256-512", "512-1024", "1024-2048", "2048-4096", ">=4096"]
    page = (bench / "out/summary.md").read_text()
    assert "| generate | slide | 18 | 11 | 61.1 [" in page
    assert "2 questions were not asked" in page
    assert (bench / "out/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(csv.DictReader(open(bench / "out/table.csv")))) == len(summary["table"])
    gap = next(one for one in summary["comparisons"] if one["second"] == "blind")
    assert (gap["difference"], gap["p"], gap["p_holm"], gap["questions"]) == (0, 1, 1, 18)
    assert "| 18 | 0 | 0 | 0.0 [-33.6, 33.6] | 1 | 1 |" in page  # nine slides that all agree: not [0.0, 0.0]


def test_what_a_server_is_sent(bench):
    with FakeServer() as server:
        assert main(command(bench, "--endpoint", server.url)) == 0
    assert [body["temperature"] for body in server.bodies] == [0] * 72
    urls = [[part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
            for body in server.bodies]  # fmt: skip
    assert urls.count([]) == 18  # blind
    named = [url[0] for url in urls if url]
    assert all(url.startswith("file://") for url in named)
    whole = [url for url in named if ".vllm-wsi-eval" not in url]
    assert len(whole) == 18
    order = [url.rsplit("/", 1)[1] for url in whole]
    assert all(abs(order.index(name) - (len(order) - 1 - order[::-1].index(name))) <= 4 for name in order)  # by slide
    thinned = bench / "features/.vllm-wsi-eval"
    assert len(list(thinned.iterdir())) == 18
    with open_features(thinned / "3.uniform-32.safetensors") as slide, open_features(bench / "features/3.safetensors") as all_:  # fmt: skip  # noqa: E501
        assert slide.num_patches == 32
        kept = slide.read_coords()[:, 0]
        assert kept.tolist() == [5 + 10 * i for i in range(32)]
        assert np.array_equal(slide.read_rows(0, 32), all_.read_rows(0, 320)[kept])
        assert slide.metadata["encoder"] == "test@1"
    assert (thinned / "0.random-32-seed0.safetensors").is_file()


def test_a_killed_run_goes_on_and_asks_nothing_twice(bench):
    with FakeServer(delay=0.3) as server:
        args = command(bench, "--endpoint", server.url, "--baselines", "none", "--concurrency", "2")
        process = subprocess.Popen([sys.executable, "-m", "vllm_wsi.cli", *args])
        results = bench / "out/generate.slide.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (results.is_file() and results.read_bytes().count(b"\n") >= 6):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # what was under way at the server ends there
        with open(results, "ab") as file:
            file.write(b'{"key": "torn')
        before = {key for key, row in read_results(results)[1].items() if row.status == "answered"}
        assert 5 <= len(before) < 18
        first = Counter(server.asked)
        assert main(args) == 0
    _, rows = read_results(results)
    assert len(rows) == 20
    assert sum(row.status == "answered" for row in rows.values()) == 18
    keys = [line["key"] for line in lines(results)[1:]]
    assert Counter(keys).most_common(1)[0][1] == 1
    for key in before:
        assert sum(server.asked[content] for content in server.asked if f"Question {key}?" in content) == 1
    assert sum(server.asked.values()) <= 18 + 2  # what the kill caught under way
    assert sum(first.values()) >= len(before)


def test_dropped_connections_are_tried_again(bench):
    with FakeServer(drop=3) as server:
        assert main(command(bench, "--endpoint", server.url, "--baselines", "none", "--retries", "8")) == 0
    _, rows = read_results(bench / "out/generate.slide.jsonl")
    assert Counter(row.status for row in rows.values()) == {"answered": 18, "missing": 2}


def test_a_server_that_is_gone_ends_the_run_and_keeps_what_there_was(bench, capsys):
    with FakeServer(drop=1) as server:
        args = ["--baselines", "none", "--retries", "0", "--concurrency", "1"]
        assert main(command(bench, "--endpoint", server.url, *args)) == 1
        assert "found no connection for 3 questions on end" in capsys.readouterr().err
    with FakeServer() as server:
        assert main(command(bench, "--endpoint", server.url, *args)) == 0
    assert main(command(bench, "--endpoint", server.url, *args)) == 1
    assert "is the server up?" in capsys.readouterr().err


def test_errors_count_as_wrong_are_reported_and_asked_again(bench, capsys):
    with FakeServer(drop=2) as server:
        args = ["--baselines", "none", "--retries", "0", "--concurrency", "1"]
        assert main(command(bench, "--endpoint", server.url, *args)) == 1
    assert "9 questions got no answer and count as wrong" in capsys.readouterr().out
    with FakeServer() as server:
        assert main(command(bench, "--endpoint", server.url, *args)) == 0
        assert sum(server.asked.values()) == 9


def test_a_server_without_logprobs_is_asked_by_structured_outputs(bench):
    with FakeServer(answer="B", logprobs=False) as server:
        args = ["--baselines", "none", "--mode", "choice", "--concurrency", "1"]
        assert main(command(bench, "--endpoint", server.url, *args)) == 0
    assert sum("structured_outputs" in body for body in server.bodies) == 18
    assert len(server.bodies) == 19
    assert server.bodies[-1]["structured_outputs"] == {"choice": ["A", "B", "C"]}
    _, rows = read_results(bench / "out/choice.slide.jsonl")
    assert {row.rule for row in rows.values() if row.status == "answered"} == {"structured"}


def test_skipped_slides_and_urls_of_another_machine(bench):
    (bench / "skip.txt").write_text("9\n8\n")
    with FakeServer() as server:
        args = ["--skip-slides", str(bench / "skip.txt"), "--features-url", "https://host/slides/", "--baselines",
                "uniform-32"]  # fmt: skip
        assert main(command(bench, "--endpoint", server.url, *args)) == 0
    summary = json.loads((bench / "out/summary.json").read_text())
    assert (summary["skipped"], summary["missing_questions"]) == (4, 0)
    urls = {body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies}
    assert "https://host/slides/0.safetensors" in urls
    assert "https://host/slides/.vllm-wsi-eval/0.uniform-32.safetensors" in urls


def test_a_folder_that_cannot_be_written_ends_the_run_instead_of_passing_for_missing_slides(bench, capsys):
    (bench / "features/.vllm-wsi-eval").write_text("in the way")
    with FakeServer() as server:
        assert main(command(bench, "--endpoint", server.url, "--baselines", "random-32")) == 1
    assert "wanted a --work" in capsys.readouterr().err


def test_a_run_of_other_settings_is_not_mixed_in(bench, capsys):
    with FakeServer() as server:
        assert main(command(bench, "--endpoint", server.url, "--limit", "2", "--baselines", "none")) == 0
        assert main(command(bench, "--endpoint", server.url, "--baselines", "none", "--max-tokens", "7")) == 1
        assert "max_tokens: found results of 500, wanted 7" in capsys.readouterr().err
        assert main(command(bench, "--endpoint", server.url, "--baselines", "none")) == 0  # more of the same
        assert sum(server.asked.values()) == 18
        assert main(command(bench, "--baselines", "none")) == 0  # the summary alone
        assert sum(server.asked.values()) == 18
        args = ["--baselines", "none", "--compare", str(bench / "out")]
        assert main(command(bench, "--endpoint", server.url, *args, out="again")) == 0
    (gap,) = json.loads((bench / "again/summary.json").read_text())["comparisons"]
    assert (gap["only_first"], gap["only_second"], gap["p"]) == (0, 0, 1)


def overwrite(bench, number, num_patches, encoder, seed):
    features = np.random.default_rng(seed).standard_normal((num_patches, 4)).astype(np.float16)
    coords = np.stack([np.arange(num_patches), np.zeros(num_patches)], axis=1)
    write_features(bench / f"features/{number}.safetensors", features, coords, {"encoder": encoder})


@pytest.mark.parametrize(
    ("num_patches", "encoder", "seed", "message"),
    [
        (320, "other@1", 3, "encoder: found an answer about 'test@1', wanted 'other@1' of "),
        (80, "test@1", 3, "num_patches: found an answer about 320, wanted 80 of "),
        (320, "test@1", 99, "slide_digest: found an answer about '"),
    ],
)
def test_a_run_whose_slides_changed_is_not_continued(bench, capsys, num_patches, encoder, seed, message):
    args = command(bench, "--baselines", "none")
    with FakeServer() as server:
        assert main([*args, "--endpoint", server.url, "--limit", "5"]) == 0
        overwrite(bench, 3, num_patches, encoder, seed)
        before = (bench / "out/generate.slide.jsonl").read_bytes()
        assert main([*args, "--endpoint", server.url]) == 1
        assert sum(server.asked.values()) == 5
        said = capsys.readouterr().err
        assert f"out/generate.slide.jsonl: slide '3': {message}" in said
        assert "take another --out, or delete the file" in said
        assert (bench / "out/generate.slide.jsonl").read_bytes() == before
        overwrite(bench, 3, 320, "test@1", 3)  # the same features, written again
        assert main([*args, "--endpoint", server.url]) == 0
        assert sum(server.asked.values()) == 18


def test_a_run_whose_slide_is_gone_is_not_continued(bench, capsys):
    args = command(bench, "--baselines", "none")
    with FakeServer() as server:
        assert main([*args, "--endpoint", server.url]) == 0
        (bench / "features/3.safetensors").unlink()
        assert main([*args, "--endpoint", server.url]) == 1
    assert "slide '3': found an answer about its 320 patches, wanted none" in capsys.readouterr().err


def test_features_may_move_and_change_their_format(bench):
    with FakeServer() as server:
        assert main(command(bench, "--endpoint", server.url, "--baselines", "none", "--limit", "5")) == 0
        (bench / "features").rename(bench / "moved")
        (bench / "features").mkdir()
        for path in (bench / "moved").glob("*.safetensors"):
            with open_features(path) as slide, h5py.File(bench / f"features/{path.stem}.h5", "w") as file:
                file["features"] = slide.read_rows(0, slide.num_patches)
                file["coords"] = slide.read_coords()
                file["features"].attrs["encoder"] = "test@1"
        assert main(command(bench, "--endpoint", server.url, "--baselines", "none")) == 0
        assert sum(server.asked.values()) == 18


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--baselines", "mean"], "baselines: found mean, wanted some of blind, constant"),
        (["--columns", "x"], "found 'x', wanted NAME=COLUMN"),
        (["--export-batch", "x"], "--model: found none"),
        (["--max-tokens", "0"], "max_tokens: found 0, wanted at least 1"),
        (["--limit", "-1"], "limit: found -1, wanted at least 1"),
        ([], "found no results"),
    ],
)
def test_bad_settings_are_refused(bench, capsys, args, message):
    assert main(command(bench, *args)) == 1
    assert message in capsys.readouterr().err


def test_always_b_on_the_published_gold_counts(tmp_path):
    """SlideBench-VQA (TCGA), 1,494 rows: «B» is right in 41.4 %, the figure known of the published file."""
    (tmp_path / "features").mkdir()
    write_features(tmp_path / "features/s.safetensors", np.ones((3, 4), np.float32))
    with open(tmp_path / "q.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "Slide", "Tumor", "Broad Category", "Narrow Category", "Question", *"ABCD", "Answer"])
        for number, letter in enumerate("B" * 618 + "A" * 400 + "C" * 300 + "D" * 176):
            writer.writerow([number, "s", "BRCA", "Diagnosis", "Grading", f"{number}?", *"wxyz", letter])
    args = ["eval", "--task", "slidebench-tcga", "--data", str(tmp_path / "q.csv"), "--features",
            str(tmp_path / "features"), "--out", str(tmp_path / "out"), "--baselines", "constant"]  # fmt: skip
    with FakeServer(answer="The answer is B.") as server:
        assert main([*args, "--endpoint", server.url, "--concurrency", "16"]) == 0
    lines = json.loads((tmp_path / "out/summary.json").read_text())["table"]
    found = {line["arm"]: line for line in lines if line["by"] == "all"}
    assert round(100 * found["slide"]["accuracy"], 1) == 41.4
    assert found["constant B"]["correct"] == found["slide"]["correct"] == 618
    assert found["slide"]["asked"] == 1494


def test_a_results_file_is_for_one_process(tmp_path):
    with ResultsFile(tmp_path / "r.jsonl", {"task": "x"}), pytest.raises(SettingsError, match="another process"):
        ResultsFile(tmp_path / "r.jsonl", {"task": "x"})
    (tmp_path / "bad.jsonl").write_text("nothing\n")
    with pytest.raises(SettingsError, match=r"bad.jsonl, line 1: found no the run's settings|line 1: found no"):
        ResultsFile(tmp_path / "bad.jsonl", {"task": "x"})


def test_measures_by_hand():
    def row(key, status="answered", label="A", gold="A", slide="s"):
        correct = label == gold and status == "answered"
        return Row(key=key, slide=slide, status=status, gold=gold, label=label, rule="label", correct=correct,
                   options=4)  # fmt: skip

    rows = [row("1"), row("2", label="B"), row("3", label=None), row("4", "error", None), row("5", "missing", None)]
    rows += [row("6", gold="B", label="B", slide="t")]
    found = measure(rows, 0)
    wanted = {"questions": 6, "missing": 1, "asked": 5, "correct": 2, "unparsed": 1, "errors": 1, "accuracy": 0.4}
    assert {name: found[name] for name in wanted} == wanted
    assert found["accuracy_of_parsed"] == pytest.approx(2 / 3)
    assert found["accuracy_of_all"] == pytest.approx(2 / 6)
    assert found["balanced_accuracy"] == pytest.approx((1 / 4 + 1) / 2)
    assert measure(rows[4:5], 0)["asked"] == 0
    assert compare(rows, rows[4:5], 0) is None


def rows_of_slides(right, per_slide=1):
    answer = {"status": "answered", "gold": "A", "label": "A", "rule": "label", "options": 4}
    return [Row(key=str(n), slide=str(n // per_slide), correct=bool(one), **answer) for n, one in enumerate(right)]


def test_all_right_has_the_exact_interval_and_not_one_of_no_width():
    found = measure(rows_of_slides([1] * 24), 0)
    assert (found["accuracy"], found["high"]) == (1, 1)
    assert found["low"] == pytest.approx(0.8575, abs=5e-5)
    found = measure(rows_of_slides([1] * 72, per_slide=3), 0)
    assert found["low"] == pytest.approx(0.8575, abs=5e-5)  # 24 slides, whatever each of them is asked


def test_questions_of_one_slide_count_once_in_the_paired_test():
    first, second = [1] * 20, [0] * 10 + [1] * 10
    assert compare(rows_of_slides(first), rows_of_slides(second), 0)["p"] == pytest.approx(2 / 2**10)
    assert compare(rows_of_slides(first, 5), rows_of_slides(second, 5), 0)["p"] == 2 / 2**2


def test_several_comparisons_are_corrected(bench):
    with FakeServer() as server:
        assert main(command(bench, "--endpoint", server.url, "--mode", "both")) == 0
    found = json.loads((bench / "out/summary.json").read_text())["comparisons"]
    assert [one["p_holm"] for one in found] == holm([one["p"] for one in found])
    assert len(found) == 8
