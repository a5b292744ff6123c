"""What is installed, and what an import costs."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, cwd: Path | None = None) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "project"
    for name in ("vllm_wsi", "triton_kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheels_top_level_is_vllm_wsi_alone(wheel):
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"vllm_wsi"}


def test_the_wheel_holds_every_module_of_the_source(wheel):
    sources = {f"vllm_wsi/{p.relative_to(ROOT / 'vllm_wsi')}" for p in (ROOT / "vllm_wsi").rglob("*.py")}
    sources |= {f"vllm_wsi/kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")}
    assert sources == {name for name in wheel if name.endswith(".py")}


def test_the_wheel_holds_the_viewer_and_the_licence_of_what_it_brings(wheel):
    folder = ROOT / "vllm_wsi/serving/viewer/static"
    files = {f"vllm_wsi/{path.relative_to(ROOT / 'vllm_wsi')}" for path in folder.rglob("*") if path.is_file()}
    assert files <= set(wheel)
    assert "vllm_wsi/serving/viewer/static/vendor/openseadragon.LICENSE.txt" in files


def test_the_wheel_holds_both_checkpoints_whole_with_their_model_cards(wheel):
    for folder in ("vllm_wsi/haystack/demo_checkpoint", "vllm_wsi/tissue/checkpoint"):
        files = {f"{folder}/{path.name}" for path in (ROOT / folder).iterdir()}
        assert files <= set(wheel)
        assert f"{folder}/README.md" in files


def test_importing_the_package_imports_neither_torch_nor_vllm_nor_numpy():
    loaded = python(
        "import sys, vllm_wsi; print([m for m in ('torch', 'vllm', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_only_the_serving_room_needs_vllm():
    code = """
import sys
sys.modules["vllm"] = None  # an import of it fails
import vllm_wsi.cli.app, vllm_wsi.cli.demo_run, vllm_wsi.model.modeling, vllm_wsi.model.init_checkpoint
import vllm_wsi.slides.doctor, vllm_wsi.slides.synthetic, vllm_wsi.selection.selector, vllm_wsi.kernels
print("imported")
"""
    assert python(code) == "imported"


def test_the_slides_room_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import vllm_wsi.slides, vllm_wsi.slides.doctor; print('imported')"
    assert python(code) == "imported"


def test_vllms_own_triton_kernels_are_found_as_without_us(tmp_path):
    code = "from vllm.utils.import_utils import has_triton_kernels; print(has_triton_kernels())"
    with_plugin = python(f"import vllm_wsi, vllm_wsi.kernels; vllm_wsi.register(); {code}", cwd=tmp_path)
    assert with_plugin.splitlines()[-1] == python(code, cwd=tmp_path).splitlines()[-1]
    assert python("import importlib.util as u; print(u.find_spec('triton_kernels'))", cwd=tmp_path) == "None"


def test_the_kernels_folder_refuses_the_name_that_would_shadow_tritons_package():
    run = subprocess.run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "this folder is `vllm_wsi.kernels`" in run.stderr


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.endpoint_plugins"])
def test_both_entry_points_are_named_vllm_wsi_and_load(group):
    (entry,) = entry_points(group=group, name="vllm_wsi")
    assert callable(entry.load())


def test_registering_twice_changes_nothing_more():
    code = """
import vllm_wsi
from vllm.engine.arg_utils import EngineArgs
vllm_wsi.register(); first = EngineArgs.add_cli_args
vllm_wsi.register(); print(EngineArgs.add_cli_args is first)
"""
    assert python(code).splitlines()[-1] == "True"
