"""`vllm serve MODEL --plugin NAME[,NAME..]`: names the plugins to allow, as VLLM_PLUGINS does."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

PLATFORM_GROUP = "vllm.platform_plugins"


def installed_plugins() -> dict[str, set[str]]:
    """Names of the installed vLLM plugins, by entry point group."""
    points = entry_points()
    return {group: set(points.select(group=group).names) for group in points.groups if group.startswith("vllm.")}


class AllowPlugins(argparse.Action):
    """Checks the names and adds them to VLLM_PLUGINS, which vLLM's other processes inherit.

    Platform plugins stay allowed; without its platform plugin, vLLM would not find the device.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        names = [name for name in str(values).split(",") if name]
        groups = installed_plugins()
        installed = set().union(*groups.values())
        unknown = [name for name in names if name not in installed]
        if unknown or not names:
            raise argparse.ArgumentError(
                self,
                f"unknown plugin {', '.join(map(repr, unknown)) or repr('')}. "
                f"Installed vLLM plugins: {', '.join(sorted(installed)) or 'none'}",
            )
        before = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
        allowed = dict.fromkeys([*before, *names, *sorted(groups.get(PLATFORM_GROUP, ()))])
        os.environ["VLLM_PLUGINS"] = ",".join(allowed)
        setattr(namespace, self.dest, names)


def with_plugin_flag(
    original: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """Wraps `EngineArgs.add_cli_args`, which vLLM calls after it has loaded the general plugins."""

    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        parser.add_argument(
            "--plugin",
            action=AllowPlugins,
            metavar="NAME[,NAME...]",
            help="vLLM plugins to allow, for example vllm_wsi; adds to VLLM_PLUGINS.",
        )
        return parser

    return add_cli_args
