"""One thing that is done with many items: by this process, several processes, or the nodes of a cluster."""

from .executor import Executor, Work
from .local_executor import LocalExecutor

__all__ = ["Executor", "LocalExecutor", "Work"]
