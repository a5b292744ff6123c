"""Streams an answer, then shows which patches the model was given, and how far the answer can be trusted.

python examples/stream_with_evidence.py
python examples/stream_with_evidence.py --server http://host:8000/v1 --slide file:///slides/a.h5
"""

import argparse
import os
from pathlib import Path

import httpx
from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("--server", default="http://localhost:8000/v1")
parser.add_argument("--slide", default=Path("slides/a.safetensors").absolute().as_uri(), help="URL of a feature file")
parser.add_argument("--question", default="Which tumour is present on this slide?")
options = parser.parse_args()
key = os.environ.get("OPENAI_API_KEY", "none")

client = OpenAI(base_url=options.server, api_key=key)
slide = {"type": "image_url", "image_url": {"url": options.slide}}
question = {"type": "text", "text": options.question}
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": [slide, question]}],
    temperature=0,
    max_tokens=64,
    stream=True,
)
print("answer: ", end="")
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# The server remembers the selection that it has just answered from: nothing is read or scored again.
reply = httpx.post(
    f"{options.server}/wsi/select", json={"url": options.slide}, headers={"Authorization": f"Bearer {key}"}, timeout=60
)
reply.raise_for_status()
evidence = reply.json()
print(f"the model was given {evidence['num_selected']} of {evidence['num_patches']:,} patches; the best five:")
best_first = sorted(range(evidence["num_selected"]), key=lambda i: -evidence["scores"][i])
for i in best_first[:5]:
    place = "no place" if evidence["rects"] is None else "x {:g}, y {:g}, {:g} x {:g} px".format(*evidence["rects"][i])
    print(f"  patch {evidence['indices'][i]:6}  score {evidence['scores'][i]:+.3f}  {place}")

if evidence["sufficiency"] is None:
    print("trust: nothing is said, since the checkpoint has no calibration")
else:
    print(f"trust: sufficiency {evidence['sufficiency']:.2f}, the probability that the slide shows what is asked for")
    print(
        f"       in distribution {evidence['in_distribution']:.2f}, the share of validation slides as unlike training's"
    )
    for warning in evidence["warnings"]:
        print(f"       warning: {warning}")
