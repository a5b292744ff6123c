"""An unmodified OpenAI client asks a question about a slide.

python examples/chat.py                       # of the server and the slides that examples/README.md sets up
python examples/chat.py --server http://host:8000/v1 --slide file:///slides/a.h5 --question "Which tissue is this?"
"""

import argparse
import os
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("--server", default="http://localhost:8000/v1")
parser.add_argument("--slide", default=Path("slides/a.safetensors").absolute().as_uri(), help="URL of a feature file")
parser.add_argument("--question", default="Which tumour is present on this slide?")
options = parser.parse_args()

client = OpenAI(base_url=options.server, api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id  # the server's own
slide = {"type": "image_url", "image_url": {"url": options.slide}}
question = {"type": "text", "text": options.question}  # after the slide, so that follow-ups find it in the prefix cache
answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": [slide, question]}], temperature=0, max_tokens=64
)
print(answer.choices[0].message.content)
