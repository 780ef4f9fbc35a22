"""The devices that share the envs: some of one machine's, or of many machines (`--num-devices`, `--distributed`).

    sharded over the envs      env state, running returns, exposure to advice    a device plays its own envs
    sharded over the samples   a minibatch                                       a device takes its part of each
    replicated                 parameters, optimizer, guidance table, sums,      all devices do the same with them
                               the rollout while it is shuffled

The same program runs on one device and on many. `SharedEnv` wraps an env, and says with four calls what is sharded;
XLA splits the rest. Where the env's pools are the same, results differ by the order of float sums, and by what follows
from it: with few envs per device world generation has been seen to round differently.

Of many processes every one runs the same script. Process 0, the leader, keeps the run folder, asks adapter and guide,
and hands the table to the others (`from_leader`); they bring their devices.
"""

import contextlib
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from envs.nearest import nearest

Pytree = Any
AXIS = "envs"
LEADER_STAYS = 2.0  # seconds that the leader waits for the others' last words


def initialize() -> None:
    """Joins the processes of this run; before anything else is done with jax. Raises ValueError, one line.

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


def check() -> None:
    """Raises ValueError, one line, where jax has no device, or numbers of a width that nothing here is made for."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise ValueError(f"jax finds no device ({reason}); unset JAX_PLATFORMS, or install jax for it") from None
    if jax.config.jax_enable_x64:
        raise ValueError("JAX_ENABLE_X64 is set, and all numbers here have 32 bits; unset it")


def is_leader() -> bool:
    return jax.process_index() == 0


def make_mesh(num_devices: int) -> Mesh | None:
    """Takes the first num_devices of every process; None for a single one. Raises ValueError if there are fewer."""
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


@dataclass(frozen=True)
class SharedEnv:
    """An env whose games are shared among devices, with the protocol of `envs`; `step` and `refill` take one key.

    Hashable, so that it can be a static argument of jit. With `mesh` None, for a single device, sharing does nothing.
    """

    env: Any
    mesh: Mesh | None = None

    @property
    def game(self) -> Any:
        return self.env.game

    @functools.cached_property
    def obs_size(self) -> int:
        """Returns O, the bytes of an observation."""
        key = jax.random.key(0)
        return jax.eval_shape(lambda: self.env.observe(self.env.reset(key, 1))).shape[-1]

    def features(self, obs: jax.Array) -> jax.Array:
        return self.env.features(obs)

    def places(self, obs: jax.Array) -> jax.Array:
        """Says of each kind of thing where the nearest one is: (..., O) -> (..., W, 3) int32, see `envs.nearest`."""
        return self.env.places(obs)

    def nearest(self, obs: jax.Array) -> jax.Array:
        """Says it in the numbers that the policy gets: (..., O) -> (..., W, 18) f32."""
        return nearest(self.env.places(obs), self.env.facing(obs), self.env.view)

    def facts(self, obs: jax.Array) -> jax.Array:
        return self.env.facts(obs)

    def to_text(self, obs: np.ndarray) -> str:
        return self.env.to_text(obs)

    # ---- the env's protocol, inside jit

    def reset(self, key: jax.Array, num_envs: int) -> Pytree:
        """Begins fresh episodes."""
        return self.shard(self.env.reset(key, num_envs))

    def observe(self, state: Pytree) -> jax.Array:
        """Returns obs (N, O)."""
        return self.map_over_envs(self.env.observe)(state)

    def step(self, key: jax.Array, state: Pytree, action: jax.Array) -> tuple:
        """Steps all envs, each with a key of its own: the same on any number of devices."""
        return self.map_over_envs(self.env.step)(jax.random.split(key, len(action)), state, action)

    def refill(self, key: jax.Array, state: Pytree) -> Pytree:
        """Does what the env does once per update."""
        return self.map_over_envs(self.env.refill)(jax.random.split(key, self.env.num_pools), state)

    # ---- what is where, inside jit

    def shard(self, tree: Pytree) -> Pytree:
        """Lets every device hold its part of the first axis."""
        return self._constrain(tree, PartitionSpec(AXIS))

    def replicate(self, tree: Pytree) -> Pytree:
        """Lets every device hold all of it."""
        return self._constrain(tree, PartitionSpec())

    def _constrain(self, tree: Pytree, spec: PartitionSpec) -> Pytree:
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))

    def map_over_envs(self, function: Callable, axes: tuple[int, ...] | int = 0) -> Callable:
        """Makes every device run the function on its part of all arrays, without looking at the others.

        Args:
            axes: the axis that is split, of all arguments or of each; of all results it is the first one
        """
        if self.mesh is None:
            return function
        specs = jax.tree.map(lambda axis: PartitionSpec(*[None] * axis, AXIS), axes)
        out = PartitionSpec(AXIS)
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)

    # ---- outside jit

    def put(self, tree: Pytree) -> Pytree:
        """Puts the leader's arrays on every device. All processes must call it."""
        if self.mesh is None:
            return tree
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        def place(x: Any, old: Any) -> jax.Array:
            x = jax.random.wrap_key_data(x, impl=jax.random.key_impl(old)) if _is_key(old) else x
            return _put(x, everywhere)

        return jax.tree.map(place, from_leader(_key_data(tree)), tree)

    def to_host(self, tree: Pytree) -> Pytree:
        """Fetches what is sharded as numpy arrays; random keys as their data. All processes must call it."""
        tree = _key_data(tree)
        if self.mesh is not None:
            tree = jax.jit(_same, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)
        return jax.tree.map(np.asarray, tree)


