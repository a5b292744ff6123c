"""The pictures that README and docs show, and the command that takes them."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"
FILES = sorted(path for path in PICTURES.iterdir() if path.suffix != ".md")


def test_without_the_real_slide_the_command_says_so_in_one_sentence(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools/make_pictures.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_WSI_SHARED": str(tmp_path)},
    )
    assert run.returncode == 1
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert f"{tmp_path}/slides/CMU-1-Small-Region.svs: found no such file, wanted the real slide" in line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_picture_is_small_and_the_page_beside_it_says_what_it_shows(path):
    assert path.stat().st_size < 400_000
    assert f"`{path.name}`" in (PICTURES / "README.md").read_text()
    if path.suffix == ".png":
        with Image.open(path) as picture:
            assert picture.width <= 1280


def test_the_diagram_has_a_title_a_description_and_text_that_is_text():
    root = ET.parse(PICTURES / "overview.svg").getroot()
    named = root.get("aria-labelledby").split()
    assert [root.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")] == named
    said = " ".join("".join(text.itertext()) for text in root.iter(f"{SVG}text"))
    for wanted in ("frozen encoder", "scorer", "32 of 100,000", "vLLM", "answer", "evidence"):
        assert wanted in said
    assert not list(root.iter(f"{SVG}image"))
