"""Environments, what is said of them, what counts as reaching a sub-goal. `envs.craftax` documents the protocol."""

import math
from typing import Any


def make_env(env_id: str, num_envs: int, num_devices: int = 1) -> Any:
    """The env of that id, for num_envs parallel games on that many devices. Raises ValueError for an unknown id."""
    if env_id == "Craftax-Classic-Symbolic-v1":
        from envs.craftax import CraftaxEnv

        # From 2,048 envs on 1, 2, 4 and 8 devices have the same pools, and so the same results. Below that, as many
        # pools would waste worlds.
        num_pools = math.lcm(num_devices, 8 if num_envs % 8 == 0 and num_envs >= 2048 else 1)
        return CraftaxEnv(pool_size=max(8, num_envs // num_pools), num_pools=num_pools)
    if env_id == "Toy-v0":
        from envs.toy import ToyEnv

        return ToyEnv(num_pools=num_devices)
    raise ValueError(f"--env-id: unknown env {env_id!r}; choose Craftax-Classic-Symbolic-v1 or Toy-v0")
