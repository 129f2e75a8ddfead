"""What a run has left behind, processes and shared memory, and its end.

Ray puts its processes into sessions of their own, and vLLM's engines outlive a server that was killed. A process that
adopts its orphans finds all of them among its descendants.
"""

import psutil

from verl_dft.end_processes import end_processes, lives
from verl_dft.platform.shared_memory import remove_abandoned, shared_memory_files
from verl_dft.processes import adopt_orphans

_LEAVING_S = 3.0
"""How long processes may take to notice that the run is over, which Ray's do by themselves."""


class Remains:
    """Made before a run begins; :meth:`end` leaves nothing of what was started since."""

    def __init__(self) -> None:
        adopt_orphans()
        self._before = {child.pid for child in _children(psutil.Process())}
        self._shared = shared_memory_files()

    def processes(self) -> list[psutil.Process]:
        """Living descendants of this process that were not there before."""
        found = []
        for child in _children(psutil.Process()):
            if child.pid not in self._before:
                found += [process for process in (child, *_children(child, recursive=True)) if lives(process)]
        return found

    def end(self) -> None:
        """Wait a little for the run's processes to leave by themselves, then kill those that are left."""
        end_processes(self.processes, _LEAVING_S)  # a killed one's children come to us
        remove_abandoned(self._shared)


def _children(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
    try:
        return process.children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []
