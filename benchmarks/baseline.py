"""The work of Craftax_Baselines' `ppo.py`, to be timed beside ours. Written anew from its description, for speed only.

Its network, its defaults (but for the env), its optimistic resets, its float observations kept as they are for the
whole rollout and shuffled whole once an epoch. What its loop stores and never reads is left out (next observations,
infos), and so are logging and the annealing of the learning rate: that can only make it faster. Its own printed steps
per second are wrong: the clock stops before the device is done, and starts before the compilation.

Repository: MichaelTMatthews/Craftax_Baselines, at commit 7ce36fa.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from craftax.craftax_env import make_craftax_env_from_name
from flax import nnx

Tree = Any


@dataclass(frozen=True)
class Config:
    """Its defaults, with Craftax-Classic."""

    env_id: str = "Craftax-Classic-Symbolic-v1"
    num_envs: int = 1024
    num_steps: int = 64
    update_epochs: int = 4
    num_minibatches: int = 8
    layer_size: int = 512
    learning_rate: float = 2e-4
    gamma: float = 0.99
    gae_lambda: float = 0.8
    clip_eps: float = 0.2
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 1.0
    reset_ratio: int = 16

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps


class TwoTowers(nnx.Module):
    """Three tanh layers for the actor and three for the critic."""

    def __init__(self, num_features: int, num_actions: int, width: int, rngs: nnx.Rngs):
        def tower(outputs: int, last_scale: float) -> nnx.List:
            sizes, scales = (num_features, width, width, width, outputs), (*[math.sqrt(2)] * 3, last_scale)
            return nnx.List([
                nnx.Linear(inputs, size, kernel_init=nnx.initializers.orthogonal(scale), rngs=rngs)
                for inputs, size, scale in zip(sizes[:-1], sizes[1:], scales, strict=True)
            ])  # fmt: skip

        self.actor, self.critic = tower(num_actions, 0.01), tower(1, 1.0)

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(..., F) -> logits (..., A), value (...)"""
        return climb(self.actor, features), climb(self.critic, features)[..., 0]


def climb(tower: Any, x: jax.Array) -> jax.Array:
    *hidden, last = tower
    for layer in hidden:
        x = nnx.tanh(layer(x))
    return last(x)


def optimistic_env(env_id: str, num_envs: int, ratio: int) -> tuple[Callable, Callable, int]:
    """(reset(key) -> obs, state), (step(key, state, action) -> obs, state, reward, done), number of actions.

    Every step makes a world for every `ratio`-th env; envs that end get one of those each, or share them where more
    end than there are.
    """
    env = make_craftax_env_from_name(env_id, auto_reset=False)
    params, num_worlds = env.default_params, max(1, num_envs // ratio)
    reset_all, step_all = jax.vmap(env.reset, in_axes=(0, None)), jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def reset(key: jax.Array) -> tuple[jax.Array, Tree]:
        obs, state = reset_all(jax.random.split(key, num_envs), params)
        # craftax returns weakly typed numbers here and strong ones from a step.
        return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), (obs, state))

    def step(key: jax.Array, state: Tree, action: jax.Array) -> tuple[jax.Array, Tree, jax.Array, jax.Array]:
        key_step, key_reset = jax.random.split(key)
        obs, state, reward, done, _ = step_all(jax.random.split(key_step, num_envs), state, action, params)
        worlds = reset_all(jax.random.split(key_reset, num_worlds), params)
        chosen = (jnp.cumsum(done) - 1) % num_worlds
        obs, state = jax.tree.map(
            lambda new, old: jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), new[chosen], old), worlds, (obs, state)
        )
        return obs, state, reward, done

    return reset, step, env.action_space(params).n


