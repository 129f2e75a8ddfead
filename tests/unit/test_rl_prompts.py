"""The prompts of ``verl-dft rl``: what is kept, left out and refused, and what verl's dataset reads of it."""

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig, OmegaConf

from verl_dft.build.group_plan import parse_composition
from verl_dft.data.records import Problem, write_problems
from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.training.online.configure import compose_rl
from verl_dft.training.online.prompts import TRAIN, VAL, demonstrations_of, prepare_prompts

Compose = Callable[..., DictConfig]
LONG = " 1" * 200


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(recipes_dir() / "tiny" / "base")


def problem(name: str, **changes: Any) -> Problem:
    given = {"answer": "3", "solution": "1 + 2 = 3", "teacher_solutions": ["a 3", "b 3", "c 3"], **changes}
    return Problem(id=name, problem=given.pop("problem", f"What is {name} ?"), **given)


@lru_cache
def base_config(algorithm: str) -> DictConfig:
    return compose_rl(["--config-name", "tiny/rl", f"algorithm={algorithm}", "data=files", "output_dir=unused"])


@pytest.fixture
def composed(tmp_path: Path) -> Compose:
    """``composed(problems, {key: value}, algorithm="gft", val=None)``: a run's configuration, batches of 2."""

    def build(
        problems: list[Problem], more: dict[str, Any] | None = None, algorithm: str = "gft", val: Any = None
    ) -> DictConfig:
        config = copy.deepcopy(base_config(algorithm))
        keys = {"output_dir": str(tmp_path / "run"), "data.train_batch_size": 2, **(more or {})}
        for key, given in {"data.train_files": problems, "data.val_files": val}.items():
            if given is not None:
                keys[key] = str(tmp_path / f"{key}.jsonl")
                write_problems(keys[key], given)
        for key, value in keys.items():
            OmegaConf.update(config, key, value)
        return config

    return build


def prepared(config: DictConfig, tokenizer: Any) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    folder = Path(config.output_dir) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    report = prepare_prompts(config, tokenizer, folder)
    return report, *(pq.read_table(folder / name).to_pylist() for name in (TRAIN, VAL))


def test_what_is_left_out_is_counted(composed: Compose, tokenizer: Any) -> None:
    given = [
        problem("a"),
        problem("no answer", answer=" "),
        problem("long prompt", problem="What is" + LONG),
        problem("no solution", solution=None),
        problem("two teachers", teacher_solutions=["a 3", " ", "c 3"]),
        problem("long teacher", teacher_solutions=["a 3", "b 3" + LONG, "c 3"]),
        problem("long expert", solution=LONG),
        problem("a fourth teacher's is not used", teacher_solutions=["a 3", "b 3", "c 3", LONG]),
    ]
    report, rows, _ = prepared(composed(given, {"group.missing": "skip"}), tokenizer)
    assert report["train"] == {"without_answer": 1, "without_demonstrations": 2, "overlong": 3, "kept": 2}
    assert [row["extra_info"]["problem_id"] for row in rows] == ["a", "a fourth teacher's is not used"]
    assert [row["extra_info"]["index"] for row in rows] == [0, 1]
    shown = rows[0]["extra_info"]["demonstrations"]
    assert [(one["origin"], one["text"]) for one in shown] == [
        ("expert", "1 + 2 = 3"), ("teacher", "a 3"), ("teacher", "b 3"), ("teacher", "c 3"),
    ]  # fmt: skip


def test_a_demonstration_may_be_as_long_as_a_response_and_no_longer(composed: Compose, tokenizer: Any) -> None:
    """The end token counts: a text of ``max_response_length`` tokens is one too long."""
    fits, not_fits = " 1" * 95, " 1" * 96
    assert len(tokenizer(fits)["input_ids"]) == 95
    given = [problem("a", solution=fits), problem("b", solution=not_fits), problem("c")]
    report, rows, _ = prepared(composed(given), tokenizer)
    assert report["train"] == {"overlong": 1, "kept": 2}
    assert [row["extra_info"]["problem_id"] for row in rows] == ["a", "c"]
    with pytest.raises(InputError, match=r"'b' .*max_response_length=96.*\(1 problems have\)"):
        prepared(composed(given, {"overlong": "error"}), tokenizer)


