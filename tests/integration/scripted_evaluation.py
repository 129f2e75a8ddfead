"""A command in the place of ``verl-dft evaluate`` for tests of when and how often training runs it, and its planner.

Its score is a function of the weights. ``SCRIPTED_EVALUATION`` in the environment: ``fail`` or ``sleep``.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def plan(_: Any) -> dict[str, list[str]]:
    """For ``eval.planner``."""
    return {"command": [sys.executable, __file__], "benchmarks": ["scripted"]}


def main(argv: list[str]) -> int:
    """Leave a ``result.json`` and a line in ``calls`` per call."""
    given = dict(argument.split("=", 1) for argument in argv)
    folder, model = Path(json.loads(given["output_dir"])), Path(given["model"])
    with open(folder / "calls", "a", encoding="utf-8") as calls:
        calls.write(f"{os.getpid()}\n")
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)
    print("scripted")
    if os.environ.get("SCRIPTED_EVALUATION") == "fail":
        print("error: it was told to fail\n")
        return 3
    if os.environ.get("SCRIPTED_EVALUATION") == "sleep":
        time.sleep(60)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).digest()
    share = int.from_bytes(digest[:6], "big") / 2**48
    result = {"benchmark": "scripted", "avg": share, "avg_ci95": [share / 2, (1 + share) / 2]}
    result |= {"truncated_frac": 0.25, "no_answer_frac": 0.0, "mean_response_tokens": 5.0}
    (folder / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
