"""What `vllm-wsi eval` asks of a calibration, what it writes of it, and its measures by hand."""

import json
import logging
import math

import pytest

from vllm_wsi.benchmark.report import constant_rows, table
from vllm_wsi.benchmark.report_page import page
from vllm_wsi.benchmark.report_trust import trust_measures, trust_section
from vllm_wsi.benchmark.results import ResultsFile, Row, read_results
from vllm_wsi.benchmark.slide_trust import SlideTrust, confidence
from vllm_wsi.cli.app import main

from .test_runner import FakeServer, bench, command, lines  # noqa: F401 - a fixture

TOLD = {"sufficiency": 0.75, "in_distribution": 0.004, "answer_temperature": 2.0, "warnings": []}
LOG = {"A": -1.9, "B": -2 + math.log(2)}  # of FakeServer's answers


def softened(temperature):
    """The confidence in B."""
    weights = {label: math.exp(value / temperature) for label, value in LOG.items()}
    return pytest.approx(weights["B"] / sum(weights.values()))


def rows_of(folder, name):
    return [row for row in lines(folder / f"out/{name}.jsonl")[1:] if row["status"] == "answered"]


def trusts(folder, name):
    return [(row["confidence"], row["sufficiency"], row["in_distribution"]) for row in rows_of(folder, name)]


def test_rows_hold_what_the_server_says_of_their_slide_and_baselines_its_temperature_alone(bench):  # noqa: F811
    with FakeServer(select=lambda body: (200, TOLD)) as server:
        assert main(command(bench, "--endpoint", server.url, "--mode", "both")) == 0
    assert trusts(bench, "generate.slide") == [(None, 0.75, 0.004)] * 18
    assert trusts(bench, "choice.slide") == [(softened(2.0), 0.75, 0.004)] * 18
    for baseline in ("blind", "random-32", "uniform-32"):
        assert trusts(bench, f"generate.{baseline}") == [(None, None, None)] * 18
        assert trusts(bench, f"choice.{baseline}") == [(softened(2.0), None, None)] * 18
    assert len(server.selected) == 36  # none for a baseline
    # Nobody knows yet whether the scorer hears the question, and no one said that it does not.
    assert all("#q=Question%20" in body["url"] for body in server.selected)
    summary = json.loads((bench / "out/summary.json").read_text())
    found = {(line["mode"], line["arm"]): line for line in summary["table"] if line["by"] == "all"}
    line = found["choice", "slide"]
    assert (line["slides_told"], line["slides_unlike"]) == (9, 9)
    assert line["confidence_risk_50"] == pytest.approx(7 / 18)
    assert "sufficiency_aurc" not in found["choice", "blind"]
    assert not {"confidence_aurc", "sufficiency_aurc"} & set(found["choice", "constant B"])
    said = (bench / "out/summary.md").read_text()
    assert "| choice | slide | confidence | 18 | 38.9 | 38.9 | 38.9 |" in said
    assert "choice slide: 9 of 9 slides are unlike those of validation" in said
    assert "confidence_aurc" in (bench / "out/table.csv").read_text().splitlines()[0]


def test_a_run_that_goes_on_with_a_baseline_learns_the_temperature_by_one_request(bench):  # noqa: F811
    with FakeServer(select=lambda body: (200, TOLD)) as server:
        args = command(bench, "--endpoint", server.url, "--mode", "choice", "--baselines")
        assert main([*args, "none"]) == 0
        assert len(server.selected) == 18
        assert main([*args, "blind"]) == 0
        assert len(server.selected) == 19
    assert trusts(bench, "choice.blind") == [(softened(2.0), None, None)] * 18


NULLS = {"sufficiency": None, "in_distribution": None, "answer_temperature": None, "warnings": []}


@pytest.mark.parametrize(
    "answer",
    [(200, NULLS), (200, {"indices": [1]}), (200, {"sufficiency": "high"}), (200, [1]), (404, {}), (405, {})],
)
def test_a_server_without_these_numbers_is_asked_once_whoever_asks(bench, answer):  # noqa: F811
    with FakeServer(select=lambda body: answer) as server:
        assert main(command(bench, "--endpoint", server.url, "--mode", "both", "--concurrency", "8")) == 0
    assert len(server.selected) == 1
    assert trusts(bench, "generate.slide") == [(None, None, None)] * 18
    assert trusts(bench, "choice.slide") == [(softened(1.0), None, None)] * 18


