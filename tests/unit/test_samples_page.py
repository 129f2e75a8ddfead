"""The page of an evaluation's samples: everything in one file, hostile text stays text, filters show what they say.

The last tests open it in headless Chromium where one is installed.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_dft.errors import InputError
from verl_dft.evaluation.report import write_report
from verl_dft.evaluation.summary import summarize
from verl_dft.report import browse
from verl_dft.report.browse import embedded_json, write_samples_page

EVIL = (
    "</script><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "<!-- <script> ]]> &lt;b&gt; & \\u003c",
    "\u2028 line \u2029 paragraph \x00 nul \u202e reversed \ud7ff \U0001f600",
    "javascript:document.title='owned'",
)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Chromium on PATH, or the one that Playwright keeps in its cache."""
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", "~/.cache/ms-playwright")).expanduser()
    cached = [str(path) for name in ("chrome", "headless_shell") for path in sorted(cache.glob(f"chromium*/*/{name}"))]
    return next(filter(None, [*map(shutil.which, _NAMES), *cached]), None)


BROWSER = find_browser()
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(_NAMES)} is on PATH and Playwright's cache has none"
)


def sample(problem: str, index: int, grade: str, qwen: str, finish: str = "stop", text: str = "text") -> dict:
    return {"problem_id": problem, "index": index, "grade": grade, "qwen": qwen, "finish_reason": finish,
            "answer": None if grade == "no_answer" else f"{problem}-{index}", "num_tokens": 7 + index, "rule": "number",
            "detail": "", "response": text, "gold": f"gold of {problem}", "problem": f"question {problem}"}  # fmt: skip


def write(folder: Path, rows: list[dict], n: int) -> Path:
    """An evaluation's folder as far as reports read it."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = list(dict.fromkeys(row["problem_id"] for row in rows))
    result = {"model": "m", "benchmark": "b", "n": n, "num_context_limited": 0, "max_tokens": 99, "temperature": 1.0}
    result |= summarize(rows, ids, n)
    (folder / "result.json").write_text(json.dumps(result))
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    return folder


def small(folder: Path) -> Path:
    """Three problems: wrong and truncated, disagreeing, and one with hostile text everywhere."""
    rows = [
        sample("p", 0, "wrong", "wrong", "length"),
        sample("p", 1, "correct", "correct"),
        sample("q", 0, "wrong", "correct"),
        sample("q", 1, "no_answer", "no_answer"),
    ]
    rows += [
        {**sample(EVIL[0], i, "error", "error", text="".join(EVIL)), "gold": EVIL[1], "problem": "".join(EVIL),
         "answer": EVIL[2], "rule": EVIL[1], "detail": EVIL[4]} for i in range(2)
    ]  # fmt: skip
    return write(folder, rows, 2)


class Page(HTMLParser):
    """Start tags with their attributes, and what stands in each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def test_one_file_two_scripts_and_a_policy_that_allows_the_second_alone(tmp_path: Path) -> None:
    text = write_samples_page(small(tmp_path)).read_text(encoding="utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and not {"img", "link", "iframe", "object", "form", "a"} & set(tags)
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    allowed = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert f"script-src 'sha256-{allowed}'" in policy and "default-src 'none'" in policy
    assert "innerHTML" not in page.scripts[1] and "document.write" not in page.scripts[1]


def test_the_samples_stand_in_the_page_as_they_were_written(tmp_path: Path) -> None:
    page = Page(write_samples_page(small(tmp_path)).read_text(encoding="utf-8"))
    data = json.loads(page.scripts[0])
    assert not {"<", ">", "&"} & set(page.scripts[0]) and page.scripts[0].isascii()
    assert [problem["id"] for problem in data["problems"]] == ["p", "q", EVIL[0]]
    evil = data["problems"][2]
    assert (evil["gold"], evil["question"]) == (EVIL[1], "".join(EVIL))
    first = dict(zip(data["fields"], evil["samples"][0], strict=True))
    assert (first["response"], first["answer"], first["rule"], first["detail"]) == (
        "".join(EVIL),
        *EVIL[2:0:-1],
        EVIL[4],
    )
    assert data["problems"][1]["samples"][1][3] is None


def test_embedded_json_is_json() -> None:
    values = [*EVIL, {"<": None}, [1, "]]>", "\ud800"]]
    assert json.loads(embedded_json(values)) == values


def test_counts_of_each_filter(tmp_path: Path) -> None:
    text = write_samples_page(small(tmp_path)).read_text(encoding="utf-8")
    counts = {k: int(v) for k, v in re.findall(r'<option value="(\w+)">[^<]*\((\d+)\)</option>', text)}
    assert counts == {
        "all": 6,
        "correct": 1,
        "wrong": 2,
        "no_answer": 1,
        "ungraded": 2,
        "truncated": 1,
        "disagreeing": 1,
    }


def test_without_a_second_verdict_nothing_can_disagree(tmp_path: Path) -> None:
    rows = [{k: v for k, v in sample("p", i, "wrong", "").items() if k not in ("qwen", "problem")} for i in range(2)]
    text = write_samples_page(write(tmp_path, rows, 2)).read_text(encoding="utf-8")
    assert '<option value="disagreeing">' not in text and json.loads(Page(text).scripts[0])["has_qwen"] is False


def test_long_responses_are_shortened_and_said_to_be(tmp_path: Path) -> None:
    long = "begin" + "x" * browse.MAX_CHARS + "end"
    folder = write(tmp_path, [sample("p", 0, "wrong", "wrong", text=long), sample("p", 1, "wrong", "wrong")], 2)
    text = write_samples_page(folder).read_text(encoding="utf-8")
    shown = json.loads(Page(text).scripts[0])["problems"][0]["samples"]
    assert len(shown[0][-1]) < browse.MAX_CHARS + 100 and shown[1][-1] == "text"
    assert (
        shown[0][-1].startswith("beginx") and shown[0][-1].endswith("xend") and "8 characters are left" in shown[0][-1]
    )
    assert "1 long responses are shown by beginning and end" in text


@pytest.mark.slow
def test_ten_thousand_samples_make_a_page_in_seconds(tmp_path: Path) -> None:
    rows = [
        sample(f"p{i}", j, "wrong", "correct", text=f"{i} {j} " + "word " * 400) for i in range(625) for j in range(16)
    ]
    begun = time.monotonic()
    path = write_samples_page(write(tmp_path, rows, 16))
    assert time.monotonic() - begun < 20 and 20e6 < path.stat().st_size < 40e6
    assert path.read_text(encoding="utf-8").count("<details") == 0  # made when they are looked at


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="result.json does not exist"):
        write_samples_page(tmp_path)
    folder = small(tmp_path / "cut")
    table = pq.read_table(folder / "samples.parquet")
    pq.write_table(table.slice(0, 4), folder / "samples.parquet")
    with pytest.raises(InputError, match="has 4 samples, result.json is of 6"):
        write_samples_page(folder)
    pq.write_table(table.drop_columns(["rule", "gold"]), folder / "samples.parquet")
    with pytest.raises(InputError, match="lacks the columns rule, gold"):
        write_samples_page(folder)
    assert not (folder / "samples.html").exists()


