"""Fixtures that more than one room needs."""

import contextlib
import os
from pathlib import Path

import pytest

# Groups of tests that take a minute or more. Engines in a test's own process come first: vLLM looks through all that
# was imported before, and stumbles over numba.
LONG = ("test_trained.py", "test_parity.py", "test_study.py", "shared_server", "test_eval.py", "test_cli.py",
        "test_server_defaults.py", "test_kernels.py", "test_kernels_compile.py", "test_bench.py")  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What shares an expensive fixture shares a process of pytest-xdist: a server among its tests, else a file's own.

    The long ones come first, so that no process waits for another at the end.
    """
    for item in items:
        group = "shared_server" if "shared_server" in item.fixturenames else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.get_closest_marker("xdist_group").args[0], len(LONG)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real slides, features and tiles, which are not part of the project."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VLLM_WSI_SHARED", default))
    if not folder.is_dir():
        pytest.skip("the real test data (../shared/data) are not on this machine")
    return folder


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
