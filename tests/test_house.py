"""The rules of the house that a program can check: sizes of files and functions, and names of files."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vllm_wsi", "triton_kernels", "bench", "tools", "examples")
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 310, 60, 8
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path.is_file()]
SOURCES = [path for path in SOURCES if "vllm_wsi/kernels" not in str(path)]  # a link to triton_kernels
SAME_PURPOSE = {
    "__init__.py": "every package has one",
    "settings.py": "the settings of a room, below the base class of all",
    "model.py": "the model as training runs it, and as vLLM runs it",
}


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def reason_beside(path, node) -> bool:
    """Whether the comment above a function says why it has many parameters or lines."""
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    above = path.read_text().splitlines()[first - 2].strip()
    return above.startswith("# Many ")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_has_many_lines_or_parameters_without_a_reason_beside_it(path):
    found = []
    for node in functions(path):
        arguments = node.args
        names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        lines = node.end_lineno - node.lineno + 1
        if (lines > MAX_FUNCTION_LINES or count > MAX_PARAMETERS) and not reason_beside(path, node):
            found.append(f"{node.name}: {lines} lines, {count} parameters")
    assert found == []


def test_no_source_file_is_much_longer_than_300_lines():
    found = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines > MAX_LINES} == {}


def test_no_two_files_of_the_package_share_a_name_for_two_purposes():
    found = defaultdict(list)
    for path in SOURCES:
        is_command = path.parent.name == "cli"  # named as its command
        if path.name not in SAME_PURPOSE and not is_command:
            found[path.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}