def test_a_request_that_fails_costs_its_fields_alone_and_is_said_once(bench, caplog):  # noqa: F811
    asked = iter(range(10**9))

    def every_third_fails(body):
        return (200, TOLD) if next(asked) % 3 else (400, {"error": {"message": "out of order"}})

    with FakeServer(select=every_third_fails) as server, caplog.at_level(logging.WARNING):
        args = ["--mode", "choice", "--baselines", "none", "--concurrency", "1"]
        assert main(command(bench, "--endpoint", server.url, *args)) == 0
    unknown, told = (None, None, None), (softened(2.0), 0.75, 0.004)
    # The first failure comes before the temperature is known; later ones leave the confidence known.
    wanted = [unknown, told, told, *[(softened(2.0), None, None), told, told] * 5]
    assert trusts(bench, "choice.slide") == wanted
    (line,) = [record.getMessage() for record in caplog.records if "wsi/select" in record.getMessage()]
    assert "found no answer for 6 questions" in line
    assert "out of order" in line


def test_a_route_that_always_fails_is_given_up(bench, caplog):  # noqa: F811
    with FakeServer(select=lambda body: (400, {"error": {"message": "broken"}})) as server:
        args = ["--mode", "choice", "--baselines", "none"]
        assert main(command(bench, "--endpoint", server.url, *args)) == 0
    assert 5 <= len(server.selected) < 18
    assert trusts(bench, "choice.slide") == [(None, None, None)] * 18
    assert "found no answer for 18 questions" in caplog.text


def test_a_scorer_that_hears_no_question_is_found_out_by_one_request(bench):  # noqa: F811
    def select(body):
        if "#" in body["url"]:
            return 400, {
                "error": {"message": "q: found a question for a checkpoint whose scorer hears none, wanted .."}
            }
        return 200, TOLD

    with FakeServer(select=select) as server:
        assert main(command(bench, "--endpoint", server.url, "--baselines", "none")) == 0
    assert ["#" in body["url"] for body in server.selected] == [True] + [False] * 18
    assert trusts(bench, "generate.slide") == [(None, 0.75, 0.004)] * 18


def test_a_run_goes_on_with_rows_that_were_written_without_these_fields(bench):  # noqa: F811
    path = bench / "out/generate.slide.jsonl"
    with FakeServer() as server:
        args = command(bench, "--endpoint", server.url, "--baselines", "none")
        assert main(args) == 0
        old = lines(path)
        for row in old[1:]:
            for name in ("confidence", "sufficiency", "in_distribution"):
                del row[name]
        path.write_text("".join(json.dumps(row) + "\n" for row in old[:8]))
        before = sum(server.asked.values())
        assert main(args) == 0
        assert sum(server.asked.values()) - before == 18 - 7
    _, rows = read_results(path)
    assert len(rows) == 20
    assert all(row.sufficiency is row.in_distribution is row.confidence is None for row in rows.values())


def test_confidence_by_hand():
    even = {"A": math.log(0.1), "B": math.log(0.3)}
    assert confidence("B", even, 1.0) == pytest.approx(0.75)
    assert confidence("A", even, 1.0) == pytest.approx(0.25)
    assert confidence("B", even, 2.0) == pytest.approx(math.sqrt(0.3) / (math.sqrt(0.1) + math.sqrt(0.3)))
    assert confidence("B", {"B": -700.0}, 0.05) == 1.0
    assert confidence("A", {"A": -1e4, "B": 0.0}, 0.05) == 0.0  # no overflow, no NaN
    for nothing in ((None, even, 1.0), ("B", None, 1.0), ("B", even, None), ("C", even, 1.0)):
        assert confidence(*nothing) is None


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (TOLD, SlideTrust(0.75, 0.004, 2.0)),
        (NULLS, SlideTrust(None, None, 1.0)),
        ({"sufficiency": 1, "in_distribution": 0}, SlideTrust(1.0, 0.0, 1.0)),
        ({"sufficiency": True, "in_distribution": "0.5"}, SlideTrust(None, None, 1.0)),
        ({"sufficiency": math.nan, "in_distribution": -1, "answer_temperature": 0}, SlideTrust(None, None, 1.0)),
        (None, SlideTrust()),
        ("text", SlideTrust()),
    ],
)
def test_what_a_record_says(record, wanted):
    assert SlideTrust.of(record) == wanted


def row(key, right, trust=None, sufficiency=None, usual=None, **changes):
    values = {"status": "answered", "gold": "A", "label": "A" if right else "B", "options": 4, "slide": key}
    values |= {"confidence": trust, "sufficiency": sufficiency, "in_distribution": usual}
    return Row(key=key, correct=right, **{**values, **changes})


