"""The engine as it runs without --enforce-eager: torch.compile takes the forward path as one graph, and answers alike.

What could break the capture of a CUDA graph is said at `forward` in `vllm_wsi.serving.model`. A capture needs a GPU.
"""

import json
import os
import subprocess
import sys

import pytest

from .conftest import make_slide, slide_message
from .test_parity import ask_transformers, reference

pytestmark = pytest.mark.engine
QUESTION = "Which tissue?"
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.compilation.counter import compilation_counter
from torch._dynamo.utils import counters
checkpoint, folder, messages = sys.argv[1:]
llm = LLM(checkpoint, dtype="float32", max_model_len=512, max_num_seqs=4, seed=0, allowed_local_media_path=folder,
          limit_mm_per_prompt={"image": 2})
started = dict(counters["stats"])
params = SamplingParams(temperature=0, max_tokens=12, min_tokens=12)
answers = [llm.chat(one, params, use_tqdm=False)[0] for one in json.loads(messages)]
found = {"tokens": [list(one.outputs[0].token_ids) for one in answers]}
found["models"] = compilation_counter.num_models_seen
found["graphs"] = started["unique_graphs"]
found["breaks"] = dict(counters["graph_break"])
found["recompiled"] = counters["stats"]["unique_graphs"] - started["unique_graphs"]
print("FOUND", json.dumps(found))
"""


def test_the_compiled_forward_path_is_one_graph_and_answers_as_transformers_does(checkpoint, tmp_path):
    slides = [make_slide(tmp_path / f"{n}.safetensors", n, seed=n) for n in (5, 33, 700)]
    prompts = [[], slides[:1], slides[2:], slides[:2]]  # text alone too: it takes the same graph
    messages = [slide_message(*(path.as_uri() for path in paths), question=QUESTION) for paths in prompts]
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), str(tmp_path), json.dumps(messages)],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND ")[1])
    model, tokenizer = reference(checkpoint)
    assert found["tokens"] == [ask_transformers(model, tokenizer, paths, QUESTION)[0] for paths in prompts]
    assert (found["models"], found["graphs"], found["breaks"]) == (1, 1, {})
    assert found["recompiled"] == 0
