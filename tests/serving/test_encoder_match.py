"""Features of another encoder: refused by a server and by an engine, unless they are allowed when it starts."""

import httpx
import numpy as np
import pytest

from vllm_wsi.slides import write_features

from .conftest import KEY, D, slide_message
from .test_parity import start_engine

OTHER = "encoder: found features of 'uni_v1', wanted 'test@1', as the checkpoint was trained on"


def make_slide_of(path, encoder):
    features = np.random.default_rng(5).standard_normal((40, D)).astype(np.float32)
    write_features(path, features, metadata={} if encoder is None else {"encoder": encoder})
    return path.as_uri()


@pytest.mark.server
def test_a_server_answers_400_about_features_of_another_encoder_and_says_which_it_cannot_tell(
    shared_server, shared_folder
):
    folder = shared_folder / "encoders"
    folder.mkdir()
    urls = {name: make_slide_of(folder / f"{name}.safetensors", name) for name in ("uni_v1", "test@1", None)}

    def post(route, **body):
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"{shared_server.api}/{route}", json=body, headers=headers, timeout=120)

    model = {"model": shared_server.model, "max_tokens": 2}
    for answer in (
        post("wsi/select", url=urls["uni_v1"]),
        post("chat/completions", messages=slide_message(urls["uni_v1"]), **model),
    ):
        assert answer.status_code == 400
        assert f"uni_v1.safetensors: {OTHER}" in answer.text
    assert post("chat/completions", messages=slide_message(urls["test@1"]), **model).status_code == 200
    found = [post("wsi/select", url=urls[name]).json()["encoder_match"] for name in ("test@1", None)]
    assert found == [
        {"features": "test@1", "checkpoint": "test@1", "match": "same", "remark": None},
        {
            "features": None,
            "checkpoint": "test@1",
            "match": "unknown",
            "remark": "the encoder of the features is not recorded",
        },
    ]


@pytest.mark.engine
def test_an_engine_takes_features_of_another_encoder_only_where_it_was_started_so(checkpoint, tmp_path):
    message = slide_message(make_slide_of(tmp_path / "a.safetensors", "uni_v1"))
    llm = start_engine(checkpoint, tmp_path, mm_processor_kwargs={"encoder_mismatch": "allow"})
    assert llm.chat(message, use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(ValueError, match=OTHER):  # the same scorer, which another engine has allowed more
        start_engine(checkpoint, tmp_path).chat(message, use_tqdm=False)
    with pytest.raises(RuntimeError, match="encoder_mismatch: found 'warn', wanted 'refuse' or 'allow'"):
        start_engine(checkpoint, tmp_path, mm_processor_kwargs={"encoder_mismatch": "warn"})
