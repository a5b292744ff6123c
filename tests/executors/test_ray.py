"""Many slides on a real Ray cluster: nodes and workers that are killed, slides that fail, addresses that are wrong.

The tests stand in the order in which they run: the last ones kill the nodes, and then the head.
"""

import csv
import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_wsi.benchmark.results import read_results
from vllm_wsi.cli.app import main
from vllm_wsi.errors import SettingsError, SetupError, SlideError
from vllm_wsi.executors import Work
from vllm_wsi.executors.ray_executor import ray_executor
from vllm_wsi.executors.ray_worker import RayWorker, WorkerStart
from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.serving.server_process import free_port
from vllm_wsi.slides import open_features
from vllm_wsi.slides.many_slides import crashed

from ..encoding.slide_images import tissue_picture, write_tiff
from .small_cluster import HOOKS, SmallCluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    cluster = SmallCluster(free_port())
    try:
        cluster.add()
        cluster.add()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(str(HOOKS))
    import ray_jobs

    return ray_jobs


@pytest.fixture
def slides(tmp_path):
    """A folder of slides that are converted."""
    folder = tmp_path / "slides"
    folder.mkdir()

    def write(*names):
        for name in names:
            np.save(folder / f"{name}.npy", np.random.default_rng(len(name)).standard_normal((50, 8)).astype("f4"))
        return folder

    return write


def rows(path):
    with open(path, newline="") as file:
        return {Path(row["slide"]).stem: (row["status"], row["reason"]) for row in csv.DictReader(file)}


def began(slide):
    """The nodes on which it was begun, by process id."""
    path = Path(f"{slide}.began")
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def assert_same_slide(one, other):
    with open_features(one) as first, open_features(other) as second:
        assert np.array_equal(first.read_rows(0, first.num_patches), second.read_rows(0, second.num_patches))
        assert np.array_equal(first.read_coords(), second.read_coords())
        assert first.metadata == second.metadata


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_slides_are_converted_and_one_that_ends_its_worker_fails_alone(cluster, slides, tmp_path, capfd, monkeypatch):
    folder = slides("a", "b", "bomb", "c", "d")
    (folder / "torn.npy").write_bytes(b"\x93NUMPY")
    monkeypatch.chdir(tmp_path)  # relative paths are those of the command
    command = ["convert", "slides", "--out", "out", "--ray", cluster.address]
    assert main(command) == 1
    found = rows(tmp_path / "out/convert_summary.csv")
    assert {name: status for name, (status, _) in found.items()} == {
        "a": "done", "b": "done", "bomb": "failed", "c": "done", "d": "done", "torn": "failed",
    }  # fmt: skip
    assert found["bomb"][1] == "slides/bomb.npy: found a slide that ends its reader"
    assert "torn.npy" in found["torn"][1]
    assert len(began(folder / "bomb.npy")) == 2
    printed = capfd.readouterr()
    assert "4 done, 0 skipped, 2 failed" in printed.out
    assert "raylet" not in printed.out + printed.err  # none of Ray's own messages
    assert main([*command[:3], "here"]) == 1  # by this machine
    for name in "abcd":
        made, wanted = (tmp_path / folder / f"{name}.safetensors" for folder in ("out", "here"))
        assert made.read_bytes() == wanted.read_bytes()
    assert not list((tmp_path / "out").glob(".*"))

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    (folder / "bomb.npy").unlink()
    (folder / "torn.npy").unlink()
    (tmp_path / "out/c.safetensors").unlink()
    assert main([*command[:-1], "auto"]) == 0
    assert "1 done, 3 skipped, 0 failed" in capfd.readouterr().out
    assert [len(began(folder / f"{name}.npy")) for name in "abcd"] == [1, 1, 2, 1]


