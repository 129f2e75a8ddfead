"""What the papers state (recipes/*/expected.yaml): the loader, and the numbers beside the papers' own text."""

import os
import re
from pathlib import Path

import pytest
import yaml

from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.report.expected import Cell, load_expected

PAPERS = {
    "dft": ["table1", "table2", "table3", "fig1", "fig2", "fig3"],
    "gft": ["fig1", "table1", "table2", "fig3", "fig4", "table3", "fig5", "table4_pass128", "table4_pass256", "table5",
            "fig6"],
    "data_rewriting": ["table1", "table2", "table3", "fig3", "table4", "fig4"],
}  # fmt: skip
TEXTS = Path(os.environ.get("VERL_DFT_PAPERS", Path(__file__).parents[2].parent / "shared" / "papers"))
"""The papers' texts are not part of the repository: tests that need them are skipped without."""
ROWS = {  # how a row's line begins in the text, where that is not plain
    "dft": {"llama-3.2-3b": "LLaMA-3.2-3B", "llama-3.1-8b": "LLaMA-3.1-8B", "deepseek-math-7b": "DeepSeekMath-7B",
            "qwen2.5-math-1.5b": "Qwen2.5-Math-1.5B", "qwen2.5-math-7b": "Qwen2.5-Math-7B"},
}  # fmt: skip


def paper_text(paper):
    path = TEXTS / f"{paper}.txt"
    if not path.is_file():
        pytest.skip(f"the text of the paper, {path.name}, is not here (VERL_DFT_PAPERS names its folder)")
    return path.read_text(encoding="utf-8")


def table_rows(text):
    """Per line of a table its first cell that is not empty, and its numbers; what stands in brackets is left out."""
    for line in text.splitlines():
        cells = [re.sub(r"\(.*?\)", "", cell).strip().replace(",", "") for cell in re.split(r"\t|\|", line)]
        cells = [cell for cell in cells if cell]
        if len(cells) > 1:
            yield cells[0], [float(cell) for cell in cells if re.fullmatch(r"-?\d+(\.\d+)?", cell)]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_table_and_figure_is_there(paper):
    expected = load_expected(recipes_dir() / paper)
    assert sorted(expected.blocks) == sorted(PAPERS[paper])
    assert expected.paper == paper and expected.contradictions


@pytest.mark.parametrize("paper", PAPERS)
def test_every_row_with_numbers_is_a_line_of_the_papers_text(paper):
    """Whole rows, in the order of their columns."""
    lines = [numbers for _, numbers in table_rows(paper_text(paper))]
    rows = 0
    for block in load_expected(recipes_dir() / paper).blocks.values():
        for model, methods in block.values.items():
            for method, row in methods.items():
                stated = [value for value in row if value is not None]
                if not stated or (paper, block.name) == ("data_rewriting", "table3"):
                    continue
                assert stated in lines, f"{block.name}, {model}, {method}: {stated}"
                rows += 1
    assert rows == {"dft": 35, "gft": 17, "data_rewriting": 16}[paper]


def test_names_of_dfts_rows_are_those_of_the_text():
    names = {tuple(numbers): name for name, numbers in table_rows(paper_text("dft"))}
    suffix = {"base": "", "sft": " w/SFT", "dft": " w/DFT", "iw_sft": " w/iw-SFT"}
    for block in ("table1", "table2"):
        for model, methods in load_expected(recipes_dir() / "dft").block(block).values.items():
            for method, row in methods.items():
                assert names[row] == ROWS["dft"][model] + suffix[method]


@pytest.mark.parametrize(("method", "line"), [
    ("base", "Base Model"), ("distill", "Distillation"), ("grpo", "GRPO"), ("gft", "GFT"),
])  # fmt: skip
@pytest.mark.parametrize("k", ["128", "256"])
def test_names_of_gfts_table_4(method, line, k):
    rows = list(load_expected(recipes_dir() / "gft").block(f"table4_pass{k}").values.values())[0]
    names = {tuple(numbers): name for name, numbers in table_rows(paper_text("gft"))}
    assert names[rows[method]] == (f"Pass@{k}" if method == "base" else line)


