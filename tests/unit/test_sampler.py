"""``Sampler`` and ``verl-dft sample`` with a script in the model's place: what is asked, kept, graded and resumed."""

import json
import resource
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_helpers import PLACES, killed

from verl_dft.data.records import read_problems
from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.sampling import store
from verl_dft.sampling.ask import Ask, Sampling
from verl_dft.sampling.command import asks_of, format_plan, main, plan, run
from verl_dft.sampling.configure import compose_sampling, plain
from verl_dft.sampling.engine import GeneratedText, SampleRequest
from verl_dft.sampling.record import read_samples, write_samples
from verl_dft.sampling.sampler import Sampler
from verl_dft.sampling.shard_file import read_shard
from verl_dft.sampling.source import ScriptedSource

BASE = str(recipes_dir() / "tiny" / "base")
TEXTS = [f"So it is \\boxed{{{number}}}." for number in range(12)] + ["no idea", "long " * 30]


def _ask(problem: str, index: int = 0, **changes: object) -> Ask:
    messages = [{"role": "user", "content": f"Ann has {problem} keys . How many ?"}]
    return Ask(problem, index, messages, problem, Sampling(max_tokens=40), "raw", **changes)


def _config(folder: Path, *more: str) -> dict:
    argv = [f"model={BASE}", "data=arithmetic", "limit=5", "n=3", "max_tokens=60", "shard_size=4"]
    return plain(compose_sampling("sample", [*argv, "want_logp=false", f"output_dir={folder}", *more]))


def test_samples_come_back_in_order_graded_and_once(tmp_path: Path) -> None:
    asks = [_ask(str(number), index) for number in range(4) for index in range(3)]
    source = ScriptedSource(TEXTS)
    with Sampler(tmp_path, BASE, {"shard_size": 5}, source) as sampler:
        samples = list(sampler.sample(asks))
        again = list(sampler.sample(asks))
    assert [(s.problem_id, s.index) for s in samples] == [(a.problem_id, a.index) for a in asks]
    assert again == samples and source.calls == [5, 5, 2]
    assert (sampler.num_generated, sampler.num_reused) == (12, 12)
    assert sampler.num_tokens == sum(s.num_tokens for s in samples)
    for sample in samples:
        right = f"boxed{{{sample.gold}}}" in sample.response
        assert sample.correct == right, sample
    assert len({s.seed for s in samples}) == 12


def test_numbers_need_no_reading_and_a_file_reads_each_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks, read = [_ask(str(number), index) for number in range(10) for index in range(3)], []
    with Sampler(tmp_path / "store", BASE, {"shard_size": 2}, ScriptedSource(TEXTS)) as sampler:
        samples = sampler.sample(asks)
        monkeypatch.setattr(store, "read_shard", lambda path: read.append(path) or read_shard(path))
        counted = list(samples.counted())
        assert not read
        write_samples(tmp_path / "samples.parquet", samples, False)
        assert len(read) == len(set(read)) == 15
        for sample, numbers in zip(samples, counted, strict=True):
            assert {name: getattr(sample, name) for name in numbers} == numbers


def test_streams_have_luck_of_their_own(tmp_path: Path) -> None:
    with Sampler(tmp_path, BASE, {}, ScriptedSource(TEXTS)) as sampler:
        one, other = sampler.sample([_ask("3"), _ask("3", stream="guided")])
    assert one.seed != other.seed


def test_what_is_stored_needs_no_engine_and_missing_samples_can_be_refused(tmp_path: Path) -> None:
    asks = [_ask(str(number)) for number in range(4)]
    with Sampler(tmp_path, BASE, {}, ScriptedSource(TEXTS)) as sampler:
        samples = list(sampler.sample(asks))

    def never(max_model_len: int) -> None:
        raise AssertionError("nothing is missing")

    with Sampler(tmp_path, BASE, {}, never) as sampler:
        assert list(sampler.sample(asks)) == samples
    with Sampler(tmp_path, BASE, {}, may_generate=False) as sampler:
        assert list(sampler.sample(asks)) == samples
        with pytest.raises(InputError, match="1 of 1 samples are not in"):
            sampler.sample([_ask("9")])
    with (
        pytest.raises(InputError, match="holds no samples"),
        Sampler(tmp_path / "none", BASE, {}, may_generate=False),
    ):
        raise AssertionError


