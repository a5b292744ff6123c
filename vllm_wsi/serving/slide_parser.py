"""Which values of a prompt's data are slides: objects that a program made, and never a path."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataParser, ProcessorBatchItems

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.selection import Selection, check_summary
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import FeatureFile, SlideIdentity, features_in_memory
from vllm_wsi.slides.feature_file import FLOAT_DTYPES

from .service import SelectionService
from .slide_request import SelectedSlide, SlideRequest

MODALITY = "image"  # the part type that every OpenAI client can send
WANTED = "wanted a slide: an open file (open_features(path)), a Selection, or features (N, d) as an array or tensor"


class SlideItems(ProcessorBatchItems[SelectedSlide]):
    """The selected slides of one prompt."""

    def __init__(self, slides: list[SelectedSlide]) -> None:
        super().__init__(slides, MODALITY)

    def get_item_for_hash(self, index: int) -> str:  # type: ignore[override]
        return self.data[index].digest


class SlideParser(MultiModalDataParser):
    """Takes what a program made by hand as slides, and selects what is not yet selected.

    vLLM passes on a request's `image_pil` part and the keys of an `image_embeds` dict without a check. So nothing is
    opened by its name here: strings, paths and every other JSON value are refused.

    Args:
        service: selects; its checkpoint is the one that slides are selected for.
    """

    def __init__(self, service: SelectionService) -> None:
        super().__init__()
        self._service = service

    def _parse_image_data(self, data: Any) -> ModalityDataItems[Any, Any]:
        several = isinstance(data, (list, tuple))
        batch = isinstance(data, (np.ndarray, Tensor)) and data.ndim > 2
        return SlideItems([self._select(item) for item in (data if several or batch else [data])])

    def _select(self, item: Any) -> SelectedSlide:
        if isinstance(item, SelectedSlide):
            if (item.scorer, item.default_k) == (self._service.scorer, self._service.default_k):
                return item
            # Selected for another checkpoint that lives in this process.
            if item.request is None:
                raise ValueError("a slide sent by value was selected for another model of this process; send a URL")
            return self._service.select(item.request)
        if isinstance(item, Selection):
            return self._selected_by_hand(item)
        if self._service.questions is not None:
            raise SlideError(
                f"found a {type(item).__name__} without its question, wanted the slide's URL in a chat message, or a "
                "Selection (`selector.select(slide, query=...)`): this checkpoint's scorer hears the question"
            )
        return self._service.select(slide_request(item))

    def _selected_by_hand(self, chosen: Selection) -> SelectedSlide:
        service = self._service
        check_selection(chosen, service.selector, service.max_slide_tokens)
        service.selector.encoder("Selection", chosen.metadata)
        chosen = service.selector.rescored(chosen)
        facts = f"{chosen.num_patches} {chosen.num_candidates} {chosen.features.dtype}"
        digest = hashlib.blake2b(facts.encode(), digest_size=20)
        for tensor in (chosen.indices, chosen.rows):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return SelectedSlide(chosen, f"selection:{digest.hexdigest()}", service.scorer, service.default_k, None)


def check_selection(chosen: Selection, selector: SlideSelector, max_slide_tokens: int) -> None:
    """Raises SlideError where a selection that a program made would not fit into the prompt.

    Args:
        selector: of the checkpoint.
        max_slide_tokens: the largest K.
    """
    k, n, rows = len(chosen.indices), chosen.num_patches, tuple(chosen.features.shape)
    feature_dim = selector.feature_dim
    if rows != (k, feature_dim):
        raise SlideError(f"Selection: features: found shape {rows}, wanted ({k}, {feature_dim}), a row for each index")
    check_summary(chosen, selector.summary_tokens)
    if chosen.pooled is not None and tuple(chosen.pooled.shape[1:]) != (feature_dim,):
        raise SlideError(f"Selection: pooled: found shape {tuple(chosen.pooled.shape)}, wanted (s, {feature_dim})")
    if not k or chosen.num_tokens > max_slide_tokens:
        found = f"{k} patches" + (
            f" and {chosen.num_summary_tokens} summary tokens" if chosen.num_summary_tokens else ""
        )
        raise SlideError(f"Selection: found {found}, wanted 1 .. {max_slide_tokens}")
    indices = chosen.indices
    if indices.dtype != torch.int64 or indices[0] < 0 or indices[-1] >= n or not bool((indices.diff() > 0).all()):
        raise SlideError(f"Selection: indices: found {indices.dtype}, wanted int64, rising, within 0 .. {n - 1}")
    if not k <= chosen.num_candidates <= n:
        found = f"{chosen.num_nonfinite} of {n} without a finite score"
        raise SlideError(f"Selection: num_nonfinite: found {found}, wanted 0 .. {n - k}, as it keeps {k}")
    if not bool(torch.isfinite(chosen.rows).all()):
        raise SlideError("Selection: features: found NaN or infinities, wanted finite numbers")


def slide_request(item: Any) -> SlideRequest:
    """The request for one value of a prompt's data.

    Args:
        item: an open `FeatureFile`, or features [N, d] as a NumPy array or a dense tensor.

    Raises:
        SlideError: it is anything else, a string or a path among them; the file changed since it was opened.
    """
    if isinstance(item, FeatureFile):
        return _of_file(item)
    if isinstance(item, Tensor):
        return SlideRequest(slide=_tensor_in_memory(item))
    if isinstance(item, np.ndarray):
        return SlideRequest(slide=features_in_memory(item))
    if item is None:  # vLLM does not check for an empty URL
        raise SlideError("found an empty URL, or a uuid alone, which names nothing, wanted the slide's URL")
    raise SlideError(f"found a {type(item).__name__}, {WANTED}")


def _of_file(file: FeatureFile) -> SlideRequest:
    if file.identity.inode == 0:
        return SlideRequest(slide=file)
    path = Path(file.identity.path)
    if SlideIdentity.of_file(path) != file.identity:
        raise SlideError(f"{file.name}: the file changed since it was opened; open it again")
    return SlideRequest(path=path, encoder=file.choice)


def _tensor_in_memory(tensor: Tensor) -> FeatureFile:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_meta:
        kind = "meta tensor without data" if tensor.is_meta else f"{tensor.layout} tensor"
        raise SlideError(f"features: found a {kind}, wanted a dense one (N, d)")
    if dtype not in FLOAT_DTYPES:
        raise SlideError(f"features: found dtype {dtype}, wanted one of {', '.join(FLOAT_DTYPES)}")
    dense = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return features_in_memory(dense.view(torch.uint16).numpy(), dtype=dtype)
    return features_in_memory(dense.numpy())
