"""``verl-dft analyze claims``: verdicts in closed form, quantities from small files; the study's recipe composes."""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_dft import tiny
from verl_dft.analysis import claims, command
from verl_dft.analysis.estimates import over_runs
from verl_dft.config import compose
from verl_dft.errors import InputError
from verl_dft.recipes.load import load_recipe
from verl_dft.recipes.plan import plan
from verl_dft.recipes.settings import settings_of
from verl_dft.recipes.values import override
from verl_dft.sampling.configure import plain

CLAIM = {"claim": "A is above B", "source": "ours", "quantity": "accuracy", "left": "a", "right": "b",
         "direction": "greater"}  # fmt: skip


def result(folder: Path, averages: list[float], model: str = "m") -> str:
    folder.mkdir(parents=True)
    problems = [{"id": f"p{i}", "avg": average} for i, average in enumerate(averages)]
    found = {"benchmark": "arithmetic", "model": model, "n": 4, "num_problems": len(averages),
             "num_samples": 4 * len(averages), "per_problem": problems}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(found))
    return str(folder)


def training(folder: Path, grad_norms: list[float]) -> str:
    folder.mkdir(parents=True)
    lines = [{"step": step, "train/grad_norm": value} for step, value in enumerate(grad_norms, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def scored(folder: Path, probabilities: list[float], problem: str = "p", **facts: Any) -> str:
    """One row of one problem, and the statistics that ``verl-dft score`` writes of it."""
    folder.mkdir(parents=True)
    values = [math.log(p) for p in probabilities]
    columns = {"problem_id": [problem], "origin": ["expert"], "response_ids": [list(range(len(values)))],
               "ref_logp": [values]}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    means = {"per_token": sum(values) / len(values), "sequence_sum": sum(values)} | facts.pop("means", {})
    about = {name: {"mean": value, "se": None} for name, value in means.items()}
    (folder / "statistics.json").write_text(json.dumps({"model": "m", "by_origin": {"all": about}} | facts))
    return str(folder)


@lru_cache(maxsize=1)
def defaults() -> dict[str, Any]:
    return plain(compose("analyze", ["analysis=claims"]))


def config(runs: dict[str, Any], more: dict[str, Any] | None = None, **claim: Any) -> dict[str, Any]:
    return defaults() | {"runs": runs, "claims": {"one": CLAIM | claim}} | (more or {})


def found(runs: dict[str, Any], **claim: Any) -> dict[str, Any]:
    return dict(claims.run(config(runs, **claim)).tables["claims"][0])


# ---- verdicts ----


@pytest.mark.parametrize(
    ("differences", "greater", "less"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], "holds", "does not hold"),
        ([-1.0, -2.0, -3.0, -4.0, -5.0], "does not hold", "holds"),
        ([1.0, -1.0, 2.0, -2.0, 3.0], "undecided", "undecided"),
        ([0.0, 0.0, 0.0], "undecided", "undecided"),
        ([2.0, 2.0, 2.0], "undecided", "undecided"),  # no spread: chance is unknown, not 0
        ([5.0], "undecided", "undecided"),
    ],
)
def test_the_interval_decides(differences: list[float], greater: str, less: str) -> None:
    estimate = claims.over_seeds(differences)
    assert claims.verdict(estimate, "greater") == greater and claims.verdict(estimate, "less") == less


def test_an_interval_that_ends_at_zero_is_undecided() -> None:
    # differences 1 and 1 + d have t = (2 + d) / d, which is the 97.5% quantile of one degree, 12.706 = tan(0.475 pi)
    edge = 2 / (math.tan(0.475 * math.pi) - 1)
    assert claims.verdict(over_runs([1.0, 1.0 + 0.99 * edge]), "greater") == "holds"
    assert claims.verdict(over_runs([1.0, 1.0 + 1.01 * edge]), "greater") == "undecided"


# ---- quantities ----


