"""Asks the trained checkpoint about slides that it has not seen, without a server.

python examples/tiny_training/ask.py run/checkpoint data
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.slides import open_features

checkpoint, data = sys.argv[1], Path(sys.argv[2])
model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
selector = model.selector()
questions = json.loads((data / "test.json").read_text())
num_right = num_kept = num_marked = 0
for one in questions:
    asked, right = (turn["value"] for turn in one["conversations"])
    with open_features(data / "features" / one["image"]) as slide:
        selection = selector.select(slide)
        marked = {int(row) for row in slide.metadata["marked"].split()}
    content = [{"type": "image"}, {"type": "text", "text": asked.removeprefix("<image>\n")}]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    answer = tokenizer.decode(model.generate(prompt, [selection], max_new_tokens=4)[0], skip_special_tokens=True)
    num_right += answer == right
    num_kept += len(marked & set(selection.indices.tolist()))
    num_marked += min(len(marked), len(selection.indices))
print(f"the last of them, {one['image']}: {answer}")
print(f"right answers: {num_right} of {len(questions)}")
print(f"marked patches among the kept: {num_kept} of {num_marked}")
