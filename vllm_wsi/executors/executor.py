"""One thing that is done with many items: what it needs, and what everybody offers who does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work(Generic[Item, Result]):
    """What is done with each item.

    `do` and `start` go to other processes: they are functions of a module, or `partial`s of such.
    """

    do: Callable[[Item], Result]
    start: Callable[..., None] | None = None  # called in each worker first, with `given`; not in this process
    given: tuple[Any, ...] = ()
    do_here: Callable[[Item], Result] | None = None  # instead of `do`, in this process
    fills_machine: bool = False  # a worker uses all cores, or the GPU: unless told otherwise, one runs on a machine
    most_workers: int | None = None  # that are worth their start
    # Of a cluster, which gives each worker what it asks for:
    device: str = "cpu"  # of the workers, as `Executor.device_there` says
    gpus: int = 1  # for each worker, where the device is none of a CPU
    takes_node: bool = False  # a worker without a GPU has all cores of a node, not one


class Executor(Protocol):
    """Does a work with many items by one or several workers."""

    def device_here(self, device: str) -> str:
        """On which device this process checks what the workers will load, where a user wants `device`."""
        ...

    def device_there(self, device: str) -> str:
        """The device of the workers, where a user wants `device`."""
        ...

    def run(self, work: Work[Item, Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | None]]:
        """(item, what came of it) as each ends, None where it ends its worker; an item's error is raised."""
        ...
