"""Environments, what is said of them, what counts as reaching a sub-goal. `envs.craftax` documents the protocol."""

from typing import Any


def make_env(env_id: str, num_envs: int) -> Any:
    """The env of that id, for num_envs parallel games. Raises ValueError for an unknown id."""
    if env_id == "Craftax-Classic-Symbolic-v1":
        from envs.craftax import CraftaxEnv

        return CraftaxEnv(pool_size=max(8, num_envs))
    if env_id == "Toy-v0":
        from envs.toy import ToyEnv

        return ToyEnv()
    raise ValueError(f"--env-id: unknown env {env_id!r}; choose Craftax-Classic-Symbolic-v1 or Toy-v0")
