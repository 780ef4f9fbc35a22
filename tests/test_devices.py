"""One device, eight forced ones, and two processes on loopback give the same training up to the order of float sums.

The latter two in processes of their own: the number of devices is settled when jax starts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import rladapter_ppo as rl
from utils import devices, runs

ROOT = Path(__file__).parents[1]
TOY = (
    "--env-id Toy-v0 --num-envs 16 --num-steps 16 --num-minibatches 2 --hidden-size 16 --rnn-size 16 --adapter none "
    "--updates-per-phase 3 --guidance-rows 8 --queries-per-phase 4 --eval-episodes 16 --total-timesteps 2000 "
    "--no-anneal-lr --lr-warmup 0".split()  # one program, whatever the number of steps
)
# The guide takes longer than the 30 seconds for which some collectives wait.
SLOW_LEADER = """
import sys, time
import rladapter_ppo as rl
from utils import devices
write = rl.write_analyses
def slow(*args):
    time.sleep(33 * devices.is_leader())
    rl.write_analyses = write
    return write(*args)
rl.write_analyses = slow
sys.exit(rl.cli(sys.argv[1:]))
"""
CRAFTAX = """
import json
import jax, numpy as np
import rladapter_ppo as rl
from envs.crafter.env import CraftaxEnv
from guidance import HostTable, TableArgs
from utils import devices

args = rl.Args(num_envs=64, num_steps=8, num_minibatches=2, hidden_size=32, table=TableArgs(guidance_rows=16))
found = []
for mesh in (None, devices.make_mesh(8)):
    env = devices.SharedEnv(CraftaxEnv(pool_size=8, num_pools=8), mesh)
    table = HostTable(args.table, env)
    table.rows.valid[:5], table.rows.goal[:5], table.rows.care[:4, :4] = True, np.arange(5), np.eye(4, dtype=bool)
    agent, params = rl.make_agent(args, env, table.for_training(), jax.random.key(0))
    runner, _ = rl.init_runner(args, agent, *env.put((params, jax.random.key(1))))
    out = rl.train_phase(args, agent, runner, *env.put((table.for_training(), np.int32(2))))
    shards = {len(x.sharding.device_set) for x in jax.tree.leaves(out)}
    found.append((jax.tree.leaves(env.to_host(out)), shards))
(one, shards_one), (eight, shards_eight) = found
close = [bool(np.allclose(a, b, rtol=1e-3, atol=1e-4)) for a, b in zip(one, eight, strict=True)]
print(json.dumps({"close": close, "shards": [sorted(shards_one), sorted(shards_eight)]}))
"""


def start(flags, folder, cache, program=None, **environment):
    """A training in a process of its own, on the CPU."""
    command = [sys.executable, *(["rladapter_ppo.py"] if program is None else ["-c", program]), *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "RLADAPTER_CACHE": str(cache)} | environment
    return subprocess.Popen(
        [*command, "--run-dir", str(folder)], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(*processes, code=0):
    """Their output."""
    try:
        out = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(out)[-3000:]
    return out


def two_processes(flags, folder, cache, program=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start([*flags, "--distributed"], folder, cache, program, JAX_COORDINATOR_ADDRESS=address,
              JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]  # fmt: skip


def numbers(folder):
    """Of each phase all that no clock measures, and the final evaluation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines.append(json.loads((folder / "summary.json").read_text()))
    lines[-1] |= lines[-1].pop("achievements")
    clocks = ("time/", "seconds", "SPS")
    return [
        {k: v for k, v in line.items() if isinstance(v, int | float) and not any(clock in k for clock in clocks)}
        for line in lines
    ]


def assert_same_training(one, other):
    one, other = numbers(one), numbers(other)
    assert len(one) == len(other) > 2
    for a, b in zip(one, other, strict=True):
        assert set(a) == set(b) and len(a) > 10
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_eight_devices_train_as_one():
    """Two updates of Craftax. Pools don't depend on the number of devices from 2,048 envs on; here they are made so."""
    eight = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": eight}
    done = subprocess.run([sys.executable, "-c", CRAFTAX], env=environment, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert len(result["close"]) > 50 and all(result["close"])
    assert result["shards"] == [[1], [8]]


def test_two_processes_train_as_one_and_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "use_compilation_cache", lambda: None)
    with jax.default_device(jax.devices("cpu")[0]):
        assert rl.cli([*TOY, "--run-dir", str(tmp_path / "one")]) == 0
    finish(*two_processes(TOY, tmp_path / "two", tmp_path, SLOW_LEADER))
    assert_same_training(tmp_path / "one", tmp_path / "two")
    guidance = [(tmp_path / name / "guidance.jsonl").read_text().count("\n") for name in ("one", "two")]
    assert guidance[0] == guidance[1] > 0  # only the leader asks and writes
    more = ["--resume", str(tmp_path / "two"), "--total-timesteps", "3000"]
    finish(*two_processes([*TOY, *more], tmp_path / "two", tmp_path))
    assert numbers(tmp_path / "two")[-1]["global_step"] == 3072
    assert numbers(tmp_path / "two")[-2]["phase"] == len(numbers(tmp_path / "two")) - 2


def test_bad_input_ends_all_processes(tmp_path):
    first, second = two_processes([*TOY, "--num-envs", "15", "--num-minibatches", "1"], tmp_path / "run", tmp_path)
    assert "error: --num-envs: 15 can't be divided among 2 devices" in finish(first, code=2)[0]
    assert "error: --num-envs" in finish(second, code=2)[0] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--num-devices 4096", "--num-devices: 4096 asked for"), ("--distributed", "JAX_NUM_PROCESSES")],
)
def test_what_the_machine_does_not_have_is_one_line(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(runs, "use_compilation_cache", lambda: None)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    assert rl.cli([*TOY, *flags.split(), "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_single_device_needs_no_mesh():
    assert devices.make_mesh(1) is None
    tree, env = {"a": np.arange(3)}, devices.SharedEnv(None)
    assert env.shard(tree) is tree and env.replicate(tree) is tree and env.put(tree) is tree
    assert devices.from_leader(tree) is tree
