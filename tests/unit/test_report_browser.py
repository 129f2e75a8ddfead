"""The report in a browser: nothing is wider than a phone, and tables scroll inside their box."""

import re
from pathlib import Path

import pytest
from test_report_runs import with_everything
from test_samples_page import browser, needs_browser

from verl_dft.cli import main as cli

FRAME = """<!doctype html>
<iframe id="f" src="index.html" style="width:{width}px;height:900px;border:0"></iframe><script>
document.getElementById('f').onload = (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  page.querySelectorAll('details').forEach((one) => {{ one.open = true; }});
  const tables = [...page.querySelectorAll('table')];
  document.title = [root.scrollWidth, root.clientWidth, tables.length,
    tables.filter((one) => one.scrollWidth > one.clientWidth + 1).length,
    page.querySelectorAll('img').length].join(' ');
}};</script>"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(width: int, tmp_path: Path) -> None:
    made = with_everything(tmp_path)
    assert cli(["report", str(made.root), f"output_dir={tmp_path}/report"]) == 0
    frame = tmp_path / "report" / "frame.html"
    frame.write_text(FRAME.format(width=width))
    options = ("--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom")
    found = browser(tmp_path, *options, f"file://{frame}")
    numbers = re.search(r"<title>(\d+) (\d+) (\d+) (\d+) (\d+)</title>", found)
    assert numbers, found[-500:]
    whole, seen, tables, scrolling, images = map(int, numbers.groups())
    assert whole <= seen <= width and tables >= 5 and images == 1
    assert (scrolling > 0) == (width == 390)
