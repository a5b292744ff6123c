"""Makes the data of the tiny training: feature files, and a question about each in SlideInstruct's form.

    python examples/tiny_training/make_data.py data

The slides are random numbers, no tissue. Half of them hold five to ten patches of a kind of their own, the marked ones;
all others are common patches. Only the marked patches tell the answer, and no label says which they are.
"""

import json
import sys
from pathlib import Path

import numpy as np

from vllm_wsi.slides import write_features

D = 16  # numbers of a patch
PATCHES = 256  # of a slide
QUESTION = "Is there a marked patch on this slide?"
KINDS = np.random.default_rng(0).standard_normal((6, D)) * 2  # five common kinds, and the marked one


def make_slide(path: Path, seed: int) -> bool:
    """Writes one slide; returns whether it has marked patches."""
    rng = np.random.default_rng([1, seed])
    kinds = rng.integers(5, size=PATCHES)
    marked = bool(rng.integers(2))
    if marked:
        kinds[rng.choice(PATCHES, rng.integers(5, 11), replace=False)] = 5
    features = KINDS[kinds] + rng.standard_normal((PATCHES, D))
    coords_px = np.stack(np.divmod(np.arange(PATCHES), 16)[::-1], axis=1) * 512
    rows = " ".join(map(str, np.flatnonzero(kinds == 5)))  # for ask.py; training does not read it
    about = {"encoder": "marked-patches@1", "patch_size_level0": "512", "marked": rows}
    write_features(path, features.astype(np.float16), coords_px, about)
    return marked


out = Path(sys.argv[1])
(out / "features").mkdir(parents=True, exist_ok=True)
for split, seeds in (("train", range(240)), ("test", range(1000, 1040))):
    questions, num_marked = [], 0
    for seed in seeds:
        name = f"{split}-{seed}.safetensors"
        marked = make_slide(out / "features" / name, seed)
        num_marked += marked
        said = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "yes" if marked else "no"}]
        questions.append({"id": name, "image": name, "conversations": said})
    (out / f"{split}.json").write_text(json.dumps(questions, indent=1))
    print(f"{out}/{split}.json: {len(questions)} slides, {num_marked} with marked patches")
