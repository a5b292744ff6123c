"""The benchmarks' harness runs, on the CPU and at tiny sizes; what it measures here says nothing."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_kernel_benchmark_compares_every_provider_that_runs_here(tmp_path):
    out = run("-m", "bench.kernels.score_topk", "--device", "cpu", "--quick", "--csv", tmp_path / "rows.csv")
    rows = rows_of(tmp_path / "rows.csv")
    by_part = {part: {row["provider"] for row in rows if row["part"] == part} for part in ("select", "ragged")}
    assert by_part == {
        "select": {"copy", "ours", "torch.topk", "torch.topk of keys"},
        "ragged": {"copy", "gemm", "ours", "eager torch"},
    }
    providers = {row["provider"] for row in rows if row["part"] == "score_topk"}
    assert providers >= by_part["ragged"] | {"our scores + torch.topk", "our scores + torch.topk of keys"}
    assert all(float(row["median_us"]) > 0 for row in rows)
    assert "left out: torch.compile: not measured on the CPU" in out


@pytest.mark.parametrize(
    ("program", "name"),
    [("bench.kernels.expected_time", "kernels.md"), ("bench.study.conditioned_page", "conditioned.md")],
)
def test_a_page_is_what_its_program_makes_of_the_arithmetic_and_of_the_rows(tmp_path, program, name):
    copied = tmp_path / name
    copied.write_text((ROOT / "docs" / name).read_text())
    run("-c", f"from pathlib import Path; import {program} as page; page.PAGE = Path({str(copied)!r}); page.main()")
    assert copied.read_text() == (ROOT / "docs" / name).read_text()


def test_the_tables_of_serving_are_what_the_newest_rows_say(tmp_path):
    page = ROOT / "docs" / "measure" / "serving.md"
    copied = tmp_path / "serving.md"
    copied.write_text(page.read_text())
    run(
        "-c",
        "from pathlib import Path; from bench.serving import throughput_report as page;"
        f"page.PAGE = Path({str(copied)!r}); page.draw = lambda decoder, rows: None; page.main()",
    )
    assert copied.read_text() == page.read_text()


def test_the_plan_for_a_gpu_reads_the_arguments_of_every_part_without_one(tmp_path):
    out = run("-m", "bench.gpu", "--dry-run", "--results", tmp_path)
    lines = [line for line in out.splitlines() if " min " in line]
    assert len(lines) == 11
    assert all(int(line.split(" min")[0].split()[-1]) <= 10 for line in lines[:-1])
    assert "--decoder qwen2.5-7b" in out


def test_the_new_slide_benchmark_gives_a_row_for_each_state_of_the_page_cache(tmp_path):
    run("-m", "bench.selection.cold_slide", "--device", "cpu", "--quick", "--csv", tmp_path / "rows.csv")
    rows = rows_of(tmp_path / "rows.csv")
    assert [row["page_cache"] for row in rows] == ["warm", "dropped"]
    assert all(float(row["total_over_floor"]) > 0 for row in rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_selector_benchmark_measures_itself_and_naive_torch():
    code = "from bench.selection.cpu_selection import bench_shape; print(len(bench_shape(300, 64, 1)))"
    assert int(run("-c", code)) >= 1


@pytest.mark.server
def test_the_serving_benchmark_compares_every_case_with_vllms_own_client(tmp_path):
    run("-m", "bench.serving.throughput", "--quick", "--csv", tmp_path / "rows.csv")
    rows = rows_of(tmp_path / "rows.csv")
    compared = {(row["case"], row["server"]) for row in rows if row["part"] == "compare"}
    assert compared == {
        *itertools.product(("text", "K = 32", "K = 32, known"), ("as it is", "no prefix cache", "2 API servers")),
        *(("K = 4096", server) for server in ("as it is", "no prefix cache")),
        ("selected", "as it is"),
        ("by value", "as it is"),
    }
    tokens = {row["case"]: float(row["prompt_tokens"]) for row in rows if row["part"] == "compare"}
    assert tokens["K = 32"] == tokens["selected"] == tokens["by value"] == tokens["text"] + 32
    assert tokens["text"] + 1000 <= tokens["K = 4096"] <= tokens["text"] + 4096
    assert {row["part"] for row in rows} == {"compare", "crowd", "patches", "at once", "slides", "tokens"}
    for row in rows:
        assert float(row["requests_per_s"]) > 0
        known = row["case"] == "K = 32, known"
        if known and row["server"] == "2 API servers":
            continue  # either of which may meet a known slide for the first time
        nothing_to_send = known or row["case"] == "text"
        assert (float(row["bytes_to_engine"]) > 1000) == (not nothing_to_send)
        if nothing_to_send:
            assert int(row["selections"]) == 0
        else:
            assert 1 <= int(row["selections"]) <= int(row["requests"])


def test_the_slides_that_are_asked_about_are_many_small_ones_and_one_of_the_largest_size():
    code = """