def test_the_engine_stays_and_grows_only_when_it_must(tmp_path: Path) -> None:
    opened: list[int] = []

    @contextmanager
    def open_source(max_model_len: int):
        opened.append(max_model_len)
        yield ScriptedSource(TEXTS)

    short, longer = _ask("1"), _ask("2 and 3 and 4 and 5 and 6")
    with Sampler(tmp_path / "a", BASE, {}, open_source) as sampler:
        sampler.sample([short])
        sampler.sample([longer])
        sampler.sample([_ask("3")])
    assert len(opened) == 2 and opened[0] < opened[1]
    opened.clear()
    with Sampler(tmp_path / "b", BASE, {}, open_source) as sampler:
        sampler.reserve([short, longer])
        sampler.sample([short])
        sampler.sample([longer])
    assert len(opened) == 1


def test_a_source_that_fails_loses_no_finished_shard(tmp_path: Path) -> None:
    class Breaks(ScriptedSource):
        def generate(self, requests: Sequence[SampleRequest]) -> list[GeneratedText]:
            if len(self.calls) == 2:
                raise RuntimeError("out of order")
            return super().generate(requests)

    asks = [_ask(str(number)) for number in range(6)]
    with (
        pytest.raises(RuntimeError, match="out of order"),
        Sampler(tmp_path, BASE, {"shard_size": 2}, Breaks(TEXTS)) as sampler,
    ):
        sampler.sample(asks)
    with Sampler(tmp_path, BASE, {"shard_size": 2}, ScriptedSource(TEXTS)) as sampler:
        sampler.sample(asks)
    assert (sampler.num_reused, sampler.num_generated) == (4, 2)


def test_a_full_disk_is_one_line_and_costs_one_shard(tmp_path: Path) -> None:
    class Fills(ScriptedSource):
        def generate(self, requests: Sequence[SampleRequest]) -> list[GeneratedText]:
            if len(self.calls) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))  # no file may grow beyond 16 bytes
            return super().generate(requests)

    asks, limits = [_ask(str(number)) for number in range(6)], resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(InputError, match="cannot be written to .*; what is stored is kept: make room") as error,
            Sampler(tmp_path, BASE, {"shard_size": 2}, Fills(TEXTS)) as sampler,
        ):
            sampler.sample(asks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    with Sampler(tmp_path, BASE, {"shard_size": 2}, ScriptedSource(TEXTS)) as sampler:
        sampler.sample(asks)
    assert (sampler.num_reused, sampler.num_generated) == (4, 2)


def test_grading_that_fails_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="answer_type 'colour' is unknown"),
        Sampler(tmp_path, BASE, {}, ScriptedSource(TEXTS)) as sampler,
    ):
        sampler.sample([_ask("1", answer_type="colour")])


def test_a_prompt_without_room_is_named(tmp_path: Path) -> None:
    config = {"engine": {"max_model_len": 30}}
    with Sampler(tmp_path, BASE, config, ScriptedSource(TEXTS)) as sampler:
        assert sampler.sample([_ask("1")])[0].num_tokens < 30
        assert sampler.num_context_limited([_ask("1"), _ask("1", 1)]) == 1
        with pytest.raises(InputError, match="the prompt of problem 1 2 3 .* the context of .* 30; leave the problem"):
            sampler.sample([_ask(" ".join(map(str, range(1, 30))))])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "whole"
    statistics = run(_config(folder), ScriptedSource(TEXTS))
    assert statistics["samples"] == 15 and statistics["problems"] == 5
    return folder


