"""``metrics.jsonl``: what a run reported, a JSON object per line with ``step``. Imports no verl: plots read it."""

import json
from pathlib import Path

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.files import atomic_write

METRICS_FILE = "metrics.jsonl"
"""Its name in a training's ``output_dir``."""


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Lines of a ``metrics.jsonl``, each with ``step``.

    Raises:
        InputError: no such file, or a line that is no JSON object (the last one may be half written).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; it is the metrics.jsonl of a training's output_dir")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not JSON; train again, or delete that line") from None
    return rows


class MetricsFile:
    """Writes the lines of a run; one that is resumed drops those that it will write again."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.is_file() else []
        with atomic_write(path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)

    def log(self, data: dict[str, float], step: int) -> None:
        failpoint("metrics.before_append")
        self.file.write(json.dumps({"step": step, **data}) + "\n")
        self.file.flush()
        failpoint("metrics.after_append")
