"""Seconds of training for each question, where questions about one slide share a sequence.

    python -m bench.training.grouped_questions [--quick] [--rounds N] [--device cuda]

A step is forward and backward of scorer, noise gate, projector and a frozen decoder, as the first stage of a recipe
trains; the optimiser is left out. Features are synthetic and all weights random: neither changes the work. Questions
and answers have a fixed number of tokens. Every round measures each number of questions in one sequence, and, in turns
with them, two questions one by one (batches of one: no padding and no mask).

- tiny: 2 layers of 128, vocabulary of bytes, N = 1,024.
- smollm2: the shape of SmolLM2-135M (30 layers of 576, 9 heads and 3 of keys, vocabulary 49,152), N = 256.

On the CPU seconds are CPU seconds of the process, which other jobs of the machine change little; on CUDA they are
those of the wall clock. `apart_over_grouped` is the median over rounds of the ratio within a round, `_low` and `_high`
are the smallest and the largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaConfig

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.model.chat_renderer import IGNORED, EncodedChat
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import TrainingItem, TrainingSlide
from vllm_wsi.training.model import SparseLearnModel, set_trainable
from vllm_wsi.training.sparselearn import SparseLearnSettings

CSV = RESULTS / "grouped_questions.csv"
COLUMNS = (
    "device", "threads", "decoder", "num_patches", "question_tokens", "answer_tokens", "questions", "rounds",
    "apart_seconds_per_question", "grouped_seconds_per_question",
    "apart_over_grouped", "apart_over_grouped_low", "apart_over_grouped_high",
)  # fmt: skip
QUESTIONS = (1, 4, 8, 16)
APART = 2
FEATURE_DIM, QUESTION_TOKENS, ANSWER_TOKENS = 512, 30, 10
SLIDE_TOKEN_ID, PAD_TOKEN_ID = 1, 0
SHAPES = {
    "tiny": {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "smollm2": {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3},
}  # fmt: skip


class Case(NamedTuple):
    """A decoder and the length of its slide."""

    decoder: str  # of `SHAPES`
    num_patches: int


CASES = (Case("tiny", 1024), Case("smollm2", 256))


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of training for each question about one slide.")
    parser.add_argument("--quick", action="store_true", help="the tiny decoder alone, N = 64, 1 and 4 questions")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    cases, numbers = ((Case("tiny", 64),), QUESTIONS[:2]) if args.quick else (CASES, QUESTIONS)
    print(f"{'decoder':10}{'N':>7}{'questions':>11}{'apart s':>10}{'grouped s':>11}{'ratio':>8}")
    for case in cases:
        for row in bench_case(case, numbers, args.rounds, torch.device(args.device)):
            append_row(args.csv, row)
            ratio = f"{row['apart_over_grouped']:8.2f} ({row['apart_over_grouped_low']:.2f} ..)"
            times = f"{row['apart_seconds_per_question']:10.4f}{row['grouped_seconds_per_question']:11.4f}"
            print(f"{case.decoder:10}{case.num_patches:7,}{row['questions']:11}{times}{ratio}", flush=True)


def bench_case(case: Case, numbers: tuple[int, ...], rounds: int, device: torch.device) -> list[dict]:
    """A row for each number of questions."""
    wrapped = _model(case.decoder).to(device)
    items = _items(case.num_patches, max(numbers))
    apart: dict[int, list[float]] = {number: [] for number in numbers}
    grouped: dict[int, list[float]] = {number: [] for number in numbers}
    _seconds(wrapped, [_group(items)], device)
    for _ in range(rounds):
        for number in numbers:
            apart[number].append(_seconds(wrapped, items[:APART], device) / APART)
            grouped[number].append(_seconds(wrapped, [_group(items[:number])], device) / number)
    rows = []
    for number in numbers:
        ratios = [one / other for one, other in zip(apart[number], grouped[number], strict=True)]
        values = (
            device.type, torch.get_num_threads(), case.decoder, case.num_patches, QUESTION_TOKENS, ANSWER_TOKENS,
            number, rounds, round(statistics.median(apart[number]), 5), round(statistics.median(grouped[number]), 5),
            *(round(one, 3) for one in (statistics.median(ratios), min(ratios), max(ratios))),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _model(decoder: str) -> SparseLearnModel:
    shape = LlamaConfig(**SHAPES[decoder], max_position_embeddings=8192, tie_word_embeddings=True)
    config = SparseWSIConfig(text_config=shape, feature_dim=FEATURE_DIM, slide_token_id=SLIDE_TOKEN_ID)
    torch.manual_seed(0)
    wrapped = SparseLearnModel(SparseWSIForConditionalGeneration(config), SparseLearnSettings())
    set_trainable(wrapped, {"scorer", "projector"})
    return wrapped.train()


def _items(num_patches: int, count: int) -> list[TrainingItem]:
    """Questions about one slide: 3 tokens before it, then the question's own, then the answer's."""
    generator = torch.Generator().manual_seed(0)
    slide = TrainingSlide(
        torch.randn(num_patches, FEATURE_DIM, generator=generator), torch.arange(num_patches), num_patches, num_patches
    )
    said = torch.randint(5, 300, (count, QUESTION_TOKENS + ANSWER_TOKENS), generator=generator).tolist()
    unlabelled = [IGNORED] * (4 + QUESTION_TOKENS)
    return [
        TrainingItem([slide], [2, 3, 4, SLIDE_TOKEN_ID, *ids], [*unlabelled, *ids[QUESTION_TOKENS:]], 4096)
        for ids in said
    ]


def _group(items: list[TrainingItem]) -> TrainingItem:
    return items[0]._replace(siblings=tuple(EncodedChat(item.ids, item.labels) for item in items[1:]))


def _seconds(wrapped: SparseLearnModel, items: list[TrainingItem], device: torch.device) -> float:
    """Of one step over sequences that come one after the other."""
    wrapped.zero_grad()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    for item in items:
        batch = {name: tensor.to(device) for name, tensor in collate([item], SLIDE_TOKEN_ID, PAD_TOKEN_ID).items()}
        wrapped(**batch, num_items_in_batch=len(items) * ANSWER_TOKENS)["loss"].backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    main()
