"""`tools/setup_env.py`: what pip is told is what uv is told."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup_env(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    return module


def test_what_pip_is_configured_with_becomes_options_and_variables_of_uv(setup_env, monkeypatch, tmp_path):
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://one.example/simple\nextra-index-url =\n  https://two.example\n"
        "  https://three.example\ncert = /from/global.pem\n\n"
        "[install]\nfind-links = /wheels\ncert = /from/install.pem\n"
        "constraint = /constraints.txt\n\n[list]\nfind-links = /not/of/install\n"
    )
    monkeypatch.setenv("PIP_FIND_LINKS", "/other/wheels")

    options, variables = setup_env.uv_configuration(setup_env.pip_configuration())

    assert options[:2] == ["--default-index", "https://one.example/simple"]
    assert options[2:6] == ["--index", "https://two.example", "--index", "https://three.example"]
    assert options[6:] == ["--find-links", "/other/wheels", "--constraints", "/constraints.txt"]
    assert variables == {"SSL_CERT_FILE": "/from/install.pem"}


def test_without_a_configuration_uv_gets_no_options(setup_env):
    assert setup_env.uv_configuration({}) == ([], {})
    assert setup_env.uv_configuration({"no-index": "true"}) == (["--no-index"], {})
    assert setup_env.uv_configuration({"no-index": "false"}) == ([], {})


def test_where_uv_fails_pip_installs_the_same_and_a_line_says_so(setup_env, monkeypatch, tmp_path, capsys):
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\nexit 2\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    asked = []
    monkeypatch.setattr(setup_env, "pip", lambda *args: asked.append(args))

    setup_env.install("-c", "constraints.txt", "a-package")

    assert asked == [("install", "-q", "-c", "constraints.txt", "a-package")]
    assert "uv did not install (CalledProcessError" in capsys.readouterr().out
