"""The record of a study: what was run, where and with what."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_wsi.files import write_atomically


def write_origin(path: Path, arguments: Mapping[str, Any], seconds: float) -> None:
    """Writes a JSON file that says what was run, on which machine, with which versions, and for how long.

    Args:
        arguments: of the command, as JSON has them.
        seconds: from its start to its end.
    """
    packages = ("vllm-wsi", "torch", "transformers", "numpy", "scikit-learn")
    origin = {
        "time_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "arguments": dict(arguments),
        "seconds": round(seconds),
        "machine": {"system": platform.system(), "processor": processor(), "cores": len(os.sched_getaffinity(0))},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
    }
    write_atomically(path, (json.dumps(origin, indent=2) + "\n").encode())


def processor() -> str:
    """The processor's model name; where the system does not tell it, its architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
