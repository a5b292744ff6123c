"""The commands as a user types them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from vllm_wsi import __version__
from vllm_wsi.cli import demo_answers
from vllm_wsi.cli.app import main
from vllm_wsi.cli.demo_slides import QUESTION, SECOND_QUESTION, DemoSlide
from vllm_wsi.errors import SlideError
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.checkpoint import load_selector
from vllm_wsi.selection.calibration import Trust
from vllm_wsi.slides import open_features, write_features

EVAL = ["eval", "--task", "csv", "--data", "q.csv", "--features", ".", "--out", "new"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "vllm-wsi"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    made = run("init-checkpoint", str(path), "--feature-dim", "512", "--hidden-size", "64")
    assert made.returncode == 0, made.stderr
    assert "random weights from seed 0" in made.stdout
    return path


def test_select_prints_the_kept_patches_of_the_real_slide(checkpoint, shared_data):
    file = shared_data / "features/mopadi_TCGA-AD-6964/features.h5"
    done = run("select", str(file), "--checkpoint", str(checkpoint), "-k", "5")
    found = json.loads(done.stdout)
    with open_features(file) as slide:
        coords = slide.read_coords()
    assert found["num_patches"] == 777
    assert found["indices"] == sorted(set(found["indices"]))
    assert len(found["indices"]) == 5
    assert found["coords"] == [coords[i].tolist() for i in found["indices"]]


def test_select_refuses_features_of_another_encoder_unless_told_to_take_them(tmp_path, capsys):
    file = tmp_path / "slide.safetensors"
    features = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float16)
    write_features(file, features, metadata={"encoder": "uni_v1"})
    asked = ["select", str(file), "--checkpoint", str(DEMO_CHECKPOINT), "-k", "3"]
    assert main(asked) == 1
    found = f"{file}: encoder: found features of 'uni_v1', wanted 'haystack@0'"
    assert found in capsys.readouterr().err
    assert main([*asked, "--encoder-mismatch", "allow"]) == 0
    match = json.loads(capsys.readouterr().out)["encoder_match"]
    assert (match["features"], match["checkpoint"], match["match"]) == ("uni_v1", "haystack@0", "different")
    assert main(["demo", "--slide", str(file), "--checkpoint", str(DEMO_CHECKPOINT)]) == 1  # before any server starts
    assert found in capsys.readouterr().err


def test_select_twice_prints_the_same(checkpoint, shared_data):
    file = shared_data / "features/mopadi_TCGA-AD-6964/features.h5"
    printed = [run("select", str(file), "--checkpoint", str(checkpoint)).stdout for _ in range(2)]
    assert printed[0] == printed[1]


def test_doctor_names_what_the_real_slide_holds(shared_data, capsys):
    assert main(["doctor", str(shared_data / "features/mopadi_TCGA-AD-6964/features.h5")]) == 0
    printed = capsys.readouterr().out
    assert "feats: 777 patches x 512, float32" in printed
    assert "level-0 pixels" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["select", "nosuch.h5", "--checkpoint", "x"], "nosuch.h5: found no readable file"),
        (["doctor", "x.h5", "--checkpoint", "nosuch/dir/x"], "nosuch/dir/x: found no checkpoint that loads"),
        (["encode", "x.svs", "--encoder", ".", "--out", "."], "encoder .: found no readable config.json"),
        (
            ["encode", "x.svs", "--encoder", "colour-texture", "--out", ".", "--patch-px", "0"],
            "patch_px: found 0, wanted at least 1",
        ),
        (["init-checkpoint", ".", "--feature-dim", "8"], "wanted a new directory"),
        (["init-checkpoint", "new", "--feature-dim", "0"], "feature_dim: found 0, wanted at least 1"),
        (["init-checkpoint", "new", "--feature-dim", "8", "--text-config", __file__], "found no JSON"),
        (["init-checkpoint", "new", "--feature-dim", "8", "--text-config", "nosuch.json"], "nosuch.json"),
        (["demo", "--slide", "nosuch.h5"], "nosuch.h5: found no readable file"),
        (["train", "nosuch.yaml", "--out", "new"], "No such file or directory: 'nosuch.yaml'"),
        (["study", "--out", "new", "--questions", "q.csv"], "--questions: found no --features beside it"),
        (["study", "--out", "new", "--slides", "many"], "slides: found 'many', wanted N:COUNT"),
        (["study", "--out", "new", "--seeds", "0"], "seeds: found 0, wanted at least 1"),
        (["study", "--out", "new", "--checkpoint", "nosuch"], "nosuch: found no checkpoint that loads"),
        (
            ["study", "--out", "new", "--fold", "0"],
            "--fold: found it beside --data haystack, wanted --data tissue",
        ),
        (
            ["study", "--out", "new", "--data", "kather", "--device", "cpu"],
            "--device: found it beside --data kather, wanted --data haystack or tissue",
        ),
    ],
)
def test_errors_are_one_sentence_and_exit_with_1(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # it asks five times where no hub answers
    assert main(arguments) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"vllm-wsi {arguments[0]}: ")
    assert sentence in line


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "{", "found no checkpoint that loads (It looks like the config file"),
        ("config.json", '{"model_type": "sparse_wsi", "num_slide_tokens": 0}', "num_slide_tokens: found 0, wanted at"),
        (
            "config.json",
            '{"model_type": "sparse_wsi", "scorer": {"kind": "x"}}',
            "scorer.kind: found 'x', wanted",
        ),
        ("model.safetensors", "nonsense", "found no checkpoint that loads (Error while deserializing header"),
        ("model.safetensors", None, "found neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_broken_checkpoint_is_named_with_what_is_wrong(tmp_path, capsys, file, content, sentence):
    folder = tmp_path / "checkpoint"
    shutil.copytree(DEMO_CHECKPOINT, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    slide = tmp_path / "a.safetensors"
    write_features(slide, np.ones((50, 64), np.float16))
    assert main(["select", str(slide), "--checkpoint", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-wsi select: {folder}: {sentence}")


def test_each_setting_that_does_not_fit_has_its_line(capsys, tmp_path):
    options = ["--patch-px", "0", "--background", "nan", "--mpp", "-1"]
    assert main(["encode", "x.svs", "--encoder", "colour-texture", "--out", str(tmp_path), *options]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "vllm-wsi encode: patch_px: found 0, wanted at least 1",
        "mpp: found -1.0, wanted above 0",
        "background: found nan, wanted a finite number",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nosuch"],
        ["select", "a.h5"],  # without --checkpoint
        ["select", "a.h5", "--checkpoint", "x", "-k", "0"],
        ["doctor"],
        ["doctor", "a.h5", "--nosuch"],
        ["encode", "a.svs", "--encoder", "x", "--out", "x", "--tissue", "grey"],
        ["encode", "a.svs", "--encoder", "x", "--out", "x", "--workers", "0"],
        ["init-checkpoint", "new", "--feature-dim", "many"],
        [*EVAL, "--endpoint", "http://x/v1", "--offline", "x"],
        [*EVAL, "--engine-args", "{"],
        [*EVAL, "--engine-args", "[]"],
    ],
)
def test_a_wrong_command_line_exits_with_2_and_shows_how_to_get_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "--help' for help." in said
    assert "Traceback" not in said


def test_a_fault_of_ours_is_not_swallowed(monkeypatch, capsys):
    def broken(*arguments):
        raise ValueError("a fault")

    monkeypatch.setattr("vllm_wsi.slides.doctor.examine", broken)
    with pytest.raises(ValueError, match="a fault"):
        main(["doctor", "x.h5"])
    assert capsys.readouterr().err == ""


def test_an_error_of_the_system_is_one_line_where_it_names_a_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main(["encode", "x.svs", "--encoder", "colour-texture", "--out", str(tmp_path / "file")]) == 1
    assert f"File exists: '{tmp_path / 'file'}'" in capsys.readouterr().err

    def broken(*arguments):
        raise OSError("found no more memory")

    monkeypatch.setattr("vllm_wsi.slides.doctor.examine", broken)
    with pytest.raises(OSError, match="found no more memory"):
        main(["doctor", "x.h5"])


def test_debug_lets_every_error_through(capsys):
    with pytest.raises(SlideError, match="found no readable file"):
        main(["--debug", "select", "nosuch.h5", "--checkpoint", "x"])
    assert capsys.readouterr().err == ""


def test_a_user_sees_a_sentence_and_with_debug_or_after_a_fault_the_traceback():
    asked = ["select", "nosuch.h5", "--checkpoint", "x"]
    plain, debug = run(*asked), run("--debug", *asked)
    assert plain.returncode == debug.returncode == 1
    missing = Path("nosuch.h5").resolve()
    sentence = f"{missing}: found no readable file (No such file or directory), wanted a feature file"
    assert plain.stderr == f"vllm-wsi select: {sentence}\n"
    assert debug.stderr.startswith("Traceback (most recent call last):")
    assert debug.stderr.splitlines()[-1] == f"vllm_wsi.errors.SlideError: {sentence}"
    code = """
