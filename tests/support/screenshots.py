"""The screenshots of README.md: parts of an experiment's and a study's page in headless Chromium.

./run report sample && ./run study sample-study
PYTHONPATH=tests/support python tests/support/screenshots.py results docs/images
"""

import sys
from pathlib import Path

from browser import Browser
from PIL import Image

SIZE = (1100, 1190)
COLOURS = 128
PAGES = {
    "experiment-page.png": ("sample/report.html", "neighbours"),
    "study-page.png": ("sample-study/comparison.html", None),
}
"""Each image: a page in results/, and the section at its top; None: from the beginning."""


def main() -> None:
    """Write both screenshots with a small palette, which keeps them small."""
    results, folder = map(Path, sys.argv[1:])
    with Browser() as browser:
        for name, (page, section) in PAGES.items():
            tab = browser.open(results / page, width=SIZE[0], height=SIZE[1])
            if section:
                tab.run(f"document.getElementById('{section}').scrollIntoView()")
            tab.screenshot(folder / name)
            Image.open(folder / name).convert("RGB").quantize(COLOURS).save(folder / name, optimize=True)


if __name__ == "__main__":
    main()
