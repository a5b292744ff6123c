"""The model cards of the packaged checkpoints: their tables, their front matter, and their place in the package."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.checkpoint import read_config
from vllm_wsi.tissue.tissue_recipe import TISSUE_PARTS

ROOT = Path(__file__).resolve().parents[2]
CARDS = {"haystack": DEMO_CHECKPOINT / "README.md", "tissue": TISSUE_PARTS / "README.md"}


def test_the_tables_of_the_cards_are_what_the_measured_rows_and_the_calibrations_say(tmp_path):
    copies = {}
    for name, card in CARDS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "calibration.json").symlink_to(card.with_name("calibration.json"))
        copies[name] = folder / "README.md"
        copies[name].write_text(card.read_text().replace("| 1.00 [", "| 0.00 ["))
    pages = f"{{name: Path(path) for name, path in { {name: str(one) for name, one in copies.items()} }.items()}}"
    code = (
        f"from pathlib import Path; from bench.study import card_tables as cards; cards.PAGES = {pages}; cards.main()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for name, card in CARDS.items():
        assert copies[name].read_text() == card.read_text()


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_one_of_the_hubs_form_and_says_what_the_checkpoint_is_for(name):
    card, config = ModelCard.load(CARDS[name]), read_config(str(CARDS[name].parent))
    assert (card.data.license, card.data.library_name, card.data.language) == ("apache-2.0", "vllm-wsi", "en")
    for wanted in (config.encoder, f"K = {config.num_slide_tokens}", "## Use", "## Calibration", "What it cannot do"):
        assert wanted in card.text
    if config.to_dict().get("base_decoder"):
        assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert card.data.base_model_relation == "adapter"
