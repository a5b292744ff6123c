"""The list of what is changed in vLLM: every target exists in this vLLM, and is wrapped once."""

import subprocess
import sys

import pytest

from vllm_wsi.serving import vllm_hooks

ALL = [hook for hooks in vllm_hooks.HOOKS.values() for hook in hooks]


@pytest.mark.parametrize("hook", ALL, ids=lambda hook: hook.target)
def test_each_hook_names_a_function_that_this_vllm_has(hook):
    owner, name = hook.place()
    assert callable(getattr(owner, name))


@pytest.mark.parametrize("stage", vllm_hooks.HOOKS)
def test_installing_a_stage_twice_wraps_each_function_once(stage):
    code = f"""
from vllm_wsi.serving import vllm_hooks as hooks
found = []
for _ in range(3):
    found.append([getattr(*hook.place()) for hook in hooks.HOOKS[{stage!r}]])
    hooks.install({stage!r})
before, first, second = found
assert all(one is not other for one, other in zip(before, first)), "not wrapped"
assert all(one is other for one, other in zip(first, second)), "wrapped twice"
assert all(getattr(one, hooks.MARK) == hook.wrapper for one, hook in zip(first, hooks.HOOKS[{stage!r}]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_nothing_else_of_this_room_assigns_to_vllm():
    """Assignments to attributes of what vLLM defines stand in `vllm_hooks.install` alone, but for one engine client."""
    code = "import vllm_wsi.serving as room; print(room.__path__[0])"
    folder = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    found = subprocess.run(
        ["grep", "-rlE", r"type: ignore\[method-assign|setattr\(", "--include=*.py", folder],
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert sorted(line.rpartition("/")[2] for line in found.split()) == [
        "open_requests.py", "plugin_flag.py", "vllm_hooks.py",
    ]  # fmt: skip