import sys, vllm_wsi.slides.doctor as doctor
from vllm_wsi.cli.app import main
doctor.examine = None
sys.exit(main(["doctor", "x.h5"]))
"""
    fault = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert fault.returncode == 1
    assert fault.stderr.startswith("Traceback (most recent call last):")
    assert fault.stderr.splitlines()[-1] == "TypeError: 'NoneType' object is not callable"


def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["encode", "x.svs", "--encoder", "colour-texture", "--out", str(tmp_path)]) == 1
    wanted = 'tqdm: found no such package, wanted it: pip install "vllm-wsi[slides]"'
    assert capsys.readouterr().err == f"vllm-wsi encode: {wanted}\n"


def test_help_and_version_import_nothing_heavy():
    code = """
import sys
from vllm_wsi.cli.app import main
commands = ("encode", "convert", "doctor", "select", "demo", "init-checkpoint", "train", "compile", "study", "eval")
for arguments in ([], *([command] for command in commands)):
    assert main([*arguments, "--help"]) == 0
assert main(["--version"]) == 0
print([m for m in ("torch", "vllm", "transformers", "numpy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [__version__, "[]"]
    assert "--geojson-origin <bounds|slide>" in done.stdout


def test_the_command_runs_as_a_module_as_torchrun_starts_it():
    done = subprocess.run([sys.executable, "-m", "vllm_wsi.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


@pytest.mark.server
def test_demo_without_pypi_shows_a_photograph_of_tissue_and_answers_right_about_a_virtual_slide(tmp_path):
    done = run("demo", "--out", str(tmp_path), VLLM_WSI_CACHE=str(tmp_path / "cache"), PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    photograph, virtual = done.stdout.split("\nslide ")[1:]
    assert "256 patches x 64" in photograph
    assert "32 of 256 patches were shown" in photograph
    assert photograph.count("its answer about tissue means nothing") == 2
    assert "100,000 patches x 64" in virtual
    assert "means nothing" not in virtual
    assert "colour-texture@1; the checkpoint's: haystack@0; features of another encoder, which" in photograph
    assert "encoder:" not in virtual
    assert virtual.count(": right") == 2
    kept, evidence = re.search(r"(\d+) of the (\d+) patches that decide the answer are shown", virtual).groups()
    assert 1 <= int(kept) <= int(evidence) <= 12
    for slide, width in (("immunohistochemistry", 2048), ("haystack-0-test-0-100000", 2048)):
        assert len(json.loads((tmp_path / f"{slide}.geojson").read_text())["features"]) == 32
        assert Image.open(tmp_path / f"{slide}.heatmap.png").width == width
        assert Image.open(tmp_path / f"{slide}.montage.png").size == (1280, 720)


def test_demo_asks_on_where_the_file_does_not_say_where_its_patches_lie(
    checkpoint, shared_data, tmp_path, capsys, monkeypatch
):
    """The server is stood in for by its own selection: what is tried here is what the demo prints and writes."""
    path, asked = tmp_path / "no-places.npy", []
    with open_features(shared_data / "features/mopadi_TCGA-AD-6964/features.h5") as slide:
        np.save(path, slide.read_rows(0, slide.num_patches))
    with open_features(path) as slide:
        record = load_selector(str(checkpoint)).select(slide).record() | Trust()._asdict()
    monkeypatch.setattr(demo_answers, "_post", lambda url, body: record)
    monkeypatch.setattr(demo_answers, "_ask", lambda _, url, question, slide: asked.append(question) or {"read": 0.0})
    demo_answers.show(SimpleNamespace(api=""), DemoSlide(path), checkpoint, tmp_path / "out")
    assert asked == [QUESTION, SECOND_QUESTION]
    printed = capsys.readouterr().out
    assert "32 of 777 patches were shown to the decoder; the best five (coordinates: none)" in printed
    assert re.search(r"^ +nothing written: \S*no-places\.npy: coords: found none, wanted .+$", printed, re.MULTILINE)
    assert not (tmp_path / "out").exists()


@pytest.mark.server
def test_demo_takes_a_slide_image_from_encoding_to_the_answer(shared_data, tmp_path):
    image = shared_data / "slides/CMU-1-Small-Region.svs"
    done = run("demo", "--slide", str(image), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "41 patches x 64" in done.stdout
    assert "32 of 41 patches were shown" in done.stdout
    assert "random weights" in done.stdout
    assert (tmp_path / "CMU-1-Small-Region.montage.png").exists()


@pytest.mark.server
def test_demo_answers_about_the_real_slide_with_evidence_and_times(shared_data, tmp_path):
    slide = shared_data / "features/mopadi_TCGA-AD-6964/features.h5"
    done = run("demo", "--slide", str(slide), "--out", str(tmp_path), VLLM_WSI_STORE=str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    assert "777 patches x 512" in done.stdout
    assert "random weights" in done.stdout
    assert "32 of 777 patches" in done.stdout
    rows = {line[:38].strip(): line[38:].split() for line in done.stdout.splitlines()}
    new, again = map(float, rows["read"])
    assert new > 0
    assert again == 0
    assert float(rows["prefill"][0]) > 0
    assert float(rows["decode"][0]) > 0