def share_env(
    make_env: Callable[[str, int, int], Any], env_id: str, num_envs: int, minibatch_size: int, num_devices: int
) -> SharedEnv:
    """Makes an env for the devices of all processes. Raises ValueError for what can't be split over them."""
    mesh = make_mesh(num_devices)
    total = 1 if mesh is None else mesh.size
    if num_envs % total:
        raise ValueError(f"--num-envs: {num_envs} can't be divided among {total} devices (--num-devices)")
    if minibatch_size % total:
        raise ValueError(
            f"--num-minibatches: minibatches of {minibatch_size} envs can't be divided among {total} devices "
            "(--num-devices)"
        )
    return SharedEnv(make_env(env_id, num_envs, total), mesh)


def _same(tree: Pytree) -> Pytree:  # of one name, so that it compiles once
    return tree


def put_like(tree: Pytree, template: Pytree) -> Pytree:
    """Puts numpy arrays (`SharedEnv.to_host`) on devices as the template is."""

    def put(x: np.ndarray, old: jax.Array) -> jax.Array:
        x = jax.random.wrap_key_data(x, impl=jax.random.key_impl(old)) if _is_key(old) else x
        # Committed where the template is not, it would compile everything that takes it anew.
        return _put(x, old.sharding) if old.committed else jax.numpy.asarray(x)

    return jax.tree.map(put, tree, template)


def _put(x: Any, sharding: Any) -> jax.Array:
    """Puts an array that this process has on devices that may be other processes'."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if _is_key(x):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_data(tree: Pytree) -> Pytree:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def from_leader(tree: Pytree) -> Pytree:
    """Returns the leader's numbers in every process; of others only the shapes count. All processes must call it."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def json_from_leader(value: Any) -> Any:
    """Returns the leader's value in every process, anything that JSON can say."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(from_leader(np.int64(text.size)))
    return json.loads(bytes(from_leader(np.resize(text, length)).tolist()))


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Ends this process where it fails or is stopped at once: its peers would wait for it, so they end too."""
    try:
        yield
    except BaseException:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            leave(1)
        raise


def leave(code: int) -> int:
    """Returns the code. One of several processes ends here, without a farewell that the others would not answer."""
    if not jax.distributed.is_initialized():
        return code
    if is_leader():  # the others lose it at once, and end with a stack trace if they have not said why they end
        time.sleep(LEADER_STAYS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
