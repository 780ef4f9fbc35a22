"""The devices that share the envs: some of one machine's, or of many machines (`--num-devices`, `--distributed`).

A mesh with one axis. The envs are split over it, and so is every minibatch; parameters, rollouts to be shuffled and the
guidance table are whole on every device. The same program runs on one device and on many: XLA splits what the calls of
`split`, `each` and `replicate` say, so that results differ by the order of float sums only, where the env's pools are
the same (`envs.make_env`). With `mesh` None, for one device, all of this does nothing.

With many processes, every process runs the same script. Process 0, the leader, keeps the run folder, asks adapter and
LLM, and hands the table to the others (`from_leader`); they bring their devices.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Pytree = Any
AXIS = "envs"


def initialize() -> None:
    """Join the processes of this run; before anything else is done with jax. Raises ValueError, one line.

    Under SLURM, Open MPI and on TPU pods jax finds out by itself; elsewhere JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    if given and len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise ValueError(f"--distributed: {', '.join(given)} is set in the environment, {missing} is not")
    try:
        numbers = [int(os.environ[name]) for name in given[1:]]
        jax.distributed.initialize(*([os.environ[names[0]], *numbers] if given else []))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--distributed: can't join the other processes ({reason}); set {', '.join(names)}, or start it with srun"
        ) from None


def is_leader() -> bool:
    return jax.process_index() == 0


def make_mesh(num_devices: int) -> Mesh | None:
    """The first num_devices of every process, or None for a single one. Raises ValueError if there are fewer."""
    if num_devices > jax.local_device_count():
        raise ValueError(
            f"--num-devices: {num_devices} asked for, {jax.default_backend()} has {jax.local_device_count()}; "
            "on a CPU XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight"
        )
    if num_devices * jax.process_count() == 1:
        return None
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return Mesh(np.array([d for devices in by_process.values() for d in devices[:num_devices]]), (AXIS,))


def count(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.size


# ---------------------------------------------------------------------------------------------------------- inside jit


def split(mesh: Mesh | None, tree: Pytree, axis: int = 0) -> Pytree:
    """Every device holds its part of this axis."""
    spec = PartitionSpec(*[None] * axis, AXIS)
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def replicate(mesh: Mesh | None, tree: Pytree) -> Pytree:
    """Every device holds all of it."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def each(mesh: Mesh | None, function: Callable, axes: tuple[int, ...] | int = 0) -> Callable:
    """The function, run by every device on its part of all arrays, without looking at the others.

    axes: the one that is split, of all arguments or of each; of all results it is the first one.
    """
    if mesh is None:
        return function
    specs = jax.tree.map(lambda axis: PartitionSpec(*[None] * axis, AXIS), axes)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)


# --------------------------------------------------------------------------------------------------------- outside jit


def everywhere(mesh: Mesh | None, tree: Pytree) -> Pytree:
    """Arrays that all processes have, put whole on every device."""
    return tree if mesh is None else jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def whole(mesh: Mesh | None, tree: Pytree) -> Pytree:
    """numpy arrays of what is split; random keys as their data. All processes must call it."""
    tree = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)
    if mesh is not None:
        tree = jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(np.asarray, tree)


def _same(tree: Pytree) -> Pytree:  # of one name, so that it compiles once
    return tree


def like(tree: Pytree, template: Pytree) -> Pytree:
    """The inverse of `whole`, on the devices as the template is."""

    def put(x: np.ndarray, old: jax.Array) -> jax.Array:
        x = jax.random.wrap_key_data(x, impl=jax.random.key_impl(old)) if _is_key(old) else x
        return _put(x, old.sharding)

    return jax.tree.map(put, tree, template)


def _put(x: Any, sharding: Any) -> jax.Array:
    """An array that this process has, on devices that may be other processes'."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if _is_key(x):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def from_leader(tree: Pytree) -> Pytree:
    """The leader's numbers, in every process; of others only the shapes count. All processes must call it."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def told_by_leader(value: Any) -> Any:
    """The same for what JSON can say, of any size."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(from_leader(np.int64(text.size)))
    return json.loads(bytes(from_leader(np.resize(text, length)).tolist()))


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Where one process fails or is stopped at once, its peers would wait for it: it leaves, and they end with an
    error."""
    try:
        yield
    except BaseException:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            leave(1)
        raise


def leave(code: int) -> int:
    """The code; but one of several processes ends here, without the farewell that the others would not answer."""
    if not jax.distributed.is_initialized():
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
