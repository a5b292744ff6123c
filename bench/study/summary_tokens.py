"""What the 32 best patches leave out: `python -m bench.study.summary_tokens RUNS --seeds 0 1 2`.

Questions of share (which tissue covers most, how much tumour) and an ordinary one (which finding, of few patches),
about virtual slides (`share_slides.py`). A small decoder is trained on what each arm of `summary_arms.py` shows, as a
stage with `selection: hard` would: K best patches by the demo checkpoint's scorer, or K - S best and S tokens for the
dropped ones: patches, or pooled means. All arms of a seed share the decoder's first weights, the training slides and
their order; the slides are the same for all seeds. Rows of the kind "seed" are of one decoder; rows of the kind
"pooled" are of all decoders, with slides as the independent units, and the difference from K best patches alone.

Tokens and answers are made once and kept in RUNS. It takes five minutes for the tokens and a minute for each arm and
seed, on one core. `bench.study.summary_cost` measures what pooled means cost beside a selection.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.kernels import ScorerWeights
from vllm_wsi.model.chat_renderer import ChatRenderer, EncodedChat
from vllm_wsi.model.checkpoint import trained_scorer
from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.scorer import frozen_scorer
from vllm_wsi.stats import Interval, mean_interval, paired_interval
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import TrainingItem, TrainingSlide
from vllm_wsi.training.model import SparseLearnModel

from .share_slides import KINDS, TEXTS, WORLD, ShareSlide
from .summary_arms import ARMS, Arm, K, shown, with_counts

CSV = RESULTS / "study" / "summary_tokens.csv"
COLUMNS = (
    "kind", "seed", "num_patches", "variation", "k", "rest", "s", "told", "steps", "training_slides", "question",
    "questions", "accuracy", "accuracy_low", "accuracy_high", "less_k_best", "less_low", "less_high",
)  # fmt: skip
NUM_PATCHES, BATCH, WARMUP, RATE, LEAST_RATE = 4096, 32, 50, 1e-3, 0.05
NEW = TinySettings(
    feature_dim=WORLD.feature_dim + 2, scorer_hidden_size=0, num_slide_tokens=K, position_ids="packed", rope_theta=1e6,
    initializer_range=0.05, texts=TEXTS,
)  # fmt: skip

CONVERSATIONS: dict[tuple[tuple[str, str], ...], EncodedChat] = {}  # of `TEXTS`, whose tokenizer is always the same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory of the slides' tokens and of the answers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", type=int, nargs="+", default=range(len(ARMS)), help="numbers in ARMS (default: all)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--training-slides", type=int, default=4000)
    parser.add_argument("--variation", type=float, default=0.4, help="of patch types between slides (default 0.4)")
    parser.add_argument("--questions", type=int, default=300, help="of each kind, for the test")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check_header(args.csv, COLUMNS)
    args.runs.mkdir(parents=True, exist_ok=True)
    arms = [ARMS[number] for number in args.arms]
    train = Slides.made(args.runs, "train", args.training_slides, args.variation, arms)
    test = Slides.made(args.runs, "test", len(KINDS) * args.questions, args.variation, arms)
    right: dict[Arm, list[NDArray[np.bool_]]] = {arm: [] for arm in arms}
    told = {"num_patches": NUM_PATCHES, "variation": args.variation, "k": K}
    told |= {"steps": args.steps, "training_slides": args.training_slides}
    for seed in args.seeds:
        for arm in arms:
            sizes = (args.variation, args.training_slides, len(test.items), args.steps)
            path = args.runs / f"{'-'.join(map(str, (arm.name, arm.s, seed, *sizes)))}.npy"
            if not path.exists():
                model, renderer = trained(arm, train, args.steps, seed)
                np.save(path, answered(model, renderer, arm, test))
                report(args.csv, told | {"kind": "seed", "seed": seed}, arm, [np.load(path)], None)
            right[arm].append(np.load(path))
    if len(args.seeds) > 1:
        for arm in arms:
            seeds = " ".join(map(str, args.seeds))
            report(args.csv, told | {"kind": "pooled", "seed": seeds}, arm, right[arm], right.get(ARMS[0]))


class Slides:
    """Questions about slides, and what arms show of them.

    Args:
        shown: of each arm, tokens fp16 [slides, K, d] and counts fp32 [slides, K].
    """

    def __init__(self, items: list[SlideItem], shown: dict[Arm, tuple[Tensor, Tensor]]) -> None:
        self.items, self._shown = items, shown

    @classmethod
    def made(cls, runs: Path, split: str, count: int, variation: float, arms: Sequence[Arm]) -> Slides:
        """Reads the tokens from RUNS; those that are not there are made, and kept there."""
        slides = [ShareSlide(split, number, NUM_PATCHES, variation) for number in range(count)]
        paths = {arm: runs / f"{split}-{count}-{variation}-{arm.rest}-{arm.s}.pt" for arm in arms}
        missing = [arm for arm in arms if not paths[arm].exists()]
        if missing:
            scorer = frozen_scorer(trained_scorer(str(DEMO_CHECKPOINT)))
            assert isinstance(scorer, ScorerWeights)
            tokens = torch.empty(len(missing), count, K, WORLD.feature_dim, dtype=torch.float16)
            counts = torch.empty(len(missing), count, K)
            for number, slide in enumerate(slides):
                for place, one in enumerate(shown(torch.from_numpy(slide.features()), scorer, missing, number)):
                    tokens[place, number], counts[place, number] = one.tokens, one.counts
            for place, arm in enumerate(missing):
                torch.save((tokens[place].clone(), counts[place].clone()), paths[arm])
        return cls([slide.item() for slide in slides], {arm: torch.load(path) for arm, path in paths.items()})

    def of_arm(self, arm: Arm) -> Tensor:
        """fp32 [slides, K, d + 2]."""
        tokens, counts = self._shown[arm]
        return with_counts(tokens.float(), counts, arm.told)


def trained(arm: Arm, slides: Slides, steps: int, seed: int) -> tuple[SparseLearnModel, ChatRenderer]:
    """A new projector and decoder that learned from what the arm shows."""
    made, tokenizer = new_model(NEW.changed(seed=seed))
    made.projector.input_norm = False  # what is shown is normalised, and the two numbers behind it shall stay
    model, renderer = SparseLearnModel(made, None).train(), ChatRenderer(tokenizer)
    learning = [*made.projector.parameters(), *made.language_model.parameters()]
    optimiser = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_after(step, steps))
    tokens, rng = slides.of_arm(arm), np.random.default_rng([seed, 10])
    order = np.concatenate([rng.permutation(len(tokens)) for _ in range(math.ceil(steps * BATCH / len(tokens)))])
    for step in range(steps):
        numbers = order[step * BATCH : (step + 1) * BATCH]
        loss = model(**batch_of(renderer, [slides.items[one] for one in numbers], tokens[numbers]))["loss"]
        optimiser.zero_grad()
        loss.backward()
        clip_grad_norm_(learning, 1.0)
        optimiser.step()
        cosine.step()
        if step % 100 == 99:
            print(f"{arm.name} {arm.s}, seed {seed}, step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval(), renderer


def rate_after(step: int, steps: int) -> float:
    """Of `RATE`: a short warm-up, then a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    turn = (step - WARMUP) / max(1, steps - WARMUP)
    return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * turn)) / 2