from bench.serving.workload import log_normal_sizes, zipf_picks
sizes = log_normal_sizes(33)
picks = zipf_picks(10, 10_000)
print(max(sizes), sorted(sizes)[16], sorted(sizes)[-2] < 200_000, [picks.count(i) for i in (0, 1, 9)])
"""
    most, median, tail, counts = run("-c", code).split(" ", 3)
    assert (int(most), int(median), tail) == (1_000_000, 20_000, "True")
    first, second, last = map(int, counts.strip(" []\n").split(","))
    assert 0.8 < first / second / 2 < 1.25
    assert 0.8 < first / last / 10 < 1.25


def test_summary_tokens_are_trained_judged_and_compared_on_questions_of_share(tmp_path):
    sizes = ("--steps", 2, "--training-slides", 32, "--questions", 4, "--seeds", 0, 1, "--arms", 0, 9)
    run("-m", "bench.study.summary_tokens", tmp_path, *sizes, "--csv", tmp_path / "rows.csv")
    rows = rows_of(tmp_path / "rows.csv")
    assert {row["question"] for row in rows} == {"prevalence", "counting", "finding"}
    assert [row["questions"] for row in rows if row["kind"] == "pooled"] == ["8"] * 6
    assert all((row["less_k_best"] != "") == (row["kind"] == "pooled") for row in rows)


def test_summary_tokens_on_tissue_are_judged_on_tiles_of_source_slides_that_were_left_out(tmp_path, shared_data):
    where = ("bench.study.tissue_summary", tmp_path, "--tissue-dir", shared_data / "tissue")
    sizes = ("--steps", 2, "--training-slides", 32, "--questions", 4, "--folds", 0, 1, "--seeds", 0, "--arms", 0, 21)
    run("-m", *where, *sizes, "--csv", tmp_path / "rows.csv")
    rows = rows_of(tmp_path / "rows.csv")
    seeds, pooled = ([row for row in rows if row["kind"] == kind] for kind in ("seed", "pooled"))
    assert {row["left_out"] for row in seeds} == {"02 04 06", "01 03 08 10"}
    assert (
        {row["tested_on"] for row in seeds}
        == {row["tested_on"] for row in pooled}
        == {"seen sources", "left-out sources"}
    )
    asked = {row["question"]: row["questions"] for row in pooled}
    assert {name: asked[name] for name in ("prevalence", "counting", "finding")} == dict.fromkeys(
        ("prevalence", "counting", "finding"), "8"
    )
    assert {row["rest"] for row in pooled if row["less_k_best"] != ""} == {"means of interleaved rows"}


def test_slides_of_shares_hold_tiles_of_their_own_side_and_the_share_that_the_answer_says(shared_data):
    code = f"""
import numpy as np
from bench.study.tissue_shares import *
pools = fold_pools({str(shared_data / "tissue")!r}, FOLDS[0])
assert sorted(np.concatenate([pool.rows for pool in pools.values()])) == list(range(5000))
for side, pool in pools.items():
    for slide in (TissueShareSlide(pool, number) for number in range(60)):
        sources = set(pool.patients[slide.made.rows].tolist())
        assert (sources <= set(FOLDS[0])) == (side == LEFT_OUT), sources
        counts = np.bincount(slide.labels(), minlength=len(CLASSES))
        tumour = counts[CLASSES.index("TUMOR")] / slide.num_patches
        if slide.kind == "prevalence":
            assert CLASSES[counts.argmax()] == NAMED[slide.made.answer]
        elif slide.kind == "counting":
            assert abs(tumour - AMOUNTS[slide.made.answer]) <= 0.25 * AMOUNTS[slide.made.answer]
        else:
            assert 4 <= counts[CLASSES.index(FINDINGS[slide.made.answer])] <= 12
"""
    run("-c", code)


def test_the_tile_nearest_to_a_mean_is_one_of_its_own_pool():
    code = """
import torch
from bench.study.summary_arms import nearest_members
rows = torch.tensor([[0.0], [5.0], [1.0], [9.0]])
print(nearest_members(torch.tensor([[4.0], [1.0]]), rows, torch.tensor([0, 1, 0, 1])).tolist())
"""
    assert run("-c", code) == "[[1.0], [5.0]]\n"


def test_pooled_means_have_the_same_bits_in_chunks_of_two_sizes(tmp_path):
    run("-m", "bench.study.summary_cost", "--quick", "--csv", tmp_path / "rows.csv")
    assert {row["same_bits"] for row in rows_of(tmp_path / "rows.csv")} == {"True"}
