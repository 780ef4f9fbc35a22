"""Shared by all tests: a compilation cache, strict rank promotion, small default settings."""

import importlib.util
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "rladapter-tests-jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
os.environ.pop("OPENAI_API_KEY", None)


@pytest.fixture(autouse=True)
def quiet_terminal(monkeypatch):
    """Messages are compared as text: no colours, no wrapping at the terminal's width."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Compiled programs are let go after each file. All together they take more memory maps than Linux gives a process
    (65,530), and XLA crashes when it gets no more."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def by_torch():
    """by_torch(function, *args): the value of one of torch_reference's functions, from a process that may load torch.

    Training never does (`utils.hf_folder.import_transformers`)."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
