"""A small archive of the real one's form, of made-up pictures: for what the real one does not show."""

import io
import zipfile

import numpy as np
from PIL import Image


def png(rng, is_tumour, width=50, height=50):
    """A picture whose colour tells the label."""
    base = np.array((120, 60, 150) if is_tumour else (225, 180, 210))
    pixels = np.clip(base + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write_archive(path, tumour_of_patient, others=6, small=0, edit=lambda lines: lines, without=()):
    """An archive of one patient for each number in `tumour_of_patient`, who has so many tumour patches and `others`.

    Args:
        small: patches of 37 x 50 px beside them, of the first patient.
        edit: changes the index's lines.
        without: pictures that are left out.
    """
    rng = np.random.default_rng(0)
    lines = ["patient,x,y,label,file"]
    with zipfile.ZipFile(path, "w") as archive:
        for patient, tumour in enumerate(tumour_of_patient):
            count = tumour + others + (small if patient == 0 else 0)
            for i in range(count):
                name, label = f"p{patient}/{i}.png", int(i < tumour)
                lines.append(f"p{patient},{101 + 50 * (i % 5)},{51 + 50 * (i // 5)},{label},{name}")
                if name not in without:
                    archive.writestr(name, png(rng, label, 37 if i >= tumour + others else 50))
        archive.writestr("index.csv", "\n".join(edit(lines)) + "\n")
    return path
