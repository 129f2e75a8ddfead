"""Data rewriting's planner, on scripted sources of known probabilities and on verdicts given by hand."""

import functools
import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from verl_dft.build.rewrite import NO_SOLUTION, NO_VERDICT, RewriteOptions, RewritePlanner, Stage, make_row
from verl_dft.build.rewrite_command import expected_samples
from verl_dft.build.rewrite_statistics import rewrite_statistics
from verl_dft.data.prompts import PROMPTS
from verl_dft.data.records import Problem
from verl_dft.sampling.ask import Sampling
from verl_dft.sampling.record import Sample


def _script(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simulate = _script("simulate_rewrite")
Response, SimulatedSampler, make_options = simulate.Response, simulate.SimulatedSampler, simulate.make_options


# ---- with and without early stopping: the same data ----

NUM_DRAWS, N = 10_000, 4
SELF = [Response("short", 0.12, True, 10), Response("middle", 0.10, True, 20), Response("long", 0.08, True, 90)]
GUIDED = [Response("short", 0.06, True, 10), Response("middle", 0.06, True, 20), Response("long", 0.08, True, 90)]
MODEL = {"self": [*SELF, Response("wrong", 0.70, False, 50)], "guided": [*GUIDED, Response("wrong", 0.80, False, 50)]}
PROBLEMS = [Problem(str(i), f"problem {i}", "1", "the solution") for i in range(NUM_DRAWS)]
LEAST_P = 1e-3
"""Seeds are fixed, so a test passes or fails for good; a right rule fails at one seed of a thousand."""


def _cells() -> dict[tuple[str, str], float]:
    """(stage, kept response) -> probability under the literal procedure, by hand."""
    chances, reach = {}, 1.0
    for stage, responses in (("self", SELF), ("guided", GUIDED)):
        right = sum(r.chance for r in responses)
        solved = 1 - (1 - right) ** N
        chances |= {(stage, r.text): reach * solved * r.chance / right for r in responses}
        reach *= 1 - solved
    return {**chances, ("fallback", ""): reach}


def _draw(
    options: RewriteOptions, seed: int, planner: type[RewritePlanner] = RewritePlanner, **kwargs: bool
) -> Counter:
    done = simulate.run(planner(PROBLEMS, options), SimulatedSampler(lambda _, stage: MODEL[stage], seed, **kwargs))
    return Counter((o.stage, o.kept.response if o.kept else "") for o in done.outcomes())


@functools.cache
def _literal() -> Counter:
    return _draw(make_options(N, None), 1)


def _p_value(chi_square: float, degrees: int) -> float:
    """P(X > chi_square); closed form for an even number of degrees of freedom."""
    assert degrees % 2 == 0
    half = chi_square / 2
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(degrees // 2))


def _p_fit(counts: Counter) -> float:
    cells = _cells()
    assert math.isclose(sum(cells.values()), 1) and counts.keys() <= cells.keys() and counts.total() == NUM_DRAWS
    terms = ((counts[cell] - NUM_DRAWS * p) ** 2 / (NUM_DRAWS * p) for cell, p in cells.items())
    return _p_value(sum(terms), len(cells) - 1)


def _p_same(one: Counter, other: Counter) -> float:
    terms = ((one[cell] - other[cell]) ** 2 / (one[cell] + other[cell]) for cell in one | other)
    return _p_value(sum(terms), len(one | other) - 1)


def test_p_values() -> None:
    # from tables of the chi-square distribution
    assert _p_value(12.592, 6) == pytest.approx(0.05, abs=1e-4) and _p_value(22.458, 6) == pytest.approx(1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "wave_size", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_early_stopping_gives_the_same_stages_and_the_same_responses(wave_size: int) -> None:
    """Chi-square of (stage, kept response): against the exact probabilities, and against independent literal draws."""
    literal, early = _literal(), _draw(make_options(N, wave_size), 2)
    assert _p_fit(literal) > LEAST_P and _p_fit(early) > LEAST_P and _p_same(literal, early) > LEAST_P
    assert len(early) == 7


class ShortestWins(RewritePlanner):
    """The rule of whoever takes the first response to be finished."""

    def _choose(self, stage: Stage, correct: Sequence[Sample]) -> Sample:
        return min(correct, key=lambda sample: sample.num_tokens)


class LastWaveForgotten(RewritePlanner):
    def _all_waves(self):
        return (wave for wave in super()._all_waves() if wave[1] == 0 or wave[1] + 1 < N // 2)


@pytest.mark.slow
@pytest.mark.parametrize(("wave_size", "planner"), [(2, ShortestWins), (None, ShortestWins), (2, LastWaveForgotten)])
def test_a_wrong_rule_is_detected(wave_size: int | None, planner: type[RewritePlanner]) -> None:
    wrong = _draw(make_options(N, wave_size), 2, planner)
    assert _p_fit(wrong) < 1e-6 and _p_same(_literal(), wrong) < 1e-6


@pytest.mark.slow
def test_stages_that_share_their_luck_are_detected() -> None:
    assert _p_fit(_draw(make_options(N, 2), 2, shared_luck=True)) < 1e-6


def test_on_the_same_luck_every_problem_ends_in_the_same_stage() -> None:
    ends = []
    for wave_size in (None, 1, 3):
        planner = RewritePlanner(PROBLEMS[:500], make_options(N, wave_size))
        simulate.run(planner, SimulatedSampler(lambda _, stage: MODEL[stage], 5))
        ends.append([outcome.stage for outcome in planner.outcomes()])
    assert ends[0] == ends[1] == ends[2] and len(set(ends[0])) == 3


# ---- what it saves ----


def test_tokens_saved_at_uniform_solve_rates() -> None:
    """n = 8, waves of 2: at most 60% of the literal procedure's tokens, and what the theory says."""
    tokens = {True: 200, False: 350}
    problems, responses = simulate.uniform_problems(4000, 3, tokens)
    used, theory = {}, {}
    for wave_size in (None, 2):
        options = make_options(8, wave_size)
        planner = simulate.run(RewritePlanner(problems, options), SimulatedSampler(responses, 3))
        samples, used[wave_size] = simulate.measured(planner)
        in_theory, theory[wave_size] = simulate.expected(options, tokens)
        assert samples == pytest.approx(in_theory, rel=0.03)
        assert used[wave_size] == pytest.approx(theory[wave_size], rel=0.03)
    share, in_theory = used[2] / used[None], theory[2] / theory[None]
    print(f"tokens, n=8, waves of 2: {100 * share:.1f}% of the literal procedure (theory {100 * in_theory:.1f}%)")
    assert share <= 0.6 and share == pytest.approx(in_theory, rel=0.03)


def test_expected_samples() -> None:
    assert expected_samples([8]) == 8
    assert expected_samples([2, 2, 2, 2]) == pytest.approx(2 * (1 + 1 / 3 + 1 / 5 + 1 / 7))
    # the theory of the script, which adds up over right and wrong samples and both stages
    total, _ = simulate.expected(make_options(8, 2), {True: 1, False: 1})
    assert total == pytest.approx(expected_samples([2, 2, 2, 2]) * (1 + 1 / 9))
    # by simulation
    problems, responses = simulate.uniform_problems(4000, 1, {True: 1, False: 1})
    options = RewriteOptions(*_stages(5), stages="self_only", wave_size=2)
    planner = simulate.run(RewritePlanner(problems, options), SimulatedSampler(responses, 1))
    assert simulate.measured(planner)[0] == pytest.approx(
        expected_samples(options.wave_sizes(planner.options.self_stage)), rel=0.03
    )


# ---- the planner ----


def _stages(n: int = 4, **changes: object) -> tuple[Stage, Stage]:
    return (
        Stage("self", n, Sampling(), "raw", PROMPTS["raw"], **changes),
        Stage("guided", n, Sampling(), "digest-and-retell", PROMPTS["digest-and-retell"], **changes),
    )


def _answer(plan: dict[str, str], **options: object) -> RewritePlanner:
    """Run a planner on problems named by ``plan``: id -> verdicts by stage, e.g. ``"wwcw/c"`` (wrong, correct …)."""
    names = {"c": "correct", "w": "wrong", "t": "timeout", "n": "no_answer"}
    problems = [Problem(id, f"Q {id}", "1", None if id.startswith("bare") else f"S {id}") for id in plan]
    planner = RewritePlanner(
        problems, RewriteOptions(*_stages(), **options), {i: "bad gold" for i in plan if i == "bad"}
    )
    while (wave := planner.next_wave()) is not None:
        assert planner.next_wave() is wave
        told = []
        for ask in wave.asks:
            grade = names[plan[ask.problem_id].split("/")[wave.stage.name == "guided"][ask.index]]
            text = f"{wave.stage.name} {ask.index}"
            told.append(
                Sample(
                    ask.problem_id,
                    ask.index,
                    text,
                    "stop",
                    grade,
                    qwen=grade,
                    prompt_name=ask.prompt_name,
                    token_ids=[7, 2],
                    num_tokens=2,
                    logp=[-0.5, -0.25],
                )  # fmt: skip
            )
        planner.tell(told)
    return planner


PLAN = {"a": "wwcc", "b": "wwww/wcww", "c": "wwww/wwww", "d": "cwww", "t": "wwwt/wwww"}


def test_waves_hold_the_open_problems_in_order_and_the_lowest_correct_index_wins() -> None:
    planner = _answer(PLAN)
    asked = [[(a.problem_id, a.index) for a in wave.asks] for wave, _ in planner.history]
    first = [(p, i) for p in "abcdt" for i in (0, 1)]
    assert asked[:2] == [first, [(p, i) for p in "abct" for i in (2, 3)]]
    assert asked[2:] == [[(p, i) for p in "bct" for i in (0, 1)], [(p, i) for p in "ct" for i in (2, 3)]]
    ends = {o.problem.id: (o.stage, o.origin, o.kept.response if o.kept else o.reason) for o in planner.outcomes()}
    assert ends == {
        "a": ("self", "self", "self 2"),
        "b": ("guided", "guided", "guided 1"),
        "c": ("fallback", "expert", "unsolved"),
        "d": ("self", "self", "self 0"),
        "t": ("fallback", "expert", NO_VERDICT),
    }
    asks = [ask for wave, _ in planner.history for ask in wave.asks]
    assert len({(a.stream, a.problem_id, a.index) for a in asks}) == len(asks)
    assert {a.stream for a in asks} == {"rewrite/self", "rewrite/guided"}
    assert all(("S " in a.messages[-1]["content"]) == (a.stream == "rewrite/guided") for a in asks)


def test_the_literal_procedure_draws_everything_and_keeps_a_seeded_random_one() -> None:
    plan, kept = {str(i): "cwcc" for i in range(300)}, []
    for seed in (0, 0, 1):
        planner = _answer(plan, early_stop=False, seed=seed)
        assert [len(wave.asks) for wave, _ in planner.history] == [1200]
        kept.append([outcome.kept.index for outcome in planner.outcomes()])
    assert kept[0] == kept[1] != kept[2]
    counts = Counter(kept[0])
    assert counts.keys() == {0, 2, 3} and _p_value(sum((n - 100) ** 2 / 100 for n in counts.values()), 2) > LEAST_P
    planner = _answer(PLAN, early_stop=False)
    assert [len(wave.asks) for wave, _ in planner.history] == [20, 12]
    assert [outcome.stage for outcome in planner.outcomes()] == ["self", "guided", "fallback", "self", "fallback"]


@pytest.mark.parametrize(
    ("stages", "origins", "num_samples"),
    [
        ("full", ["self", "guided", "expert", "self", "expert"], 28),
        ("self_only", ["self", "expert", "expert", "self", "expert"], 18),
        ("guided_only", ["expert", "guided", "expert", "expert", "expert"], 28),
    ],
)
def test_ablations(stages: str, origins: list[str], num_samples: int) -> None:
    """Table 4: the stage that is left out leaves the expert's text."""
    planner = _answer(PLAN, stages=stages)
    outcomes = planner.outcomes()
    assert [outcome.origin for outcome in outcomes] == origins
    assert sum(len(samples) for _, samples in planner.history) == num_samples
    found = rewrite_statistics(outcomes, planner.history, planner.options)
    # which stage settled a problem is the same question under every ablation
    assert found["table1"]["self"]["count"] == 2 and found["rows"]["by_origin"] == dict(
        sorted(Counter(origins).items())
    )


def test_a_problem_without_a_solution_is_dropped_where_it_needs_one_and_a_bad_gold_falls_back_unsampled() -> None:
    plan = {"bare1": "wwcw", "bare2": "wwww", "bad": ""}
    planner = _answer(plan)
    assert {ask.problem_id for wave, _ in planner.history for ask in wave.asks} == {"bare1", "bare2"}
    assert [(o.stage, o.origin, o.reason) for o in planner.outcomes()] == [
        ("self", "self", ""),
        ("dropped", None, NO_SOLUTION),
        ("fallback", "expert", "bad gold"),
    ]
    found = rewrite_statistics(planner.outcomes(), planner.history, planner.options)
    assert found["dropped"] == {NO_SOLUTION: 1} and found["fallback_reasons"] == {"bad gold": 1}
    assert found["table1"]["total"] == {"count": 2, "share": 1.0} and found["num_problems"] == 3
    # the expert's text is also what a self-solved problem has under guided_only
    kept = {o.problem.id: o.origin for o in _answer(plan, stages="guided_only").outcomes()}
    assert kept == {"bare1": None, "bare2": None, "bad": "expert"}


def test_the_verifier_is_chosen_by_stage() -> None:
    sample = Sample("p", 0, "x", "stop", "wrong", qwen="correct")
    strict, lenient = _stages(verifier="strict")[0], _stages(verifier="qwen")[1]
    assert not strict.accepts(sample) and lenient.accepts(sample)
    assert strict.accepts(Sample("p", 0, "x", "stop", "correct", qwen="correct"))


def test_a_response_that_was_cut_off_is_accepted_where_asked() -> None:
    cut_off = Sample("p", 0, "x", "length", "correct", qwen="correct")
    assert not _stages()[0].accepts(cut_off) and _stages()[0].correct(cut_off)
    assert _stages(keep_truncated=True)[0].accepts(cut_off)


def test_rows_have_the_plain_problem_and_the_sampled_ids() -> None:
    planner = _answer(PLAN)
    rows = {o.problem.id: make_row(o, planner.options, "raw", PROMPTS["raw"]) for o in planner.outcomes()}
    for id, row in rows.items():
        assert row.messages[:-1] == [{"role": "user", "content": f"Q {id}"}] and row.problem_id == id
    assert [rows["a"].messages[-1]["content"], rows["a"].response_ids, rows["a"].behavior_logp] == [
        "self 2", [7, 2], [-0.5, -0.25],
    ]  # fmt: skip
    assert (
        rows["b"].origin == "guided" and rows["b"].behavior_logp == [-0.5, -0.25] and rows["b"].finish_reason == "stop"
    )
    assert rows["c"].messages[-1]["content"] == "S c" and rows["c"].response_ids is rows["c"].behavior_logp is None
    # sampled with one prompt and trained with another: not that row's log-probs
    boxed = make_row(planner.outcomes()[0], planner.options, "boxed", PROMPTS["boxed"])
    assert boxed.behavior_logp is None and boxed.response_ids == [7, 2] and "boxed" in boxed.messages[0]["content"]


def test_telling_something_else_than_was_asked_is_refused() -> None:
    planner = RewritePlanner(PROBLEMS[:2], make_options(2, 1))
    with pytest.raises(AssertionError, match="no wave is waiting"):
        planner.tell([])
    wave = planner.next_wave()
    samples = SimulatedSampler(lambda _, stage: MODEL[stage]).sample(wave.asks)
    with pytest.raises(AssertionError, match="not the samples that were asked for"):
        planner.tell(samples[::-1])
    with pytest.raises(AssertionError, match="still to come"):
        planner.outcomes()
