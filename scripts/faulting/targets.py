"""What a scenario's process calls where ``verl-dft`` alone does not do: texts from an endpoint, a run made of steps."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_dft.cli import told

ENDPOINT = "VERL_DFT_FAULTS_ENDPOINT"
"""Environment variable with the scripted endpoint's URL."""


def _source() -> Any:
    from verl_dft.sampling.endpoint import EndpointSource

    return EndpointSource(os.environ[ENDPOINT], "teacher", concurrency=4, backoff_s=0.05)


def sample(argv: Sequence[str]) -> int:
    """``verl-dft sample`` with an endpoint for the engine."""
    from verl_dft.sampling import command

    return told(lambda: _done(command.run(command.plain(command.compose_sampling("sample", argv)), _source())))


def rewrite(argv: Sequence[str]) -> int:
    """``verl-dft rewrite`` with an endpoint for the engine."""
    from verl_dft.build import rewrite_command as command

    return told(lambda: _done(command.run(command.plain(command.compose_sampling("rewrite", argv)), _source())))


def evaluate(argv: Sequence[str]) -> int:
    """``verl-dft evaluate`` with an endpoint for the engine."""
    from verl_dft.evaluation.command import compose_evaluate
    from verl_dft.evaluation.run import evaluate as run

    return told(lambda: _done(run(compose_evaluate(argv), _source())))


def steps(argv: Sequence[str]) -> int:
    """A run of two commands after each other and one beside them, as recipes and the demo make them."""
    return told(lambda: _steps(Path(argv[0]), Path(argv[1])))


def _steps(root: Path, samples: Path) -> int:
    from verl_dft.steps import Step, StepError, StepRunner

    def verb(*arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "verl_dft.cli", *arguments)

    data = ("data", "make", "data=arithmetic", "data.source.num_rows=48", "data.source.num_val=16")
    files = root / "data" / "train.parquet"
    plan = [
        Step("data", verb(*data, f"output_dir={root / 'data'}"), root / "data", (files,)),
        Step("more", verb(*data, f"data.train_files={files}", "data.source=null", f"output_dir={root / 'more'}"),
             root / "more", (), needs=("data",)),
        Step("reject", verb("reject", f"samples={samples}", f"output_dir={root / 'reject'}"), root / "reject",
             (root / "reject" / "rft.parquet", root / "reject" / "statistics.json"), (samples,)),
    ]  # fmt: skip
    del plan[1]
    try:
        StepRunner(root, 1, track_code=False).run(plan)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _done(_: object) -> int:
    return 0
