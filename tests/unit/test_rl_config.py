"""The configuration of ``verl-dft rl``: what composes, what verl accepts, what is refused in one line."""

import copy
import functools

import pytest
import yaml
from omegaconf import OmegaConf

from verl_dft.config import compose, group_options
from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.training.online.configure import LOOPS, check, complete, compose_rl, composition_of, demonstrates
from verl_dft.training.online.registry import LOOPS as REGISTERED

ALGORITHMS = group_options("algorithm")


BASE = recipes_dir() / "tiny" / "base"


@functools.cache
def composed(algorithm, hardware):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_DFT_HARDWARE", hardware)
        return compose("rl", [*options(algorithm), f"model={BASE}", "data=arithmetic", "output_dir=runs/x"])


@pytest.fixture
def rl():
    """`rl(algorithm, *keys)`: the checked configuration of ``verl-dft rl algorithm=…`` with keys."""

    def build(algorithm="grpo", *keys, hardware="cpu"):
        config = copy.deepcopy(composed(algorithm, hardware))
        for key, value in (item.split("=", 1) for item in keys):
            OmegaConf.update(config, key, yaml.safe_load(value) if ":" not in value else value)
        complete(config)
        check(config)
        return config

    return build


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`command(*overrides)`: the configuration of a whole command line."""
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    return lambda *given: compose_rl([f"model={BASE}", "data=arithmetic", f"output_dir={tmp_path}", *given])


def options(algorithm):
    teacher = "distillation.teacher_models.teacher_model.model_path=a/teacher"
    return [f"algorithm={algorithm}", *([teacher] if algorithm == "distill" else [])]


@pytest.mark.parametrize("hardware", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_accepted_by_verl(rl, algorithm, hardware):
    """verl builds its own configuration classes, and its validator has nothing to say."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = rl(algorithm, hardware=hardware)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    assert actor.policy_loss.loss_mode == config.actor_rollout_ref.actor.policy_loss.loss_mode
    assert rollout.prompt_length == 1024 and rollout.response_length == 2048
    assert need_critic(config) == (algorithm == "ppo")
    assert config.trainer.n_gpus_per_node == (1 if hardware == "cpu" else 8)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        # DFT paper, Sec. 4.2
        ("grpo", {"lr": 1e-6, "batch": 256, "n": 4, "warmup": 0.1, "loss": "vanilla", "adv": "grpo"}),
        ("ppo", {"lr": 1e-6, "batch": 256, "n": 4, "warmup": 0.1, "loss": "vanilla", "adv": "gae"}),
        # GFT paper (K, tau) and its script (lr, batch)
        ("gft", {"lr": 1e-6, "batch": 128, "n": 8, "loss": "gft", "tau": 0.7, "strict": None, "mini": 128}),
        ("gft_authors", {"lr": 1e-6, "batch": 128, "n": 8, "loss": "gft", "tau": 0.1, "strict": True, "mini": 32}),
        ("online_rewrite", {"n": 1, "loss": "is_sft", "batch": 256}),
    ],
)
def test_defaults_are_the_papers(rl, algorithm, expected):
    config = rl(algorithm)
    actor = config.actor_rollout_ref.actor
    found = {
        "lr": actor.optim.lr,
        "warmup": actor.optim.lr_warmup_steps_ratio,
        "batch": config.data.train_batch_size,
        "mini": actor.ppo_mini_batch_size,
        "n": config.actor_rollout_ref.rollout.n,
        "loss": actor.policy_loss.loss_mode,
        "adv": config.algorithm.adv_estimator,
        "tau": actor.policy_loss.objective.get("tau"),
        "strict": actor.policy_loss.objective.get("strict"),
    }
    assert {name: found[name] for name in expected} == expected


def test_the_authors_make_four_updates_of_256_rows(rl):
    config = rl("gft_authors")
    rows = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    assert rows == 256 and config.data.train_batch_size * config.actor_rollout_ref.rollout.n // rows == 4


@pytest.mark.parametrize(
    ("algorithm", "loop", "shows"),
    [("grpo", "verl_dft", False), ("gft", "verl_dft_group", True), ("online_rewrite", "verl_dft_rewrite", True)],
)
def test_the_algorithm_chooses_who_writes_responses(rl, algorithm, loop, shows):
    config = rl(algorithm)
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == loop
    assert demonstrates(config) is shows


def test_a_users_own_agent_loop_stays(rl):
    key = "actor_rollout_ref.rollout.agent.default_agent_loop"
    assert rl("grpo", f"{key}=tool_agent").actor_rollout_ref.rollout.agent.default_agent_loop == "tool_agent"


def test_agent_loops_are_registered_with_verl():
    from hydra.utils import get_class
    from verl.experimental.agent_loop.agent_loop import AgentLoopBase, _agent_loop_registry

    assert set(LOOPS.values()) == set(REGISTERED)
    for name, target in REGISTERED.items():
        assert _agent_loop_registry[name] == {"_target_": target}
        assert issubclass(get_class(target), AgentLoopBase)


