"""Environments. A new one is a file (or folder) with `make_env(num_envs, num_devices)`, and a line in `ENVS`.

The protocol (`envs/toy.py` is the smallest example). An env is an object without arrays of its own, hashable and equal
to another one of the same settings, so that it can be a static argument of `jax.jit`. It has

    game: Game                                   its words (`envs.game`)
    num_pools: int                               G, see below
    view: tuple[int, int]                        rows and columns of what the player sees, itself in the middle
    reset(key, num_envs) -> state                fresh episodes; `state` is any pytree
    refill(keys (G,), state) -> state            called once per update, for work too expensive to do at each step
    observe(state) -> obs (N, O) uint8           all that policy, facts and caption are made of
    step(keys (N,), state, action (N,)) -> state, reward (N,) f32, done (N,) bool, info
    features(obs (..., O)) -> (..., F) f32       what the policy sees of it
    places(obs (..., O)) -> (..., W, 3) int32    the nearest of each of `game.kinds`, see envs.nearest
    facing(obs (..., O)) -> (..., 2) int32       dy, dx of the cell that the player faces
    facts(obs (..., O)) -> (..., P) bool         in the order of `game.facts`
    to_text(obs (O,)) -> str                     the caption, on the host

The first axis of every array of `state` has N or G entries: env i and pool i * G // N belong together, and nothing else
does, so that D devices (G divisible by D) can each run `refill`, `observe` and `step` on their part of both.

`step` resets an env whose episode ends: the state it returns is then the first one of the next episode, reward and
done are those of the step. `info` holds, per env,

    reached (N, num_basic) bool      basic sub-goals that were reached with this step
    worked (N, num_basic) bool       basic sub-goals that were worked towards, reached ones included: what a bonus pays
    achievements (N, A) bool         `game.achievements` as they stood at the end of the step, before the reset

For people to look at (evaluate.py) an env may have, besides,

    HABITS: dict, DEATHS: tuple                          habits of common sense with what each is; what ends a life
    find_habits(obs, action, next_obs, done) -> occasions, sensible (..., H) bool     inside jit
    cause_of_death(obs, action) -> (...) int32           of a life's last step, an index into DEATHS
    ORIGINAL: str, original(num_envs, seed)              the game that it is a version of, to play on the host
    scene(state) -> pytree (N, ...)                      what `draw` needs of a state, inside jit
    draw(scene of one env) -> (H, W, 3) uint8            a picture, the view at its top
    letters(obs (O,)) -> rows of (letter, colour)        the same for a terminal
    status(obs (O,)) -> vitals of 9, bag                 two dicts of numbers
"""

import importlib
from typing import Any

# Env id -> module with make_env(num_envs, num_devices). Imported when asked for: some games take seconds to import.
ENVS = {
    "Craftax-Classic-Symbolic-v1": "envs.crafter",
    "Toy-v0": "envs.toy",
}


def make_env(env_id: str, num_envs: int, num_devices: int = 1) -> Any:
    """Makes the env of that id, for num_envs games on that many devices. Raises ValueError for an unknown id."""
    if env_id not in ENVS:
        raise ValueError(f"--env-id: unknown env {env_id!r}; choose {' or '.join(ENVS)}")
    return importlib.import_module(ENVS[env_id]).make_env(num_envs, num_devices)
