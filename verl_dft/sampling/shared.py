"""One engine for many jobs: several checkpoints on several benchmarks, without a start for each.

Starting an engine takes seconds to minutes, taking other weights of the same shape the time to read them.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from verl_dft.sampling.engine import VLLMEngine
from verl_dft.sampling.engine_options import context_length, load_config
from verl_dft.sampling.fingerprint import model_fingerprint
from verl_dft.sampling.same_shape import Shape, model_shape, shape_difference
from verl_dft.sampling.source import TextSource


class EngineHost:
    """Keeps at most one engine open, or one set of replicas. Close it, or use it as a context manager.

    ``num_started`` and ``num_swapped`` count engine starts and changes of weights.

    Args:
        max_model_len: what engines are started with at least, as far as their model's context goes: the longest prompt
            + response of all jobs to come, so that a later one needs no new engine.
    """

    def __init__(self, max_model_len: int = 0) -> None:
        self._max_model_len = max_model_len
        self._source: Any = None
        self._setup: tuple[dict[str, Any], int] | None = None
        self._shape: Shape | None = None
        self._writer = ""
        self._room = 0
        self.num_started = self.num_swapped = 0

    def __enter__(self) -> "EngineHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def open(
        self, model: str, options: Mapping[str, Any], max_model_len: int, num_replicas: int = 1
    ) -> Iterator[TextSource]:
        """A source of this model's texts: the open engine as it is, with other weights, or a new one.

        Texts are those of a new engine with ``max_model_len``. Where the block raises, the engine is closed.

        Args:
            model: folder or hub name.
            options: of :class:`VLLMEngine`, without ``max_model_len``.
            max_model_len: longest prompt + response in tokens.
            num_replicas: above 1, engines in Ray actors (:class:`verl_dft.sampling.replicas.ReplicaEngines`).

        Raises:
            InputError: what starting an engine raises.
        """
        self._provide(model, dict(options), max_model_len, num_replicas)
        try:
            yield self._source
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the engine. Safe to call twice; a later :meth:`open` starts a new one."""
        source, self._source, self._setup = self._source, None, None
        if source is not None:
            source.close()

    def _provide(self, model: str, options: dict[str, Any], max_model_len: int, num_replicas: int) -> None:
        config = load_config(model, options.get("trust_remote_code", False))
        writer = model_fingerprint(model, config)
        fits = self._source is not None and self._setup == (options, num_replicas) and max_model_len <= self._room
        if fits and writer == self._writer:
            return
        shape = model_shape(model)
        if fits and self._swap(model, shape):
            self._writer, self._shape = writer, shape
            return
        self.close()
        room = max(max_model_len, min(self._max_model_len, context_length(config)))
        self._source = start_engine(model, {**options, "max_model_len": room}, num_replicas)
        self._setup, self._writer, self._shape, self._room = (options, num_replicas), writer, shape, room
        self.num_started += 1

    def _swap(self, model: str, shape: Shape) -> bool:
        assert self._shape is not None
        if shape_difference(self._shape, shape) is not None:
            return False
        try:
            self._source.load(model)
        except Exception as error:  # what vLLM raises differs by version; a new engine is always right
            reason = " ".join(str(error).split())[:160]
            print(f"warning: {model} is given an engine of its own ({reason})", file=sys.stderr)
            return False
        self.num_swapped += 1
        return True


def start_engine(model: str, options: Mapping[str, Any], num_replicas: int) -> Any:
    """A vLLM engine in this process, or ``num_replicas`` in Ray actors. ``options``: of :class:`VLLMEngine`."""
    if num_replicas == 1:
        return VLLMEngine(model, **options)
    from verl_dft.sampling.replicas import ReplicaEngines

    return ReplicaEngines(model, num_replicas, **options)
