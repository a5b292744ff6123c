"""`--plugin`: a flag that vLLM does not have, checked against what is installed."""

import os

import pytest

import vllm_wsi
from vllm_wsi.serving.plugin_flag import installed_plugins


@pytest.fixture
def parser(monkeypatch):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    vllm_wsi.register()
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


def allowed() -> list[str]:
    return os.environ["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize(
    "arguments", [["--plugin", "vllm_wsi"], ["--plugin=vllm_wsi"], ["--plugin", "vllm_wsi,vllm_wsi"]]
)
def test_a_named_plugin_is_allowed_for_every_process(parser, monkeypatch, arguments):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    parser.parse_args(arguments)
    assert allowed()[0] == "vllm_wsi"
    assert len(set(allowed())) == len(allowed())


def test_plugins_that_vllm_plugins_names_stay_allowed(parser, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    parser.parse_args(["--plugin", "vllm_wsi"])
    assert {"lora_filesystem_resolver", "vllm_wsi"} <= set(allowed())


def test_platform_plugins_stay_allowed(parser, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    parser.parse_args(["--plugin", "vllm_wsi"])
    assert installed_plugins().get("vllm.platform_plugins", set()) <= set(allowed())


@pytest.mark.parametrize("name", ["nosuch", "vllm_wsi,nosuch", ""])
def test_an_unknown_name_ends_with_the_list_of_installed_plugins(parser, capsys, name):
    with pytest.raises(SystemExit):
        parser.parse_args(["--plugin", name])
    message = capsys.readouterr().err
    assert "unknown plugin" in message
    assert "Installed vLLM plugins:" in message
    assert "vllm_wsi" in message
    assert "VLLM_PLUGINS" not in os.environ


def test_without_the_flag_nothing_is_set(parser):
    parser.parse_args([])
    assert "VLLM_PLUGINS" not in os.environ
