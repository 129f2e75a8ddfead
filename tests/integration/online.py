"""verl's own GRPO trainer on the tiny base model without a GPU: its data, its overrides and how to start it.

Nothing of it is ours but the loss, the reward and the CPU platform that verl loads as a plugin.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds to cores that other workers need
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HYDRA_FULL_ERROR": "1",
}


def write_prompts(path: Path, num: int) -> Path:
    """``num`` problems of the tiny world, mostly easy ones, so that a group has right and wrong answers."""
    from verl_dft.data.arithmetic import make_problems

    rows = [
        {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": problem.problem}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"index": index, "split": "train"},
        }
        for index, problem in enumerate(make_problems(num, seed=5, level_weights=(0.1, 0.3, 0.3, 0.2, 0.1)))
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def overrides(model: Path, prompts: Path, out: Path, *, ranks: int = 1) -> list[str]:
    """verl's keys for two GRPO steps of two updates each: 8 prompts, 4 answers to each, mini-batches of 4 prompts."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    fp32 = f"+{actor}.fsdp_config.mixed_precision"
    return [
        # Ray with logical GPUs: verl schedules its workers by them
        f"+ray_kwargs.ray_init.num_gpus={ranks}",
        "ray_kwargs.ray_init.num_cpus=16",
        "+ray_kwargs.ray_init.address=local",
        "+ray_kwargs.ray_init.object_store_memory=200000000",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "trainer.device=cpu",
        f"trainer.n_gpus_per_node={ranks}",
        "trainer.nnodes=1",
        "trainer.total_training_steps=2",
        "trainer.total_epochs=100",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        "trainer.resume_mode=disable",
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={out}/checkpoints",
        f"hydra.run.dir={out}/hydra",
        "algorithm.adv_estimator=grpo",
        "algorithm.use_kl_in_reward=False",
        f"data.train_files={prompts}",
        f"data.val_files={prompts}",
        "data.train_batch_size=8",
        "data.max_prompt_length=96",
        "data.max_response_length=96",
        "data.dataloader_num_workers=0",
        "data.seed=1",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"{actor}.strategy=fsdp2",
        f"{actor}.use_torch_compile=False",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.fsdp_config.dtype=float32",
        f"{actor}.fsdp_config.model_dtype=float32",
        f"{fp32}.param_dtype=fp32",
        f"{fp32}.reduce_dtype=fp32",
        f"{fp32}.buffer_dtype=fp32",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=8",
        f"{actor}.use_kl_loss=False",
        f"{actor}.optim.lr=1e-3",
        f"{rollout}.name=vllm",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.n=4",
        f"{rollout}.dtype=float32",
        f"{rollout}.enforce_eager=True",
        f"{rollout}.free_cache_engine=False",
        f"+{rollout}.enable_sleep_mode=False",
        f"{rollout}.gpu_memory_utilization=0.3",
        f"{rollout}.max_model_len=192",
        f"{rollout}.calculate_log_probs=True",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=16",
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes=8",
        f"{rollout}.agent.num_workers=1",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={HERE / 'online_reward.py'}",
        "reward.custom_reward_function.name=compute_score",
    ]