@pytest.mark.parametrize("place", [place for place, _ in PLACES])
def test_killed_anywhere_sampling_ends_with_the_same_bytes(tmp_path: Path, finished: Path, place: str) -> None:
    folder = tmp_path / "killed"
    assert killed(f"{place}:2", lambda: run(_config(folder), ScriptedSource(TEXTS)))
    assert not (folder / "statistics.json").exists()
    run(_config(folder), ScriptedSource(TEXTS))
    for name in ("samples.parquet", "problems.jsonl", "statistics.json", "statistics.md", "config.json"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_what_is_written_can_be_read(finished: Path, tmp_path: Path) -> None:
    samples = read_samples(finished)
    assert [s.problem_id for s in samples[::3]] == [p.id for p in read_problems(finished / "problems.jsonl")]
    write_samples(tmp_path / "copy.parquet", samples, with_logp=False)
    assert (tmp_path / "copy.parquet").read_bytes() == (finished / "samples.parquet").read_bytes()
    manifest = json.loads((finished / "samples.parquet.manifest.json").read_text())
    assert manifest["seed"] == 0 and manifest["num_generated"] == 15 and manifest["statistics"]["samples"] == 15
    with pytest.raises(InputError, match="row 0: sample 0 of problem .* is also .*samples.parquet: row 0"):
        read_samples([finished, finished / "samples.parquet"])


def test_a_plan_counts_without_touching_anything(tmp_path: Path, finished: Path, capsys) -> None:
    config = _config(tmp_path / "new")
    found = plan(config)
    assert found["samples"] == 15 and found["stored"] == 0 and found["max_response_tokens"] == 15 * 60
    assert not (tmp_path / "new").exists()
    assert plan(_config(finished))["stored"] == 15
    assert plan(_config(finished, "n=4"))["stored"] == 0  # other shards
    assert plan(_config(finished, "n=4", "deterministic=false"))["stored"] == 15
    assert format_plan(found).startswith("dry run: 15 samples (0 stored already), ")
    argv = [f"model={BASE}", "data=arithmetic", "limit=2", f"output_dir={tmp_path / 'x'}", "max_tokens=50", "--dry-run"]
    assert main(argv) == 0 and "8 samples (0 stored already)" in capsys.readouterr().out


def test_another_configuration_is_refused_in_the_same_folder(finished: Path) -> None:
    with pytest.raises(InputError, match=r"holds a result made with another configuration \(temperature differ\)"):
        run(_config(finished, "temperature=0.5"), ScriptedSource(TEXTS))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("n=0", "n=0; it must be a whole number of at least 1"),
        ("temperature=0", "temperature=0 gives the same text 3 times"),
        ("temperature=-1", "temperature=-1; it must be a number of at least 0"),
        ("top_p=0", "top_p=0; it must be above 0"),
        ("max_tokens=0", "max_tokens=0; it must be a whole number"),
        ("prompt=none", "no prompt 'none'"),
        ("limit=0", "limit=0; it is the number of problems"),
        ("prompt=arithmetic-guided", "needs a reference solution"),
    ],
)
def test_wrong_options_end_with_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(_config(tmp_path, override), ScriptedSource(TEXTS))
    assert not list(tmp_path.iterdir())


def test_a_command_line_without_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model was given"):
        compose_sampling("sample", ["data=arithmetic", f"output_dir={tmp_path}"])
    with pytest.raises(InputError, match="output_dir is not set"):
        compose_sampling("sample", ["data=arithmetic", f"model={BASE}"])
    with pytest.raises(InputError, match="num_replicas=0; it must be a whole number"):
        _config(tmp_path, "num_replicas=0")
    with pytest.raises(InputError, match="no problems: set data=NAME"):
        run(plain(compose_sampling("sample", [f"model={BASE}", f"output_dir={tmp_path}"])), ScriptedSource(TEXTS))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    config = plain(compose_sampling("sample", [f"model={BASE}", f"data={rows}", f"output_dir={tmp_path}"]))
    with pytest.raises(InputError, match="rows.jsonl holds training rows, and problems are wanted here"):
        run(config, ScriptedSource(TEXTS))


def test_asks_follow_the_problems(tmp_path: Path) -> None:
    config = _config(tmp_path)
    from verl_dft.data.problems import problems_of

    problems = problems_of(config["data"], 2)
    asks = asks_of(problems, config, stream="s")
    assert [(a.problem_id, a.index, a.stream) for a in asks] == [(p.id, i, "s") for p in problems for i in range(3)]
    assert asks[0].messages == [{"role": "user", "content": problems[0].problem}]
