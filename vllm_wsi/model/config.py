"""The checkpoint contract: everything that training, `transformers` and `vllm serve` must agree on."""

from __future__ import annotations

import math
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from vllm_wsi.errors import CheckpointError
from vllm_wsi.slides.encoder_names import EncoderCheck, Mismatch

MODEL_TYPE = "sparse_wsi"
ARCHITECTURE = "SparseWSIForConditionalGeneration"
SLIDE_TOKEN = "<|slide|>"
"""The placeholder of one slide in a prompt's text; a checkpoint's tokenizer holds it as one special token."""

FP32_PARTS = ("scorer", "projector")
"""Parts that are trained, saved and loaded in fp32, whatever the decoder's dtype: together a few MB. In bf16 thousands
of patches would share a score, and most steps of training would round to nothing."""

PROJECTOR_INPUTS = ("features", "score")
"""What a token may say of its patch: its features; how it scored, and how many patches of its slide were scored. The
best 32 of many patches score higher than the best 32 of few, whatever the slide shows."""

POSITION_MODES = ("original", "packed")
TEXT_POSITIONS = 4096
"""Positions that the default budget leaves to text, in a decoder that has many."""


class SparseWSIConfig(PreTrainedConfig):
    """Configuration of a slide language model whose decoder sees the K best patches of each slide.

    Args:
        text_config: the decoder's own configuration, or a dict of it; any causal decoder that the runtime knows.
        feature_dim: d, the size of a patch feature.
        encoder: id@revision of the patch encoder that the model was trained on; None: not recorded.
        patch_um: edge of its patches on the glass, in microns; None: not recorded.
        num_slide_tokens: K, tokens of each slide: its K - S best patches, and S summary tokens.
        summary_tokens: S, means of the dropped patches (`selection/slide_pools.py`), 0 <= S < K. They are read as
            patches are, by a projector with `input_norm` whose `inputs` are features alone.
        max_patches: longest slide that is served; a longer one is refused.
        scorer: {"kind": "patch", "hidden_size": h}, where h = 0 is the plain linear scorer; or {"kind": "context",
            "hidden_size": w, "num_layers": 2, "num_heads": w // 64}, Transformer blocks over the whole slide; or
            {"kind": "question", "hidden_size": h, "rank": 16, "free_tokens": (K - S) // 4}, which hears the question.
        projector: {"hidden_size": m, "input_norm": True, "inputs": ["features"]} of normalise, Linear(d, m), GELU,
            Linear(m, decoder); m is the decoder's hidden size unless given. `inputs` are some of `PROJECTOR_INPUTS`;
            "score" takes a scorer of kind "patch".
        position_ids: "original" (a kept patch keeps its place among the N, as in the SparseLearn paper) or
            "packed" (kept patches are counted like text).
        max_slide_positions: RoPE positions that the slides of one prompt may take together in "original" mode;
            beyond it places are scaled down (`selection/positions.py`). None: what the decoder has, less 4096 for
            text (half of it in a decoder of fewer than 8192).
        slide_token_id: id of `SLIDE_TOKEN` in the tokenizer.
        part_dtypes: "float32" for each of `FP32_PARTS`. The key `dtype`, which transformers and vLLM read, is the
            decoder's.

    Raises:
        CheckpointError: a value that no model can have.
    """

    model_type = MODEL_TYPE
    sub_configs = {"text_config": AutoConfig}

    # Many parameters: transformers makes a configuration from the keys of config.json.
    def __init__(
        self,
        text_config: Any = None,
        feature_dim: int = 512,
        encoder: str | None = None,
        patch_um: float | None = None,
        num_slide_tokens: int = 32,
        summary_tokens: int = 0,
        max_patches: int = 1 << 20,
        scorer: dict[str, Any] | None = None,
        projector: dict[str, Any] | None = None,
        position_ids: str = "original",
        max_slide_positions: int | None = None,
        slide_token_id: int = 0,
        part_dtypes: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = CONFIG_MAPPING["qwen2"]()
        elif isinstance(text_config, dict):
            kind = text_config.get("model_type", "qwen2")
            if kind not in CONFIG_MAPPING:
                raise CheckpointError(
                    f"text_config: model_type: found {kind!r}, wanted a decoder that transformers knows"
                )
            text_config = CONFIG_MAPPING[kind](**text_config)
        if position_ids not in POSITION_MODES:
            raise CheckpointError(f"position_ids: found {position_ids!r}, wanted one of {', '.join(POSITION_MODES)}")
        for name, value in (("feature_dim", feature_dim), ("num_slide_tokens", num_slide_tokens)):
            if value < 1:
                raise CheckpointError(f"{name}: found {value}, wanted at least 1")
        if not 0 <= summary_tokens < num_slide_tokens:
            wanted_tokens = f"0 .. {num_slide_tokens - 1}, fewer than num_slide_tokens"
            raise CheckpointError(f"summary_tokens: found {summary_tokens}, wanted {wanted_tokens}")
        if patch_um is not None and not (isinstance(patch_um, int | float) and 0 < patch_um < math.inf):
            raise CheckpointError(f"patch_um: found {patch_um!r}, wanted microns above 0")
        wanted = dict.fromkeys(FP32_PARTS, "float32")
        if (found := part_dtypes if part_dtypes is not None else wanted) != wanted:
            raise CheckpointError(f"part_dtypes: found {found}, wanted {wanted}")
        table = getattr(text_config, "max_position_embeddings", None) or 2 * TEXT_POSITIONS
        if max_slide_positions is None:
            max_slide_positions = table - TEXT_POSITIONS if table >= 2 * TEXT_POSITIONS else table // 2
        if not 0 < max_slide_positions < table:
            raise CheckpointError(f"max_slide_positions: found {max_slide_positions}, wanted 1 .. {table - 1}")
        self.text_config = text_config
        self.feature_dim = feature_dim
        self.encoder = encoder
        self.patch_um = patch_um
        self.num_slide_tokens = num_slide_tokens
        self.summary_tokens = summary_tokens
        self.max_patches = max_patches
        self.scorer: dict[str, Any] = {"kind": "patch", "hidden_size": 256} | (scorer or {})
        if self.scorer["kind"] == "question":
            self.scorer = {"rank": 16, "free_tokens": self.num_kept_patches // 4} | self.scorer
        self.projector: dict[str, Any] = {
            "hidden_size": text_config.hidden_size,
            "input_norm": True,
            "inputs": ["features"],
        } | (projector or {})
        inputs = self.projector["inputs"]
        if not inputs or set(inputs) - set(PROJECTOR_INPUTS):
            raise CheckpointError(f"projector: inputs: found {inputs}, wanted some of {', '.join(PROJECTOR_INPUTS)}")
        if "score" in inputs and self.scorer["kind"] != "patch":
            raise CheckpointError(
                f"projector: inputs: found score beside a scorer of kind {self.scorer['kind']!r}, wanted 'patch'"
            )
        if summary_tokens and (inputs != ["features"] or not self.projector["input_norm"]):
            raise CheckpointError(
                f"summary_tokens: found {summary_tokens} beside a projector of {self.projector}, wanted input_norm and "
                "the inputs ['features']: a mean of patches has no score"
            )
        self.position_ids = position_ids
        self.max_slide_positions = max_slide_positions
        self.slide_token_id = slide_token_id
        self.part_dtypes: dict[str, str] = wanted
        # transformers hands these down to `text_config`; without a value, a loaded decoder would lose its own, and with
        # that of attention the causal mask.
        for name in ("attn_implementation", "experts_implementation"):
            kwargs.setdefault(name, getattr(text_config, f"_{name}", None))
        kwargs.setdefault("architectures", [ARCHITECTURE])
        kwargs.setdefault("tie_word_embeddings", getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def encoder_check(self, mismatch: Mismatch = "refuse") -> EncoderCheck:
        """What features must be of.

        Raises:
            SettingsError: an unknown `mismatch`.
        """
        return EncoderCheck(self.encoder, mismatch, patch_um=self.patch_um)

    @property
    def scorer_options(self) -> dict[str, Any]:
        """Arguments of `build_scorer`."""
        options = {"feature_dim": self.feature_dim, **self.scorer}
        if self.scorer["kind"] == "question":
            options |= {"text_size": self.text_config.hidden_size, "num_slide_tokens": self.num_kept_patches}
        return options

    @property
    def num_kept_patches(self) -> int:
        """K - S, patches kept of each slide."""
        return self.num_slide_tokens - self.summary_tokens

    @property
    def slide_position_budget(self) -> int:
        """RoPE positions that the slides of one prompt may take; 0 where positions are packed."""
        return self.max_slide_positions if self.position_ids == "original" else 0

    @property
    def mrope_section(self) -> list[int] | None:
        """Makes vLLM ask the model for its positions, which it does for models with M-RoPE alone.

        The decoder itself sees ordinary one-dimensional positions (`serving/model.py`).
        """
        return [1, 1, 1] if self.position_ids == "original" else None


AutoConfig.register(MODEL_TYPE, SparseWSIConfig, exist_ok=True)
