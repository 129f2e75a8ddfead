"""The documentation: generated parts are up to date, and what it names exists."""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from verl_dft.config import compose
from verl_dft.objectives import OPTIONAL_FIELDS, get_objective
from verl_dft.paths import configs_dir
from verl_dft.testing import make_batch, run
from verl_dft.training.configure import COMPUTED_FIELDS, REDUCTIONS, ROW_FIELDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_docs = load_script(ROOT / "scripts" / "make_docs.py")
OBJECTIVES = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")


@pytest.mark.parametrize("document", make_docs.DOCUMENTS)
def test_generated_parts_are_up_to_date(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert make_docs.generate(text) == text, f"{document} is not up to date; run: make docs"


def test_a_changed_docstring_or_comment_makes_a_document_stale() -> None:
    words = ("Negative log-likelihood, weighted by the probability", "exponent of the weight; 1 = the paper")
    changed = OBJECTIVES
    for word in words:
        assert word in OBJECTIVES
        changed = changed.replace(word, "something else")
    assert make_docs.generate(changed) == OBJECTIVES


def test_every_objective_is_in_the_order_and_has_a_section() -> None:
    assert sorted(make_docs.ORDER) == make_docs.built_in()
    for name in make_docs.built_in():
        assert f"\n### {name}\n\n<!-- generated: objective {name} -->\n" in OBJECTIVES


@pytest.mark.parametrize("name", make_docs.built_in())
def test_every_option_is_in_the_yaml_with_a_comment_and_in_the_table(name: str) -> None:
    options = [field.name for field in dataclasses.fields(get_objective(name))]
    about = make_docs.facts(name)
    assert [option.name for option in about.options] == options, f"configs/objective/{name}.yaml"
    assert list(make_docs.OFF[name]) == options, "OFF in scripts/make_docs.py"
    assert about.paper.startswith("[")
    text = make_docs.section(name)
    for option in about.options:
        assert f"| `{option.name}` | `{option.default}` |" in text and make_docs.cell(option.comment) in text


def test_an_option_without_a_comment_is_refused() -> None:
    assert make_docs.yaml_options(["# x", "_target_: y", "tau: 0.7 # the paper"]) == [("tau", "0.7", "the paper")]
    with pytest.raises(ValueError, match="a value and a comment: 'tau: 0.7'"):
        make_docs.yaml_options(["tau: 0.7"])


OFF = [(name, option, *off) for name, options in make_docs.OFF.items() for option, off in options.items() if off[0]]
BOUNDS = {
    ("iw_sft", "clamp_min"): {"level": "token", "temperature": 30.0, "clamp_max": math.inf},
    ("iw_sft", "clamp_max"): {"level": "token", "temperature": 30.0, "clamp_min": 0.0},
    ("is_sft", "clip"): {"behavior": "all"},
    ("psft", "eps_low"): {"use_advantage": True, "eps_high": math.inf},
    ("psft", "eps_high"): {},
    ("chord", "cutoff"): {},
}
"""Options that are bounds, with what makes them tell: the other bound open, and values that would reach this one."""


@pytest.mark.parametrize(("name", "option", "value", "left"), OFF, ids=lambda value: str(value))
def test_the_value_that_turns_an_option_off(name: str, option: str, value: str, left: str) -> None:
    """It is one the command line can give, and leaves the method that the table names, or a bound without effect."""
    given = OverridesParser.create().parse_override(f"objective.{option}={value}").value()
    objective = get_objective(name, **{option: given}, **BOUNDS.get((name, option), {}))
    batch = make_batch(dtype=torch.float64)
    if left:
        for found, expected in zip(run(objective, batch), run(get_objective(left.lower()), batch), strict=True):
            assert torch.allclose(found, expected)
    if (name, option) in BOUNDS:
        metrics = objective(batch).metrics
        assert not metrics["cutoff_frac" if name == "chord" else "clipped_frac"].any()


def test_docstrings_become_markdown() -> None:
    text = "Limits: ``a=0`` is :math:`x_{1} + y`,\nsee `A paper\n<https://x.org>`_.\nDiffers from the paper: no."
    assert make_docs.paragraph(text) == (
        "**Limits:** `a=0` is $`x_{1} + y`$, see [A paper](https://x.org).\n\n**Differs from the paper:** no."
    )
    assert make_docs.paragraph(".. math::\n    a\n      b") == "```math\na\n  b\n```"
    long = make_docs.paragraph("word " * 22 + "``code of four words`` - and :math:`a + b` more " * 4)
    assert "\n-" not in long and max(map(len, long.split("\n"))) <= 120
    assert long.count("`code of four words`") == 4 and long.count("$`a + b`$") == 4
    assert ":math:" not in OBJECTIVES and "\n.. " not in OBJECTIVES


def test_every_field_of_a_batch_is_explained_with_where_it_comes_from() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", OBJECTIVES.split("## What the trainer provides")[1], re.M))
    assert set(OPTIONAL_FIELDS) <= set(rows)
    for name in OPTIONAL_FIELDS:
        assert (name in ROW_FIELDS or name == "ref_logp") == ("column" in rows[name]), name
        assert name in ROW_FIELDS or name in COMPUTED_FIELDS


def test_every_reduction_is_explained() -> None:
    table = OBJECTIVES.split("## From token losses to one number")[1].split("## ")[0]
    assert re.findall(r"^\| `(\w+)`(?: \(default\))? \|", table, re.M) == list(REDUCTIONS)


def test_extend_shows_the_files_of_the_plugin_package() -> None:
    shown = re.findall(r"```\w*\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(encoding="utf-8"), re.S)
    folder = ROOT / "tests" / "plugin_package"
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) == 3
    for path in files:
        assert path.read_text(encoding="utf-8") in shown, path.relative_to(folder)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


def keys() -> set[str]:
    """Every configuration key of a training run, with every data source and objective."""
    found = {"objective.q", "objective.OPTION"}  # the plugin's option; a placeholder

    def collect(node: object, prefix: str = "") -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            found.add(f"{prefix}{key}")
            collect(value, f"{prefix}{key}.")

    for name in ("sft", "dpo", "sampler"):
        collect(OmegaConf.to_container(compose(name, [])))
    for group in ("data", "objective"):
        for file in (configs_dir() / group).glob("*.yaml"):
            collect(OmegaConf.to_container(OmegaConf.load(file)), f"{group}.")
    return found


NAMED_KEY = r"(?<![\w./])((?:objective|trainer|data|optim|reference|engine|export)(?:\.[a-z_]+)+)\b(?!\()"


def test_the_keys_that_are_named_exist() -> None:
    valid, named = keys(), 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        pattern = (
            r"(?<![\w./])((?:objective|trainer|data|optim|reference|engine|export)\.[a-z_]+(?:\.[a-z_]+)*)\b(?!\()"
        )
        for key in re.findall(pattern, text, re.I):
            named += 1
            assert key in valid, f"{page.name}: {key}"
    assert named > 50


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme, page.name
    for name in make_docs.built_in():
        assert f"`{name}`" in readme, name


def test_summed_gradients_are_mean_gradients_under_a_smaller_threshold() -> None:
    """docs/deviations.md: `micro_batch_sum` with clip c is `micro_batch_mean` with clip c / n, but for AdamW's eps."""
    n, clip = 8, 1.0
    ends = []
    for factor, threshold in ((n, clip), (1, clip / n), (1, clip)):
        generator = torch.Generator().manual_seed(0)
        weight = torch.ones(5, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)
        for step in range(20):
            weight.grad = factor * torch.randn(5, generator=generator) * (0.01 if step % 2 else 0.3)
            torch.nn.utils.clip_grad_norm_([weight], threshold)
            optimizer.step()
        ends.append(weight.detach())
    assert torch.allclose(ends[0], ends[1], atol=1e-4)
    assert not torch.allclose(ends[0], ends[2], atol=1e-2), "the threshold is what makes the difference"