def test_encoded_and_warmed_on_a_cluster_is_what_this_machine_makes(cluster, tmp_path, capfd):
    images = tmp_path / "images"
    images.mkdir()
    for seed, name in enumerate(("a", "b", "bomb")):
        write_tiff(images / f"{name}.tiff", tissue_picture(640, 512, seed))
    init_checkpoint(tmp_path / "c", TinySettings(feature_dim=64, hidden_size=32, scorer_hidden_size=16))
    command = ["encode", str(images), "--encoder", "colour-texture", "--patch-px", "64", "--out", str(tmp_path / "out")]
    warm = ["--checkpoint", str(tmp_path / "c"), "--store", str(tmp_path / "store")]
    on_ray = ["--ray", cluster.address]
    assert main([*command, "--warm", str(tmp_path / "c"), *warm[2:], *on_ray, "--qc", str(tmp_path / "out")]) == 1
    found = rows(tmp_path / "out/encode_summary.csv")
    assert found == {"a": ("done", ""), "b": ("done", ""), "bomb": ("failed", crashed(images / "bomb.tiff"))}
    assert (tmp_path / "out/a.qc.png").exists()
    assert main([*command[:-1], str(tmp_path / "here")]) == 0
    for name in "ab":
        assert_same_slide(tmp_path / f"out/{name}.safetensors", tmp_path / f"here/{name}.safetensors")
    capfd.readouterr()
    assert main(["warm", str(tmp_path / "out"), *warm]) == 0
    assert "0 done, 2 skipped, 0 failed" in capfd.readouterr().out  # selected on the nodes, found by this process
    assert main(["warm", str(tmp_path / "out"), *warm, "-k", "5", *on_ray, "--workers", "1"]) == 0
    assert "2 done, 0 skipped, 0 failed" in capfd.readouterr().out
    assert main(["warm", str(tmp_path / "out"), *warm, "-k", "5"]) == 0
    assert "0 done, 2 skipped, 0 failed" in capfd.readouterr().out


def test_questions_are_asked_of_engines_on_the_nodes(cluster, tmp_path, capfd):
    (tmp_path / "features").mkdir()
    slides = [HaystackWorld().slide("test", number, 500) for number in range(4)]
    with open(tmp_path / "questions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Slide", "Question", *"ABCD", "Answer"])
        for number, slide in enumerate(slides):
            slide.write(tmp_path / f"features/{number}.safetensors")
            item = slide.item()
            writer.writerow([number, item.question.split("\n")[1], *(item.options[one] for one in "ABCD"), item.answer])
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8}
    command = ["eval", "--task", "csv", "--data", str(tmp_path / "questions.csv"), "--out", str(tmp_path / "out")]
    command += ["--features", str(tmp_path / "features"), "--baselines", "blind", "--max-tokens", "8"]
    command += ["--offline", str(DEMO_CHECKPOINT), "--engine-args", json.dumps(engine)]
    assert main([*command, "--ray", cluster.address, "--workers", "1"]) == 0
    _, found = read_results(tmp_path / "out/generate.slide.jsonl")
    assert [row.status for row in found.values()] == ["answered"] * 4
    assert sum(row.correct for row in found.values()) >= 3
    assert all(0 <= row.sufficiency <= 1 and row.in_distribution > 0 for row in found.values())  # of the demo's slides
    before = (tmp_path / "out/generate.slide.jsonl").read_bytes()
    assert main([*command, "--ray", cluster.address]) == 0  # nothing is left to ask
    assert (tmp_path / "out/generate.slide.jsonl").read_bytes() == before


def test_an_error_of_the_work_is_raised_as_it_is(cluster, jobs):
    with ray_executor(cluster.address) as executor:
        assert sorted(executor.run(Work(jobs.double), iter(range(5)))) == [(n, 2 * n) for n in range(5)]
        with pytest.raises(SlideError, match=r"^1: found it, wanted another$"):
            list(executor.run(Work(jobs.refuse), [1]))
        assert list(executor.run(Work(jobs.double), [])) == []


@pytest.mark.parametrize(("start", "reason"), [("cannot_start", "found no weights"), ("end", "actor died")])
def test_workers_that_do_not_start_end_the_run(cluster, jobs, start, reason):
    with ray_executor(cluster.address) as executor, pytest.raises(SetupError, match="found no worker that starts") as e:
        list(executor.run(Work(jobs.double, getattr(jobs, start)), [1, 2, 3]))
    assert reason in str(e.value)


def test_gpus_are_asked_for_where_the_cluster_has_them(cluster):
    with ray_executor(cluster.address) as executor:
        assert [executor.device_there(device) for device in ("auto", "cpu")] == ["cpu", "cpu"]
        with pytest.raises(SetupError, match="found no node with a GPU, wanted one, or --device cpu"):
            executor.device_there("cuda")
        with pytest.raises(SettingsError, match="found 'cuda:1', wanted auto, cpu or cuda"):
            executor.device_there("cuda:1")
        with pytest.raises(SetupError, match="found no node that has 1 CPU and 2 GPU, wanted one"):
            list(executor.run(Work(len, device="cuda", gpus=2), [""]))


