"""The bar of a command over many slides, and a line for each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_wsi.errors import needs_extra

if TYPE_CHECKING:
    from tqdm import tqdm

    from vllm_wsi.slides.many_slides import Outcome


@contextmanager
def slides_bar(total: int) -> Iterator[tuple[tqdm, Callable[[Outcome], None]]]:
    """(the bar, what is called as each slide ends).

    Raises:
        SetupError: tqdm is not there.
    """
    with needs_extra("slides"):
        from tqdm import tqdm
    with tqdm(total=total, unit="slide", disable=None) as bar:

        def ended(outcome: Outcome) -> None:
            bar.update()
            bar.set_postfix_str("")
            if outcome.status == "failed":
                bar.write(f"failed: {outcome.reason}", file=sys.stderr)
            else:
                patches = f"{outcome.patches:,} patches in {outcome.seconds:.1f} s"
                bar.write(f"{outcome.status}: {outcome.slide}: {outcome.reason or patches}")
            if outcome.warning:
                bar.write(f"warning: {outcome.slide}: {outcome.warning}", file=sys.stderr)

        yield bar, ended
