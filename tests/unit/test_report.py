"""Tables, plots and pages: right numbers, nothing unescaped, nothing outside the file."""

import json
from pathlib import Path

import pytest
from html_helpers import Tags

from verl_dft.errors import InputError
from verl_dft.report import html
from verl_dft.report.plots import read_metrics, series, training_curves
from verl_dft.report.tables import Table, comparison_table, difference

PNG = b"\x89PNG\r\n\x1a\n"


def result(counts: list[int], n: int = 4, levels: bool = True) -> dict:
    shares = [count / n for count in counts]
    return {
        "n": n,
        "avg": sum(shares) / len(shares),
        "avg_ci95": [0.125, 0.875],
        "pass_at_k": {str(n): 0.75},
        "avg_by_level": {"1": shares[0], "2": shares[1]} if levels else {},
        "no_answer_frac": 0.0625,
        "truncated_frac": 0.0,
        "per_problem": [{"id": f"p{i}", "avg": share} for i, share in enumerate(shares)],
    }


def test_comparison_table_by_hand():
    # base: 2, 0, 1, 3 of 4 right = 37.5%; tuned: 3, 0, 2, 3 = 50%. Differences .25, 0, .25, 0: mean 12.5 points;
    # sd = sqrt(4 * .125^2 / 3) = .14434, se = .07217, t(.975; 3) = 3.1824: half width 22.97 points.
    table = comparison_table({"base": result([2, 0, 1, 3]), "tuned": result([3, 0, 2, 3])}, against=["base"])
    assert table.header[0:3] == ["model", "avg@4 %", "95% CI"]
    assert table.rows[0] == ["base", "37.5", "12.5 to 87.5", "", "75.0", "50 / 0", "6.2", "0.0"]
    assert table.rows[1][1] == "50.0"
    assert table.rows[1][3] == "+12.5 (-10.5 to +35.5)"


def test_a_difference_stands_only_below_the_row_it_is_taken_from():
    results = {"base": result([2, 0, 1, 3]), "SFT": result([1, 0, 1, 3]), "DFT": result([3, 0, 2, 3])}
    rows = comparison_table(results, against=["base", "SFT"]).rows
    filled = [[bool(cell) for cell in row[3:5]] for row in rows]
    assert filled == [[False, False], [True, False], [True, True]]
    assert rows[1][3].startswith("-6.2") and rows[2][4].startswith("+18.8")


def test_a_benchmark_without_levels_has_no_level_column():
    header = comparison_table({"m": result([1, 2], levels=False)}).header
    assert not [cell for cell in header if "level" in cell]


def test_results_of_different_problems_are_refused():
    with pytest.raises(InputError, match="same problems"):
        difference(result([1, 2]), result([1, 2, 3]))


def test_one_problem_has_no_interval():
    assert difference(_one(1), _one(3)) == "+50.0"


def _one(count: int) -> dict:
    return {"per_problem": [{"id": "p", "avg": count / 4}]}


def test_markdown_and_text():
    table = Table(["model", "x|y"], [["a\\b", "1"], ["longer name", "22"]])
    lines = table.markdown().splitlines()
    assert lines == ["| model | x\\|y |", "| --- | ---: |", "| a\\\\b | 1 |", "| longer name | 22 |"]
    assert table.text().splitlines() == ["model        x|y", "-" * 16, "a\\b            1", "longer name   22"]
    with pytest.raises(AssertionError):
        Table(["a"], [["1", "2"]])


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b < c", "</pre>"])
def test_whatever_a_model_writes_is_only_text(evil, tmp_path):
    (tmp_path / "p.png").write_bytes(PNG)
    pieces = [
        html.heading(evil),
        html.paragraph(evil),
        html.preformatted(evil),
        html.preformatted(evil, "wrong"),
        html.table(Table([evil], [[evil]])),
        html.facts({evil: evil}),
        html.image(tmp_path / "p.png", evil),
    ]
    parsed = Tags(html.page(evil, pieces))
    tags = [tag for tag, _ in parsed.tags]
    assert "script" not in tags and tags.count("img") == 1 and tags.count("pre") == 2
    (image,) = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert set(image) == {"alt", "src"} and image["alt"] == evil and image["src"].startswith("data:image/png;base64,")
    assert parsed.text.count(evil) == 10  # title, h1, heading, paragraph, two pre, two cells, name and value


def test_a_page_refers_to_nothing_outside(tmp_path):
    text = html.page("t", [html.table(Table(["a"], [["b"]]))])
    for tag, attributes in Tags(text).tags:
        assert tag not in ("script", "link", "iframe")
        assert not {"src", "href"} & set(attributes)


def write_metrics(path: Path, values: list[float]) -> Path:
    lines = [
        {"step": i + 1, "train/loss": v, "train/nll": 2 * v, "train/token_weight": 0.5} for i, v in enumerate(values)
    ]
    lines.append({"step": len(values), "val/nll": 1.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_training_curves_draw_every_run(tmp_path):
    from matplotlib import pyplot as plt

    runs = {name: write_metrics(tmp_path / f"{name}.jsonl", [3.0, 2.0, 1.0]) for name in ("SFT", "DFT")}
    out = training_curves(runs, tmp_path / "curves.png")
    assert out.read_bytes().startswith(PNG) and out.stat().st_size > 5000
    one = training_curves({"SFT": runs["SFT"]}, tmp_path / "one.png")
    assert one.read_bytes() != out.read_bytes()
    assert not plt.get_fignums()  # figures are closed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["DFT.jsonl", "SFT.jsonl", "curves.png", "one.png"]


def test_series_picks_the_lines_that_have_the_metric(tmp_path):
    rows = read_metrics(write_metrics(tmp_path / "m.jsonl", [3.0, 2.0]))
    assert series(rows, "train/nll") == ([1, 2], [6.0, 4.0])
    assert series(rows, "val/nll") == ([2], [1.5])


def test_metrics_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path / "none.jsonl")
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "train/loss": 1}\n{"step": 2, "tr')  # killed while writing
    assert [row["step"] for row in read_metrics(path)] == [1]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="train/loss"):
        training_curves({"SFT": path}, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
