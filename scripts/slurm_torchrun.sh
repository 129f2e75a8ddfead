#!/usr/bin/env bash
# Runs a `verl-dft train` (or score) over several machines of a Slurm allocation: the same command on each, which starts
# torch's launcher there.
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive scripts/slurm_torchrun.sh \
#     verl-dft train objective=dft data=rows.parquet model=FOLDER trainer.nnodes=2 trainer.n_gpus_per_node=8 output_dir=FOLDER
# Environment: MASTER_PORT (29500). The folders must be on a file system that all machines see. Nothing here decides a
# result. A whole recipe on several machines: scripts/slurm_ray.sh, with verbs.train.launcher=ray.
set -euo pipefail

if [[ $# -lt 2 || $1 != verl-dft || ($2 != train && $2 != score) ]]; then
  echo "error: give verl-dft train … or verl-dft score …" >&2
  exit 2
fi
if [[ -z ${SLURM_JOB_NODELIST:-} ]]; then
  echo "error: not in a Slurm allocation; use sbatch or salloc" >&2
  exit 2
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=${MASTER_PORT:-29500}
nodes=${#hosts[@]}
if [[ $nodes -gt 1 && " $* " != *" trainer.nnodes=$nodes "* ]]; then
  echo "error: the allocation has $nodes machines; add trainer.nnodes=$nodes to the command" >&2
  exit 2
fi
# --kill-on-bad-exit: where one machine fails, the others would wait for it
# shellcheck disable=SC2016 # SLURM_NODEID is each machine's own
exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash -c 'export NODE_RANK=$SLURM_NODEID; exec "$@"' _ "$@"
