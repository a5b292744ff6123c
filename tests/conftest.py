"""Fixtures that more than one room needs."""

import contextlib
import os
from pathlib import Path

import pytest


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
