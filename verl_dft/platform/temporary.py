"""Where vLLM's temporary files go.

It leaves the file through which its processes met, and the sockets of those that were killed, in the system's temporary
folder; so an engine, or a run with engines, gets one that goes with it.
"""

import getpass
import os
import tempfile
from contextlib import suppress
from pathlib import Path

ENGINE_FOLDER, RUN_FOLDER = "verl_dft_engine", "verl_dft_rl"
"""For :func:`verl_dft.files.scratch_folder`."""
_LONGEST_SOCKET_PATH = 107
"""Of Linux; see unix(7)."""


def temporaries_in(folder: Path) -> dict[str, str]:
    """Environment variables that send temporary files to ``folder``, a new one; caches and Ray's logs stay elsewhere.

    None where a socket's path would be too long there.
    """
    if len(str(folder)) + len("/12345678-1234-1234-1234-123456789012") > _LONGEST_SOCKET_PATH:
        return {}
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    _link(folder, compiled)
    usual = {
        "TORCHINDUCTOR_CACHE_DIR": str(compiled),
        "RAY_TMPDIR": os.environ.get("TMPDIR", "/tmp"),
    }
    kept = {name: os.environ.get(name, path) for name, path in usual.items()}
    return {**kept, "TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": str(folder)}


def _link(folder: Path, compiled: Path) -> None:
    """Let torch find the header that it has compiled for ten seconds, which it looks for in the temporary folder."""
    with suppress(OSError):
        compiled.mkdir(mode=0o700, exist_ok=True)
        (folder / compiled.name).symlink_to(compiled)
