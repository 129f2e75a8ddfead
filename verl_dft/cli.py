"""``verl-dft VERB [overrides]``. Verbs are imported when they are called: ``--help`` must not wait for torch."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from verl_dft.errors import InputError, MachineFailed

# verb -> (module with main(argv) -> int, one line, examples)
_VERBS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "doctor": (
        "verl_dft.doctor",
        "check the installation: device, versions, entry points, objectives",
        ("verl-dft doctor", "verl-dft doctor --json"),
    ),
    "data": (
        "verl_dft.data.command",
        "make, list or show training data; check benchmarks",
        (
            "verl-dft data list",
            "verl-dft data make data=arithmetic output_dir=runs/arithmetic",
            "verl-dft data show data=arithmetic model=MODEL_FOLDER",
            "verl-dft data check benchmark=dft data_dir=FOLDER train=FILE",
        ),
    ),
    "sample": (
        "verl_dft.sampling.command",
        "sample graded responses to problems with vLLM, for the builders",
        (
            "verl-dft sample model=FOLDER data=gsm8k n=4 output_dir=runs/samples",
            "verl-dft sample model=FOLDER data=problems.jsonl n=8 num_replicas=4 output_dir=runs/samples",
            "verl-dft sample model=FOLDER data=arithmetic limit=100 output_dir=runs/samples --dry-run",
        ),
    ),
    "reject": (
        "verl_dft.build.reject_command",
        "make RFT rows and DPO pairs of graded samples",
        (
            "verl-dft reject samples=runs/samples output_dir=runs/rft",
            "verl-dft reject samples=runs/samples output_dir=runs/rft max_per_problem=4 pairs_per_problem=2",
        ),
    ),
    "rewrite": (
        "verl_dft.build.rewrite_command",
        "make training rows by data rewriting: self-solved, retold, or the expert's",
        (
            "verl-dft rewrite model=FOLDER_OR_HUB_NAME data=gsm8k output_dir=runs/rewritten",
            "verl-dft rewrite model=FOLDER data=problems.jsonl self.n=16 guided.n=4 output_dir=runs/rewritten",
            "verl-dft rewrite … --dry-run",
        ),
    ),
    "groups": (
        "verl_dft.build.groups_command",
        "make groups of expert, teacher and own responses with advantages, for objective=gft",
        (
            "verl-dft groups model=FOLDER data=problems.jsonl output_dir=runs/groups",
            "verl-dft groups samples=runs/s data=runs/s/problems.jsonl composition=2:6 output_dir=runs/groups",
            "verl-dft groups model=FOLDER data=gsm8k teacher.model=TEACHER output_dir=runs/groups",
        ),
    ),
    "score": (
        "verl_dft.training.score_command",
        "log-probs of given rows under a model, as training computes them",
        (
            "verl-dft score model=FOLDER data=rows.parquet output_dir=runs/scored",
            "verl-dft score model=FOLDER data=rewritten.parquet expert=expert.parquet output_dir=runs/by_stage",
            "verl-dft score model=A reference.path=B kl=true data=rows.parquet output_dir=runs/kl",
        ),
    ),
    "train": (
        "verl_dft.training.launch",
        "train a model with an objective on verl's SFT trainer",
        (
            "verl-dft train objective=dft data=gsm8k model=Qwen/Qwen2.5-Math-1.5B output_dir=runs/dft",
            "verl-dft train objective=dft objective.floor=0.1 data=rows.parquet model=MODEL_FOLDER optim.lr=1e-5",
            "verl-dft train objective=dft data=gsm8k model=… trainer.n_gpus_per_node=8 model.lora_rank=16",
            "verl-dft train launcher=ray objective=sft data=gsm8k model=… trainer.nnodes=2",
            "verl-dft train objective._target_=my_pkg.MyObjective data=gsm8k model=…",
            "verl-dft train --config-name laptop/gsm8k_dft model=SMOLLM2_FOLDER",
            "verl-dft train objective=dpo data=runs/rft/pairs.parquet model=FOLDER output_dir=runs/dpo",
        ),
    ),
    "rl": (
        "verl_dft.training.online.command",
        "train online on verl's PPO trainer: GRPO, PPO, GFT, rewriting, distillation",
        (
            "verl-dft rl algorithm=grpo data=gsm8k model=FOLDER_OR_HUB_NAME output_dir=runs/grpo",
            "verl-dft rl algorithm=ppo data=problems.jsonl model=FOLDER trainer.n_gpus_per_node=8 output_dir=runs/ppo",
            "verl-dft rl algorithm=gft data=problems.jsonl model=FOLDER group.composition=2:6 output_dir=runs/gft",
            "verl-dft rl algorithm=online_rewrite data=gsm8k model=FOLDER output_dir=runs/rewrite",
            "verl-dft rl --config-name tiny/rl algorithm=grpo output_dir=runs/tiny/grpo",
        ),
    ),
    "evaluate": (
        "verl_dft.evaluation.command",
        "sample with vLLM, grade, and report avg@n with its interval",
        (
            "verl-dft evaluate model=runs/dft/model benchmark=gsm8k n=16",
            "verl-dft evaluate model=[BASE,runs/dft/model] benchmark=math500 n=16 temperature=1.0",
            "verl-dft evaluate model=runs/dft/model benchmark=dft data_dir=FOLDER",
        ),
    ),
    "compare": (
        "verl_dft.evaluation.compare",
        "the difference between two evaluations of the same problems, with its interval and p-value",
        (
            "verl-dft compare runs/evaluate/sft/math500 runs/evaluate/dft/math500",
            "verl-dft compare runs/evaluate/sft runs/evaluate/dft output_dir=runs/sft-dft",
            "verl-dft compare runs/evaluate/sft runs/evaluate/dft benchmark=math500,aime24 --json",
        ),
    ),
    "recipe": (
        "verl_dft.recipe",
        "list, show or run recipes: the steps of a paper's table or pipeline, at three scales",
        (
            "verl-dft recipe list",
            "verl-dft recipe show gft/sft_gft_grpo scale=paper",
            "verl-dft recipe run gft/sft_gft_grpo scale=tiny",
            "verl-dft recipe run gft/sft_gft_grpo scale=paper model=FOLDER_OR_HUB_NAME --dry-run",
        ),
    ),
    "analyze": (
        "verl_dft.analysis.command",
        "the papers' figures from finished runs: token probabilities, KL, entropy, stages, dynamics, sweeps",
        (
            "verl-dft analyze tokens runs='{base: runs/score/base, DFT: runs/score/dft}' output_dir=runs/figures",
            "verl-dft analyze kl runs='{SFT: {16: runs/kl/sft_16, 64: runs/kl/sft_64}}' output_dir=runs/figures",
            "verl-dft analyze entropy runs='{GRPO: runs/grpo}' output_dir=runs/figures",
            "verl-dft analyze stages runs='{base: runs/by_stage}' output_dir=runs/figures",
            "verl-dft analyze dynamics runs='{SFT: runs/sft, DFT: [runs/d1, runs/d2]}' smooth=8 output_dir=runs/fig",
            "verl-dft analyze sweep runs='{GFT: [runs/eval/a, runs/eval/b]}' key=objective.tau output_dir=runs/fig",
        ),
    ),
    "tiny": (
        "verl_dft.tiny",
        "write the tiny world's untrained model",
        ("verl-dft tiny init seed=1 output_dir=runs/untrained",),
    ),
    "report": (
        "verl_dft.report.command",
        "the papers' numbers beside those of recipe runs, as Markdown and one page of HTML",
        (
            "verl-dft report runs/recipes/tiny output_dir=runs/report",
            "verl-dft report runs/recipes/paper/by_name/dft/table1/paper tolerance=1.5",
            "verl-dft report runs/recipes/tiny record=recipes/results.json",
        ),
    ),
    "demo": (
        "verl_dft.demo",
        "SFT and DFT from one base on the tiny world, evaluated and tabulated, in minutes on a CPU",
        ("verl-dft demo", "verl-dft demo scale=ci output_dir=runs/demo-ci"),
    ),
}


def usage(verb: str | None = None) -> str:
    """The help text of the command, or of one verb."""
    if verb is None:
        lines = ["usage: verl-dft VERB [key=value …]", "", "verbs:"]
        lines += [f"  {name:<10}{line}" for name, (_, line, _) in _VERBS.items()]
        lines += ["", "verl-dft VERB --help shows examples. Exit codes: 0 done, 1 failed run, 2 bad input."]
        return "\n".join(lines)
    module, line, examples = _VERBS[verb]
    text = [f"verl-dft {verb}: {line}", "", "examples:", *(f"  {example}" for example in examples)]
    groups = {
        "train": ("objective", "data", "model", "hardware"),
        "rl": ("algorithm", "data", "model"),
        "data": ("data",),
        "evaluate": ("benchmark",),
    }
    groups |= dict.fromkeys(("sample", "rewrite", "groups"), ("data", "model")) | {"score": ("model", "hardware")}
    if verb in groups:
        from verl_dft.config import group_options

        text += ["", "config groups (every key below them can be overridden):"]
        text += [f"  {group}: {', '.join(group_options(group))}" for group in groups[verb]]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit code: 0 done, 1 failed run, 2 bad input."""
    try:
        return _run(argv)
    except BrokenPipeError:  # whoever read the output has gone (`| head`); Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from verl_dft import __version__

        print(f"verl-dft {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in _VERBS:
        import difflib

        close = difflib.get_close_matches(verb, _VERBS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(f"error: unknown verb {verb!r}{hint} Valid: {', '.join(_VERBS)}", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(rest):
        print(usage(verb))
        return 0
    # the folder a command is started in may hold the user's own objective (objective._target_=my_losses.Mine)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return told(lambda: importlib.import_module(_VERBS[verb][0]).main(rest))


def told(run: Callable[[], int]) -> int:
    """``run()``'s exit code; what a user can put right is told in one line instead of a traceback."""
    try:
        return run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MachineFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        from verl_dft.files import disk_full

        if not disk_full(error):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; what is finished is kept: make room and run it again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
