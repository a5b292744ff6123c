from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tissue_folder(shared_data) -> Path:
    folder = shared_data / "tissue"
    if not (folder / "idc_patches.zip").is_file():
        pytest.skip("the labelled tissue (../shared/data/tissue) is not on this machine")
    return folder
