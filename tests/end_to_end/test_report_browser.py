"""The report in a real browser: it draws, is as wide as the window, and loads nothing."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tests.grids import MadeUp, Told, write_grid

from lamina import report
from lamina.compare import Study, table
from lamina.record import Record

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary was found on PATH")
# Only the copies that a test makes hold a script. The page sits in a frame of the wanted width (a window of Chromium
# cannot be as narrow as a phone) and tells its widths and its requests to the frame's parent, for --dump-dom to print.
PROBE = """<script>addEventListener("load", () => { const page = document.documentElement;
  const loaded = performance.getEntriesByType("resource").length;
  parent.postMessage(JSON.stringify([page.scrollWidth, page.clientWidth, loaded]), "*"); });</script></body>"""
FRAME = """<!DOCTYPE html><script>onmessage = (e) => { document.documentElement.dataset.probe = e.data; }</script>
<iframe src="report.html" style="border:0" width="%d" height="900"></iframe>"""


def browse(page: Path, scratch: Path, *arguments: str) -> str:
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--disable-sync"]
    command += [f"--user-data-dir={scratch / 'profile'}", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, encoding="utf-8")
    return done.stdout


def write_sample(path: Path) -> Path:
    tasks, total = 6, [[50 if j <= i else 0 for j in range(6)] for i in range(6)]
    correct = [[48 - 2 * (i - j) if j <= i else 0 for j in range(6)] for i in range(6)]
    long = "a-name-without-any-space-" * 6
    stream = {"data": "digits", "tasks": [{"name": f"{long}{i}", "classes": [long, f"{i}"]} for i in range(tasks)]}
    run = {"format": 2, "name": "inflora", "method": {"name": "inflora"}, "stream": stream}
    run |= {"matrix": {"correct": correct, "total": total}, "losses": [[s, 1 / (1 + s)] for s in range(50)]}
    run |= {"classes": [{"name": long, "task": long, "correct": 3, "total": 5}], "skipped": [long]}
    runs = [Record.from_json(made, "made up") for made in (run, run | {"name": long, "notes": [long]})]
    return report.write(runs, path)


def write_table(path: Path) -> Path:
    """The page of a comparison, with a name that is too long for any screen."""
    long = "a-name-without-any-space-" * 6
    text = f"title: {long}\nmethods: {{finetune: {{}}, {long}: {{method.name: inflora}}}}\nseeds: [0, 1]\nbaseline: {long}\n"
    text += "search: {over: {training.lr: [1, 2, 3, 4, 5, 6, 7, 8]}}\n"
    study = Study(write_grid(path.parent, text), cells=path.parent / "cells")
    study.work(Told(), MadeUp(lambda config: 0.5))
    table.write(study.content(f"lamina compare {long}.yaml"), path.parent).rename(path)
    return path


@pytest.mark.parametrize("write", [write_sample, write_table])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_scrolls_sideways_or_loads_anything(tmp_path: Path, width: int, write: Callable[[Path], Path]) -> None:
    page = write(tmp_path / "report.html")
    text = page.read_text(encoding="utf-8").replace("<details>", "<details open>")
    policy = "default-src 'none';"
    assert policy in text
    text = text.replace(policy, policy + " script-src 'unsafe-inline';").replace("</body>", PROBE)
    page.write_text(text, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % width, encoding="utf-8")
    shown = browse(frame, tmp_path, "--window-size=1400,1000", "--hide-scrollbars", "--dump-dom")
    content, window, loaded = json.loads(shown.split('data-probe="', 1)[1].split('"', 1)[0])
    assert window == width
    assert content == width
    assert loaded == 0


def test_both_themes_draw(tmp_path: Path) -> None:
    page = write_sample(tmp_path / "report.html")
    corners = []
    for theme, setting in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{theme}.png"
        browse(page, tmp_path, f"--blink-settings=preferredColorScheme={setting}", "--hide-scrollbars",
               "--window-size=1280,1400", f"--screenshot={shot}")  # fmt: skip
        with Image.open(shot) as image:
            assert len(image.convert("RGB").resize((320, 350)).getcolors(320 * 350) or []) > 50
            corners.append(image.convert("L").getpixel((2, 2)))
    assert corners[0] > 240 > 60 > corners[1]