def test_report_has_the_numbers_and_leads_to_the_page(tmp_path: Path) -> None:
    report, page = write_report(small(tmp_path))
    text = report.read_text(encoding="utf-8")
    assert page.is_file() and "[samples.html](samples.html)" in text
    for line in ("| strict | 16.7 | 0.0 to 88.4 |", "| qwen-compatible | 33.3 | 0.0 to 100.0 |", "| 2 | 33.3 | 16.7 |",
                 "| truncated | 16.7% |", "| strict and qwen verdicts disagree | 1 |", "| error | 2 |"):  # fmt: skip
        assert line in text, text
    assert "- warning: 16.7% of the samples were cut off" in text


def browser(tmp_path: Path, *options: str) -> str:
    """Run headless Chromium and return what it prints. A container has no sandbox of its own to give it."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1000", *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_browser
@pytest.mark.parametrize(
    ("filter_", "shown", "problems"),
    [
        ("wrong", "2 samples of 2 problems", ["p", "q"]),
        pytest.param("all", "6 samples of 3 problems", ["p", "q", EVIL[0]], marks=pytest.mark.slow),
        pytest.param("truncated", "1 samples of 1 problems", ["p"], marks=pytest.mark.slow),
        pytest.param("disagreeing", "1 samples of 1 problems", ["q"], marks=pytest.mark.slow),
        pytest.param("nonsense", "6 samples of 3 problems", ["p", "q", EVIL[0]], marks=pytest.mark.slow),
    ],
)
def test_filters_in_a_browser(filter_: str, shown: str, problems: list[str], tmp_path: Path) -> None:
    page = write_samples_page(small(tmp_path))
    found = browser(tmp_path, "--dump-dom", f"{page.as_uri()}#filter={filter_}&open=1")
    assert f">{shown} · page 1 of 1<" in found and "<title>m on b</title>" in found
    assert [unescape(name) for name in re.findall(r"<h2>(.*?)</h2>", found, re.S)] == problems
    assert found.count("<details") == int(shown.split()[0]) and "<img" not in found
    if filter_ == "all":  # opened, so that the hostile response is in the page too, as text
        opened = unescape(found[found.index('id="list"') : found.index('id="data"')])
        assert opened.count(EVIL[1]) >= 3 and "owned" in opened


@pytest.mark.slow
@needs_browser
def test_find_and_pages_in_a_browser(tmp_path: Path) -> None:
    rows = [sample(f"p{i}", 0, "wrong", "wrong") for i in range(45)]
    page = write_samples_page(write(tmp_path, rows, 1))
    third = browser(tmp_path, "--dump-dom", f"{page.as_uri()}#page=3")
    assert "45 samples of 45 problems · page 3 of 3" in third
    assert re.findall(r"<h2>(.*?)</h2>", third) == ["p40", "p41", "p42", "p43", "p44"]
    found = browser(tmp_path, "--dump-dom", f"{page.as_uri()}#find=QUESTION%20p44&page=9")
    assert re.findall(r"<h2>(.*?)</h2>", found) == ["p44"]


def driven(page: Path, script: str, policy: bool = False) -> str:
    """The address of a copy of the page that ends with a script of the test's, which its policy would not run."""
    text = page.read_text(encoding="utf-8")
    if not policy:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    copy = page.with_name("driven.html")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy.as_uri()