def test_columns_of_data_rewritings_table_3():
    """Its line alternates: SFT and rewriting of self, then of guided, then SFT of the fallback."""
    lines = list(table_rows(paper_text("data_rewriting")))
    names = {"qwen2.5-math-7b": "Qwen2.5-Math-7B", "llama-3.1-8b-instruct": "Llama-3.1-8B-Instruct"}
    for model, rows in load_expected(recipes_dir() / "data_rewriting").block("table3").values.items():
        sft, ours = rows["sft"], rows["rewriting"]
        line = [sft[0], ours[0], sft[1], ours[1], sft[2]]
        assert (names[model], line) in lines
        assert ours[2] is None


@pytest.mark.parametrize(("paper", "words"), [
    ("dft", "+15.66"), ("dft", "+2.09"), ("dft", "+3.46"), ("dft", "+2.05"), ("dft", "+10.02"), ("dft", "+5.33"),
    ("dft", "+15.51"), ("dft", "+7.18"), ("dft", "+15.90"), ("dft", "+2.37"), ("dft", "+11.20"), ("dft", "4.20 points"),
    ("dft", "+1.88"), ("dft", "+18.75"), ("dft", "+17.04"), ("dft", "+1.86"), ("dft", "+2.39"), ("dft", "+4.15"),
    ("dft", "+3.34"), ("dft", "+1.30"), ("dft", "+2.45"), ("dft", "+11.46"), ("dft", "+3.43"), ("dft", "+7.19"),
    ("dft", "+17.66"), ("dft", "+6.23"), ("dft", "+9.75"), ("dft", "+3.57"), ("dft", "+1.58"), ("dft", "+4.76"),
    ("dft", "first 120 training steps"), ("dft", "first 10–20 steps"), ("dft", "2e-4, 1e-4, 5e-5, and 1e-5"),
    ("dft", "from 32 to 256"), ("dft", "'the', 'let', ',', '.'"), ("gft", "approximately at step 100"),
    ("gft", "\\approx 0.7"), ("gft", "- 4.09"), ("gft", "+2.86"), ("data_rewriting", "first 40–50 steps"),
])  # fmt: skip
def test_a_stated_difference_or_statement_is_in_the_text(paper, words):
    assert words in paper_text(paper)
    if words.startswith("+"):
        stated = {
            f"{d.value:+.2f}" for b in load_expected(recipes_dir() / paper).blocks.values() for d in b.differences
        }
        assert words in stated


@pytest.mark.parametrize(("paper", "block", "model", "method", "column", "value"), [
    ("dft", "table1", "qwen2.5-math-7b", "sft", "aime24", 2.48),
    ("dft", "table1", "qwen2.5-math-1.5b", "dft", "avg", 31.58),
    ("dft", "table3", "qwen2.5-math-1.5b", "dft", "avg", 30.67),  # the table's own run of DFT
    ("dft", "table3", "qwen2.5-math-1.5b", "offline_dft", "avg", 35.43),
    ("dft", "fig1", "qwen2.5-math-1.5b", "dft", "amc23", None),
    ("gft", "table5", "qwen2.5-math-1.5b", "demo2_self6", "avg", 45.59),
    ("gft", "table1", "llama-3.1-8b", "asft", "amc23", None),
    ("data_rewriting", "table1", "llama-3.1-8b-instruct", "rewriting", "guided", 16335),
])  # fmt: skip
def test_values_are_found_by_name(paper, block, model, method, column, value):
    assert load_expected(recipes_dir() / paper).block(block).value(model, method, column) == value


