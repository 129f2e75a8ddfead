"""``kill -9`` at three places under real vLLM; then the rest is done, and no byte differs from a run without kills."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]
_KILLS = ["store.after_append:3", "store.before_rename:2", "store.after_rename:1"]
_COMMON = ["data=arithmetic", "data.source.num_rows=8", "data.source.num_val=0", "shard_size=6", "engine.dtype=float32"]
_COMMANDS = {
    "sample": (["n=3", "max_tokens=60"], ["samples.parquet", "problems.jsonl", "statistics.json", "statistics.md"]),
    "groups": (["composition=1:0:3", "self.max_tokens=60"], ["rows.parquet", "statistics.json", "statistics.md"]),
}


@pytest.mark.parametrize("verb", list(_COMMANDS))
@pytest.mark.nightly
def test_killed_three_times_under_vllm(verb: str, tiny_base: Path, tmp_path: Path, run_cli: Callable) -> None:
    options, written = _COMMANDS[verb]
    command = [verb, f"model={tiny_base}", *_COMMON, *options]
    whole = run_cli([*command, f"output_dir={tmp_path / 'whole'}"], timeout=180)
    assert whole.rc == 0, whole.stderr[-3000:]
    folder = tmp_path / "killed"
    for place in _KILLS:
        killed = run_cli([*command, f"output_dir={folder}"], timeout=180, env={"VERL_DFT_FAILPOINT": place})
        assert killed.rc == -signal.SIGKILL, killed.stderr[-3000:]
        assert not (folder / "statistics.json").exists()
    assert 0 < len(list(folder.rglob("store/*.jsonl"))) < 4
    done = run_cli([*command, f"output_dir={folder}"], timeout=180)
    assert done.rc == 0, done.stderr[-3000:]
    for name in written:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
