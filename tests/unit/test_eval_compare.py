"""``verl-dft compare``: tests against closed forms, planted differences, and inputs that cannot be compared."""

import importlib.util
import itertools
import json
import random
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

from verl_dft.cli import main
from verl_dft.errors import InputError
from verl_dft.evaluation.compare import compare, markdown, paired_t_p, sign_flip_p

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "simulate_compare.py"


def write(folder: Path, counts: list[int], benchmark: str = "b", n: int = 4, **changes: object) -> Path:
    """A result as ``evaluate`` writes it, as far as it is read here."""
    problems = [{"id": f"p{i}", "num_correct": c, "avg": c / n} for i, c in enumerate(counts)]
    result = {"model": folder.name, "benchmark": benchmark, "n": n, "num_problems": len(counts), "temperature": 1.0,
              "num_samples": n * len(counts), "per_problem": problems, **changes}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_one_benchmark_by_hand(tmp_path: Path) -> None:
    """Differences .25 0 .25 0: mean 12.5 points, se 7.217, t(.975; 3) = 3.1824: +- 22.97; t = 1.732, p = .1817.

    Signs of the two that differ: of ++ +- -+ -- two are as far from 0, so p = .5.
    """
    a, b = write(tmp_path / "a", [2, 0, 1, 3]), write(tmp_path / "b", [3, 0, 2, 3])
    found = compare(a, b)
    (row,) = found["rows"]
    assert (row["a"], row["b"], row["difference"], row["num_problems_that_differ"]) == (0.375, 0.5, 0.125, 2)
    assert row["ci95"] == pytest.approx((-0.10467, 0.35467), abs=1e-5)
    assert row["p_value"] == 0.5 and row["p_value_t"] == pytest.approx(0.18169, abs=1e-5)
    assert "| b | 4 | 4 | 37.5 | 50.0 | +12.5 | -10.5 to +35.5 | 0.500 | 0.182 |" in markdown(found)
    assert found["average"] is None and not found["notes"]


def test_order_of_problems_does_not_matter_and_exchange_mirrors(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [2, 0, 1, 3]), write(tmp_path / "b", [3, 1, 2, 0])
    result = json.loads((b / "result.json").read_text())
    result["per_problem"].reverse()
    (b / "result.json").write_text(json.dumps(result))
    there, back = compare(a, b)["rows"][0], compare(b, a)["rows"][0]
    assert there["difference"] == -back["difference"] == 0
    assert there["ci95"] == pytest.approx([-end for end in reversed(back["ci95"])])
    assert there["p_value"] == back["p_value"] == 1


def test_sign_flips_are_all_counted_when_few_and_drawn_when_many() -> None:
    generator = random.Random(0)
    for _ in range(20):
        values = [generator.randint(-4, 4) / 4 for _ in range(7)]
        flips = itertools.product((1, -1), repeat=7)
        far = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) >= abs(sum(values)) for signs in flips]
        assert sign_flip_p(values) == pytest.approx(fmean(far))
    values = [generator.gauss(0.3, 1) for _ in range(16)]
    zeros = [1e-13] * 40  # problems on which both agree
    assert sign_flip_p(values + zeros) == sign_flip_p(values)
    one_more = [*values, 1e-6]  # seventeen are drawn, and hardly differ from sixteen
    assert sign_flip_p(one_more, num_draws=20_000) == pytest.approx(sign_flip_p(values), abs=0.015)
    assert sign_flip_p(one_more, seed=1) == sign_flip_p(one_more, seed=1)
    assert sign_flip_p([1.0] * 40, num_draws=99) == 1 / 100  # no draw is as far, yet chance is never 0
    assert sign_flip_p([0.0, 0.0]) == 1 and sign_flip_p([1.0]) == 1 and sign_flip_p([1.0] * 6) == 2 / 64


def test_t_test_agrees_with_its_interval_and_with_scipy() -> None:
    generator = random.Random(1)
    samples = [[generator.gauss(0.2, 1) for _ in range(generator.randint(3, 50))] for _ in range(50)]
    for values in samples:
        half = abs(fmean(values)) / (stdev(values) / len(values) ** 0.5)
        assert (paired_t_p(values) < 0.05) == (half > _quantile(len(values) - 1))
    assert paired_t_p([0.5, 0.5]) is None
    stats = pytest.importorskip("scipy.stats")
    for values in samples:
        assert paired_t_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-7)


def _quantile(degrees: int) -> float:
    from verl_dft.evaluation.student import t975

    return t975(degrees)


