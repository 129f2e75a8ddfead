"""vLLM engines in Ray actors: see :mod:`verl_dft.sampling.actors` for how they share the work."""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from verl_dft.sampling.actors import ActorPool
from verl_dft.sampling.cluster import check_room, engines_run_on_cpu, most_on_one_machine, ray_session
from verl_dft.sampling.engine import VLLMEngine
from verl_dft.sampling.engine_options import cpu_threads, load_config
from verl_dft.sampling.source import TextSource


@dataclass(frozen=True)
class _Engine:
    """Starts a :class:`VLLMEngine` in an actor, or gives it other weights."""

    model: str
    options: dict[str, Any]
    num_threads: int | None

    def __call__(self, opened: TextSource | None) -> TextSource:
        if opened is None:
            if self.num_threads is not None:
                os.environ["OMP_NUM_THREADS"] = str(self.num_threads)  # Ray sets its own
            return VLLMEngine(self.model, **self.options)
        assert isinstance(opened, VLLMEngine)
        opened.load(self.model)
        return opened


class ReplicaEngines(ActorPool):
    """vLLM engines in Ray actors, each on ``tensor_parallel_size`` GPUs of one machine. A context manager.

    The texts of a shard are those of a :class:`VLLMEngine` in this process with the same options.

    Args:
        model: folder (on every machine of the cluster at the same place) or hub name.
        num_replicas: engines.
        max_restarts: how often an actor that failed is started again.
        options: of :class:`VLLMEngine`. On a CPU ``kv_cache_gib`` is each engine's, and so is ``num_threads``.
    """

    def __init__(
        self,
        model: str,
        num_replicas: int,
        tensor_parallel_size: int = 1,
        *,
        max_restarts: int = 3,
        **options: Any,
    ) -> None:
        config = load_config(model, options.get("trust_remote_code", False))
        threads, bundle = None, {"GPU": float(tensor_parallel_size), "CPU": 1.0}
        if engines_run_on_cpu():
            threads = cpu_threads(config, options.get("num_threads"), tensor_parallel_size)
            bundle = {"CPU": float(threads * tensor_parallel_size)}
        options = {**options, "tensor_parallel_size": tensor_parallel_size, "num_threads": threads}
        self._threads = threads
        self._session = ExitStack()
        self._session.enter_context(ray_session(num_cpus=int(bundle["CPU"]) * num_replicas + 1))
        try:
            check_room(bundle, num_replicas)
            if threads is not None:
                options["memory_share"] = 1 / most_on_one_machine(bundle, num_replicas)
            self._options = options
            super().__init__(_Engine(model, options, threads), num_replicas, bundle, max_restarts=max_restarts)
        except BaseException:
            self._session.close()
            raise

    def load(self, model: str) -> None:
        """Have all engines take the weights of another folder of the same shape; see :meth:`VLLMEngine.load`."""
        self.change(_Engine(model, self._options, self._threads))

    def close(self) -> None:
        """End the engines, their processes, and the Ray that was started for them. Safe to call twice."""
        try:
            super().close()
        finally:
            self._session.close()
