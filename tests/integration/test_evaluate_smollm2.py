"""A real model on real problems: SmolLM2-135M on two of the DFT paper's benchmarks, from the command to the page.

docs/benchmarks/cpu.md has the same at full size. The model comes from a package registry (shared/tools/get_smollm2.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]
BENCHMARKS = ("math500", "amc23")


@pytest.fixture(scope="module")
def smollm2(shared_dir: Path, run_command: Callable) -> Iterator[Path]:
    """A folder of SmolLM2-135M-Instruct, deleted at the end: 270 MB."""
    tool = shared_dir / "tools" / "get_smollm2.py"
    if not tool.is_file():
        pytest.skip(f"needs {tool}, which does not exist (it is not part of the project)")
    with tempfile.TemporaryDirectory() as folder:
        done = run_command([sys.executable, tool, Path(folder, "smollm2")], timeout=300)
        if done.rc != 0:
            pytest.skip(f"{tool} could not get the model: {done.stderr.strip().splitlines()[-1:]}")
        yield Path(folder, "smollm2")


def test_smollm2_on_real_benchmarks(smollm2: Path, shared_dir: Path, tmp_path: Path, run_cli: Callable) -> None:
    command = ["evaluate", f"model={smollm2}", f"benchmark=[{','.join(BENCHMARKS)}]", "limit=2", "n=2", "max_tokens=64"]
    data = f"data_dir={shared_dir / 'data' / 'benchmarks'}"
    done = run_cli([*command, data, f"output_dir={tmp_path}"], timeout=400)
    assert done.rc == 0, done.stderr[-3000:]
    results = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in BENCHMARKS}
    for name, result in results.items():
        rows = pq.read_table(tmp_path / name / "samples.parquet").to_pylist()
        assert [(row["index"], row["prompt_name"]) for row in rows] == [(i % 2, "qwen-boxed") for i in range(4)]
        assert len({row["problem_id"] for row in rows}) == 2 and len({row["response"] for row in rows}) == 4
        cut = [row["finish_reason"] == "length" for row in rows]
        assert all(row["num_tokens"] == 64 for row in rows if row["finish_reason"] == "length")
        assert all(0 < row["num_tokens"] <= 64 for row in rows)
        assert result["truncated_frac"] == fmean(cut) and sum(result["verdicts"].values()) == 4
        assert result["engine"]["dtype"] == "bfloat16" and result["temperature"] == 1.0
        # where the model was cut off, the table, a warning, the report and the page say how often
        share = f"{100 * fmean(cut):.1f}%"
        assert share in next(line for line in done.stdout.splitlines() if f" {name} " in line)
        assert not any(cut) or f"{name}: {share} of the samples were cut off; raise max_tokens" in done.stderr
        assert f"| truncated | {share} |" in (tmp_path / name / "report.md").read_text()
        assert f"{share} cut off" in (tmp_path / name / "samples.html").read_text()
    assert any(result["truncated_frac"] for result in results.values())
    assert "mean of the 2 benchmarks" in done.stdout