def test_a_planted_difference_is_found_and_an_absent_one_is_not() -> None:
    """272 problems, 16 samples each (as Minerva has), 200 pairs; of 1,000, 99.5% were found with 5.2% false alarms."""
    spec = importlib.util.spec_from_file_location("simulate_compare", SCRIPT)
    simulate = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = simulate
    spec.loader.exec_module(simulate)
    planted = simulate.rates(5.0, 272, 16, num_pairs=200, seed=1, num_draws=400)
    absent = simulate.rates(0.0, 272, 16, num_pairs=200, seed=2, num_draws=400)
    assert planted.found_sign_flip >= 0.97 and planted.found_t >= 0.97
    assert absent.found_sign_flip <= 0.095 and absent.found_t <= 0.095  # 5% + 2.9 standard deviations
    assert min(planted.covered, absent.covered) >= 0.9
    assert planted.mean_difference == pytest.approx(0.05, abs=0.003)
    assert absent.mean_difference == pytest.approx(0, abs=0.003)


def test_several_benchmarks_and_their_average(tmp_path: Path) -> None:
    """Average: mean of the differences; error root(sum of squared errors) / 2; Welch and Satterthwaite's freedom."""
    for side, big, small in (("a", [1, 2, 0, 3, 2, 1], [0, 1]), ("b", [2, 2, 1, 3, 4, 0], [2, 2])):
        write(tmp_path / side / "big", big, "big")
        write(tmp_path / side / "small", small, "small")
    found = compare(tmp_path / "a", tmp_path / "b")
    big, small = [0.25, 0, 0.25, 0, 0.5, -0.25], [0.5, 0.25]
    average = found["average"]
    assert average["difference"] == pytest.approx((fmean(big) + fmean(small)) / 2)
    parts = [stdev(values) ** 2 / len(values) for values in (big, small)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 5 + parts[1] ** 2 / 1)
    width = _quantile(freedom) * sum(parts) ** 0.5 / 2
    assert average["ci95"] == pytest.approx((average["difference"] - width, average["difference"] + width))
    flips = itertools.product((1, -1), repeat=8)
    weighted = [d / 12 for d in big] + [d / 4 for d in small]
    sums = [abs(sum(s * w for s, w in zip(signs, weighted, strict=True))) for signs in flips]
    assert average["p_value"] == pytest.approx(fmean(s >= abs(sum(weighted)) - 1e-9 for s in sums))
    assert [row["benchmark"] for row in found["rows"]] == ["big", "small"] and "| average |" in markdown(found)
    only = compare(tmp_path / "a", tmp_path / "b", ["small"])
    assert [row["benchmark"] for row in only["rows"]] == ["small"] and only["average"] is None


def test_settings_that_differ_are_noted(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [1, 2]), write(tmp_path / "b", [1, 3], temperature=0.5)
    assert compare(a, b)["notes"] == ["b: temperature is 1.0 in A and 0.5 in B"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [1, 2, 3])
    (tmp_path / "empty").mkdir()
    write(tmp_path / "twice" / "x", [1, 2, 3])
    write(tmp_path / "twice" / "y", [1, 2, 3])
    broken = write(tmp_path / "broken", [1])
    (broken / "result.json").write_text("{")
    cases = [
        (write(tmp_path / "n", [1, 2, 3], n=8), "b: A has n=4 samples per problem, B n=8"),
        (write(tmp_path / "fewer", [1, 2]), "1 problems are in one result alone .'p2'."),
        (write(tmp_path / "other", [1, 2, 3], "c"), "only one of .* has a result for b, c; .*benchmark="),
        (write(tmp_path / "missing", [1, 2, 3], num_samples=11), "3 problems and 11 samples of b where .* missing"),
        (write(tmp_path / "range", [1, 2, 5]), "outside 0 to 1"),
        (tmp_path / "empty", "holds no result.json"),
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path / "twice", "two results for b"),
        (broken, "is not a result of verl-dft evaluate"),
    ]
    for b, message in cases:
        with pytest.raises(InputError, match=message):
            compare(a, b)
    with pytest.raises(InputError, match="has no result for x; it has b"):
        compare(a, a, ["x"])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [2, 0, 1, 3]), write(tmp_path / "b|x", [3, 0, 2, 3])
    assert main(["compare", str(a), str(b), f"output_dir={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert out.strip() == (tmp_path / "out" / "compare.md").read_text().strip() and "+12.5" in out
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert saved["rows"][0]["difference"] == 0.125
    assert main(["compare", str(a), str(b), "--json", "benchmark=b", "seed=3"]) == 0
    assert json.loads(capsys.readouterr().out)["tests"]["seed"] == 3
    for argv, message in (
        ([str(a)], "takes two folders, got 1"),
        ([str(a), str(b), "sed=1"], "unknown option 'sed=1'"),
        ([str(a), str(b), "--js"], "unknown option '--js'"),
        ([str(a), str(b), "seed=x"], "whole number"),
    ):
        assert main(["compare", *argv]) == 2
        assert message in capsys.readouterr().err
