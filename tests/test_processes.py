import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_wsi.processes import process_pool

POOL = """
import os, sys, time
from pathlib import Path
from vllm_wsi.processes import process_pool

def write_pid_and_wait(path):
    part = path.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.rename(path)
    time.sleep(300)

if __name__ == "__main__":
    with process_pool(1) as pool:
        pool.submit(write_pid_and_wait, Path(sys.argv[1])).result()
"""


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_pool_starts_each_process_with_what_was_given(tmp_path):
    with process_pool(1, os.chdir, tmp_path) as pool:
        assert pool.submit(os.getcwd).result() == str(tmp_path)
        assert pool.submit(os.getpid).result() != os.getpid()
    assert Path.cwd() != tmp_path


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see other processes")
def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    script, pid_file = tmp_path / "pool.py", tmp_path / "pid"
    script.write_text(POOL)
    parent = subprocess.Popen([sys.executable, script, pid_file])
    try:
        while not pid_file.exists():
            assert parent.poll() is None
            time.sleep(0.05)
        worker = int(pid_file.read_text())
        assert is_running(worker)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 60
        while is_running(worker):
            assert time.monotonic() < deadline, "the worker outlived its parent"
            time.sleep(0.05)
    finally:
        parent.kill()
