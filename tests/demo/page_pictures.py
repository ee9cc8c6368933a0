"""The pictures of the page in the docs: `python tests/demo/page_pictures.py` takes them again with the embedded checkpoint."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

from browsing import NARROW, WIDE, chromium, opened
from conftest import serve
from legibility import open_tab
from PIL import Image

FOLDER = Path(__file__).parents[2] / "docs/images"
PICTURES: dict[str, tuple[dict[str, int], str, str | None]] = {
    "wide-light": (WIDE, "light", None),
    "wide-dark": (WIDE, "dark", None),
    "narrow-light": (NARROW, "light", None),
    "narrow-dark": (NARROW, "dark", None),
    "gradient": (WIDE, "light", "Gradient"),
    "nearby": (WIDE, "light", "Nearby"),
}
"""Size, theme, and the tab that is shown in full."""


def main() -> None:
    """Take all of them."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        serve(Path("embedded"), Path(scratch) / "page") as address,
        chromium() as browser,
    ):
        for name, (size, theme, tab) in PICTURES.items():
            look: dict[str, Any] = {"viewport": size, "color_scheme": theme, "reduced_motion": "reduce"}
            with opened(browser, address, **look) as page:
                if tab is not None:
                    open_tab(page, tab)
                page.wait_for_timeout(500)
                taken = Image.open(io.BytesIO(page.screenshot(full_page=tab is not None)))
                taken.convert("RGB").save(FOLDER / f"demo-{name}.webp", quality=85, method=6)


if __name__ == "__main__":
    main()
