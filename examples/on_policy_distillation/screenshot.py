# Copyright 2026 The on-policy-distillation authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Saves the coloured tokens of a report as a picture, as a browser shows them.

    python screenshot.py REPORT.html OUT.png

REPORT.html is a page of `report.py` with --generations. Needs Chromium or Chrome on PATH, and pillow, which comes with
matplotlib.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NEEDS_PILLOW = "screenshot.py cuts the picture with pillow, which is not installed: pip install pillow"
WIDTH, HEIGHT = 880, 4000  # of the window: a README's column, and more than the tokens of a few answers take
DENSITY = 2  # pixels of the picture for each of the window
COLOURS = 64
ONLY_TOKENS = "<style>body { margin: 0 } body > * { display: none } body > #generations { display: block }</style>"


def find_browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise ValueError(f"no browser on PATH ({', '.join(BROWSERS)}): apt-get install chromium, or install Chrome")
    return found


def only_tokens(report: Path) -> str:
    """The report's page without its other parts."""
    page = report.read_text(encoding="utf-8")
    if 'id="generations"' not in page:
        raise ValueError(f"{report} has no coloured tokens: make it with report.py --generations TITLE=FILE")
    return page.replace("</head>", ONLY_TOKENS + "</head>", 1)


def photograph(browser: str, page: str, folder: Path) -> Path:
    """The whole window that shows `page`. All files, the browser's own too, are in `folder`."""
    html, png = folder / "page.html", folder / "window.png"
    html.write_text(page, encoding="utf-8")
    command = [
        *(browser, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"),
        *(f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={DENSITY}", f"--screenshot={png}"),
    ]
    if os.geteuid() == 0:  # root has no sandbox, as in a container; the page is ours
        command.append("--no-sandbox")
    done = subprocess.run([*command, html.as_uri()], capture_output=True, text=True, timeout=120)
    if done.returncode or not png.exists():
        raise ValueError(f"{browser} made no picture: {done.stderr.strip()[-1000:]}")
    return png


def save_cut(window: Path, out: Path) -> None:
    """Without the empty rest of the window, in few colours: a README's readers load it."""
    try:
        from PIL import Image, ImageChops
    except ImportError:
        sys.exit(NEEDS_PILLOW)
    with Image.open(window) as image:
        picture = image.convert("RGB")
    empty = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    *_, bottom = ImageChops.difference(picture, empty).getbbox()
    if bottom == picture.height:
        raise ValueError(f"the tokens take more than {HEIGHT} pixels of height: make the report from fewer answers")
    picture = picture.crop((0, 0, picture.width, bottom + 16 * DENSITY))
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, metavar="REPORT.html")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    arguments = parser.parse_args()
    try:
        browser, page = find_browser(), only_tokens(arguments.report)
        with tempfile.TemporaryDirectory() as folder:
            save_cut(photograph(browser, page, Path(folder)), arguments.out)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        sys.exit(f"screenshot.py: {error}")


if __name__ == "__main__":
    main()
