"""First on PYTHONPATH on the nodes of the tests' cluster: what their workers do with certain slides.

- A slide whose name begins with `bomb` ends its process, as a damaged slide in a native library can.
- FILE is not read as long as FILE.hold exists; FILE.began has a line for each time that it was begun: the process id
  of the node.
"""

import os
import sys
import time
from pathlib import Path


def watch(module, name: str) -> None:
    original = getattr(module, name)

    def opened(path, *args):
        with open(f"{path}.began", "a") as file:
            file.write(f"{os.getppid()}\n")
        if path.name.startswith("bomb"):
            os._exit(7)
        while Path(f"{path}.hold").exists():
            time.sleep(0.02)
        return original(path, *args)

    setattr(module, name, opened)


if any(argument.endswith("default_worker.py") for argument in sys.orig_argv):  # of Ray
    import vllm_wsi.encoding.encode_slide as encode_slide
    import vllm_wsi.slides.convert_features as convert_features

    watch(convert_features, "open_features")
    watch(encode_slide, "open_image")
