"""`python -m vllm_wsi.cli`, as `torchrun` starts it."""

import sys

from .app import main

sys.exit(main())
