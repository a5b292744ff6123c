"""On a server's PYTHONPATH: rows of FILE are not read as long as FILE.hold exists."""

import time
from pathlib import Path

from vllm_wsi.slides.formats.rows import RawRows

_read_into = RawRows.read_into


def read_into(self, start, out):
    while Path(f"{self._path}.hold").exists():
        time.sleep(0.01)
    _read_into(self, start, out)


RawRows.read_into = read_into
