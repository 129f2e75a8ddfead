"""The Slurm scripts on a machine without Slurm: srun and scontrol are stood in for by ones that run everything here."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
pytestmark = [pytest.mark.integration, pytest.mark.alone]
SRUN = """#!/usr/bin/env bash
n=1
while [[ $1 == --* ]]; do case $1 in --ntasks=*) n=${1#*=} ;; esac; shift; done
if [[ $n == 1 ]]; then exec env SLURM_NODEID=0 "$@"; fi
for ((i = 0; i < n; i++)); do SLURM_NODEID=$i "$@" & done
wait
"""
SCONTROL = "#!/usr/bin/env bash\ntr , '\\n' <<<\"$3\"\n"
VERL_DFT = """#!/usr/bin/env bash
echo "told: $* node ${NODE_RANK:-none} master ${MASTER_ADDR:-none} ray ${RAY_ADDRESS:-none}"
if [[ -n ${RAY_ADDRESS:-} ]]; then
  python -c 'import ray; ray.init(log_to_driver=False); print("machines:", sum(n["Alive"] for n in ray.nodes()))'
fi
exit "${FAKE_CODE:-0}"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of an allocation of two machines, both of them this one."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("verl-dft", VERL_DFT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "SLURM_JOB_NODELIST": "one,two"}


def run(script: str, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPTS / script, *arguments], env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.mark.parametrize("script", ["slurm_ray.sh", "slurm_torchrun.sh"])
def test_scripts_are_good_bash_and_refuse_what_cannot_work(script: str, slurm: dict[str, str]) -> None:
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPTS / script], check=True)
    done = run(script, [], slurm)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    outside = {name: value for name, value in slurm.items() if name != "SLURM_JOB_NODELIST"}
    done = run(script, ["verl-dft", "train", "trainer.nnodes=2"], outside)
    assert done.returncode == 2 and "not in a Slurm allocation" in done.stderr


def test_torchrun_on_every_machine(slurm: dict[str, str]) -> None:
    done = run("slurm_torchrun.sh", ["verl-dft", "train", "a=b c"], slurm)
    assert done.returncode == 2 and "add trainer.nnodes=2" in done.stderr
    done = run("slurm_torchrun.sh", ["verl-dft", "train", "a=b c", "trainer.nnodes=2"], slurm)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"told: train a=b c trainer.nnodes=2 node {rank} master one ray none" for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.nightly
def test_ray_on_every_machine_and_none_left(slurm: dict[str, str]) -> None:
    """Two raylets join one cluster, the command finds both, its exit code is the script's, and Ray ends with it."""
    environment = {
        **slurm,
        "RAY_PORT": "6397",
        "RAY_START_OPTIONS": "--num-cpus=2",
        "RAY_START_TIMEOUT_S": "120",
        "FAKE_CODE": "7",
    }
    done = run("slurm_ray.sh", ["gft/sft_grpo", "scale=paper"], environment)
    assert done.returncode == 7, done.stdout[-2000:] + done.stderr[-2000:]
    assert "told: recipe run gft/sft_grpo scale=paper node none master none ray " in done.stdout
    assert "machines: 2" in done.stdout
    left = [p for p in psutil.process_iter(["cmdline"]) if any(":6397" in word for word in p.info["cmdline"] or ())]
    assert not left, left
