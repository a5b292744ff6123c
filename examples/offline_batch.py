"""Asks vLLM about several slides at once, in this process and without a server.

python examples/offline_batch.py                          # the demo checkpoint, slides/*.safetensors
python examples/offline_batch.py --checkpoint DIR --question "Which tissue is this?" /slides/*.h5
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process; read at vLLM's import
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, on a machine without a GPU
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams

from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT

parser = argparse.ArgumentParser()
parser.add_argument("slides", nargs="*", type=Path, default=sorted(Path("slides").glob("*.safetensors")))
parser.add_argument("--checkpoint", default=str(DEMO_CHECKPOINT))
parser.add_argument("--question", default="Which tumour is present on this slide?")
options = parser.parse_args()

llm = LLM(
    model=options.checkpoint,
    allowed_local_media_path="/",  # nobody else asks this process
    dtype="float32",  # as the demo checkpoint was trained; leave it out for a large decoder
    max_model_len=2048,
    enforce_eager=True,  # starts sooner; leave it out for many slides
)
conversations = []
for path in options.slides:
    slide = {"type": "image_url", "image_url": {"url": path.absolute().as_uri()}}
    question = {"type": "text", "text": options.question}
    conversations.append([{"role": "user", "content": [slide, question]}])
answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
for path, answer in zip(options.slides, answers, strict=True):
    print(f"{path}: {answer.outputs[0].text}")
