"""Public sets in their published and normalised forms, subsets, filters, prepared rows, configs and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_helpers import family

from verl_dft.data.command import main
from verl_dft.data.parsing import last_boxed
from verl_dft.data.prepare import prepare_rows
from verl_dft.data.prompts import PROMPTS, render_messages
from verl_dft.data.records import read_problems, read_rows
from verl_dft.data.sources import _SOURCES, load_problem_set, load_problems
from verl_dft.errors import InputError

GSM8K = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many altogether?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat is 48+24 = <<48+24=72>>72.\n#### 1,072",
}
NUMINA = {"source": "olympiads", "problem": "What is $2+3$?", "solution": "It is $\\boxed{5}$.", "messages": []}


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(path: Path, num: int) -> str:
    return write(path, [{"problem": f"problem {i}", "solution": f"It is \\boxed{{{i}}}."} for i in range(num)])


# ---- parsing ----


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{3} and \boxed{unfinished", "3"),
        (r"\boxed{}", ""),
        ("none", ""),
    ],
)
def test_last_boxed(text: str, answer: str) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("answer_format", "ending"),
    [("boxed", "\nThe answer is \\boxed{1072}."), ("hash", "\n#### 1072"), ("none", "")],
)
def test_gsm8k_published_and_normalised_forms_agree(tmp_path: Path, answer_format: str, ending: str) -> None:
    worked = "She sold 48/2 = 24 clips in May.\nThat is 48+24 = 72."
    normalised = {"id": "gsm8k/0", "problem": GSM8K["question"], "answer": "1072", "solution": worked}
    for name, record in (("hub", GSM8K), ("normal", normalised)):
        path = write(tmp_path / f"{name}.jsonl", [record])
        [problem] = load_problems({"name": "gsm8k", "path": path, "answer_format": answer_format})
        assert (problem.id, problem.problem, problem.answer) == ("gsm8k/0", GSM8K["question"], "1072")
        assert problem.solution == worked + ending


def test_numinamath_answers_come_from_the_last_box(tmp_path: Path) -> None:
    proof = {"source": "aops", "problem": "Prove it.", "solution": "Clear."}
    empty = {"source": "aops", "problem": "Prove it.", "solution": " "}
    path = write(tmp_path / "n.jsonl", [NUMINA, proof, empty])
    found = load_problem_set({"name": "numinamath_cot", "path": path, "subset": "first_n"})
    assert [(p.answer, p.source) for p in found.train] == [
        ("5", "numinamath_cot/olympiads"),
        ("", "numinamath_cot/aops"),
    ]
    assert found.report["problems_dropped_empty"] == 1 and found.report["problems_without_answer"] == 1


def test_math_reads_levels_and_answers_of_both_forms(tmp_path: Path) -> None:
    records = [
        {"problem": "q", "solution": "so \\boxed{4}", "level": "Level 5", "type": "Algebra"},
        {"id": "math_train/9", "problem": "q", "solution": "so \\boxed{04}", "level": 2, "answer": "4"},
        {"problem": "q", "solution": "so \\boxed{}", "level": "Level ?"},
    ]
    found = load_problems({"name": "math", "path": write(tmp_path / "m.jsonl", records), "subset": "first_n"})
    assert [(p.id, p.answer, p.level) for p in found] == [
        ("math/0", "4", 5),
        ("math_train/9", "4", 2),
        ("math/2", "", None),
    ]


@pytest.mark.parametrize(("name", "file", "num"), [("gsm8k", "gsm8k_train", 7473), ("math", "math_train", 7500)])
def test_real_files(shared_dir: Path, name: str, file: str, num: int) -> None:
    found = load_problem_set(
        {"name": name, "path": str(shared_dir / f"data/benchmarks/{file}.jsonl.gz"), "num_val": 100}
    )
    assert (len(found.train), len(found.val)) == (num - 100, 100)
    assert len({p.id for p in [*found.train, *found.val]}) == num
    agree = sum(last_boxed(p.solution or "") == p.answer for p in found.train)
    assert agree == len(found.train) if name == "gsm8k" else agree > 0.98 * len(found.train)


# ---- selection ----


def test_random_subset_is_seeded_and_extends(tmp_path: Path) -> None:
    path = numbered(tmp_path / "p.jsonl", 300)
    source = {"name": "numinamath_cot", "path": path, "num_rows": 100, "num_val": 20, "seed": 5}
    first = load_problem_set(source)
    train, val = [p.id for p in first.train], [p.id for p in first.val]
    assert len(set(train + val)) == 120 and train != sorted(train)
    assert [p.id for p in load_problems(source)] == train
    assert [p.id for p in load_problems({**source, "seed": 6})] != train
    # more rows, or no validation rows, keep the ones drawn before
    assert [p.id for p in load_problems({**source, "num_rows": 150})][:100] == train
    assert [p.id for p in load_problems({**source, "num_val": 0})] == train
    # drawn over the whole set, not from its head
    assert max(int(i.split("/")[1]) for i in train) > 250


def test_first_n_is_the_head_in_order(tmp_path: Path) -> None:
    source = {
        "name": "math",
        "path": numbered(tmp_path / "p.jsonl", 30),
        "num_rows": 10,
        "num_val": 2,
        "subset": "first_n",
    }
    found = load_problem_set(source)
    assert [p.answer for p in found.train] == [str(i) for i in range(10)]
    assert [p.answer for p in found.val] == ["10", "11"]


def test_length_filter_counts_prompt_and_solution_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = family("qwen2")
    tokenizer.save_pretrained(tmp_path / "tok")
    records = [{"problem": "q", "solution": "x = 4. " * (i + 1)} for i in range(6)]
    lengths = []
    for record in records:
        messages = [*render_messages("raw", "q"), {"role": "assistant", "content": record["solution"]}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        lengths.append(len(ids) - 1)  # without the newline after the end token
    source = {"name": "math", "path": write(tmp_path / "p.jsonl", records), "subset": "first_n", "num_val": 1}
    source |= {"max_tokens": lengths[2], "tokenizer": str(tmp_path / "tok")}
    found = load_problem_set(source)
    assert [p.id for p in found.train] == ["math/0", "math/1", "math/2"]
    # two of the five for training, and the one for validation
    assert found.report["problems_dropped_overlong"] == 3 and found.report["problems_selected"] == 6
    with pytest.raises(InputError, match="max_tokens needs data.source.tokenizer"):
        load_problems({**source, "tokenizer": None})
    with pytest.raises(InputError, match="no problem is left"):
        load_problems({**source, "max_tokens": 3})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"name": "nosuch"}, "no source 'nosuch'; use one of arithmetic, files, gsm8k, math, numinamath_cot"),
        ({"name": "math", "pth": "x"}, "data.source has no option 'pth' for math; valid: path, hub"),
        ({"name": "math", "path": "no.jsonl"}, "no.jsonl does not exist"),
        ({"name": "math", "path": "P", "num_rows": 9}, r"p\.jsonl has 5 rows, but 9 for training \+ 0 for validation"),
        ({"name": "math", "path": "P", "num_val": 5}, "0 training and 5 validation rows of 5"),
        ({"name": "math", "path": "P", "subset": "last"}, "subset is 'last'; use random or first_n"),
        ({"name": "gsm8k", "path": "P"}, r"p\.jsonl: row \d: no column 'answer' \(columns: problem, solution\)"),
        ({"name": "gsm8k", "path": "P", "answer_format": "x"}, "answer_format is 'x'; use one of boxed, hash, none"),
        ({"name": "files"}, "data=files needs data.source.path=FILE"),
        ({"name": "files", "path": "P", "problem_key": "q"}, r"no column 'q' .*; set data.source.problem_key=NAME"),
        ({"name": "math"}, "cannot load EleutherAI/hendrycks_math .* for a local copy give data.source.path=FILE"),
    ],
)
def test_bad_sources(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    if source.get("path") == "P":
        source = {**source, "path": numbered(tmp_path / "p.jsonl", 5)}
    with pytest.raises(InputError, match=message) as error:
        load_problems(source)
    assert "\n" not in str(error.value)


def test_files_with_own_column_names(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"q": "1+1?", "sol": "It is \\boxed{2}."}, {"q": "x?", "sol": ""}])
    source = {"name": "files", "path": path, "problem_key": "q", "solution_key": "sol"}
    with pytest.raises(InputError, match=r"mine\.jsonl: row 1: column 'sol' is empty"):
        load_problems(source)
    [problem] = load_problems({**source, "num_rows": 1, "subset": "first_n"})
    assert (problem.id, problem.answer, problem.solution) == ("mine/0", "2", "It is \\boxed{2}.")


# ---- prompts ----


def test_prompts() -> None:
    boxed = "q {x}\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert render_messages("raw", "q {x}") == [{"role": "user", "content": "q {x}"}]
    assert render_messages("boxed", "q {x}") == [{"role": "user", "content": boxed}]
    system = {"role": "system", "content": "You are a helpful assistant."}
    assert render_messages("qwen-boxed", "q {x}") == [system, {"role": "user", "content": boxed}]
    guided = render_messages("arithmetic-guided", "q", "worked {y}")
    assert guided[0]["content"] == "Reference : worked {y}\nRetell .\nq"
    with pytest.raises(InputError, match=f"no prompt 'qwen'; use one of {', '.join(PROMPTS)}"):
        render_messages("qwen", "q")
    with pytest.raises(InputError, match="needs a reference"):
        render_messages("arithmetic-guided", "q")
    with pytest.raises(InputError, match="no place for a reference"):
        render_messages("raw", "q", "r")


# ---- prepared rows ----


def test_rows_are_made_once_and_remade_when_anything_changes(tmp_path: Path) -> None:
    path = numbered(tmp_path / "p.jsonl", 8)
    data = {"source": {"name": "math", "path": path, "num_val": 3, "seed": 1}, "prompt": "raw", "train_files": None}
    out = tmp_path / "out"
    made = prepare_rows(data, out, problems_file=True)
    assert (made.report["reused"], made.report["num_train"], made.report["num_val"]) == (False, 5, 3)
    rows = read_rows(made.train).to_pylist()
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant"] and rows[0]["origin"] == "expert"
    assert rows[0]["messages"][0]["content"] == f"problem {rows[0]['problem_id'].split('/')[1]}"
    assert [p.id for p in read_problems(out / "problems.jsonl")] == [row["problem_id"] for row in rows]
    manifest = json.loads((out / "train.parquet.manifest.json").read_text())
    assert manifest["seed"] == 1 and len(manifest["inputs"]["source"]["sha256"]) == 64

    before = made.train[0].stat().st_mtime_ns
    assert prepare_rows(data, out).report["reused"] and made.train[0].stat().st_mtime_ns == before
    # another prompt, a touched row file, a touched input, no validation
    assert not prepare_rows({**data, "prompt": "boxed"}, out).report["reused"]
    assert not prepare_rows(data, out).report["reused"]
    made.val[0].write_bytes(made.train[0].read_bytes())
    assert not prepare_rows(data, out).report["reused"]
    numbered(Path(path), 9)
    assert prepare_rows(data, out).report["num_train"] == 6
    without = prepare_rows({**data, "source": {**data["source"], "num_val": 0}}, out)
    assert without.val == [] and not (out / "val.parquet").exists()
    assert prepare_rows({**data, "source": {**data["source"], "num_val": 0}}, out).report["reused"]


def test_given_files(tmp_path: Path) -> None:
    rows = write(
        tmp_path / "rows.jsonl",
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    )
    problems = numbered(tmp_path / "problems.jsonl", 4)
    data = {"train_files": [rows, problems], "val_files": rows, "prompt": "boxed", "source": {"name": "files"}}
    made = prepare_rows(data, tmp_path / "out")
    assert made.train[0] == Path(rows) == made.val[0]
    table = read_rows(made.train[1]).to_pylist()
    assert [row["messages"][1]["content"] for row in table] == [f"It is \\boxed{{{i}}}." for i in range(4)]
    assert table[0]["messages"][0]["content"].startswith("problem 0\nPlease reason")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train_files": "no.parquet"}, "no.parquet does not exist"),
        ({}, "no training data: set data=NAME"),
        ({"source": {"name": "files", "path": "no.jsonl"}}, "no.jsonl does not exist; data.source.path must be"),
        ({"source": {"name": "arithmetic"}, "prompt": "nosuch"}, "no prompt 'nosuch'"),
        ({"source": {"name": "arithmetic_pretrain", "slipps": 1}}, "arithmetic_pretrain"),
        ({"train_files": "C"}, r"c\.jsonl: no column 'messages' \(training rows\) and none called 'problem'"),
        ({"train_files": "N"}, "problem 'n/0' has no solution to train on"),
    ],
)
def test_bad_data(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    files = {"C": ("c.jsonl", {"text": "a"}), "N": ("n.jsonl", {"problem": "q", "answer": "1"})}
    if data.get("train_files") in files:
        name, record = files[data["train_files"]]
        data = {"train_files": write(tmp_path / name, [record])}
    with pytest.raises(InputError, match=message) as error:
        prepare_rows(data, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_pretraining_source(tmp_path: Path) -> None:
    source = {"name": "arithmetic_pretrain", "num_rows": 50, "num_val": 5, "seed": 0, "mix": {"native": 1.0}}
    made = prepare_rows({"source": source, "prompt": "raw"}, tmp_path)
    assert (len(read_rows(made.train)), len(read_rows(made.val))) == (50, 5)
    assert set(read_rows(made.train)["origin"].to_pylist()) == {"self"}


# ---- configs and command ----


def test_every_data_config_composes_and_sets_the_options_its_source_has(repo_root: Path) -> None:
    from verl_dft.config import compose

    names = sorted(path.stem for path in (repo_root / "configs/data").glob("*.yaml"))
    assert set(names) >= set(_SOURCES)
    for name in names:
        config = compose("data", [f"data={name}"])
        assert (config.data.source.name, config.data.prompt, config.data.overlong) == (name, "raw", "drop")
        if name in _SOURCES:
            options = set(_SOURCES[name][1]) - {"hub", "hub_configs", "path", "split"}
            assert options <= set(config.data.source), name
            assert set(config.data.source) - {"name"} <= set(_SOURCES[name][1]), name
    arithmetic = compose("data", ["data=arithmetic", "model=folder/of/model"])
    assert (arithmetic.data.source.num_rows, list(arithmetic.data.source.level_weights)) == (
        768,
        [0.05, 0.05, 0.05, 0.15, 0.7],
    )
    assert compose("data", ["data=gsm8k", "model=folder/of/model"]).data.source.tokenizer == "folder/of/model"


def test_command_makes_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    overrides = ["data=arithmetic", "data.source.num_rows=5", "data.source.num_val=2"]
    assert main(["make", *overrides, f"output_dir={out}"]) == 0
    assert pq.read_metadata(out / "train.parquet").num_rows == 5 and pq.read_metadata(out / "val.parquet").num_rows == 2
    assert len(read_problems(out / "problems.jsonl")) == 5
    assert str(out / "train.parquet") in capsys.readouterr().out

    family("qwen2").save_pretrained(tmp_path / "tok")
    [first, second, *_] = read_rows(out / "train.parquet").to_pylist()
    assert main(["show", *overrides, f"model={tmp_path / 'tok'}", "show_from=1"]) == 0
    shown = capsys.readouterr().out
    assert f"<|im_start|>assistant\n⟦{second['messages'][1]['content']}<|im_end|>⟧" in shown
    assert first["messages"][0]["content"] not in shown

    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in [*_SOURCES, *PROMPTS])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "needs one of list, make, show, check"),
        (["mak"], "needs one of list, make, show, check, got 'mak'"),
        (["make", "data=arithmetic"], "output_dir is not set"),
        (["show", "data=arithmetic"], "model is not set"),
        (["make", "data=arithmetik"], "no option 'arithmetik'"),
        (["make", "data=arithmetic", "data.source.num_row=3"], "data.source.num_row"),
        (["show", "data=arithmetic", "model=/no/such"], "no tokenizer can be loaded from '/no/such'"),
    ],
)
def test_bad_commands(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(argv)
