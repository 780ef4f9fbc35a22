"""Shared by all tests: how programs are compiled, and kept, and let go; a quiet terminal; torch in another process."""

import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Most of the tests' time would be XLA's, optimising programs that run for moments. What they compute is the same. In
# the environment, for the processes that tests start too; before jax is imported, which reads it.
QUICK = "--xla_cpu_use_fusion_emitters=false"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
given = os.environ.get("XLA_FLAGS", "")
if QUICK not in given and importlib.metadata.version("jaxlib").startswith("0.10."):  # unknown flags end the process
    os.environ["XLA_FLAGS"] = f"{given} {QUICK}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "rladapter-tests-jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(tempfile.gettempdir(), "rladapter-tests-hypothesis")
os.environ.pop("OPENAI_API_KEY", None)

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
import rladapter_adapter  # noqa: E402
import rladapter_ppo  # noqa: E402


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


class OneProgram:
    """A compiled function of `rladapter_ppo` that gets None for flags that nothing compiled reads: `Args` is a static
    argument, so runs that differ in their folder alone would compile it anew."""

    UNREAD = (
        "exp_name seed track run_dir resume save_every eval_episodes num_devices distributed dry_run env_id llm"
    ).split()
    UNREAD_OF_TABLE = "queries_per_phase query_until trials comprehension embed".split()

    def __init__(self, program):
        self.program = program

    def __call__(self, args, *rest):
        unread = dict.fromkeys(self.UNREAD)
        if not args.anneal_lr and not args.lr_warmup:  # then the rate is the same whatever the number of updates
            unread["total_timesteps"] = 1
        sft = rladapter_adapter.SftArgs(adapter="any" if args.learns else "none", sft_every=1)  # all that is read of it
        table = dataclasses.replace(args.table, **dict.fromkeys(self.UNREAD_OF_TABLE))
        return self.program(dataclasses.replace(args, table=table, sft=sft, **unread), *rest)

    def __getattr__(self, name):
        return getattr(self.program, name)


@pytest.fixture(autouse=True, scope="session")
def one_program_for_many_runs():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("init_runner", "train_phase", "evaluate_steps"):
            patch.setattr(rladapter_ppo, name, OneProgram(getattr(rladapter_ppo, name)))
        yield


@pytest.fixture(scope="session")
def by_torch():
    """by_torch(function, *args): the value of one of torch_reference's functions, from a process that may load torch.

    Training never does (`utils.hf_folder.import_transformers`)."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
