"""What a checkpoint from a seed is like: its slide part, and a decoder that is small enough for a demo or a test."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_wsi.settings import Settings


class SlideSettings(Settings, frozen=True):
    """The part of a model that knows slides, whatever its decoder is."""

    feature_dim: int = Field(ge=1)
    """d of the features that it takes."""
    encoder: str | None = None
    """id@revision of the features."""
    patch_um: float | None = Field(None, gt=0)
    """Edge of their patches on the glass, in microns."""
    scorer_kind: Literal["patch", "context", "question"] = "patch"
    """Scores each patch alone, within the whole slide, or for a question (`selection/scorer.py`)."""
    scorer_hidden_size: int = Field(256, ge=0)
    """h; 0: the plain linear scorer."""
    scorer_rank: int = Field(16, ge=1)
    """Of the kind `question`: numbers of a patch's vector."""
    free_tokens: int | None = Field(None, ge=0)
    """Of the kind `question`: patches of K that no question chooses; none: a quarter of the kept ones."""
    projector_inputs: tuple[Literal["features", "score"], ...] = ("features",)
    """What a token says of its patch (`SlideProjector`)."""
    num_slide_tokens: int = Field(32, ge=1)
    """K, tokens of each slide."""
    summary_tokens: int = Field(0, ge=0)
    """Of K, means of the dropped patches."""
    position_ids: Literal["original", "packed"] = "original"
    """Whether a kept patch keeps its place among the N, or is counted like text."""
    max_slide_positions: int | None = Field(None, ge=1)
    """Positions that the slides of one prompt may take together; none: by the decoder's."""
    seed: int | None = None
    """Of the random weights; none: that of the run, else 0."""


class TinySettings(SlideSettings, frozen=True):
    """A whole small model with random weights."""

    decoder: Literal["qwen2", "qwen3", "llama"] = "qwen2"
    """The decoder's architecture."""
    hidden_size: int = Field(128, ge=32, multiple_of=32)
    """Of the decoder, in heads of 32."""
    num_layers: int = Field(2, ge=1)
    """Of the decoder."""
    max_position_embeddings: int = Field(8192, ge=2)
    """Of the decoder."""
    rope_theta: float = Field(10000.0, gt=0)
    """Long slides at their original positions want a large one (Qwen2.5: 1e6)."""
    texts: tuple[str, ...] = ()
    """Their words become tokens of their own (`byte_tokenizer`)."""
    initializer_range: float = Field(0.15, gt=0)
    """Standard deviation of the weights; transformers' own 0.02 makes a model this small repeat one token."""
