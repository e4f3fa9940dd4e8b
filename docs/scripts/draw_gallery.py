"""Copy the demonstration's pictures into docs/gallery/, with fewer colours: draw_gallery.py results/ressl_r18"""

import sys
from pathlib import Path

from PIL import Image

GALLERY = Path(__file__).parents[1] / "gallery"
PICTURES = ("tsne", "neighbours", "confusion", "triangles", "spectrum")

if __name__ == "__main__":
    results = Path(sys.argv[1])
    GALLERY.mkdir(exist_ok=True)
    for source in [results / "curves.png", *(results / "pictures" / f"{name}.png" for name in PICTURES)]:
        image = Image.open(source).convert("RGB")
        image.thumbnail((1100, 1400), Image.Resampling.LANCZOS)
        image.quantize(128).save(GALLERY / source.name, optimize=True)
