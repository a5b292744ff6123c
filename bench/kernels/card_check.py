"""Do the kernels score and select right on this card? `python -m bench.kernels.card_check`, before anything is timed.

For every size of the table: the check that a server makes at its start (`self_check.py`), and one launch against two
launches and against the oracle on the same scores, bit for bit, at awkward lengths. Ends with status 1 where one is
wrong.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch

from vllm_wsi.kernels import ScorerWeights, score_topk, select_topk
from vllm_wsi.kernels.buffers import Workspace
from vllm_wsi.kernels.launch_table import DTYPES, card_of
from vllm_wsi.kernels.score import score_triton
from vllm_wsi.kernels.select import select_triton
from vllm_wsi.kernels.self_check import check_device
from vllm_wsi.selection.scorer import seeded_scorer

SHAPES = list(itertools.product((256, 512, 1536), (0, 64, 128, 256, 512)))
LENGTHS = (1, 31, 32, 33, 1000, 4097, 100_003)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--k", type=int, nargs="+", default=[32, 256])
    return found


def main() -> None:
    args = parser().parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("card_check: found no CUDA device, wanted one")
    device = torch.device("cuda", torch.cuda.current_device())
    print(torch.cuda.get_device_name(device), *card_of(device))
    wrong = 0
    for d, h in SHAPES:
        began = time.perf_counter()
        weights = seeded_scorer("patch", d, h, seed=0).requires_grad_(False).weights()
        found = "right"
        try:
            for k in args.k:
                check_device(weights, k, device)
                compare_launches(weights, d, k, device)
        except Exception as error:  # the other shapes are worth knowing too
            found, wrong = f"WRONG: {type(error).__name__}: {error}", wrong + 1
        print(f"d = {d:4}  h = {h:3}  {found}  ({time.perf_counter() - began:.1f} s)", flush=True)
    if wrong:
        raise SystemExit(f"card_check: found {wrong} of {len(SHAPES)} shapes that score wrong, wanted none")


def compare_launches(weights: ScorerWeights, d: int, k: int, device: torch.device) -> None:
    """Raises AssertionError where `score_topk` and two launches differ in a bit, or keep others than the oracle."""
    on_device, workspace = weights.to(device), Workspace(device)
    for n, dtype in itertools.product(LENGTHS, DTYPES):
        x = torch.randn(n, d, device=device).to(dtype)
        x[::13] = x[0]  # ties
        found = score_topk(x, on_device, k)
        scores = score_triton(x, on_device)
        assert torch.equal(found.all_scores, scores), f"{n} rows of {dtype}: scores of one launch and of two differ"
        for wanted in (select_triton(scores, k, x, workspace=workspace), select_topk(scores, k, x)):
            same = all(torch.equal(one, other) for one, other in zip(found, wanted, strict=False))
            assert same, f"{n} rows of {dtype}: other patches are kept"


if __name__ == "__main__":
    main()
