"""Compiled programs: where they are kept, and how long making them took."""

import os
import tempfile
import time
from pathlib import Path

import jax

COMPILING = "/jax/core/compile/"  # jax's events of tracing, lowering and compiling


def cache_folder() -> Path:
    """Returns where compiled programs and replies are kept between runs: $RLADAPTER_CACHE or ~/.cache/rladapter.

    A user without a home, as containers have them, keeps them with the machine's temporary files.
    """
    try:
        return Path(os.environ.get("RLADAPTER_CACHE") or "~/.cache/rladapter").expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"rladapter-{os.getuid()}"


def use_compilation_cache() -> None:
    """Keeps programs that take more than a second to compile in `cache_folder`, unless jax was told otherwise."""
    for name, value in (
        ("jax_compilation_cache_dir", str(cache_folder() / "jax")),
        ("jax_persistent_cache_min_compile_time_secs", 1.0),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)


class CompileClock:
    """Counts the seconds that this process spends on tracing, lowering and compiling (or loading what is cached).

    jax reports each of them when it ends, inner ones before the outer one that they are part of: what lies within a
    later report counts once.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._report)

    def _report(self, event: str, seconds: float, **_: str | int) -> None:
        if event.startswith(COMPILING):
            end = time.perf_counter()
            self.add(end - seconds, end)

    def add(self, start: float, end: float) -> None:
        """Takes note of one span of time, in seconds of `time.perf_counter`."""
        while self._spans and self._spans[-1][1] > start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))

    @property
    def seconds(self) -> float:
        return sum(end - start for start, end in self._spans)

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._report)
