"""A/B tests of many options at once: what came of each, in envs without it and in envs with it.

    sums = add_up_visits(...)             on the device, inside jit, for one rollout
    trial += phase_trial(sums)            on the host, once per phase
    trial_z(trial) > DECIDED_AT_SE        the option has won

An option is *in force* in some situations. A *visit* begins where it comes into force. Sums have the shape (K, 2, ...),
for K options, in envs WITHOUT and WITH the option.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WITHOUT, WITH = 0, 1  # the two arms of a trial
AT_ONCE = 2  # options on trial at a time: an env lacks one at most, else most envs would lack some
CONTROL_SHARE = 1 / 8  # share of the envs that an option on trial is withheld from
MIN_VISITS = 10  # visits of each arm in a phase, below which that phase counts nothing
DECIDED_AT_SE = 3.0  # standard errors by which an arm must lead: many trials are watched, and every phase


def add_up_visits(in_force: Callable[[Any], jax.Array], goals: jax.Array, shown: jax.Array, steps: tuple) -> jax.Array:
    """Adds up over T steps and N envs.

    visits: how often an option came into force. returns, squares: of what an env earned from there on. successes:
    visits in which the option's goal was reached. steps, reached, action: while the option was in force. A visit that
    began before the first step counts as steps only.

    Args:
        in_force: facts (N, P) -> (N, K) bool
        goals: (K, G) f32, which of G goals an option has
        shown: (N, K) bool, which env has which option
        steps: facts (T, N, P), reached (T, N, G) bool, action (T, N, A) f32, one-hot, return (T, N) from that step on,
            fresh (T, N) bool: an episode begins with this step
    Returns:
        (K, 2, 5 + G + A) f32: visits, returns, squares, successes, steps, reached, action
    """
    arms = jnp.stack([~shown, shown]).astype(jnp.float32)  # (2, N, K)

    def step(carry: tuple, x: tuple) -> tuple[tuple, None]:
        before, counted, succeeded, sums = carry  # (N, K) bool: in force before, visit counts, goal was reached
        facts, reached, action, returns, fresh = x
        now = in_force(facts)
        entered = now & (~before | fresh[:, None])
        counted = (counted | entered) & now
        hit = (reached.astype(jnp.float32) @ goals.T > 0) & counted
        success = hit & (~succeeded | entered)
        per_visit = jnp.stack([jnp.ones_like(returns), returns, returns**2], 1)
        per_step = jnp.concatenate([jnp.ones((*fresh.shape, 1)), reached, action], 1)
        add = [
            jnp.einsum("gnk,nc->kgc", arms * entered, per_visit),
            jnp.einsum("gnk->kg", arms * success)[..., None],
            jnp.einsum("gnk,nc->kgc", arms * now, per_step),
        ]
        succeeded = hit | (succeeded & counted & ~entered)
        return (now, counted, succeeded, sums + jnp.concatenate(add, -1)), None

    facts, reached, action, *_ = steps
    nothing = jnp.zeros_like(shown)
    sums = jnp.zeros((shown.shape[1], 2, 5 + reached.shape[-1] + action.shape[-1]))
    carry = (in_force(facts[0]), nothing, nothing, sums)
    return jax.lax.scan(step, carry, steps)[0][-1]


def arm_lines(sums: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Describes each option and arm that was used in a phase, in numbers that JSON takes."""
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    for row, arm in np.argwhere(sums["steps"] > 0).tolist() if sums else ():
        at = row, arm
        visits = max(sums["visits"][at], 1.0)
        mean = sums["returns"][at] / visits
        yield {
            "row": row,
            "with_advice": arm,
            "visits": int(sums["visits"][at]),
            "steps": int(sums["steps"][at]),
            "return_mean": mean,
            "return_variance": max(sums["squares"][at] / visits - mean**2, 0.0),
            "successes": int(sums["successes"][at]),
            "reached": {goal: int(n) for goal, n in enumerate(sums["reached"][at]) if n},
        }


def phase_trial(sums: dict[str, np.ndarray]) -> np.ndarray:
    """Returns (K, 2) of one phase: the difference of mean returns (with - without) / its variance, 1 / its variance.

    With and without are compared within a phase: returns grow while a policy learns, and so does the share of envs that
    are given what works; sums over phases would mistake the one for the other.
    """
    n = np.maximum(sums["visits"], 1)
    mean = sums["returns"] / n
    variance = (np.maximum(sums["squares"] / n - mean**2, 1e-4) / n).sum(1)
    precision = np.where((sums["visits"] >= MIN_VISITS).all(1), 1 / variance, 0.0)
    return np.stack([(mean[:, WITH] - mean[:, WITHOUT]) * precision, precision], 1)


def trial_z(trial: np.ndarray) -> np.ndarray:
    """Returns (K,) standard errors by which the return with an option leads that without it; 0 where unknown."""
    return trial[:, 0] / np.sqrt(np.maximum(trial[:, 1], 1e-9))


def choose(z: np.ndarray, times_tried: np.ndarray, visits: np.ndarray) -> list[int]:
    """Chooses up to AT_ONCE options to put on trial: undecided ones, the least tried first, of those the most used."""
    order = np.lexsort((-visits, times_tried))
    return [int(k) for k in order if visits[k] > 0 and abs(z[k]) <= DECIDED_AT_SE][:AT_ONCE]


def show_probability(z: np.ndarray) -> np.ndarray:
    """Returns (K,) how many envs get an option that is not on trial: few a loser, all the others."""
    return np.where(z < -DECIDED_AT_SE, CONTROL_SHARE, 1.0)


def draw_shown(key: jax.Array, show_probability: jax.Array, on_trial: jax.Array, num_envs: int) -> jax.Array:
    """Draws who gets what.

    Args:
        show_probability: (K,)
        on_trial: (AT_ONCE,) int32, the options on trial, K for none; each is withheld from other envs
    Returns:
        (N, K) bool
    """
    key_arm, key_shown = jax.random.split(key)
    arm = jax.random.uniform(key_arm, (num_envs, 1)) / CONTROL_SHARE
    held_back = arm.astype(jnp.int32) == jnp.arange(AT_ONCE)  # (N, AT_ONCE)
    withheld = (held_back[..., None] & (on_trial[:, None] == jnp.arange(len(show_probability)))).any(1)
    return (jax.random.uniform(key_shown, withheld.shape) < show_probability) & ~withheld