def make_baseline(config: Config) -> tuple[Tree, Callable]:
    """(state, jitted function of state and key that does one update: rollout, advantages, epochs)."""
    reset, step_env, num_actions = optimistic_env(config.env_id, config.num_envs, config.reset_ratio)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(config.learning_rate, eps=1e-5))
    obs, env_state = jax.jit(reset)(jax.random.key(0))
    graphdef, params = nnx.split(TwoTowers(obs.shape[-1], num_actions, config.layer_size, nnx.Rngs(0)))

    def act(params: Tree, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nnx.merge(graphdef, params)(obs)

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, dict[str, jax.Array]]:
        params, env_state, obs = carry
        key_action, key_env = jax.random.split(key)
        logits, value = act(params, obs)
        action = jax.random.categorical(key_action, logits)
        next_obs, env_state, reward, done = step_env(key_env, env_state, action)
        kept = {"obs": obs, "action": action, "value": value, "reward": reward, "done": done}
        return (params, env_state, next_obs), kept | {"log_prob": pick(jax.nn.log_softmax(logits), action)}

    def update(state: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        params, opt_state, env_state, obs = state
        key_steps, key_epochs = jax.random.split(key)
        carry, batch = jax.lax.scan(step, (params, env_state, obs), jax.random.split(key_steps, config.num_steps))
        _, env_state, obs = carry
        batch |= advantages_of(config, batch, act(params, obs)[1])
        batch = jax.tree.map(lambda x: x.reshape(config.batch_size, *x.shape[2:]), batch)

        def epoch(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
            order = jax.random.permutation(key, config.batch_size)
            minibatches = jax.tree.map(lambda x: x[order].reshape(config.num_minibatches, -1, *x.shape[1:]), batch)
            return jax.lax.scan(minibatch, carry, minibatches)

        def minibatch(carry: tuple, part: dict[str, jax.Array]) -> tuple[tuple, jax.Array]:
            params, opt_state = carry
            loss, grads = jax.value_and_grad(lambda p: ppo_loss(config, *act(p, part["obs"]), part))(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), loss

        carry, losses = jax.lax.scan(epoch, (params, opt_state), jax.random.split(key_epochs, config.update_epochs))
        return (*carry, env_state, obs), losses.mean()

    return (params, optimizer.init(params), env_state, obs), jax.jit(update, donate_argnums=0)


def pick(log_probs: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_probs, action[:, None], axis=1)[:, 0]


def advantages_of(config: Config, batch: dict[str, jax.Array], last_value: jax.Array) -> dict[str, jax.Array]:
    """GAE over (T, N)."""

    def back(carry: tuple, x: tuple) -> tuple[tuple, jax.Array]:
        advantage, next_value = carry
        reward, value, done = x
        delta = reward + config.gamma * next_value * (1 - done) - value
        advantage = delta + config.gamma * config.gae_lambda * (1 - done) * advantage
        return (advantage, value), advantage

    steps = batch["reward"], batch["value"], batch["done"].astype(jnp.float32)
    _, advantages = jax.lax.scan(back, (jnp.zeros_like(last_value), last_value), steps, reverse=True, unroll=16)
    return {"advantage": advantages, "target": advantages + batch["value"]}


def ppo_loss(config: Config, logits: jax.Array, value: jax.Array, part: dict[str, jax.Array]) -> jax.Array:
    """Clipped surrogate, clipped value loss, entropy."""
    log_probs = jax.nn.log_softmax(logits)
    ratio = jnp.exp(pick(log_probs, part["action"]) - part["log_prob"])
    advantage = (part["advantage"] - part["advantage"].mean()) / (part["advantage"].std() + 1e-8)
    policy = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps) * advantage)
    clipped = part["value"] + jnp.clip(value - part["value"], -config.clip_eps, config.clip_eps)
    errors = jnp.maximum(jnp.square(value - part["target"]), jnp.square(clipped - part["target"]))
    entropy = -(jnp.exp(log_probs) * log_probs).sum(1)
    return policy.mean() + config.vf_coef * 0.5 * errors.mean() - config.ent_coef * entropy.mean()
