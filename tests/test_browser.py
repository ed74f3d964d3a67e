"""Pages in a real browser: one sheet of A4, no sideways scrolling on a phone, and a rating that is done by keys alone.

The tests need Chromium or Chrome, named by FERRY_BROWSER or found on the path. Nothing is fetched: the pages are files.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from registry import poc, rating
from registry.report import Report, render
from tests.test_explain import explained
from tests.test_poc import BOARD
from tests.test_rate import dealt
from tests.test_report import REPORT, samples

PHONE, DESKTOP = (390, 844), (1280, 900)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PROBE = "<script>const f = document.getElementById('f'); f.onload = () => {{ {script} }}; f.srcdoc = {page};</script>"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> str:
    found = os.environ.get("FERRY_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip("there is no Chromium here; install one, or name it in FERRY_BROWSER")
    return found


def run(browser: str, folder: Path, *words: str) -> str:
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def two_lines() -> Report:
    """Return the report of a workspace with two products, with every text that may be long at its longest."""
    models = [
        replace(m, reason="x " * 90, ratings=["people see no clear difference: " + "they preferred " * 6]) for m in REPORT.models
    ]
    first = REPORT.releases[0]
    return replace(
        REPORT,
        models=[models[0], replace(models[1], subject="digits/I/full")],
        variants=[*REPORT.variants, *(replace(v, family="digits/I") for v in REPORT.variants)],
        releases=[first, replace(first, line="digits", costs=[replace(row, assumed=True) for row in first.costs])],
        devices=[replace(d, reason="refused because " * 9, release=f"shapes release {i}") for i, d in enumerate(REPORT.devices)],
        decisions=[replace(d, why="better on the new data " * 9) for d in REPORT.decisions],
        go_back=REPORT.go_back * 2,
    )


def wrapped(folder: Path, page: str, width: int, script: str) -> str:
    """Write a page in a frame as wide as a screen, with a script beside it, and return its address.

    A frame is needed because a headless window is never narrower than 500 pixels.
    """
    path = folder / "wrapped.html"
    text = json.dumps(page).replace("</", "<\\/")
    path.write_text(
        f'<body style="margin:0"><pre id="told"></pre><iframe id="f" style="width:{width}px;height:900px;border:0"></iframe>'
        + PROBE.format(script=script, page=text)
    )
    return path.as_uri()


def told(browser: str, folder: Path, page: str, width: int, script: str) -> str:
    """Run a script on a page in the browser, and return what it writes into the element `told`."""
    script = f"const tell = text => document.getElementById('told').textContent = text; const d = f.contentDocument; {script}"
    dom = run(browser, folder, "--virtual-time-budget=20000", "--dump-dom", wrapped(folder, page, width, script))
    found = re.search(r'<pre id="told">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[:500]
    return html.unescape(found[1])


@pytest.mark.parametrize("report", [REPORT, two_lines()], ids=["three variants", "two lines"])
def test_report_prints_on_one_sheet(report: Report, browser: str, tmp_path: Path):
    page, pdf = tmp_path / "report.html", tmp_path / "report.pdf"
    page.write_text(render(report))
    run(browser, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri())
    data = pdf.read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", data)) == 1
    width, height = map(float, re.search(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", data).groups())  # type: ignore[union-attr]
    assert (round(width / 72 * 25.4), round(height / 72 * 25.4)) == (210, 297)


@pytest.mark.parametrize("width", [PHONE[0], DESKTOP[0]])
@pytest.mark.parametrize(
    "page",
    [
        render(REPORT),
        render(two_lines()),
        explained(),
        explained(device=True),
        rating.page(dealt(), [(samples(1, 1), samples(1, 1))] * 20),
        poc.render(
            poc.Page("s" * 40, "128 x 128 pixels, in colour", [replace(BOARD, name="b" * 60)] * 2, poc.Budget(300, 5, 150))
        ),
    ],
    ids=["report", "two lines", "explanation", "explanation with a device", "rating", "PoC"],
)
def test_no_page_scrolls_sideways(page: str, width: int, browser: str, tmp_path: Path):
    begin = "if (d.getElementById('name')) { d.getElementById('name').value = 'Anna'; d.forms[0].requestSubmit(); }"
    script = f"{begin} tell(`${{d.documentElement.scrollWidth}} ${{d.documentElement.clientWidth}}`);"
    wide, seen = map(int, told(browser, tmp_path, page, width, script).split())
    assert wide == seen > width - 30


def test_report_is_drawn(browser: str, tmp_path: Path):
    page, shot = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(render(REPORT))
    run(browser, tmp_path, f"--window-size={DESKTOP[0]},{DESKTOP[1]}", f"--screenshot={shot}", page.as_uri())
    with Image.open(BytesIO(shot.read_bytes())) as image:
        assert image.size == DESKTOP
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {(255, 255, 255), (0x7D, 0xA7, 0xD9)} <= colours  # paper, and the bars of the intervals


def test_rating_by_keys_gives_the_answers_that_were_pressed(browser: str, tmp_path: Path):
    sheet = dealt()
    press = """
      const key = value => d.dispatchEvent(new f.contentWindow.KeyboardEvent("keydown", {key: value, bubbles: true}));
      key("1");
      d.getElementById("name").value = " Anna <b> ";
      d.forms[0].requestSubmit();
      key("2"); key("Backspace");
      d.getElementById("vote1").click();
      for (let i = 1; i < 19; i++) key("2");
      key("x"); key("=");
      tell(d.getElementById("file").getAttribute("href"));
    """
    link = told(browser, tmp_path, rating.page(sheet, [(samples(1, 1), samples(1, 1))] * 20), PHONE[0], press)
    answers = rating.read(unquote(link.removeprefix("data:application/json,")).encode())
    assert (answers.sheet, answers.rater) == (sheet.id, "Anna <b>")
    assert answers.votes == ["1"] + ["2"] * 18 + ["="]
