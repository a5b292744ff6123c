"""LangChain's ChatOpenAI asks about a slide, which it passes on as an image_url.

pip install langchain-openai
python examples/langchain_client.py
"""

import argparse
import os
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("--server", default="http://localhost:8000/v1")
parser.add_argument("--slide", default=Path("slides/a.safetensors").absolute().as_uri(), help="URL of a feature file")
parser.add_argument("--question", default="Which tumour is present on this slide?")
options = parser.parse_args()
key = os.environ.get("OPENAI_API_KEY", "none")

model = OpenAI(base_url=options.server, api_key=key).models.list().data[0].id
chat = ChatOpenAI(model=model, base_url=options.server, api_key=key, temperature=0, max_tokens=64)
slide = {"type": "image_url", "image_url": {"url": options.slide}}
first = HumanMessage([slide, {"type": "text", "text": options.question}])
answer = chat.invoke([first])
print(answer.text)

# A follow-up sends the conversation so far; the server has the slide's selection and its tokens already.
again = chat.invoke([first, answer, HumanMessage("What does this slide show?")])
print(again.text)
