"""Shared by all tests: a compilation cache, strict rank promotion, small default settings."""

import os
import sys
import tempfile
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "rladapter-tests-jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
os.environ.pop("OPENAI_API_KEY", None)


@pytest.fixture(autouse=True)
def quiet_terminal(monkeypatch):
    """Messages are compared as text: no colours, no wrapping at the terminal's width."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
