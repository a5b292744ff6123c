"""First on PYTHONPATH in the processes of some tests, so that it runs before vLLM is imported.

- Rows of FILE are not read as long as FILE.hold exists.
- With WSI_TESTS_V2, vLLM's V2 model runner, the one of GPUs, runs on the CPU. vLLM takes it where Triton works: its
  interpreter stands in for a compiler of GPUs, and its CPU backend says that it is active.
"""

import os
import time
from pathlib import Path


def hold_files() -> None:
    from vllm_wsi.slides.formats.rows import RawRows

    original = RawRows.read_into

    def read_into(self, start, out):
        while Path(f"{self.source.name}.hold").exists():
            time.sleep(0.01)
        original(self, start, out)

    RawRows.read_into = read_into


def take_v2_runner() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import triton.backends

    class Driver:
        @staticmethod
        def is_active():
            return True

    class Backend:
        compiler = None
        driver = Driver

    triton.backends.backends["cpu"] = Backend


if os.environ.get("WSI_TESTS_V2"):
    take_v2_runner()
hold_files()
