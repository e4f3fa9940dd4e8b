"""Draw the views on the pages of the methods, from the YAML of each page: draw_views.py [METHOD ...]

Needs the demonstration's shards: snakemake --cores all shards/demo/manifest.json
"""

import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

from ssl_core.look import preview

PAGES = Path(__file__).parents[1] / "methods"
WIDTH = 900  # pixels


def draw(page: Path) -> None:
    """Write views/<method>.png for the first experiment on a page."""
    settings = re.search(r"^```yaml\n(experiments:\n  (\w+):.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert settings is not None, page
    picture = page.parent / "views" / f"{page.stem}.png"
    picture.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        overlay, large = Path(folder, "overlay.yaml"), Path(folder, "views.png")
        overlay.write_text(settings[1])
        preview.draw(settings[2], [overlay], large, threads=1)
        image = Image.open(large).convert("RGB")
    height = round(image.height * WIDTH / image.width)
    image.resize((WIDTH, height), Image.Resampling.LANCZOS).quantize(128).save(picture, optimize=True)
    print(picture, picture.stat().st_size)


if __name__ == "__main__":
    for page in sorted(PAGES.glob("*.md")):
        if not sys.argv[1:] or page.stem in sys.argv[1:]:
            draw(page)