def batch_of(renderer: ChatRenderer, items: Sequence[SlideItem], tokens: Tensor) -> dict[str, Tensor]:
    """One batch at packed positions: the S tokens stand right behind the patches, as patches would."""
    made = []
    for item, one in zip(items, tokens, strict=True):
        ids, labels = conversation(renderer, item)
        made.append(TrainingItem([TrainingSlide(one, torch.arange(K), K, K)], ids, labels, budget=0))
    return collate(made, renderer.slide_token_id, renderer.tokenizer.eos_token_id)


def conversation(renderer: ChatRenderer, item: SlideItem) -> EncodedChat:
    """As the renderer makes it, which renders each of the few different ones once."""
    if (found := CONVERSATIONS.get(item.turns)) is None:
        found = CONVERSATIONS[item.turns] = renderer.conversation(item)
    return found


@torch.no_grad()
def answered(model: SparseLearnModel, renderer: ChatRenderer, arm: Arm, slides: Slides) -> NDArray[np.bool_]:
    """[questions]: whether the right option's first token is the likeliest of all options'."""
    tokens, right = slides.of_arm(arm), []
    for start in range(0, len(tokens), 4 * BATCH):
        items = slides.items[start : start + 4 * BATCH]
        logits, labels = model.tail_logits(**batch_of(renderer, items, tokens[start : start + 4 * BATCH]))
        first = (labels >= 0).int().argmax(dim=1)
        for row, item in enumerate(items):
            options = list(item.options)
            found = logits[row, first[row], renderer.first_ids(options)]
            right.append(options[int(found.argmax())] == item.answer)
    return np.array(right)


def report(
    csv: Path,
    told: dict[str, object],
    arm: Arm,
    right: Sequence[NDArray[np.bool_]],
    best: Sequence[NDArray[np.bool_]] | None,
) -> None:
    """Appends a row for each kind of question.

    Args:
        right: of each seed, [questions].
        best: the same of K best patches alone, to compare with.
    """
    for place, question in enumerate(KINDS):
        of_kind = np.stack(right)[:, place :: len(KINDS)]
        slides = np.broadcast_to(np.arange(of_kind.shape[1]), of_kind.shape).ravel().tolist()
        accuracy = mean_interval(of_kind.ravel(), slides)
        less: Interval | tuple[str, ...] = ("", "", "")
        if best is not None:
            less = paired_interval(of_kind.ravel(), np.stack(best)[:, place :: len(KINDS)].ravel(), slides)
        values = [round(one, 4) if isinstance(one, float) else one for one in (*accuracy, *less)]
        row = told | {"rest": arm.rest, "s": arm.s, "told": arm.told, "question": question, "questions": len(slides)}
        row |= dict(zip(COLUMNS[-6:], values, strict=True))
        append_row(csv, {name: row[name] for name in COLUMNS})
        print(*(row[name] for name in ("kind", "seed", "rest", "s", "told", "question")), *values, flush=True)


if __name__ == "__main__":
    main()