def test_a_command_line_as_a_user_types_it(command):
    config = command("algorithm=gft", "group.composition=2:6", "actor_rollout_ref.actor.optim.lr=3e-6")
    assert config.actor_rollout_ref.model.path == str(BASE) and config.data.source.name == "arithmetic"
    assert config.actor_rollout_ref.actor.optim.lr == 3e-6
    assert composition_of(config).counts == (1, 1, 6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gft group.composition=1:3:5", "group.composition=1:3:5 has 9 responses"),
        ("gft group.composition=no_gal", "verl-dft train objective=gft"),
        ("gft algorithm.adv_estimator=gae", "use grpo with groups"),
        ("gft algorithm.rollout_correction.bypass_mode=true", "stored responses have none"),
        ("gft trainer.v1.trainer_mode=sync", "demonstrations need verl_dft"),
        ("gft rewrite.enabled=true", "are two algorithms"),
        ("online_rewrite actor_rollout_ref.rollout.n=4", "keeps one response of a problem"),
        ("grpo data.train_batch_size=100 actor_rollout_ref.actor.ppo_mini_batch_size=64", "not a multiple"),
        ("grpo data.train_batch_size=8 actor_rollout_ref.actor.ppo_mini_batch_size=1 trainer.n_gpus_per_node=3",
         "do not split over 3 ranks"),
        ("grpo data.train_batch_size=4 actor_rollout_ref.actor.ppo_mini_batch_size=4 "
         "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=6", "does not divide the 16 rows"),
        ("grpo limits.start=0", "limits.start=0 must be a number of seconds above 0"),
        ("grpo poll_s=-1", "poll_s=-1"),
        ("grpo seed=-3", "seed=-3"),
        ("grpo overlong=truncate", "overlong=truncate is not one of drop, error"),
        ("grpo rollout_failure=retry", "not one of stop, skip"),
        ("grpo actor_rollout_ref.actor.policy_loss.loss_mode=asft", "asft cannot run in verl's online trainer"),
        ("gft actor_rollout_ref.actor.policy_loss.objective.tau=-1", "tau"),
        ("grpo trainer.logger=[wandbb]", "'wandbb' is not one of"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(rl, given, said):
    with pytest.raises(InputError) as error:
        rl(*given.split())
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm=grop", "did you mean grpo"),
        ("rolout.n=4", "has no key 'rolout.n'"),
        ("+actor_rollout_ref.actor.policy_loss.objective.tau=1", "loss_mode=vanilla is none"),
    ],
)
def test_a_mistyped_override_is_one_line(command, override, said):
    with pytest.raises(InputError) as error:
        command(override)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_model_or_folder_is_named(monkeypatch):
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    with pytest.raises(InputError, match=r"model\.path is not set"):
        compose_rl(["output_dir=x"])
    with pytest.raises(InputError, match="output_dir is not set"):
        compose_rl(["model=a/b"])


def test_guided_prompts_fit_the_context(rl):
    plain, rewriting = rl(), rl("online_rewrite")
    assert plain.actor_rollout_ref.rollout.max_model_len == 1024 + 2048
    assert rewriting.actor_rollout_ref.rollout.max_model_len == 1024 + 2 * 2048


@pytest.mark.parametrize(("problems", "ranks", "size"), [(256, 1, 16), (3, 1, 12), (5, 2, 10), (17, 2, 2)])
def test_rows_per_pass_divide_a_ranks_rows(rl, problems, ranks, size):
    config = rl("grpo", f"data.train_batch_size={problems}", f"trainer.n_gpus_per_node={ranks}")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert actor.ppo_micro_batch_size_per_gpu == rollout.log_prob_micro_batch_size_per_gpu == size
    assert config.critic.ppo_micro_batch_size_per_gpu == size


def test_the_last_step_is_saved_where_nothing_says_when(rl):
    assert rl("grpo", "trainer.save_freq=-1").trainer.save_freq > 10**9
    assert rl("grpo", "trainer.save_freq=5").trainer.save_freq == 5


def test_attention_on_gpus_is_what_is_installed(rl, monkeypatch, tmp_path):
    config = rl(hardware="gpu")
    for model in (config.actor_rollout_ref.model, config.critic.model):
        assert model.override_config.attn_implementation == "sdpa" and model.use_remove_padding is False
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    config = rl(hardware="gpu")
    assert config.critic.model.override_config.attn_implementation == "flash_attention_2"
    assert config.actor_rollout_ref.model.use_remove_padding is True
    config = rl("grpo", "precision=fp32", hardware="gpu")
    assert config.critic.model.override_config.attn_implementation == "sdpa"