def test_accuracy_is_paired_over_seeds(tmp_path: Path) -> None:
    left = [result(tmp_path / f"a{i}", values) for i, values in enumerate([[1.0, 0.5], [0.5, 0.5], [1.0, 1.0]])]
    right = [result(tmp_path / f"b{i}", values) for i, values in enumerate([[0.5, 0.5], [0.25, 0.25], [0.75, 0.5]])]
    record = found({"a": left, "b": right})
    # 0.25, 0.25 and 0.375, though the seeds themselves are 0.25 to 0.5 apart; s / sqrt(3) is 1/24
    assert record["mean"] == pytest.approx(7 / 24) and record["verdict"] == "holds"
    assert record["high"] - record["mean"] == pytest.approx(4.302653 / 24)
    assert (record["left_mean"], record["units"]) == (0.75, 3)


def test_a_models_result_is_found_among_the_evaluations(tmp_path: Path) -> None:
    runs = {label: [training(tmp_path / label, [1.0])] for label in "ab"}
    for label, average in (("a", 1.0), ("b", 0.5)):
        result(tmp_path / "evaluation" / label, [average], model=str(tmp_path / label / "model"))
    more = {"evaluations": [str(tmp_path / "evaluation")], "seeds": [7]}
    analysis = claims.run(config(runs, more))
    assert analysis.tables["claims"][0]["mean"] == 0.5 and analysis.tables["claims"][0]["verdict"] == "undecided"
    assert analysis.tables["claims_accuracy"][1] == {"label": "b", "seed": "7", "accuracy": 0.5}


def test_gradient_norms_are_steady_for_themselves_or_for_being_small(tmp_path: Path) -> None:
    runs = {"a": [training(tmp_path / "a", [0.1, 0.3])], "b": [training(tmp_path / "b", [2.0, 3.0])]}
    relative, absolute = (found(runs, quantity=f"grad_norm_{kind}", direction="less") for kind in ("cv", "sd"))
    assert relative["left_mean"] == pytest.approx(math.sqrt(0.02) / 0.2)
    assert relative["right_mean"] == pytest.approx(math.sqrt(0.5) / 2.5)
    assert absolute["mean"] == pytest.approx(math.sqrt(0.02) - math.sqrt(0.5))


def test_shares_of_tokens(tmp_path: Path) -> None:
    runs = {
        "a": [scored(tmp_path / "a", [0.05, 0.5, 0.95, 0.99])],
        "b": [scored(tmp_path / "b", [0.2, 0.5, 0.95, 0.6])],
    }
    means = [found(runs, quantity=f"share_{kind}")["mean"] for kind in ("low", "high", "extreme")]
    assert means == [0.25, 0.25, 0.5]


def test_statistics_of_scores(tmp_path: Path) -> None:
    runs = {"a": [scored(tmp_path / "a", [0.5, 0.5])], "b": [scored(tmp_path / "b", [0.25, 0.5, 0.5])]}
    assert found(runs, quantity="logp_response")["mean"] == pytest.approx(2 * math.log(2))
    assert found(runs, quantity="logp_token")["mean"] == pytest.approx(math.log(2) / 3)
    drift = {label: [scored(tmp_path / f"kl_{label}", [0.5], means={"kl_model_reference": value}, reference="base")]
             for label, value in (("a", 0.1), ("b", 0.3))}  # fmt: skip
    assert found(drift, quantity="kl")["mean"] == pytest.approx(-0.2)


# ---- one line for what cannot be compared ----


def test_mistakes_in_claims_are_named() -> None:
    def fails(match: str, runs: Any = None, **claim: Any) -> None:
        with pytest.raises(InputError, match=match):
            claims.check(config({"a": ["x"], "b": ["y"]} if runs is None else runs, **claim))

    fails(r"claims\.one\.quantity is 'speed', not one of accuracy, kl", quantity="speed")
    fails(r"claims\.one\.direction is 'more', not one of greater, less", direction="more")
    fails(r"claims\.one\.left is 'c', not one of a, b", left="c")
    fails(r"claims\.one must have the keys claim, source", note="x")
    two = {"a": ["x", "y"], "b": ["z", "w"]}
    fails(r"same seeds for all labels, one path each; they have \{'a': 2, 'b': 1\}", two | {"b": "z"})
    fails(r"runs\.b has the same path twice", two | {"b": ["z", "w/../z"]})
    fails(r"runs\.b must be a path, or a list of one path for each seed", two | {"b": {1: "z", 2: "w"}})
    for seeds, match in (([1, 2, 3], "names 3 seeds; every label of runs has 2 paths"), (2, "seeds=2 must be a list")):
        with pytest.raises(InputError, match=match):
            claims.check(config(two, {"seeds": seeds}))
    with pytest.raises(InputError, match="claims is not set"):
        claims.check(config({}) | {"claims": None})


