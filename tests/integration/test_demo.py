"""The demo end to end at its reduced size: real data, trainings and vLLM; then again, which must cost nothing."""

import json
import re
from pathlib import Path

import pytest

from verl_dft.report.plots import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]
STEPS = {"problems", "sft", "dft", "evaluate-base", "evaluate-sft", "evaluate-dft"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def first(folder, run_cli):
    return run_cli(["demo", "scale=ci", f"output_dir={folder}"], timeout=600)


def test_demo_ends_with_a_table_of_base_sft_and_dft(first, folder):
    assert first.rc == 0, first.stdout[-3000:] + first.stderr[-3000:]
    table = json.loads((folder / "summary.json").read_text())["table"]
    assert [row[0] for row in table["rows"]] == ["base", "SFT", "DFT"]
    for row in table["rows"]:
        assert 0 <= float(row[1]) <= 100 and re.fullmatch(r"[\d.]+ to [\d.]+", row[2]), row
        assert row[0] in first.stdout
    assert float(table["rows"][0][1]) > 0, "the base solves nothing at all"
    assert table["rows"][2][3] and table["rows"][2][4], "DFT is compared with the base and with SFT"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| base |" in (folder / "table.md").read_text()


def test_both_methods_started_from_the_same_place(first, folder):
    lines = {m: read_metrics(folder / m / "metrics.jsonl") for m in ("sft", "dft")}
    nll = {m: [line["train/nll"] for line in rows if "train/nll" in line] for m, rows in lines.items()}
    assert len(nll["sft"]) == len(nll["dft"]) == 8
    assert nll["sft"][0] == pytest.approx(nll["dft"][0], rel=1e-6)
    assert nll["sft"][-1] != nll["dft"][-1]
    loss = {m: next(line["train/loss"] for line in rows if "train/loss" in line) for m, rows in lines.items()}
    assert loss["dft"] < loss["sft"] == pytest.approx(nll["sft"][0], rel=1e-5)


def test_the_page_stands_alone_and_tells_where_numbers_come_from(first, folder):
    page = (folder / "index.html").read_text()
    assert "data:image/png;base64," in page and "<script" not in page and "http" not in page
    facts = json.loads((folder / "summary.json").read_text())
    assert set(facts["commands"]) == STEPS
    for text in (*facts["model_sha256"].values(), *facts["versions"].values(), facts["hardware"]):
        assert text in page
    assert len(set(facts["model_sha256"].values())) == 3


def test_a_second_call_reuses_everything(first, folder, run_cli):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = run_cli(["demo", "scale=ci", f"output_dir={folder}"], timeout=120)
    assert again.rc == 0, again.stderr
    assert set(re.findall(r"\] (\S+) +reused", again.stdout)) == STEPS and "started" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    table = [re.search(r"^DFT .*$", done.stdout, re.MULTILINE)[0] for done in (first, again)]
    assert table[0] == table[1]


def test_a_failed_stage_ends_the_demo_and_points_to_its_log(tmp_path, run_cli):
    done = run_cli(["demo", "scale=ci", "scales.ci.batch_size=24", f"output_dir={tmp_path / 'run'}"], timeout=300)
    assert done.rc == 1  # the recipe's micro-batch of 16 does not divide 24
    assert re.search(r"error: step (sft|dft) failed .*logs/(sft|dft)\.log", done.stderr)
    assert "does not divide" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [("scale=large", "scale=large"), ("base=nowhere", "base=nowhere"), ("scales.ci.n=0", "scales.ci.n=0"),
     ("seeds=3", "seeds")],
)  # fmt: skip
def test_bad_input_is_one_line(override, message, tmp_path, run_cli):
    done = run_cli(["demo", "scale=ci", f"output_dir={tmp_path / 'run'}", override], timeout=60)
    assert done.rc == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
