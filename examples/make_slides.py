"""Makes three virtual slides that the demo checkpoint of the package can be asked about.

    python examples/make_slides.py slides

They are random numbers, no tissue: a few of their patches belong to one of four «findings», and the demo checkpoint has
learned to find them. Prints the right answer of each slide.
"""

import sys
from pathlib import Path

from vllm_wsi.haystack.generator import HaystackWorld

out = Path(sys.argv[1] if len(sys.argv) > 1 else "slides")
out.mkdir(parents=True, exist_ok=True)
for number, name in enumerate(("a", "b", "c")):
    slide = HaystackWorld().slide("test", number, num_patches=10_000)
    path = slide.write(out / f"{name}.safetensors")
    print(f"{path}: {slide.num_patches:,} patches, {len(slide.key_patches)} of them of {slide.finding_name}")