def test_results_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    def fails(match: str, runs: dict[str, Any], more: dict[str, Any] | None = None, **claim: Any) -> None:
        with pytest.raises(InputError, match=match) as error:
            claims.run(config(runs, more, **claim))
        assert "\n" not in str(error.value)

    one, two = result(tmp_path / "one", [1.0]), result(tmp_path / "two", [1.0, 0.5])
    fails("problems are in one result alone", {"a": [one], "b": [two]})
    fails("same seeds for all labels", {"a": [one, two], "b": [one]})
    fails("names 2 seeds; every label of runs has 1 paths", {"a": [one], "b": [two]}, {"seeds": [1, 2]})
    short, long = training(tmp_path / "short", [1.0, 2.0]), training(tmp_path / "long", [1.0, 2.0, 3.0])
    fails("at different steps", {"a": [short], "b": [long]}, quantity="grad_norm_cv")
    fails("no evaluation of it", {"a": [short], "b": [long]})
    rows, other = scored(tmp_path / "rows", [0.5]), scored(tmp_path / "other", [0.5, 0.5], model="n")
    fails("different rows", {"a": [rows], "b": [other]}, quantity="share_low")
    fails("different model: m and n", {"a": [rows], "b": [other]}, quantity="logp_token")
    elsewhere = scored(tmp_path / "elsewhere", [0.5], problem="q")
    fails(
        r"different problems: 2 are in one alone \('p' for one\)",
        {"a": [rows], "b": [elsewhere]},
        quantity="logp_token",
    )
    fails("lacks 'kl_model_reference'", {"a": [rows], "b": [rows]}, quantity="kl")


def test_the_command_prints_the_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"a": [result(tmp_path / f"a{i}", [1.0]) for i in (1, 2)], "b": [result(tmp_path / f"b{i}", [i / 4]) for i in
            (1, 2)]}  # fmt: skip
    out = tmp_path / "out"
    given = [override("runs", runs), override("claims", {"one": CLAIM})]
    assert command.main(["claims", *given, f"output_dir={out}"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "A is above B" in line)
    assert line.endswith("| a > b | +75.0, +50.0 | +62.5 (-96.3 to +221.3) | undecided |")
    assert pq.read_table(out / "claims_seeds.parquet").num_rows == 2 and (out / "claims.md").is_file()


# ---- the study ----


@pytest.mark.slow
def test_a_plan_that_leaves_out_an_arm_of_the_seeds_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names 2 seeds; every label of runs has 1 paths"):
        plan(settings_of(load_recipe("study/claims"), ["seeds=[1,2]", "seed=2", f"output_dir={tmp_path}"]))


@pytest.mark.slow
def test_the_study_composes_and_a_seeds_keys_do_not_depend_on_the_others(tmp_path: Path) -> None:
    def keys(seeds: str) -> dict[str, str]:
        settings = settings_of(load_recipe("study/claims"), [f"seeds={seeds}", f"output_dir={tmp_path}"])
        return {step.name: step.key for step in plan(settings)}

    one, two = keys("[1]"), keys("[1,2]")
    assert len(two) == 2 * (len(one) - 1) + 1
    assert {name for name in one if one[name] != two[name]} == {"claims"}


@pytest.mark.slow
def test_an_untrained_model_differs_by_seed(tmp_path: Path) -> None:
    for seed in (1, 2):
        assert tiny.main(["init", f"seed={seed}", f"output_dir={tmp_path / str(seed)}"]) == 0
    assert tiny.main(["init", str(tmp_path / "again"), "1"]) == 0
    one, two, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "2", "again"))
    assert one == again != two


@pytest.mark.parametrize(
    "given", ["", "make", "init", "init output_dir=x seed=-1", "init output_dir=x size=2", "init x 1 2"]
)
def test_what_is_no_untrained_model_is_refused(given: str) -> None:
    with pytest.raises(InputError):
        tiny.main(given.split())