def test_averages_are_those_of_their_rows_or_are_named():
    """A typing error in a cell shows as an average that does not fit; three of the papers' own do not."""
    odd = []
    for paper in PAPERS:
        for block in load_expected(recipes_dir() / paper).blocks.values():
            if block.columns[-1] != "avg" or len(block.columns) == 1:
                continue
            for model, methods in block.values.items():
                for method, (*row, average) in methods.items():
                    if average is not None and abs(sum(row) / len(row) - average) > 0.0051:
                        odd.append((paper, block.name, model, method))
    assert odd == [
        ("data_rewriting", "table2", "qwen2.5-math-7b", "sft"),
        ("data_rewriting", "table2", "llama-3.1-8b-instruct", "sft"),
        ("data_rewriting", "table4", "qwen2.5-math-7b", "guided_only_dft"),
    ]


def test_cells_are_all_of_a_block():
    block = load_expected(recipes_dir() / "gft").block("table3")
    cells = list(block.cells())
    assert len(cells) == 4 * 3
    assert cells[0] == Cell("table3", "llama-3.2-3b-instruct", "base", "mawps", 96.06)


GOOD = {
    "paper": "p", "title": "t", "arxiv": "1",
    "blocks": {"table1": {"source": "Table 1", "metric": "avg@16", "unit": "%", "columns": ["a", "b"],
                          "values": {"m": {"base": [1.0, 2.0], "sft": [1.5, 3.0]}}}},
}  # fmt: skip


def changed(**block):
    return {**GOOD, "blocks": {"table1": {**GOOD["blocks"]["table1"], **block}}}


@pytest.mark.parametrize(("raw", "message"), [
    ([1], "must be a mapping"),
    ({k: v for k, v in GOOD.items() if k != "arxiv"}, "lacks arxiv"),
    ({**GOOD, "note": 1}, "unknown keys: note"),
    ({**GOOD, "blocks": []}, "blocks must be a mapping"),
    ({**GOOD, "contradictions": [{"a": 1}]}, "list of texts"),
    (changed(colour=1), "unknown keys: colour"),
    (changed(columns=["a", "a"]), "different names"),
    (changed(values={"m": [1]}), "MODEL: METHOD: list"),
    (changed(values={"m": {"base": [1.0]}}), "list of 2 values"),
    (changed(values={"m": {"base": [1.0, "2,0"]}}), "'2,0' is not a number"),
    (changed(values={"m": {"base": None}}), "`empty` must say why"),
    (changed(empty="a picture"), "be left out where none is"),
    (changed(differences=[{"model": "m", "method": "sft", "against": "base", "column": "a", "value": 0.6}]),
     "0.50 by its cells and 0.6 as stated"),
    (changed(differences=[{"model": "m", "method": "sft", "against": "base", "column": "a", "value": 0.5,
                           "contradicts": "no"}]), "and only there"),
    (changed(differences=[{"model": "m", "method": "dft", "against": "base", "column": "a", "value": 0.5}]),
     "no method 'dft' in table1 of m; there is base, sft"),
    (changed(values={"m": {"base": None, "sft": [1.0, 2.0]}}, empty="a picture", differences=[
        {"model": "m", "method": "sft", "against": "base", "column": "a", "value": 0.5}]), "put it under statements"),
    (changed(statements=[{"what": "x"}]), "lacks value"),
])  # fmt: skip
def test_a_wrong_file_is_one_line(raw, message, tmp_path):
    path = tmp_path / "expected.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_expected(path)
    assert "\n" not in str(error.value)


def test_a_right_file_loads_and_unreadable_ones_are_one_line(tmp_path):
    path = tmp_path / "expected.yaml"
    with pytest.raises(InputError, match="cannot be read"):
        load_expected(path)
    path.write_text("a: [1")
    with pytest.raises(InputError, match="is not YAML") as error:
        load_expected(path)
    assert "\n" not in str(error.value)
    path.write_text(yaml.safe_dump(GOOD))
    assert load_expected(tmp_path).block("table1").value("m", "sft", "b") == 3.0
    with pytest.raises(InputError, match="no column 'c' in table1; there is a, b"):
        load_expected(tmp_path).block("table1").value("m", "sft", "c")
