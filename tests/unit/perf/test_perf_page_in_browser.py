"""The page in a real browser: it draws the bars to scale, in light and dark, with no network."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmrl_core.perf.charts import COLOURS
from mmrl_core.perf.report import report_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def screenshot(page: str, folder: Path, *options: str, width: int = 1280) -> np.ndarray[Any, Any]:
    """Pixels [height, width, 3] uint8 of a page opened as a file."""
    assert BROWSER is not None
    (folder / "page.html").write_text(page, encoding="utf-8")
    picture = folder / "page.png"
    subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},2000",
            f"--screenshot={picture}",
            *options,
            (folder / "page.html").as_uri(),
        ],
        env={**os.environ, "HOME": str(folder)},
        capture_output=True,
        timeout=120,
        check=True,
    )
    return np.asarray(Image.open(picture).convert("RGB"))


def bar(pixels: np.ndarray[Any, Any]) -> dict[str, int]:
    """Pixels of each phase in the line of the picture that has most of the update."""
    found = {}
    for phase, colour in COLOURS.items():
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        found[phase] = (np.abs(pixels.astype(int) - wanted).max(-1) <= 2).sum(1)
    line = found["update"].argmax()
    return {phase: int(counts[line]) for phase, counts in found.items()}


@pytest.mark.skipif(BROWSER is None, reason="NOT TESTED: the page in a browser, because no Chromium is installed")
def test_a_browser_draws_the_page(made: Any, tmp_path: Path) -> None:
    results = [made.result(made.measured(), created=f"2026-01-0{day}", commit=f"c{day}") for day in (1, 2)]
    page = report_page(results)
    light = screenshot(page, tmp_path)
    drawn = bar(light)
    assert drawn["update"] > 100
    assert drawn["rollout"] / drawn["update"] == pytest.approx(2, rel=0.05)  # as in conftest.measured
    assert drawn["rest"] / drawn["update"] == pytest.approx(1, rel=0.05)
    assert light[5, 5].tolist() == [255, 255, 255]
    # a narrow window: the chart shrinks with the page
    narrow = bar(screenshot(page, tmp_path, width=500))
    assert 20 < narrow["update"] < 0.7 * drawn["update"]
    dark = screenshot(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert dark[5, 5].max() < 64
    assert bar(dark) == drawn
