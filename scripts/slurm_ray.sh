#!/usr/bin/env bash
# Starts Ray on every machine of a Slurm allocation, runs one command on the first, and ends Ray with it.
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive scripts/slurm_ray.sh \
#     verl-dft rl algorithm=grpo data=gsm8k model=FOLDER trainer.nnodes=2 trainer.n_gpus_per_node=8 output_dir=FOLDER
#   sbatch … scripts/slurm_ray.sh gft/sft_gft_grpo scale=paper verbs.rl.trainer.nnodes=2      # a recipe, by its name
# Environment: RAY_PORT (6379), RAY_START_OPTIONS (further options of `ray start`), RAY_START_TIMEOUT_S (300).
# The folders of the command must be on a file system that all machines see. Nothing here decides a result.
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "error: no command; give verl-dft VERB …, or a recipe's name and its keys" >&2
  exit 2
fi
if [[ $1 != verl-dft ]]; then
  set -- verl-dft recipe run "$@"
fi
if [[ -z ${SLURM_JOB_NODELIST:-} ]]; then
  echo "error: not in a Slurm allocation; use sbatch or salloc" >&2
  exit 2
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
port=${RAY_PORT:-6379}
# the address by which the others reach the first machine, as Ray finds it; `hostname` may give a loopback one
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" python -c 'import ray; print(ray.util.get_node_ip_address())' | tail -n 1)
read -r -a options <<<"${RAY_START_OPTIONS:-}"
export RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
# a cluster takes jobs from whoever reaches its port: from this job alone, by a token that srun hands on in the environment
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(python -c 'import secrets; print(secrets.token_hex(32))')}

children=()
cleanup() {
  # each `ray start --block` ends its machine's Ray when it is ended
  for child in "${children[@]}"; do kill -TERM "$child" 2>/dev/null || true; done
  for child in "${children[@]}"; do wait "$child" 2>/dev/null || true; done
}
trap cleanup EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

start() { # HOST OPTIONS…: Ray on one machine, until it is ended
  local host=$1
  shift
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$host" \
    ray start --block --disable-usage-stats "$@" ${options[@]+"${options[@]}"} &
  children+=($!)
}

alive() { # how many machines are in the cluster
  RAY_ADDRESS="$ip:$port" python -c '
import ray
ray.init(logging_level="ERROR", log_to_driver=False)
print(sum(node["Alive"] for node in ray.nodes()))' 2>/dev/null || echo 0
}

wait_for() { # NUMBER: until so many machines are there
  local deadline=$((SECONDS + ${RAY_START_TIMEOUT_S:-300})) found child
  until found=$(alive) && [[ $found -ge $1 ]]; do
    for child in "${children[@]}"; do
      if ! kill -0 "$child" 2>/dev/null; then
        echo "error: ray start has ended on a machine; its output is above" >&2
        exit 1
      fi
    done
    if ((SECONDS > deadline)); then
      echo "error: Ray has $found of $1 machines after ${RAY_START_TIMEOUT_S:-300} s" >&2
      exit 1
    fi
    sleep 2
  done
}

start "$head" --head --node-ip-address="$ip" --port="$port" --include-dashboard=false
wait_for 1
for host in "${hosts[@]:1}"; do
  start "$host" --address="$ip:$port"
done
wait_for "${#hosts[@]}"
echo "Ray on ${#hosts[@]} machine(s) at $ip:$port; running: $*" >&2
export RAY_ADDRESS="$ip:$port"
# in the background, so that a signal to this script is noticed while the command runs
"$@" &
command=$!
children+=("$command")
wait "$command"
