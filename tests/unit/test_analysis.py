"""``verl-dft analyze``: numbers against direct computation, what the axes hold, one line for bad input."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import pyplot as plt

from verl_dft.analysis import change, command, draw, dynamics, entropy, kl, stages, sweep, tokens
from verl_dft.analysis.estimates import over_problems, over_runs
from verl_dft.analysis.runs import labels_of, parse_runs
from verl_dft.analysis.scored import check_same_rows, read_scored
from verl_dft.config import compose
from verl_dft.errors import InputError
from verl_dft.evaluation.student import t975
from verl_dft.sampling.configure import plain

PNG = b"\x89PNG\r\n\x1a\n"
LOGP = {"base": [[-0.1, -3.0], [-0.05], [-4.0, -0.7, -0.02]], "tuned": [[-0.01, -5.0], [-0.05], [-0.2, -0.7, -3.5]]}
IDS = [[5, 6], [7], [6, 6, 8]]


def config(what: str, **values: Any) -> dict[str, Any]:
    return plain(compose("analyze", [f"analysis={what}"])) | values


def scored(
    folder: Path, values: Sequence[Sequence[float]], ids: Any = IDS, column: str = "ref_logp", **more: Any
) -> Path:
    """What ``verl-dft score`` writes of three rows, of which two are of one problem."""
    folder.mkdir(parents=True)
    columns = {"problem_id": ["a", "a", "b"], "origin": ["expert"] * 3, "response_ids": ids, "ref_logp": values}
    columns |= {column: values} | more
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    return {label: str(scored(tmp_path / label, values)) for label, values in LOGP.items()}


def metrics(folder: Path, **series: Sequence[float]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    steps = range(len(next(iter(series.values()))))
    lines = [{"step": k + 1, **{key.replace("__", "/"): values[k] for key, values in series.items()}} for k in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def result(folder: Path, counts: Sequence[int], model: str = "base", n: int = 4, name: str = "gsm8k") -> Path:
    folder.mkdir(parents=True)
    problems = [{"id": f"p{i}", "avg": count / n} for i, count in enumerate(counts)]
    about = {"model": model, "benchmark": name, "n": n, "num_problems": len(counts), "num_samples": n * len(counts)}
    values = about | {"avg": sum(counts) / n / len(counts), "pass_at_k": {"4": 0.75}, "per_problem": problems}
    (folder / "result.json").write_text(json.dumps(values))
    return folder


# ---- what is given ----


def test_runs_are_labels_points_and_seeds(tmp_path: Path) -> None:
    for name in ("a/x", "b/x", "c/x"):
        (tmp_path / name).mkdir(parents=True)
    a, b, c = (str(tmp_path / name / "x") for name in "abc")
    assert [point.label for point in parse_runs([a, b])] == ["a", "b"]
    seeds = parse_runs({"SFT": [a, b], 7: c})
    assert [(point.label, point.at, len(point.paths)) for point in seeds] == [("SFT", None, 2), ("7", None, 1)]
    steps = parse_runs({"SFT": {20: a, 5: [b, c]}})
    assert [(point.at, len(point.paths)) for point in steps] == [(5.0, 2), (20.0, 1)]
    assert labels_of([Path("runs/sft/score"), Path("runs/dft/score")]) == ["sft", "dft"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, ["runs is not set", "runs={LABEL: PATH"]),
        ({}, ["runs is not set"]),
        ({"SFT": "nowhere"}, ["nowhere does not exist"]),
        ({"SFT": 3}, ["3 where a path belongs"]),
        ({"SFT": {"last": "."}}, ["runs.SFT", "'last'", "not a number"]),
        ([".", "."], ["twice"]),
    ],
)
def test_bad_runs(given: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        parse_runs(given)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# ---- estimates ----


def test_an_interval_is_clustered_by_problem() -> None:
    # problems a: 1 + 0 of 3, b: 2 of 3; mean .5, influences (1 - 1.5) / 6 and (2 - 1.5) / 6; se = sqrt(2 * 2 / 144)
    found = over_problems(np.array([1, 0, 2]), np.array([2, 1, 3]), ["a", "a", "b"])
    width = t975(1) * math.sqrt(2 * (2 * (0.5 / 6) ** 2))
    assert found.mean == 0.5 and found.units == 2
    assert (found.low, found.high) == pytest.approx((0.5 - width, 0.5 + width))
    assert over_problems(np.array([1]), np.array([2]), ["a"]).low is None


def test_over_runs_is_students_interval() -> None:
    found = over_runs([1.0, 2.0, 4.0])
    width = t975(2) * np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((7 / 3, 7 / 3 - width, 7 / 3 + width))
    assert over_runs([1.0]).low is None
    assert found.text(1, scale=-1e-3) == "0.0 (0.0 to 0.0)"


# ---- tokens ----


def test_token_histogram_by_hand(runs: dict[str, str]) -> None:
    found = tokens.run(config("tokens", runs=runs, bins=4, words=0))
    flat = {label: np.exp(np.concatenate(values)) for label, values in LOGP.items()}
    counts = {label: np.histogram(values, bins=4, range=(0, 1))[0] for label, values in flat.items()}
    assert counts["base"].tolist() == [2, 1, 0, 3] and counts["tuned"].tolist() == [2, 1, 0, 3]
    for label in runs:
        mine = [record for record in found.tables["tokens"] if record["label"] == label]
        assert [record["count"] for record in mine] == counts[label].tolist()
        assert sum(record["share"] for record in mine) == pytest.approx(1)
    assert [record["times"] for record in found.tables["tokens"][4:]] == [1.0, 1.0, None, 1.0]


def test_shares_and_their_paired_change(runs: dict[str, str]) -> None:
    found = tokens.run(config("tokens", runs=runs, words=0, thresholds=[0.03, 0.95])).tables["tokens_thresholds"]
    below = {record["label"]: record for record in found if record["side"] == "below"}
    # base: exp(-4) = .018 alone is below .03; tuned: exp(-5) alone (exp(-3.5) = .0302)
    assert [below[label]["mean"] for label in LOGP] == pytest.approx([1 / 6, 1 / 6])
    assert below["tuned"]["change_mean"] == pytest.approx(0)
    # problem a gains a token, b loses one: influences +1/6 and -1/6
    width = t975(1) * math.sqrt(2 * 2 / 36)
    assert (below["tuned"]["change_low"], below["tuned"]["change_high"]) == pytest.approx((-width, width))
    above = {record["label"]: record["mean"] for record in found if record["side"] == "above"}
    assert above == pytest.approx({"base": 2 / 6, "tuned": 2 / 6})  # .951, .980; .990, .951


def test_the_words_of_the_lowest_bin(tmp_path: Path, runs: dict[str, str], repo_root: Path) -> None:
    from transformers import AutoTokenizer

    folder = str(repo_root / "recipes" / "tiny" / "base")
    files = {label: read_scored(Path(path)) for label, path in runs.items()}
    found = tokens.lowest_words(files, bins=10, words=5, tokenizer=folder)
    mine = [record for record in found if record["label"] == "base"]
    # base: -3.0 (token 6) and -4.0 (token 6) are below 0.1
    assert [(r["token_id"], r["count"], r["share"], r["total"]) for r in mine] == [(6, 2, 1.0, 3)]
    assert mine[0]["token"] == AutoTokenizer.from_pretrained(folder).decode([6])
    tuned = [(r["token_id"], r["count"], r["total"]) for r in found if r["label"] == "tuned"]
    assert tuned == [(6, 1, 3), (8, 1, 1)]
    with pytest.raises(InputError, match=r"statistics\.json does not exist; give tokenizer=FOLDER"):
        tokens.lowest_words(files, bins=10, words=5)


def test_token_figures(runs: dict[str, str]) -> None:
    records = tokens.run(config("tokens", runs=runs, bins=4, words=0)).tables["tokens"]
    _, axes = plt.subplots()
    tokens.draw_histogram(axes, records, list(runs))
    assert len(axes.patches) == 2 and axes.get_yscale() == "log"
    assert axes.patches[0].get_data().values.tolist() == [2, 1, 0, 3]
    _, axes = plt.subplots()
    tokens.draw_change(axes, records, list(runs), "base")
    assert len(axes.lines) == 2  # the level 1, and the tuned model's line without the bin that is empty in both
    assert axes.lines[1].get_xdata().tolist() == [0.125, 0.375, 0.875]
    plt.close("all")


def test_rows_that_differ_are_named(tmp_path: Path) -> None:
    a = read_scored(scored(tmp_path / "a", LOGP["base"]))
    for name, ids, word in (("b", [[5, 6], [7], [6, 9, 8]], "response_ids of row 2"), ("c", None, "first in row 0")):
        values = LOGP["base"] if ids else [[-0.1], [-0.05, -0.2], [-4.0, -0.7, -0.02]]
        other = read_scored(scored(tmp_path / name, values, ids or [[5], [7, 7], [6, 6, 8]]))
        with pytest.raises(InputError, match=word) as error:
            check_same_rows({"A": a, "B": other})
        assert str(a.path) in str(error.value) and "score the same file with both" in str(error.value)


@pytest.mark.parametrize(
    ("values", "more", "words"),
    [
        ([[-0.1], [-0.2], [-1.0, -1.0, -1.0]], {}, ["row 0: 1 values in column 'ref_logp' for 2 tokens"]),
        ([[-0.1, math.nan], [-0.2], [-1.0, -1.0, -1.0]], {}, ["'ref_logp' has values that are not numbers"]),
        (LOGP["base"], {"response_ids": [None, [7], [6, 6, 8]]}, ["row 0: column 'response_ids' is empty"]),
        (LOGP["base"], {"behavior_logp": LOGP["base"]}, ["both ref_logp and behavior_logp", "column="]),
    ],
)
def test_damaged_scores(tmp_path: Path, values: Any, more: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        read_scored(scored(tmp_path / "x", values, **more))
    assert all(word in str(error.value) for word in [*words, str(tmp_path / "x" / "rows.parquet")])


# ---- KL ----


def test_kl_by_step_and_over_seeds(tmp_path: Path) -> None:
    values = {"s5": [[0.1, 0.2], [0.0], [0.3, 0.1, 0.2]], "s9": [[0.4, 0.2], [0.1], [0.3, 0.1, 0.2]]}
    paths = {name: str(scored(tmp_path / name, v, column="kl_model_reference")) for name, v in values.items()}
    found = kl.run(config("kl", runs={"SFT": {9: paths["s9"], 5: paths["s5"]}})).tables["kl"]
    assert [record["at"] for record in found] == [5, 9]
    assert [record["mean"] for record in found] == pytest.approx([0.9 / 6, 1.3 / 6])
    width = t975(1) * math.sqrt(2 * 2) * abs(0.3 - 0.15 * 3) / 6
    assert found[0]["high"] - found[0]["mean"] == pytest.approx(width)
    each = kl.run(config("kl", runs={"SFT": paths["s5"]}, per="response")).tables["kl"]
    assert each[0]["mean"] == pytest.approx(0.3)
    seeds = kl.run(config("kl", runs={"SFT": {5: list(paths.values())}})).tables["kl"][0]
    assert (seeds["mean"], seeds["over"], seeds["units"]) == (pytest.approx(2.2 / 12), "runs", 2)
    _, axes = plt.subplots()
    draw.draw_points(axes, found, "step", "KL", zero=True)
    assert axes.lines[0].get_xdata().tolist() == [0, 5, 9] and axes.lines[0].get_ydata()[0] == 0
    _, axes = plt.subplots()
    draw.draw_points(axes, each * 3, "", "KL")
    assert len(axes.patches) == 3 and axes.patches[0].get_height() == pytest.approx(0.3)
    plt.close("all")


def test_kl_needs_one_reference_and_the_column(tmp_path: Path, runs: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"base/rows\.parquet: no column 'kl_model_reference' .*kl=true"):
        kl.run(config("kl", runs=runs))
    paths = [scored(tmp_path / name, LOGP["base"], column="kl_model_reference") for name in ("x", "y")]
    for path, name in zip(paths, ("A", "B"), strict=True):
        (path / "score.json").write_text(json.dumps({"reference.path": name}))
    with pytest.raises(InputError, match="different references"):
        kl.run(config("kl", runs=[str(path) for path in paths]))


# ---- stages ----


def statistics(path: Path, stage: bool = True) -> Path:
    def part(total: float, token: float) -> dict[str, Any]:
        means = {"sequence_sum": {"mean": total, "se": 1.0}, "per_token": {"mean": token, "se": None}}
        return {"problems": 5, "rows": 5, "tokens": 50, **means}

    found: dict[str, Any] = {"by_origin": {"self": part(-7, -0.7), "all": part(-8, -0.8)}}
    if stage:
        both = {"expert": part(-30, -3), "rewritten": part(-20, -2), "difference": part(10, 1)}
        found["by_stage"] = {"self": both, "guided": {"problems_without_expert": 2}, "expert": both}
    path.mkdir()
    (path / "statistics.json").write_text(json.dumps(found))
    return path


def test_stages_and_their_bars(tmp_path: Path) -> None:
    path = str(statistics(tmp_path / "a"))
    found = stages.run(config("stages", runs={"A": path, "B": path}))
    mine = [r for r in found.tables["stages"] if r["label"] == "A"]
    assert [(r["group"], r["text"], r["sequence_sum_mean"]) for r in mine[:3]] == [
        ("self", "expert", -30.0), ("self", "rewritten", -20.0), ("self", "difference", 10.0)]  # fmt: skip
    assert mine[0]["sequence_sum_high"] == pytest.approx(-30 + t975(4)) and mine[0]["per_token_low"] is None
    assert {r["group"] for r in mine} == {"self", "expert"}  # guided has no expert's text
    _, axes = plt.subplots()
    stages.draw(axes, found.tables["stages"], "sequence_sum", "nats")
    assert len(axes.patches) == 2 * 3  # of each model: self in both texts, the fallback once
    assert len(axes.get_xticks()) == 4
    plt.close("all")


def test_stages_by_origin_and_mixed(tmp_path: Path) -> None:
    plain_path = str(statistics(tmp_path / "plain", stage=False))
    found = stages.run(config("stages", runs={"A": plain_path}, per="token")).tables["stages"]
    assert [(r["group"], r["text"], r["per_token_mean"]) for r in found] == [("self", "rows", -0.7)]
    staged = str(statistics(tmp_path / "staged"))
    with pytest.raises(InputError, match=r"plain/statistics\.json has no 'by_stage'.*expert=FILE"):
        stages.run(config("stages", runs={"A": plain_path, "B": staged}))


# ---- dynamics, entropy ----


def test_dynamics_of_seeds_smoothed(tmp_path: Path) -> None:
    one = metrics(tmp_path / "one", train__loss=[4.0, 2.0, 6.0], train__rectified_frac=[0.1, 0.2, 0.3])
    two = metrics(tmp_path / "two", train__loss=[2.0, 2.0], val__nll=[1.0, 3.0])
    online = metrics(tmp_path / "online", actor__loss=[1.0])
    given = {"SFT": [str(one), str(two)], "RL": str(online)}
    found = dynamics.run(config("dynamics", runs=given, metrics=["loss", "val/*"], smooth=2))
    curves = {(r["label"], r["step"]): r for r in found.tables["dynamics"] if r["metric"] == "loss"}
    assert list(curves) == [("SFT", 1), ("SFT", 2), ("RL", 1)]  # step 3 is in one run alone
    assert [curves["SFT", k]["mean"] for k in (1, 2)] == [3.0, 2.5]
    assert curves["SFT", 1]["high"] == pytest.approx(3 + t975(1) * 1.0) and curves["RL", 1]["low"] is None
    assert found.notes == ["SFT has no val/nll in 1 of 2 runs", "RL has no val/nll"]
    assert [r["mean"] for r in found.tables["dynamics"] if r["metric"] == "val/nll"] == [1.0, 3.0]
    assert [r["value"] for r in found.tables["dynamics_runs"] if r["path"] == str(one)] == [4.0, 2.0, 6.0]
    assert "mean over the last 2" in found.figures["dynamics_loss"].caption
    _, axes = plt.subplots()
    found.figures["dynamics_loss"].draw(axes)
    assert len(axes.lines) == 2 + 1 and len(axes.collections) == 1  # means, the single run's logged values, one band
    plt.close("all")


def test_validation_is_not_smoothed(tmp_path: Path) -> None:
    path = str(metrics(tmp_path / "a", val__nll=[4.0, 2.0]))
    found = dynamics.run(config("dynamics", runs={"A": path}, smooth=8))
    assert [r["mean"] for r in found.tables["dynamics"]] == [4.0, 2.0]
    assert "not smoothed" in found.figures["dynamics_val_nll"].caption


def test_accuracy_has_the_interval_of_its_evaluation(tmp_path: Path) -> None:
    series = {"eval__gsm8k__avg": [0.2, 0.4], "eval__gsm8k__ci95_low": [0.1, 0.3], "eval__gsm8k__ci95_high": [0.3, 0.6]}
    a, b = (str(metrics(tmp_path / name, **series)) for name in ("a", "b"))
    found = dynamics.run(config("dynamics", runs={"A": a}, metrics="eval/*/avg"))
    assert [(r["low"], r["mean"], r["high"]) for r in found.tables["dynamics"]] == [(0.1, 0.2, 0.3), (0.3, 0.4, 0.6)]
    assert "over problems, of one evaluation" in found.figures["dynamics_eval_gsm8k_avg"].caption
    seeds = dynamics.run(config("dynamics", runs={"A": [a, b]}, metrics="eval/*/avg"))
    assert [(r["low"], r["over"]) for r in seeds.tables["dynamics"]] == [(0.2, "runs"), (0.4, "runs")]


def test_units_of_axes() -> None:
    assert dynamics.unit("train/rectified_frac") == ("rectified tokens (%)", 100.0)
    assert dynamics.unit("eval/math500/avg") == ("accuracy on math500 (%)", 100.0)
    assert dynamics.unit("grad_norm") == ("gradient norm, before clipping", 1.0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"step": 1, "train/loss": "high"}', ["line 1", "train/loss is 'high', not a number"]),
        ('{"train/loss": 1.0}', ["line 1 has no step"]),
        ("[1]", ["line 1 has no step"]),
        ('{"step": 1}', ["holds no metrics"]),
        ('{"step": 1, "train/nll": 1.0}', ["no metric 'loss'; there are: train/nll"]),
    ],
)
def test_bad_metrics_files(tmp_path: Path, line: str, words: list[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(InputError) as error:
        dynamics.run(config("dynamics", runs=str(tmp_path), metrics="loss"))
    assert all(word in str(error.value) for word in [*words, str(tmp_path / "metrics.jsonl")])


def test_entropy_is_of_one_kind(tmp_path: Path) -> None:
    rl = str(metrics(tmp_path / "rl", actor__entropy=[0.5, 0.25]))
    eaft = str(metrics(tmp_path / "eaft", train__entropy=[1.0]))
    none = str(metrics(tmp_path / "sft", train__loss=[1.0]))
    found = entropy.run(config("entropy", runs={"GRPO": rl}))
    assert [r["mean"] for r in found.tables["entropy"]] == [0.5, 0.25] and list(found.figures) == ["entropy"]
    with pytest.raises(InputError, match=r"sft/metrics\.jsonl: no entropy is logged.*actor/entropy"):
        entropy.run(config("entropy", runs=[rl, none]))
    with pytest.raises(InputError, match="not comparable"):
        entropy.run(config("entropy", runs=[rl, eaft]))


# ---- sweep ----


def trained(folder: Path, tau: float, rectified: Sequence[float]) -> str:
    metrics(folder, train__rectified_frac=rectified)
    (folder / "config.yaml").write_text(f"objective:\n  tau: {tau}\n  name: gft\n")
    return str(folder / "model")


@pytest.fixture
def swept(tmp_path: Path) -> list[str]:
    models = [trained(tmp_path / f"run{tau}", tau, [tau / 2, tau]) for tau in (0.7, 0.3)]
    return [str(result(tmp_path / f"eval{i}", counts, model)) for i, (counts, model)
            in enumerate(zip(([4, 2, 1], [1, 2, 0]), models, strict=True))]  # fmt: skip


def test_sweep_reads_the_key_from_the_trainings(tmp_path: Path, swept: list[str]) -> None:
    base = str(result(tmp_path / "base", [1, 1, 1]))
    given = config("sweep", runs={"GFT": swept}, key="objective.tau", training_metric="rectified_frac", baseline=base)
    found = sweep.run(given)
    records = found.tables["sweep"]
    assert [(r["at"], r["mean"]) for r in records] == [(0.3, 0.25), (0.7, pytest.approx(7 / 12))]
    width = t975(2) * np.std([1, 0.5, 0.25], ddof=1) / math.sqrt(3)
    assert records[1]["high"] - records[1]["mean"] == pytest.approx(width)
    assert [r["mean"] for r in found.tables["sweep_training"]] == pytest.approx([0.225, 0.525])
    last = sweep.run(given | {"reduce": "last"}).tables["sweep_training"]
    assert [r["mean"] for r in last] == [0.3, 0.7]
    assert found.tables["sweep_baseline"][0]["mean"] == 0.25
    figure, axes = plt.subplots()
    found.figures["sweep"].draw(axes)
    assert len(axes.containers) == 1 and len(figure.axes) == 2 and len(figure.axes[1].containers) == 1
    assert axes.containers[0].lines[0].get_ydata().tolist() == pytest.approx([25.0, 700 / 12])
    assert len(axes.get_legend().get_texts()) == 3
    plt.close("all")


def test_sweep_over_given_values_seeds_and_benchmarks(tmp_path: Path) -> None:
    for run, counts in (("a", ([4, 0], [2, 2])), ("b", ([0, 0], [4, 2]))):
        for name, part in zip(("x", "y"), counts, strict=True):
            result(tmp_path / run / name, part, name=name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    found = sweep.run(config("sweep", runs={"SFT": {1e-5: a, 1e-3: [a, b]}})).tables["sweep"]
    assert [r["mean"] for r in found] == [0.5, pytest.approx((0.5 + 0.375) / 2)]
    # benchmarks x (1, 0) and y (.5, .5): variances of the means .25 and 0, so one degree of freedom
    assert found[0]["high"] - 0.5 == pytest.approx(t975(1) * math.sqrt(0.25) / 2)
    assert (found[1]["over"], found[1]["units"]) == ("runs", 2)
    passed = sweep.run(config("sweep", runs={"SFT": {1: a}}, metric="pass@4", benchmark="x")).tables["sweep"][0]
    assert (passed["mean"], passed["low"]) == (0.75, None)


def test_the_scale_of_a_swept_key() -> None:
    assert sweep.is_geometric([1e-5, 5e-5, 1e-4, 2e-4]) and sweep.is_geometric([32, 64, 128, 256])
    assert not sweep.is_geometric([0.1, 0.3, 0.5, 0.7, 0.9]) and not sweep.is_geometric([0.0, 1.0])
    assert sweep.is_geometric([1.0, 10.0]) and not sweep.is_geometric([0.5])


def test_bad_sweeps(tmp_path: Path, swept: list[str]) -> None:
    def fails(match: str, **values: Any) -> None:
        with pytest.raises(InputError, match=match) as error:
            sweep.run(config("sweep", **values))
        assert "\n" not in str(error.value)

    fails("results without a value", runs=swept)
    fails(r"run0\.7/config\.yaml: objective\.name is 'gft', not a number", runs={"GFT": swept}, key="objective.name")
    fails("no metric 'train/clipped'", runs={"GFT": swept}, key="objective.tau", training_metric="train/clipped")
    fails("has no pass@64; it has pass@4", runs={"GFT": swept}, key="objective.tau", metric="pass@64")
    fails("not one of avg, pass@K", runs={"GFT": swept}, key="objective.tau", metric="accuracy")
    other = str(result(tmp_path / "other", [1, 1, 1, 1]))
    fails("different problems for gsm8k", runs={"GFT": swept}, key="objective.tau", baseline=other)
    lost = str(result(tmp_path / "lost", [1, 1, 1], model="/nowhere/model"))
    fails("lies in no training's output_dir", runs={"GFT": [lost]}, key="objective.tau")


# ---- change ----


def test_changes_are_paired_and_averaged_over_benchmarks(tmp_path: Path) -> None:
    for run, counts in (("base", ([0, 4], [1, 1])), ("tuned", ([2, 4], [3, 1])), ("again", ([4, 4], [3, 3]))):
        for name, part in zip(("x", "y"), counts, strict=True):
            result(tmp_path / run / name, part, name=name)
    base, tuned, again = (str(tmp_path / name) for name in ("base", "tuned", "again"))
    found = change.run(config("change", runs={"SFT": tuned, "both": [tuned, again]}, baseline=base))
    records = {(r["label"], r["benchmark"]): r for r in found.tables["change"]}
    # x: 1/2 and 0; y: 1/2 and 0: each mean 1/4, and 3/8 the error of both times t
    assert [records["SFT", name]["mean"] for name in ("x", "y", "mean")] == pytest.approx([0.25] * 3)
    assert records["SFT", "x"]["high"] - 0.25 == pytest.approx(t975(1) * 0.25)
    assert records["SFT", "mean"]["high"] - 0.25 == pytest.approx(t975(2) * 0.25 / math.sqrt(2))
    assert records["SFT", "x"]["accuracy"] == 0.75
    assert records["both", "y"]["mean"] == pytest.approx((0.25 + 0.5) / 2) and records["both", "y"]["over"] == "runs"
    levels = change.run(config("change", runs={"SFT": tuned}, benchmark="y"))
    assert [(r["benchmark"], r["mean"]) for r in levels.tables["change"]] == [("y", 0.5)]
    _, axes = plt.subplots()
    found.figures["change"].draw(axes)
    assert len(axes.patches) == 2 * 3 and axes.patches[0].get_height() == pytest.approx(25)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "mean"]
    plt.close("all")


def test_changes_need_the_same_problems_and_no_points(tmp_path: Path) -> None:
    a, b = str(result(tmp_path / "a", [1, 1])), str(result(tmp_path / "b", [1, 1, 1]))
    with pytest.raises(InputError, match="different problems for gsm8k"):
        change.run(config("change", runs={"A": a}, baseline=b))
    with pytest.raises(InputError, match=r"runs\.A has points"):
        change.run(config("change", runs={"A": {1: a}}))


# ---- the command ----


@pytest.mark.parametrize("what", command.WHATS)
def test_every_analysis_has_keys_of_its_own(what: str) -> None:
    found = compose("analyze", [f"analysis={what}"])
    assert {"runs", "output_dir", "formats"} < set(found)


def test_neither_verl_nor_torch_is_imported() -> None:
    modules = ", ".join(f"verl_dft.analysis.{name}" for name in ("command", "output", *command.WHATS))
    code = f"import sys, {modules}; print(sorted({{'verl', 'torch', 'vllm'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_labels_and_values_on_the_command_line(tmp_path: Path) -> None:
    override = f"runs={{SFT+GRPO: {{1e-5: {tmp_path}, 5e-5: {tmp_path}}}, GFT \\(no mix\\): {{16: {tmp_path}}}}}"
    points = parse_runs(plain(compose("analyze", [override]))["runs"])
    assert [(point.label, point.at) for point in points] == [
        ("SFT+GRPO", 1e-5),
        ("SFT+GRPO", 5e-5),
        ("GFT (no mix)", 16),
    ]


def test_runs_from_a_file(tmp_path: Path) -> None:
    folder = metrics(tmp_path / "sft", train__loss=[1.0, 0.5])
    file = tmp_path / "figure.yaml"
    file.write_text(f"defaults: [/analyze, _self_]\nruns:\n  SFT (seed 1): {folder}\nsmooth: 2\n")
    out = tmp_path / "out"
    assert command.main(["dynamics", "--config-name", str(file), f"output_dir={out}"]) == 0
    assert pq.read_table(out / "dynamics.parquet").to_pylist()[1] == {
        "label": "SFT (seed 1)", "metric": "loss", "step": 2, "mean": 0.75, "low": None, "high": None, "units": 1,
        "over": "runs"}  # fmt: skip
    assert json.loads((out / "dynamics.parquet.manifest.json").read_text())["num_rows"] == 2


def test_the_command_writes_figures_data_and_manifest(
    tmp_path: Path, runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = "runs={" + ",".join(f"{label}: {path}" for label, path in runs.items()) + "}"
    assert command.main(["tokens", given, f"output_dir={out}", "words=0", "formats=[png,svg]"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "tokens.md", "tokens.parquet", "tokens.parquet.manifest.json", "tokens.png", "tokens.svg", "tokens_change.png",
        "tokens_change.svg", "tokens_thresholds.parquet", "tokens_thresholds.parquet.manifest.json"]  # fmt: skip
    png = (out / "tokens.png").read_bytes()
    assert png.startswith(PNG) and plt.imread(out / "tokens.png").shape[:2] == (600, 900)
    table = pq.read_table(out / "tokens.parquet")
    assert table.num_rows == 40 and table["count"].to_pylist()[:20].count(0) == 16
    manifest = json.loads((out / "tokens.parquet.manifest.json").read_text())
    assert set(manifest["inputs"]) == set(runs) and "tokens.png" in manifest["figures"]
    assert (out / "tokens.md").read_text() in capsys.readouterr().out
    assert command.main(["tokens", given, f"output_dir={out}", "words=0"]) == 0
    assert (out / "tokens.png").read_bytes() == png


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no analysis was named", "tokens, kl, entropy, stages, dynamics, sweep"]),
        (["token"], ["'token' is no analysis"]),
        (["tokens"], ["runs is not set"]),
        (["kl", "runs=[.]"], ["output_dir is not set"]),
        (["kl", "runs=[.]", "output_dir=x", "formats=jpg"], ["formats=['jpg']", "png, svg, pdf"]),
        (["dynamics", "bins=3"], ["no key 'bins'"]),
        (["tokens", "runs=[nowhere]", "output_dir=x"], ["nowhere does not exist"]),
        (["sweep", "runs=[.]", "output_dir=x", "key=a"], ["holds no result.json"]),
        (["stages", "runs=[.]", "output_dir=x"], ["statistics.json does not exist"]),
    ],
)
def test_bad_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        command.main(argv)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()