def test_grpo_needs_no_demonstrations(composed: Compose, tokenizer: Any) -> None:
    given = [problem("a", solution=None, teacher_solutions=None), problem("b", solution=LONG)]
    report, rows, val = prepared(composed(given, algorithm="grpo"), tokenizer)
    assert report == {"train": {"kept": 2}, "val": {}}
    assert all(row["extra_info"]["demonstrations"] == [] for row in [*rows, *val])


def test_a_problem_without_texts_is_an_error_by_default(composed: Compose, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"'b' has a solution and 1 teacher texts .*1:3:4 wants 1 and 3"):
        prepared(composed([problem("a"), problem("b", teacher_solutions=["x", " "]), problem("c")]), tokenizer)
    with pytest.raises(InputError, match="'b' has no solution to fall back on"):
        prepared(composed([problem("a"), problem("b", solution=None)], algorithm="online_rewrite"), tokenizer)


def test_too_few_for_a_batch(composed: Compose, tokenizer: Any) -> None:
    given = [problem("a"), problem("b", answer=""), problem("c", problem=LONG)]
    with pytest.raises(InputError, match=r"1 of 3 problems .*without_answer 1, overlong 1, kept 1.*train_batch_size=2"):
        prepared(composed(given), tokenizer)


def test_validation_has_no_demonstrations(composed: Compose, tokenizer: Any) -> None:
    given, val = [problem("a"), problem("b")], [problem("v", solution=None, teacher_solutions=None)]
    report, _, rows = prepared(composed(given, {"trainer.test_freq": 1}, val=val), tokenizer)
    assert report["val"] == {"kept": 1} and rows[0]["extra_info"]["problem_id"] == "v"
    assert rows[0]["extra_info"]["demonstrations"] == []
    with pytest.raises(InputError, match=r"none of 1 validation problems .*without_answer 1"):
        prepared(composed(given, {"trainer.test_freq": 1}, val=[problem("v", answer="")]), tokenizer)
    with pytest.raises(InputError, match="need problems to validate on"):
        prepared(composed(given, {"trainer.test_freq": 1}), tokenizer)


def test_verl_gets_a_validation_file_where_the_first_problem_is_left_out(composed: Compose, tokenizer: Any) -> None:
    _, rows, val = prepared(composed([problem("x", answer=""), problem("a"), problem("b")]), tokenizer)
    assert len(val) == 1 and val[0]["prompt"] == rows[0]["prompt"] and val[0]["extra_info"]["demonstrations"] == []


def test_a_run_that_has_begun_keeps_its_prompts(composed: Compose, tokenizer: Any) -> None:
    given = [problem("a"), problem("b")]
    config = composed(given)
    prepared(config, tokenizer)
    prepared(composed([*given, problem("c")]), tokenizer)  # nothing was trained: new ones are welcome
    (Path(config.output_dir) / "checkpoints").mkdir()
    prepared(composed([*given, problem("c")]), tokenizer)
    for changed in ([problem("a"), problem("b", solution="3"), problem("c")], given):
        with pytest.raises(InputError, match="have changed since the run"):
            prepared(composed(changed), tokenizer)
    prepared(composed([*given, problem("c")]), tokenizer)


@pytest.mark.parametrize(
    ("composition", "origins"),
    [("1:3:4", ["expert", "teacher", "teacher", "teacher"]), ("0:2:6", ["teacher"] * 2), ("1:0:7", ["expert"])],
)
def test_demonstrations_of_a_composition(composition: str, origins: list[str]) -> None:
    shown = demonstrations_of(problem("a"), parse_composition(composition))
    assert [one["origin"] for one in shown] == origins


def test_verls_dataset_reads_the_files(composed: Compose, tokenizer: Any) -> None:
    """Through verl's own reader, as the trainer makes it: prompts and demonstrations come out as they went in."""
    from verl.utils.dataset.rl_dataset import RLHFDataset

    given = [problem("a", solution="x <|im_end|> ≥ 3\n", problem="What ?\n"), problem("b")]
    config = composed(given)
    _, rows, _ = prepared(config, tokenizer)
    dataset = RLHFDataset(data_files=config.data.train_files, tokenizer=tokenizer, config=config.data)
    assert len(dataset) == 2
    for index, row in enumerate(rows):
        item = dataset[index]
        assert [dict(message) for message in item["raw_prompt"]] == row["prompt"]
        shown = [dict(one) for one in item["extra_info"]["demonstrations"]]
        assert shown == row["extra_info"]["demonstrations"] and shown[0]["text"] == given[index].solution
        assert item["extra_info"]["problem_id"] == given[index].id
        assert item["reward_model"]["ground_truth"] == "3"