def test_measures_by_hand():
    rows = [
        row("1", True, 0.9, 0.9, 0.5),
        row("2", True, 0.8, 0.2, 0.01),
        row("3", False, 0.6, 0.8, 0.0099),
        row("4", False, None, 0.7, 0.0001, label=None),  # names no option
        row("5", False, status="error", label=None),
        row("6", False, status="missing", label=None),
        row("7", True, None, options=0, label=None),  # an open question
    ]
    found = trust_measures(rows)
    # By confidence: right, right, wrong, and two of confidence 0 that are wrong.
    risks = [0, 0, 1 / 3, 2 / 4, 3 / 5]
    assert found["confidence_answers"] == 5
    assert found["confidence_aurc"] == pytest.approx(sum(risks) / 5)
    assert found["confidence_risk_80"] == pytest.approx(2 / 4)
    assert found["confidence_risk_50"] == pytest.approx(1 / 3)
    # Each answer is a part of its own: |1 - 0.9|, |1 - 0.8|, |0 - 0.6|, 0, 0.
    assert found["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.6) / 5)
    # By sufficiency: right (0.9), wrong (0.8), wrong (0.7), right (0.2), the error (0).
    risks = [0, 1 / 2, 2 / 3, 2 / 4, 3 / 5]
    assert found["sufficiency_answers"] == 5
    assert found["sufficiency_aurc"] == pytest.approx(sum(risks) / 5)
    assert (found["sufficiency_risk_80"], found["sufficiency_risk_50"]) == pytest.approx((2 / 4, 2 / 3))
    assert (found["slides_told"], found["slides_unlike"]) == (4, 2)  # 0.01 itself is usual
    (line,) = [one for one in table({("choice", "slide"): rows}, 0) if (one["by"], one["part"]) == ("all", "closed")]
    assert found.items() <= line.items()
    assert "| choice | slide | confidence | 5 | 28.7 | 50.0 | 33.3 | 18.0 |" in trust_section([line])
    assert "| choice | slide | sufficiency | 5 | 45.3 | 50.0 | 66.7 |  |" in trust_section([line])


def test_measures_at_their_limits():
    assert trust_measures([]) == trust_measures([row("1", True), row("2", False, status="error", label=None)]) == {}
    assert trust_section([{"mode": "choice", "arm": "slide"}]) == []
    right = trust_measures([row(str(n), True, 1.0) for n in range(3)])
    assert right == {
        "calibration_error": 0.0, "confidence_answers": 3, "confidence_aurc": 0.0, "confidence_risk_80": 0.0,
        "confidence_risk_50": 0.0,
    }  # fmt: skip
    ties = trust_measures([row(str(n), n < 3, 0.5, 0.5) for n in range(4)])
    for by in ("confidence", "sufficiency"):
        assert [ties[f"{by}_{what}"] for what in ("aurc", "risk_80", "risk_50")] == [0.25] * 3
    one = trust_measures([row("1", False, 0.25)])
    assert (one["calibration_error"], one["confidence_aurc"], one["confidence_risk_50"]) == (0.25, 1.0, 1.0)
    # Several questions about one slide, of which one calls it unusual; an answer found otherwise is left out.
    same = [row("1", True, 0.5, 0.5, 0.5, slide="s"), row("2", True, None, 0.5, 0.001, slide="s")]
    found = trust_measures(same)
    assert (found["slides_told"], found["slides_unlike"], found["confidence_answers"]) == (1, 1, 1)
    assert all(math.isfinite(value) for value in (right | ties | one | found).values())


def test_the_answer_that_is_always_the_same_has_none_of_these():
    _, constant = constant_rows([row("1", True, 0.9, 0.9, 0.5), row("2", False, 0.9, 0.9, 0.5)])
    assert trust_measures(constant) == {}


def test_the_page_of_a_run_without_these_numbers_has_no_such_part(tmp_path):
    rows = [row("1", True), row("2", False)]
    run = {"versions": {}, "task": "csv", "model": "m", "data": "d", "data_sha256": "0", "prompt_sha256": "0"}
    summary = {"run": {**run, "seed": 0, "endpoint": "e"}, "encoders": [], "skipped": 0, "missing_slides": []}
    summary |= {"table": table({("choice", "slide"): rows}, 0), "comparisons": []}
    assert "trusted" not in page(summary)
    summary["table"] = table({("choice", "slide"): [row("1", True, 0.5), row("2", False, 0.5)]}, 0)
    assert "How far the answers can be trusted" in page(summary)
    with ResultsFile(tmp_path / "r.jsonl", {}) as file:
        file.append(rows[0])
    assert read_results(tmp_path / "r.jsonl")[1]["1"] == rows[0]