def test_a_node_that_is_not_set_up_as_the_command_starts_no_worker(tmp_path):
    told = WorkerStart.of(Work(len), None)
    for changed, wrong in (
        ({"version": "0.0.0"}, "vllm-wsi: found "),
        ({"folder": str(tmp_path / "none")}, "found no folder"),
        ({"mark": tmp_path / "none"}, "wanted one that all nodes share"),
    ):
        with pytest.raises(SetupError, match=rf"^node .*{wrong}"):
            RayWorker().start(replace(told, **changed))


@pytest.mark.parametrize("address", ["local", "ray://host:10001", "host", ""])
def test_an_address_that_is_none_of_a_head_is_refused(address, tmp_path, capfd):
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out"), "--ray", address]) == 1


def test_an_address_without_a_cluster_is_one_error(slides, tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"127.0.0.1:{server.getsockname()[1]}"  # never says a word
        for address in (f"127.0.0.1:{free_port()}", silent):
            assert main(["convert", str(slides("a")), "--out", str(tmp_path / "out"), "--ray", address]) == 1
            wanted = f"--ray {address}: found no Ray cluster that answers at {address}, wanted one that runs"
            assert capfd.readouterr().err == f"vllm-wsi convert: {wanted}\n"


class Running:
    """A command in a process of its own."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "vllm_wsi.cli", *map(str, arguments)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ended(self):
        """(status, stdout, stderr)"""
        out, err = self._process.communicate(timeout=100)
        return self._process.returncode, out, err


def test_others_do_the_slides_of_a_node_that_is_killed(cluster, slides, tmp_path):
    folder = slides("a", "b", "c", "d")
    holds = [folder / f"{name}.npy.hold" for name in "ab"]
    for hold in holds:
        hold.touch()
    running = Running("convert", folder, "--out", tmp_path / "out", "--ray", cluster.address)
    a, b = folder / "a.npy", folder / "b.npy"
    wait_for(lambda: began(a) and began(b))
    assert {*began(a), *began(b)} == {node.pid("raylet") for node in cluster.nodes}
    lost = cluster.nodes.pop()
    slide = a if began(a) == [lost.pid("raylet")] else b
    lost.kill()
    holds[slide is a].unlink()  # of the other slide
    wait_for(lambda: len(began(slide)) == 2)  # by the node that is left
    assert began(slide)[1] == cluster.nodes[0].pid("raylet")
    (folder / f"{slide.name}.hold").unlink()
    status, out, err = running.ended()
    assert status == 0, err
    assert "4 done, 0 skipped, 0 failed" in out
    assert "found a node that is lost; others do what it had" in err
    assert set(rows(tmp_path / "out/convert_summary.csv").values()) == {("done", "")}
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["a.safetensors", "b.safetensors", "c.safetensors", "convert_summary.csv", "d.safetensors"]
    lost.stop()


def test_a_cluster_that_loses_all_nodes_is_one_error_and_the_next_run_goes_on(cluster, slides, tmp_path):
    folder = slides("a", "b", "c")
    (folder / "b.npy.hold").touch()
    command = "convert", folder, "--out", tmp_path / "out", "--ray", cluster.address
    running = Running(*command)
    wait_for(lambda: began(folder / "b.npy"))
    lost = cluster.nodes.pop()
    lost.kill()
    status, _, err = running.ended()
    assert status == 1
    assert "found no node left that has 1 CPU, wanted one; what is done is kept, and the same command goes on" in err
    lost.stop()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.safetensors"]
    (folder / "b.npy.hold").unlink()
    cluster.add()
    status, out, err = Running(*command).ended()
    assert (status, "2 done, 1 skipped, 0 failed" in out) == (0, True), err


def test_a_head_that_is_killed_is_one_error(cluster, slides, tmp_path):
    folder = slides("a")
    (folder / "a.npy.hold").touch()
    running = Running("convert", folder, "--out", tmp_path / "out", "--ray", cluster.address)
    wait_for(lambda: began(folder / "a.npy"))
    cluster.head.kill("gcs_server")
    status, _, err = running.ended()
    assert status == 1
    assert "found a cluster that no longer answers, wanted it; what is done is kept" in err
