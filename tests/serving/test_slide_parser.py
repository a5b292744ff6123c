"""What a program may hand over as a slide (`LLM.generate`), and what is refused in one sentence; no engine."""

import dataclasses
import io

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.serving.service import SelectionService
from vllm_wsi.serving.slide_parser import SlideItems, SlideParser
from vllm_wsi.serving.slide_request import SlideRequest
from vllm_wsi.slides import open_features
from vllm_wsi.slides.encoder_names import EncoderCheck

from .conftest import D, make_slide

K = 8


@pytest.fixture
def selector():
    return SlideSelector(seeded_scorer("patch", D, 16, seed=0).requires_grad_(False).weights(), K)


@pytest.fixture
def parse(selector):
    """From `multi_modal_data["image"]` to the selected slides."""
    parser = SlideParser(SelectionService(selector, "scorer", max_slide_tokens=16))

    def parse(data):
        items = parser.parse_mm_data({"image": data})["image"]
        assert isinstance(items, SlideItems)
        return items.data

    return parse


def kept(slides) -> list[list[int]]:
    return [slide.selection.indices.tolist() for slide in slides]


def test_files_selections_arrays_and_tensors_are_slides_alone_in_lists_and_as_a_batch(parse, selector, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", 40)
    with open_features(path) as slide:
        rows = slide.read_rows(0, 40)
        chosen = selector.select(slide)
        wanted = chosen.indices.tolist()
        assert len(wanted) == K
        tensor = torch.from_numpy(rows)
        for item in (slide, chosen, rows, np.asfortranarray(rows), tensor, tensor.requires_grad_()):
            assert kept(parse(item)) == [wanted]
            assert kept(parse([item, item])) == kept(parse((item, item))) == [wanted, wanted]
        slide.read_rows(0, 1)  # it is still the caller's
    assert kept(parse(np.stack([rows, rows[::-1]]))) == [wanted, [39 - i for i in wanted[::-1]]]
    assert kept(parse(rows[:1])) == kept(parse(rows[None, :1])) == [[0]]


@pytest.mark.parametrize("n", [1, K - 1, K, K + 1])
def test_bfloat16_and_float16_tensors_keep_their_type(parse, n):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        (slide,) = parse(torch.randn(n, D, dtype=torch.float64).to(dtype))
        assert slide.selection.features.dtype == dtype
        assert len(slide.selection.indices) == min(n, K)


def test_a_file_of_several_encoders_keeps_the_one_that_it_was_opened_with(parse, tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for name, d in (("other", D + 1), ("ours", D)):
            file[f"features/{name}"] = np.random.default_rng(0).standard_normal((20, d)).astype(np.float32)
    with open_features(path, "ours") as slide:
        assert parse(slide)[0].selection.features.shape == (K, D)


def test_a_file_that_changed_since_it_was_opened_is_refused(parse, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", 40)
    with open_features(path) as slide:
        make_slide(path, 41)
        with pytest.raises(SlideError, match="changed since it was opened"):
            parse(slide)


@pytest.mark.parametrize("spell", [str, lambda path: path, lambda path: str(path).encode(), lambda path: path.as_uri()])
def test_a_path_is_never_opened_whether_there_is_a_file_or_not(parse, tmp_path, spell):
    there, absent = make_slide(tmp_path / "a.safetensors", 40), tmp_path / "b.safetensors"
    said = []
    for path in (there, absent):
        for data in (spell(path), [spell(path)], {spell(path): torch.zeros(5, D)}):
            with pytest.raises(SlideError, match="wanted a slide: an open file") as error:
                parse(data)
            assert path.name not in str(error.value)
            said.append(str(error.value))
    assert said[:3] == said[3:]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (Image.new("RGB", (9, 9)), "found a Image"),
        ([Image.new("RGB", (9, 9))], "found a Image"),
        ({"image_embeds": torch.zeros(5, D)}, "found a dict"),
        ([None], "found an empty URL, or a uuid alone"),
        ([[1.0, 2.0]], "found a list"),
        ([True], "found a bool"),
        (3, "found a int"),
        (io.BytesIO(b"x"), "found a BytesIO"),
        (torch.zeros(D), "one vector for a whole slide"),
        (np.zeros(D, np.float32), "one vector for a whole slide"),
        ([torch.zeros(D)], "one vector for a whole slide"),
        (np.float32(1), "found a float32"),
        (torch.zeros(()), "wanted patch features"),
        (torch.zeros(0, D), "found no patches"),
        (torch.zeros(2, 3, 4, D), "wanted patch features"),
        (torch.zeros(5, D, dtype=torch.int64), "found dtype int64"),
        (torch.zeros(5, D).to_sparse(), "sparse_coo tensor"),
        (torch.zeros(5, D, device="meta"), "meta tensor"),
        (np.array([[object()]]), "dtype object"),
        (torch.full((5, D), torch.nan), "no patch with a finite score"),
        (torch.zeros(5, D + 1), f"found d = {D + 1}, wanted {D}"),
    ],
)
def test_whatever_else_is_refused_in_one_sentence(parse, data, found):
    with pytest.raises(SlideError, match=found) as error:
        parse(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda s: {"features": s.features[:, :-1]}, "features: found shape"),
        (lambda s: {"features": s.features[:-1]}, "features: found shape"),
        (lambda s: {"features": s.features * torch.nan}, "NaN or infinities"),
        (lambda s: {"indices": s.indices.flip(0)}, "indices"),
        (lambda s: {"indices": s.indices * 0}, "indices"),
        (lambda s: {"indices": s.indices + 40}, "within 0 .. 39"),
        (lambda s: {"indices": s.indices - 40}, "within 0 .. 39"),
        (lambda s: {"indices": s.indices.int()}, "int32, wanted int64"),
        (lambda s: {"indices": s.indices[:0], "features": s.features[:0]}, "found 0 patches"),
        (lambda s: {"num_nonfinite": 40 - len(s.indices) + 1}, "num_nonfinite: found 33 of 40"),
        (lambda s: {"num_nonfinite": -1}, "num_nonfinite: found -1 of 40"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(parse, selector, tmp_path, change, found):
    with open_features(make_slide(tmp_path / "a.safetensors", 40)) as slide:
        chosen = selector.select(slide)
    with pytest.raises(SlideError, match=found):
        parse(dataclasses.replace(chosen, **change(chosen)))


def test_a_selection_of_more_patches_than_a_request_may_ask_for_is_refused(parse, selector, tmp_path):
    with open_features(make_slide(tmp_path / "a.safetensors", 40)) as slide:
        parse(selector.select(slide, 16))
        with pytest.raises(SlideError, match=r"found 17 patches, wanted 1 \.\. 16"):
            parse(selector.select(slide, 17))


def test_two_selections_of_one_slide_never_share_a_digest(parse, selector, tmp_path):
    with open_features(make_slide(tmp_path / "a.safetensors", 40)) as slide:
        slides = [parse(selector.select(slide, k))[0] for k in (7, 8, 8)]
    assert slides[0].digest != slides[1].digest == slides[2].digest


def test_a_selection_of_another_encoders_features_is_refused_as_a_file_is(tmp_path):
    scorer = seeded_scorer("patch", D, 16, seed=0).requires_grad_(False).weights()
    path = make_slide(tmp_path / "a.safetensors", 40)  # of test@1
    with open_features(path) as slide:
        chosen = SlideSelector(scorer, K).select(slide)

    def parse(encoder):
        service = SelectionService(SlideSelector(scorer, K, encoder=encoder), "scorer", max_slide_tokens=16)
        return SlideParser(service).parse_mm_data({"image": chosen})["image"].data

    for encoder in (EncoderCheck("test@1"), EncoderCheck("uni", "allow"), EncoderCheck()):
        assert parse(encoder)[0].selection.features is chosen.features
    with pytest.raises(SlideError, match="Selection: encoder: found features of 'test@1', wanted 'uni'"):
        parse(EncoderCheck("uni"))


def test_a_selection_by_hand_gets_the_scorers_own_scores_and_is_refused_where_a_patch_has_none(
    parse, selector, tmp_path
):
    path = make_slide(tmp_path / "a.safetensors", 40)
    with open_features(path) as slide:
        chosen = selector.select(slide)
    (found,) = parse(dataclasses.replace(chosen, scores=torch.zeros(len(chosen.scores))))
    assert torch.allclose(found.selection.scores, chosen.scores, atol=1e-5)
    assert found.digest != parse(dataclasses.replace(chosen, num_nonfinite=1))[0].digest
    features = chosen.features.clone()
    features[3] *= 1e16
    with pytest.raises(SlideError, match="Selection: features: found a patch without a finite score, wanted none"):
        parse(dataclasses.replace(chosen, features=features))


def test_a_selection_by_hand_has_the_summary_tokens_that_the_checkpoint_shows(selector, tmp_path):
    with_summary = SlideSelector(selector.scorer, K, summary_tokens=3)
    parser = SlideParser(SelectionService(with_summary, "scorer", max_slide_tokens=16))

    def parse(chosen):
        return parser.parse_mm_data({"image": chosen})["image"].data[0]

    with open_features(make_slide(tmp_path / "a.safetensors", 40)) as slide:
        chosen, without, large = (
            one.select(slide, k) for one, k in ((with_summary, K), (selector, K), (with_summary, 17))
        )
    found = parse(chosen)
    assert torch.equal(found.selection.pooled, chosen.pooled)
    assert found.digest != parse(dataclasses.replace(chosen, pooled=chosen.pooled + 1)).digest
    for wrong, message in (
        (without, "Selection: pooled: found none, wanted the means of the dropped patches, at most 3"),
        (large, "Selection: found 14 patches and 3 summary tokens, wanted 1 .. 16"),
        (
            dataclasses.replace(chosen, pooled=chosen.pooled[:, 1:]),
            r"pooled: found shape \(3, 47\), wanted \(s, 48\)",
        ),
        (dataclasses.replace(chosen, pooled=chosen.pooled * torch.nan), "found NaN or infinities"),
    ):
        with pytest.raises(SlideError, match=message):
            parse(wrong)
    with pytest.raises(SlideError, match=r"k: found 3, wanted 4 \.\. 16"):
        parser._service.select(SlideRequest(path=tmp_path / "a.safetensors", k=3))