@pytest.mark.slow
@needs_browser
def test_a_script_that_got_into_the_page_would_not_run(tmp_path: Path) -> None:
    """The second line of defence, and what shows that the browser here does run scripts that are allowed."""
    page = write_samples_page(small(tmp_path))
    script = "document.title = 'owned'"
    assert "<title>owned</title>" in browser(tmp_path, "--dump-dom", driven(page, script))
    assert "<title>m on b</title>" in browser(tmp_path, "--dump-dom", driven(page, script, policy=True))


@needs_browser
def test_the_controls_in_a_browser(tmp_path: Path) -> None:
    """Choose a filter, type, turn pages, open: what a person does, one after the other, with what is then shown."""
    rows = [sample(f"p{i}", j, "wrong" if i % 2 else "correct", "wrong") for i in range(45) for j in range(2)]
    script = """
    const seen = [];
    const act = (id, event, value) => {
      if (value !== undefined) byId(id).value = value;
      byId(id).dispatchEvent(new Event(event));
      seen.push([byId("shown").textContent, document.querySelectorAll("section").length, byId("next").disabled,
                 document.querySelectorAll("details[open]").length, location.hash]);
    };
    act("filter", "change", "wrong"); act("next", "click"); act("next", "click"); act("previous", "click");
    act("find", "input", "QUESTION p3"); act("open", "click"); act("open", "click");
    act("filter", "change", "correct");
    document.body.dataset.seen = JSON.stringify(seen);
    """
    page = write_samples_page(write(tmp_path, rows, 2))
    found = browser(tmp_path, "--dump-dom", driven(page, script))
    assert json.loads(unescape(re.search(r'data-seen="([^"]*)"', found)[1])) == [
        ["44 samples of 22 problems · page 1 of 2", 20, False, 0, "#filter=wrong&find=&page=1"],
        ["44 samples of 22 problems · page 2 of 2", 2, True, 0, "#filter=wrong&find=&page=2"],
        ["44 samples of 22 problems · page 2 of 2", 2, True, 0, "#filter=wrong&find=&page=2"],
        ["44 samples of 22 problems · page 1 of 2", 20, False, 0, "#filter=wrong&find=&page=1"],
        ["12 samples of 6 problems · page 1 of 1", 6, True, 0, "#filter=wrong&find=QUESTION+p3&page=1"],
        ["12 samples of 6 problems · page 1 of 1", 6, True, 12, "#filter=wrong&find=QUESTION+p3&page=1"],
        ["12 samples of 6 problems · page 1 of 1", 6, True, 0, "#filter=wrong&find=QUESTION+p3&page=1"],
        ["10 samples of 5 problems · page 1 of 1", 5, True, 0, "#filter=correct&find=QUESTION+p3&page=1"],
    ]


def screenshot(tmp_path: Path, address: str, width: int) -> np.ndarray:
    """[height, width, 3] of 0 to 1."""
    from matplotlib import image

    picture = tmp_path / "page.png"
    browser(tmp_path, f"--screenshot={picture}", f"--window-size={width},1000", address)
    return image.imread(picture)[..., :3]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 600])
def test_screenshot(width: int, tmp_path: Path) -> None:
    """The page is drawn: dark text on white, the coloured edges of samples, and in a narrow window nothing wider."""
    page = write_samples_page(small(tmp_path))
    pixels = screenshot(tmp_path, f"{page.as_uri()}#filter=wrong&open=1", width)
    assert pixels.shape[:2] == (1000, width)
    assert (pixels > 0.98).all(-1).mean() > 0.5 and (pixels < 0.3).all(-1).sum() > 1000
    red = (abs(pixels - [0.8, 0.2, 0.2]) < 0.02).all(-1)  # the edge of a wrong sample
    assert red.sum() > 100
    script = "document.body.dataset.over = document.documentElement.scrollWidth - window.innerWidth"
    found = browser(tmp_path, "--dump-dom", f"--window-size={width},1000", driven(page, script) + "#open=1")
    assert int(re.search(r'data-over="(-?\d+)"', found)[1]) <= 0
