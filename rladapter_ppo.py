"""RLAdapter with PPO in JAX. A small adapter model rewrites the situation for an LLM; the LLM's sub-goals guide a PPO
agent; the outcome trains the adapter.

    device, N updates per phase                host, at the pause before each phase              device
    observe -> facts --(sample of situations)--> caption -> adapter: analysis -> guide: sub-goals with reasons
       |                                                                                |
       |                                         rows of the guidance table <-----------+
       v                                                    |
    rollout, GAE, PPO  <--  advice: a lookup at every step <+
       |
       +--- per row: visits, returns, sub-goals reached  -->  comprehension, trials  -->  fine-tuning of the adapter

    python rladapter_ppo.py --seed 1                  # 1M steps of Crafter, offline guide, 10 minutes on a CPU core
    python rladapter_ppo.py --guidance none           # plain PPO
    python rladapter_ppo.py --llm http --llm-base-url http://127.0.0.1:8000/v1 --llm-model NAME
    python rladapter_ppo.py --resume runs/...         # go on where a run was stopped

Paper: RLAdapter / AdaRefiner, arXiv 2309.17176. The file reads top to bottom: flags, pytrees, network, what is jitted
(loss, GAE, update, rollout, evaluation), and `main`, the loop. What the policy is told is in advice.py, the table in
guidance.py, the adapter in rladapter_adapter.py, the guide in llm_client.py.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import guidance
import hindsight
import llm_client
import rladapter_adapter
from advice import CONTEXTS, ContextVectors, Exposure, GuidanceTable, NoContext, draw_exposures, pytree
from envs import make_env
from envs.game import Game
from envs.nearest import NUM_FEATURES, pointed
from envs.scores import Tally, episode_metrics
from guidance import HostTable, TableArgs
from llm_client import LlmArgs, NoGuide, make_guide
from rladapter_adapter import NoAdapter, SftArgs, make_adapter, write_analyses
from utils import devices, runs
from utils.cli import BigInt, check_ranges

Pytree = Any


@dataclass(frozen=True)
class Args:
    """Flags. Those of the table, the adapter and the guide are in the files that read them."""

    exp_name: str = Path(__file__).stem
    """name of this experiment, part of the run folder's name"""
    seed: int = 1
    """seed of everything random: worlds, actions, weights, minibatches, the adapter's sampling"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    run_dir: Path | None = None
    """folder of the run; default runs/<env-id>__<exp-name>__<seed>__<time>"""
    resume: Path | None = None
    """go on with the run in this folder: all other flags come from it, only --total-timesteps may be given anew;
    auto: with the run in --run-dir, or start it there"""
    save_every: int = 5
    """phases between two checkpoints; the last phase and Ctrl-C save too"""
    eval_episodes: int = 256
    """episodes of the final evaluation, rounded up to a multiple of --num-envs"""
    num_devices: int = 1
    """devices that share the envs, in each process"""
    distributed: bool = False
    """be one of several processes with the same flags: under SLURM, or with JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID set"""
    dry_run: bool = False
    """print the prompts of the first pause, and the calls, tokens and cost to expect of the run, and stop"""

    env_id: str = "Craftax-Classic-Symbolic-v1"
    """the environment: Craftax-Classic-Symbolic-v1 or Toy-v0"""
    total_timesteps: BigInt = 1_000_000
    """env steps of training, met to within one update"""
    learning_rate: float = 1e-3
    """learning rate of PPO's Adam"""
    num_envs: int = 64
    """parallel games"""
    num_steps: int = 64
    """steps of a rollout, per env and update"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero over the run"""
    lr_warmup: float = 0.05
    """share of the updates in which the learning rate rises from zero"""
    gamma: float = 0.97
    """discount of future rewards"""
    gae_lambda: float = 0.625
    """lambda of generalized advantage estimation"""
    num_minibatches: int = 8
    """minibatches in an epoch of PPO"""
    update_epochs: int = 4
    """epochs that PPO makes on each rollout"""
    norm_adv: bool = True
    """normalise advantages over the batch"""
    clip_coef: float = 0.2
    """PPO's clipping range of the probability ratio"""
    ent_coef: float = 0.01
    """weight of the entropy bonus in the loss"""
    vf_coef: float = 1.0
    """weight of the value loss"""
    predict_coef: float = 0.08
    """weight of the auxiliary loss: how facts and nearest things change with an action is predicted; 0: no such loss"""
    max_grad_norm: float = 0.5
    """global norm at which the gradient is clipped"""
    value_ema: float = 0.99
    """decay, per minibatch, of the mean and variance that value targets are standardised by"""
    hidden_size: int = 256
    """width of the policy network's layers"""
    rnn_size: int = 256
    """width of the policy's memory, a GRU; 0: no memory"""
    updates_per_phase: int = 8
    """PPO updates between two pauses"""

    guidance: Literal["full", "none", "facts"] = "full"
    """full: the adapter and the guide advise the policy; none: plain PPO; facts: control experiment, the policy sees
    the facts that advice may rest on, no adapter and no guide run"""
    guidance_bonus: float | None = None
    """reward for each step of work towards an advised sub-goal; default 0.1 with guidance, 0 without. Without guidance
    the bonus is for every basic sub-goal (a control experiment)"""
    bonus_fade: float = 0.8
    """share of the bonus that each repetition of a sub-goal in an episode pays of the one before"""
    pointer: Literal["advice", "fixed", "none"] = "advice"
    """what advice shows beside its embedding. advice: the places of the things that the two most urgent pieces are
    about, and the action that one is; fixed: a control, the same of all sub-goals that are possible, in a fixed order;
    none: as in the paper"""
    approach_bonus: float = 0.05
    """reward for each step closer to the first thing that advice points at, and the price of each step away from it"""
    table: tyro.conf.OmitArgPrefixes[TableArgs] = TableArgs()
    sft: tyro.conf.OmitArgPrefixes[SftArgs] = SftArgs()
    llm: tyro.conf.OmitArgPrefixes[LlmArgs] = LlmArgs()

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.num_envs // self.num_minibatches  # envs, each with all its steps

    @property
    def num_updates(self) -> int:
        return -(-self.total_timesteps // self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.num_updates * self.batch_size

    def updates_in_phase(self, phase: int, updates_done: int) -> int:
        """Counts updates. The first phase is one: before it there is little to ask about. The last may be short."""
        return min(1 if phase == 0 else self.updates_per_phase, self.num_updates - updates_done)

    @property
    def updates_that_ask(self) -> int:
        """Counts the updates before which a pause still asks."""
        return math.ceil(self.table.query_until * self.num_updates)

    @property
    def learns(self) -> bool:
        """Is the adapter fine-tuned, or what it would be tuned on told in its place?"""
        return self.tunes or (self.context.guided and self.sft.analyses == "retrieved")

    @property
    def tunes(self) -> bool:
        return self.context.guided and self.sft.has_model and self.sft.sft_every > 0

    @property
    def context(self) -> type[NoContext]:
        return CONTEXTS[self.guidance]

    @property
    def bonus(self) -> float:
        return self.context.default_bonus if self.guidance_bonus is None else self.guidance_bonus


# --------------------------------------------------------------------------------------------------
# Pytrees
#
#     N envs       T steps of a rollout     K rows of the table     P facts     O bytes of an observation
#     A actions    S sub-goals, the first G of which are basic      F features  D size of an embedding
# --------------------------------------------------------------------------------------------------


@pytree
class Transition:
    """One step of all envs, with all that the policy saw."""

    obs: jax.Array  # (N, O) uint8
    facts: jax.Array  # (N, P) bool
    advised: jax.Array  # (N, S) bool, what the policy was advised
    pointed: jax.Array  # (N, 2) int32, the kinds of things that advice points at; W for nothing
    hinted: jax.Array  # (N,) int32, the action that advice is; A for none
    previous: jax.Array  # (N,) int32, the action before; A where an episode begins
    memory: jax.Array  # (N, R) f32, of the policy before this step; of a rollout's steps the first one's alone is kept
    action: jax.Array  # (N,) int32
    log_prob: jax.Array  # (N,) f32
    value: jax.Array  # (N,) f32
    reward: jax.Array  # (N,) f32, with bonus
    env_reward: jax.Array  # (N,) f32, without
    done: jax.Array  # (N,) bool, the episode ended with this step
    reached: jax.Array  # (N, G) bool


@pytree
class Runner:
    """All that training carries from update to update."""

    params: Pytree
    opt_state: Pytree
    env_state: Pytree
    key: jax.Array
    update: jax.Array  # () int32
    episodic_return: jax.Array  # (N,) f32, so far, without bonus
    episodic_length: jax.Array  # (N,) int32
    value_stats: jax.Array  # (2,) f32, running mean of value targets and of their squares
    previous: jax.Array  # (N,) int32, last action; A where an episode begins
    memory: jax.Array  # (N, R) f32, of the policy; zero where an episode begins
    paid: jax.Array  # (N, G) int32, how often a bonus was paid for each sub-goal in this episode
    failed: jax.Array  # () int32, updates in a row that met gradients which are no numbers


# --------------------------------------------------------------------------------------------------
# Network
# --------------------------------------------------------------------------------------------------


class ActorCritic(nnx.Module):
    """Features and context are summed in the first layer; a GRU remembers; actor and critic see both.

    Heads on [memory, embedding] and layer norm before every dense layer. The input projection of the GRU is outside of
    the scan: on a CPU small products in a loop are what costs.
    """

    def __init__(
        self,
        num_features: int,
        context_sizes: list[int],
        num_actions: int,
        num_changes: int,
        width: int,
        rnn_size: int,
        rngs: nnx.Rngs,
    ):
        hidden_init = nnx.initializers.orthogonal(math.sqrt(2.0))
        dense = functools.partial(nnx.Linear, kernel_init=hidden_init, rngs=rngs)
        self.num_actions, self.rnn_size = num_actions, rnn_size
        self.features = dense(num_features, width)
        self.context = nnx.List([dense(size, width, use_bias=False) for size in context_sizes])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        if rnn_size:
            recurrent = functools.partial(nnx.Linear, kernel_init=nnx.initializers.orthogonal(1.0), rngs=rngs)
            self.gru_in = recurrent(width + num_actions, 3 * rnn_size)
            self.gru_memory = recurrent(rnn_size, 3 * rnn_size)
            self.memory_norm = nnx.LayerNorm(rnn_size, rngs=rngs)
        self.actor_hidden = dense(width + rnn_size, width)
        self.actor_norm = nnx.LayerNorm(width, rngs=rngs)
        small = nnx.initializers.orthogonal(0.01)
        self.actor = nnx.Linear(width, num_actions, kernel_init=small, rngs=rngs)
        self.follow = nnx.Linear(width, 1, kernel_init=small, bias_init=nnx.initializers.ones, rngs=rngs)
        self.critic_hidden = dense(width + rnn_size, width)
        self.critic_norm = nnx.LayerNorm(width, rngs=rngs)
        self.critic = nnx.Linear(width, 1, kernel_init=nnx.initializers.orthogonal(1.0), rngs=rngs)
        self.change_hidden = dense(width + rnn_size + num_actions, width)
        self.change_norm = nnx.LayerNorm(width, rngs=rngs)
        self.change = nnx.Linear(width, num_changes, kernel_init=small, rngs=rngs)

    def __call__(
        self, features: jax.Array, context: ContextVectors, hinted: jax.Array, previous: jax.Array, memory: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Maps features (T, B, F), hinted and previous actions (T, B) and the memory (B, R) before them.

        Returns:
            logits (T, B, A), value (T, B), the memory after them, and for `predict` the hidden layer (T, B, H)
        """
        inputs = jnp.concatenate([features, *(weights for weights, _ in context)], -1)
        projected = [layer(basis) for layer, (_, basis) in zip(self.context, context, strict=True)]  # (M, width) each
        kernel = jnp.concatenate([self.features.kernel[...], *projected])  # one matmul is cheaper than a sum of them
        x = nnx.relu(self.norm(inputs @ kernel + self.features.bias[...]))
        if self.rnn_size:
            memories, memory = self.remember(x, previous, memory)
            x = jnp.concatenate([self.memory_norm(memories), x], -1)
        acting = nnx.relu(self.actor_norm(self.actor_hidden(x)))
        # How far to follow a hint is one number for all actions, so what it learns of one it knows of the others.
        logits = self.actor(acting) + self.follow(acting) * jax.nn.one_hot(hinted, self.num_actions)
        value = self.critic(nnx.relu(self.critic_norm(self.critic_hidden(x))))
        return logits, value[..., 0], memory, x

    def predict(self, hidden: jax.Array, action: jax.Array) -> jax.Array:
        """Predicts how what is seen changes with an action: hidden (T, B, H), action (T, B) -> (T, B, V)"""
        acted = jnp.concatenate([hidden, jax.nn.one_hot(action, self.num_actions)], -1)
        return self.change(nnx.relu(self.change_norm(self.change_hidden(acted))))

    def remember(self, x: jax.Array, previous: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x (T, B, width), previous (T, B), memory (B, R) -> memories (T, B, R), the last one (B, R)"""
        gates = self.gru_in(jnp.concatenate([x, jax.nn.one_hot(previous, self.num_actions)], -1))  # (T, B, 3 R)
        kernel, bias = self.gru_memory.kernel[...], self.gru_memory.bias[...]

        def step(memory: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            gates_t, fresh_t = x
            memory = jnp.where(fresh_t[:, None], 0.0, memory)
            reset_x, update_x, new_x = jnp.split(gates_t, 3, -1)
            reset_h, update_h, new_h = jnp.split(memory @ kernel + bias, 3, -1)
            reset, update = jax.nn.sigmoid(reset_x + reset_h), jax.nn.sigmoid(update_x + update_h)
            memory = (1 - update) * jnp.tanh(new_x + reset * new_h) + update * memory
            return memory, memory

        last, memories = jax.lax.scan(step, memory, (gates, previous == self.num_actions))
        return memories, last


@dataclass(frozen=True)
class Agent:
    """The static half of the policy: hashable, so that it can be a static argument of jit."""

    env: devices.SharedEnv
    graphdef: Any
    context: type[NoContext]

    def __call__(
        self, params: Pytree, table: GuidanceTable, seen: dict[str, jax.Array], memory: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Maps what is seen (T, B, ...) and the memory (B, R) before it as `ActorCritic` does; values standardised."""
        network, near = nnx.merge(self.graphdef, params), self.env.nearest(seen["obs"])
        parts = [self.env.features(seen["obs"]), near.reshape(*near.shape[:-2], -1), pointed(near, seen["pointed"])]
        context = self.context.vectors(table, seen)
        return network(jnp.concatenate(parts, -1), context, seen["hinted"], seen["previous"], memory)


# --------------------------------------------------------------------------------------------------
# The update. Everything from here to `evaluate` is pure and runs inside jit
# --------------------------------------------------------------------------------------------------


SEEN = ("obs", "facts", "advised", "pointed", "hinted", "previous")  # of a Transition, what the policy looks at


def action_log_prob(logits: jax.Array, action: jax.Array) -> jax.Array:
    """Picks the log-probability of actions: (..., A), (...) -> (...)"""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1)[..., 0]


def predict_loss(agent: Agent, params: Pytree, hidden: jax.Array, batch: Transition) -> jax.Array:
    """Computes the squared error of the predicted change of facts and nearest things, summed over them, () f32.

    A policy that must foresee what its actions do learns sooner what to do. What the last step of a rollout leads to
    is not stored, and what ends an episode leads nowhere: both are left out.
    """
    near = agent.env.nearest(batch.obs)
    state = jnp.concatenate([near.reshape(*near.shape[:-2], -1), batch.facts.astype(jnp.float32)], -1)  # (T, B, V)
    predicted = nnx.merge(agent.graphdef, params).predict(hidden[:-1], batch.action[:-1])
    error = jnp.square(predicted - (state[1:] - state[:-1])).sum(-1)
    return (error * ~batch.done[:-1]).mean()


def ppo_loss(
    args: Args,
    agent: Agent,
    params: Pytree,
    table: GuidanceTable,
    batch: Transition,
    advantages: jax.Array,
    returns: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes PPO's loss of one minibatch (T, B), and what is logged about it; values are standardised."""
    seen = {name: getattr(batch, name) for name in SEEN}
    logits, value, _, hidden = agent(params, table, seen, batch.memory[0])
    log_ratio = action_log_prob(logits, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - args.clip_coef, 1.0 + args.clip_coef)
    policy_loss = jnp.maximum(-advantages * ratio, -advantages * clipped).mean()
    value_loss = 0.5 * jnp.square(value - returns).mean()
    log_probs = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    prediction_loss = predict_loss(agent, params, hidden, batch) if args.predict_coef else jnp.zeros(())
    loss += args.predict_coef * prediction_loss
    losses = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "predict_loss": prediction_loss,
        "approx_kl": ((ratio - 1.0) - log_ratio).mean(),
        "clipfrac": (jnp.abs(ratio - 1.0) > args.clip_coef).mean(),
    }
    return loss, losses


def compute_gae(
    reward: jax.Array, value: jax.Array, done: jax.Array, last_value: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Computes generalized advantage estimates (arXiv 1506.02438).

    Args:
        reward, value, done: (T, N); done[t] says that the episode ended with step t
        last_value: (N,) of the state after the last step
    Returns:
        advantages, returns: (T, N)
    """

    def step(
        carry: tuple[jax.Array, jax.Array], x: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        advantage, next_value = carry
        reward_t, value_t, done_t = x
        delta = reward_t + gamma * next_value * (1.0 - done_t) - value_t
        advantage = delta + gamma * lam * (1.0 - done_t) * advantage
        return (advantage, value_t), advantage

    start = (jnp.zeros_like(last_value), last_value)
    _, advantages = jax.lax.scan(step, start, (reward, value, done.astype(jnp.float32)), reverse=True)
    return advantages, advantages + value


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Makes Adam without its learning rate, which `learning_rate` gives: a resumed run may span another total."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5))


def learning_rate(args: Args, update: jax.Array) -> jax.Array:
    """Returns the learning rate of an update: it rises for a moment, and falls linearly to zero."""
    fraction = jnp.maximum(0.0, 1.0 - update / args.num_updates) if args.anneal_lr else 1.0
    warmed_up = (update + 1) / max(args.lr_warmup * args.num_updates, 1.0)
    return args.learning_rate * fraction * jnp.minimum(1.0, warmed_up)


def value_scale(stats: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and standard deviation of the value targets so far."""
    return stats[0], jnp.sqrt(jnp.maximum(stats[1] - stats[0] ** 2, 1e-4))


def update_agent(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, transitions: Transition, last_value: jax.Array
) -> tuple[Runner, dict[str, jax.Array]]:
    """Makes epochs of minibatch updates on one rollout. Returns the runner and the mean losses.

    A minibatch whose gradients are not all numbers changes nothing.
    """
    advantages, returns = compute_gae(
        transitions.reward, transitions.value, transitions.done, last_value, args.gamma, args.gae_lambda
    )
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    # A minibatch is any of all envs, so each device needs them all, and takes its part of every minibatch.
    samples = agent.env.replicate((transitions, advantages, returns))
    optimizer, rate = make_optimizer(args), learning_rate(args, runner.update)

    def minibatch(
        carry: tuple[Pytree, Pytree, jax.Array], indices: jax.Array
    ) -> tuple[tuple[Pytree, Pytree, jax.Array], dict[str, jax.Array]]:
        params, opt_state, stats = carry
        indices = agent.env.shard(indices)
        batch, batch_advantages, batch_returns = jax.tree.map(lambda x: x[:, indices], samples)
        moments = jnp.stack([batch_returns.mean(), jnp.square(batch_returns).mean()])
        stats = args.value_ema * stats + (1 - args.value_ema) * moments
        mean, deviation = value_scale(stats)
        targets = (batch_returns - mean) / deviation
        loss = functools.partial(ppo_loss, args, agent)
        grads, losses = jax.grad(loss, has_aux=True)(params, table, batch, batch_advantages, targets)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        sound = jnp.isfinite(optax.global_norm(grads))
        carry = jax.tree.map(lambda new, old: jnp.where(sound, new, old), (params, opt_state, stats), carry)
        return carry, losses | {"skipped": 1.0 - sound}

    key, key_shuffle = jax.random.split(runner.key)
    keys = jax.random.split(key_shuffle, args.update_epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, args.num_envs))(keys)
    order = order.reshape(args.update_epochs * args.num_minibatches, -1)
    carry = (runner.params, runner.opt_state, runner.value_stats)
    (params, opt_state, stats), losses = jax.lax.scan(minibatch, carry, order)
    losses = jax.tree.map(jnp.mean, losses)
    losses["explained_variance"] = 1.0 - jnp.var(returns - transitions.value) / (jnp.var(returns) + 1e-8)
    runner = dataclasses.replace(
        runner, params=params, opt_state=opt_state, value_stats=stats, key=key, update=runner.update + 1,
        failed=jnp.where(losses["skipped"] > 0, runner.failed + 1, 0),
    )  # fmt: skip
    return runner, losses


# --------------------------------------------------------------------------------------------------
# The rollout, and a phase of training
# --------------------------------------------------------------------------------------------------


def act(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, exposure: Exposure, key: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Looks at all envs, looks up what they are advised, asks the policy: fields of `Transition`; the new memory."""
    obs = agent.env.observe(runner.env_state)
    facts = agent.env.facts(obs)
    known = agent.env.places(obs)[..., 2] > 0
    advice = agent.context.advise(args, agent.env.game, table, exposure, facts, known)
    seen = {"obs": obs, "facts": facts, "previous": runner.previous} | advice
    step = jax.tree.map(lambda x: x[None], seen)
    logits, value, memory, _ = agent(runner.params, table, step, runner.memory)
    action = jax.random.categorical(key, logits[0])
    log_prob = action_log_prob(logits[0], action)
    mean, deviation = value_scale(runner.value_stats)
    seen |= {"memory": runner.memory, "action": action, "log_prob": log_prob}
    return seen | {"value": value[0] * deviation + mean}, memory


def steps_closer(env: devices.SharedEnv, seen: dict[str, jax.Array], obs: jax.Array) -> jax.Array:
    """Counts by how many steps, -1 to 1, the first thing pointed at is nearer in obs (N, O) than it was: (N,) f32.

    A jump is no step: then the nearest thing of that kind is another one. There and back is worth nothing.
    """
    kind = jnp.minimum(seen["pointed"][:, 0], len(env.game.kinds) - 1)[:, None, None]
    before, now = (jnp.take_along_axis(env.places(x), kind, 1)[:, 0] for x in (seen["obs"], obs))  # (N, 3)
    steps = jnp.abs(before[:, :2]).sum(-1) - jnp.abs(now[:, :2]).sum(-1)
    counts = (before[:, 2] > 0) & (now[:, 2] > 0) & (jnp.abs(steps) <= 1)
    return steps * counts * (seen["pointed"][:, 0] < len(env.game.kinds))


def fading_bonus(args: Args, worked: jax.Array, paid: jax.Array) -> jax.Array:
    """Returns the bonus (...) for work on sub-goals (..., G), each of which was paid so often in this episode (..., G).

    A sub-goal pays --guidance-bonus / (1 - --bonus-fade) in an episode at most, however often it is done and undone.
    """
    return args.bonus * (worked * args.bonus_fade**paid).sum(-1)


def play_step(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, exposure: Exposure, key: jax.Array
) -> tuple[Runner, Transition, jax.Array]:
    """Plays one step of all envs.

    Returns:
        the runner; what happened; achievements (N, A) at the end of the step
    """
    key_action, key_env = jax.random.split(key)
    seen, memory = act(args, agent, runner, table, exposure, key_action)
    state, reward, done, info = agent.env.step(key_env, runner.env_state, seen["action"])
    worked = info["worked"] & (seen["advised"][..., : agent.env.game.num_basic] | agent.context.rewards_anything)
    bonus = fading_bonus(args, worked, runner.paid)
    if args.approach_bonus and args.pointer != "none":
        bonus += args.approach_bonus * steps_closer(agent.env, seen, agent.env.observe(state)) * ~done
    transition = Transition(**seen, reward=reward + bonus, env_reward=reward, done=done, reached=info["reached"])
    runner = dataclasses.replace(
        runner,
        env_state=state,
        memory=jnp.where(done[:, None], 0.0, memory),
        previous=jnp.where(done, len(agent.env.game.actions), seen["action"]),
        paid=jnp.where(done[:, None], 0, runner.paid + worked),
    )
    return runner, transition, info["achievements"]


def rollout(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, exposure: Exposure
) -> tuple[Runner, Transition, dict[str, jax.Array]]:
    """Plays T steps of all envs, in training and in evaluation.

    Returns:
        the runner; transitions with a leading axis T, memory with one of 1; of each step (T, N, ...) the return,
        length and achievements of the episode so far, that step included
    """
    key, key_refill, key_steps = jax.random.split(runner.key, 3)

    def step(carry: Runner, key_step: jax.Array) -> tuple[Runner, tuple[Transition, dict[str, jax.Array]]]:
        carry, transition, achievements = play_step(args, agent, carry, table, exposure, key_step)
        episode = {
            "episodic_return": carry.episodic_return + transition.env_reward,
            "episodic_length": carry.episodic_length + 1,
        }
        begun = {name: jnp.where(transition.done, 0, value) for name, value in episode.items()}
        carry = dataclasses.replace(carry, **begun)
        transition = dataclasses.replace(transition, memory=None)  # the replay makes it anew
        return carry, (transition, episode | {"achievements": achievements})

    memory = runner.memory[None]
    runner, (transitions, episodes) = jax.lax.scan(step, runner, jax.random.split(key_steps, args.num_steps))
    transitions = dataclasses.replace(transitions, memory=memory)
    env_state = agent.env.refill(key_refill, runner.env_state)
    return dataclasses.replace(runner, key=key, env_state=env_state), transitions, episodes


@functools.partial(jax.jit, static_argnums=0, inline=True)
def draw_exposure(agent: Agent, runner: Runner, table: GuidanceTable) -> tuple[Runner, Exposure]:
    """Draws which env is given which advice, from now on."""
    key, key_exposure = jax.random.split(runner.key)
    facts = agent.env.facts(agent.env.observe(runner.env_state))
    return dataclasses.replace(runner, key=key), draw_exposures(table, key_exposure, facts)


def add_up_ended(values: jax.Array, done: jax.Array) -> jax.Array:
    """Adds up what stood at the end of episodes: (T, N, ...), done (T, N) -> (...) f32"""
    done = done.reshape(*done.shape, *[1] * (values.ndim - 2))
    return jnp.where(done, values, 0).astype(jnp.float32).sum((0, 1))


# Traced once, though `train_phase` uses it twice.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def train_update(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, exposure: Exposure
) -> tuple[Runner, tuple[dict, dict, dict], tuple[dict, dict]]:
    """Makes one PPO update: a rollout and its epochs.

    Returns:
        the runner; sums of what is logged, of what came of each row, and of `look_back`; a sample of the situations
        met, and the steps of `look_back`
    """
    runner, transitions, episodes = rollout(args, agent, runner, table, exposure)
    sums = jax.tree.map(lambda x: add_up_ended(x, transitions.done), episodes)
    last_value = act(args, agent, runner, table, exposure, runner.key)[0]["value"]
    key, key_sample = jax.random.split(runner.key)
    runner = dataclasses.replace(runner, key=key)
    runner, losses = update_agent(args, agent, runner, table, transitions, last_value)
    sums |= {
        "losses": losses,
        "bonus": (transitions.reward - transitions.env_reward).sum(),
        "covered_steps": transitions.advised.any(-1).sum(dtype=jnp.float32),
        "episodes": transitions.done.sum(dtype=jnp.float32),
    }
    outcomes = agent.context.outcomes(args, agent.env, table, exposure, transitions)
    chosen = jax.random.randint(key_sample, (agent.context.situations_per_update,), 0, args.batch_size)
    met = {"obs": transitions.obs, "facts": transitions.facts}
    situations = jax.tree.map(lambda x: x.reshape(args.batch_size, -1)[chosen], met)
    found, history = look_back(args, transitions, chosen)
    return runner, (sums, outcomes, found), (situations, history)


def look_back(
    args: Args, transitions: Transition, chosen: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns what hindsight.py learns from, where the adapter learns: sums of one rollout; and its steps (T, N, ...)
    beside the numbers of those that were chosen."""
    if not args.learns:
        return {}, {}
    seen = transitions.reached, transitions.facts
    reached, facts = (x.reshape(args.batch_size, -1).astype(jnp.float32) for x in seen)
    paid = reached * (transitions.env_reward.reshape(-1, 1) > hindsight.PAYS)
    followed = paid * ~transitions.done.at[-1].set(True).reshape(-1, 1)  # what follows the last step is not there
    later = jnp.roll(facts, -args.num_envs, 0)
    sums = {
        "times": paid.sum(0), "true_then": paid.T @ facts, "steps": jnp.float32(args.batch_size),
        "followed": followed.sum(0), "brought": followed.T @ (later * (1 - facts)), "together": facts.T @ facts,
    }  # fmt: skip
    packed = jnp.packbits(transitions.reached, axis=-1)
    steps = {"reward": transitions.env_reward, "done": transitions.done, "reached": packed}
    return sums, steps | {"chosen": chosen}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))
def train_phase(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, num_updates: jax.Array
) -> tuple[Runner, dict[str, Any], dict[str, jax.Array], dict[str, jax.Array], tuple[dict, dict]]:
    """Makes num_updates (traced, at most updates_per_phase) updates with a fixed table. The runner is donated.

    Returns:
        the runner; sums of what is logged; sums of what came of each row; obs (U * 256, O) and facts (U * 256, P) of
        situations met; sums and steps (U, ...) of `look_back`. Of U updates those of the first num_updates are filled
    """
    runner, exposure = draw_exposure(agent, runner, table)

    def one_update(i: jax.Array, carry: tuple) -> tuple:
        runner, sums, situations = carry
        runner, more, met = train_update(args, agent, runner, table, exposure)
        sums = jax.tree.map(jnp.add, sums, more)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return runner, sums, jax.tree.map(put, situations, met)

    _, sums, met = jax.eval_shape(functools.partial(train_update, args, agent), runner, table, exposure)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    situations = jax.tree.map(lambda x: jnp.zeros((args.updates_per_phase, *x.shape), x.dtype), met)
    runner, sums, met = jax.lax.fori_loop(0, num_updates, one_update, (runner, sums, situations))
    (sums, outcomes, found), (situations, history) = sums, met
    situations = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), situations)
    return runner, *agent.env.replicate((sums, outcomes, situations, (found, history)))


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def watch_nothing(env: devices.SharedEnv, transitions: Transition, next_obs: jax.Array) -> dict[str, jax.Array]:
    """Returns what is to be counted of each step (T, N, ...) of an evaluation: nothing more than usual."""
    return {}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def evaluate_steps(
    args: Args, agent: Agent, watch: Callable, runner: Runner, table: GuidanceTable, exposure: Exposure
) -> tuple[Runner, jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Plays T steps of all envs.

    Returns:
        the runner; done (T, N); of each step (T, N, ...) the episode so far, and what is watched
    """
    runner, transitions, episodes = rollout(args, agent, runner, table, exposure)
    next_obs = jnp.concatenate([transitions.obs[1:], agent.env.observe(runner.env_state)[None]])
    watched = watch(agent.env, transitions, next_obs)
    return runner, *agent.env.replicate((transitions.done, episodes, watched))


def evaluate(
    args: Args,
    agent: Agent,
    params: Pytree,
    table: GuidanceTable,
    key: jax.Array,
    report: Callable[[int, int], None] = lambda done, total: None,
    watch: Callable[..., dict[str, jax.Array]] = watch_nothing,
    ask: Callable[[jax.Array], GuidanceTable] | None = None,
) -> dict[str, Any]:
    """Plays fresh episodes: sampled actions, a frozen table, every env the same number of whole episodes.

    Args:
        report: called with the episodes played and the total
        watch: see `watch_nothing`
        ask: called with what the envs see (N, O) as often as training pauses; gives the table to go on with
    Returns:
        what `Tally.result` does
    """
    tally = Tally(agent.env.game, args.num_envs, args.eval_episodes)
    runner, _ = init_runner(args, agent, params, agent.env.put(key))  # the scale of values does not matter here
    for chunk in itertools.count():
        if chunk % args.updates_per_phase == 0:  # as often as in training
            table = ask(agent.env.observe(runner.env_state)) if chunk and ask else table
            runner, exposure = draw_exposure(agent, runner, table)
        runner, *played = evaluate_steps(args, agent, watch, runner, table, exposure)
        tally.add(*agent.env.to_host(played))
        report(tally.played, tally.episodes)
        if tally.full:
            return tally.result()


# --------------------------------------------------------------------------------------------------
# Host
# --------------------------------------------------------------------------------------------------

LIMITS = {
    "total_timesteps": (1, 10**15),
    "num_envs": (1, 2**20),
    "num_steps": (2, 2**20),
    "num_minibatches": (1, 2**20),
    "update_epochs": (1, 1000),
    "hidden_size": (1, 2**16),
    "rnn_size": (0, 2**14),
    "num_devices": (1, 2**16),
    "updates_per_phase": (1, 10**6),
    "eval_episodes": (1, 10**7),
    "save_every": (1, 10**9),
    "seed": (0, 2**32 - 1),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    "learning_rate": (0, 10),
    "lr_warmup": (0, 1),
    "value_ema": (0, 1),
    "clip_coef": (0, 10),
    "ent_coef": (0, 10),
    "vf_coef": (0, 100),
    "predict_coef": (0, 100),
    "max_grad_norm": (0, 10**6),
    "guidance_bonus": (0, 100),
    "bonus_fade": (0, 1),
    "approach_bonus": (0, 100),
}


def check_args(args: Args) -> None:
    """Raises ValueError, one line that names the flag, for what can't work."""
    check_ranges(args, LIMITS)
    for group, owner in ((args.table, guidance), (args.sft, rladapter_adapter), (args.llm, llm_client)):
        check_ranges(group, owner.LIMITS)
    if args.num_envs % args.num_minibatches:
        raise ValueError(
            f"--num-minibatches: {args.num_envs} envs can't be divided into {args.num_minibatches} minibatches of "
            "whole envs; change --num-envs or --num-minibatches"
        )
    if args.sft.analyses == "retrieved" and args.sft.sft_data not in rladapter_adapter.FROM_PLAY:
        raise ValueError(
            f"--analyses retrieved: --sft-data {args.sft.sft_data} keeps no situations; choose "
            f"{' or '.join(rladapter_adapter.FROM_PLAY)}"
        )
    silent = args.sft.adapter == "none" and args.sft.analyses != "retrieved"
    if silent and args.sft.sft_data != "best":
        raise ValueError(
            f"--sft-data {args.sft.sft_data}: --adapter none has nothing to tune; leave it out, or have it told by "
            "--analyses retrieved"
        )
    if silent and args.llm.llm == "echo":
        raise ValueError(
            "--llm echo: gives as advice what the analysis says, and --adapter none says nothing; choose an "
            "--adapter, or --analyses retrieved"
        )
    if args.llm.llm_replay is not None and args.llm.llm != "replay":
        raise ValueError("--llm-replay: only --llm replay reads it; say that, too, or leave it out")
    steps = args.updates_per_phase * args.num_steps
    if args.learns and args.sft.sft_data in rladapter_adapter.FROM_PLAY and steps < hindsight.HORIZON:
        raise ValueError(
            f"--sft-data {args.sft.sft_data}: looks {hindsight.HORIZON} steps ahead within a phase, which has {steps}; "
            "choose a larger --num-steps or --updates-per-phase"
        )
    if args.batch_size * 500 > 64 * 2**30:  # bytes of a `Transition`, about
        raise ValueError(f"--num-envs, --num-steps: {args.batch_size} samples are too many; choose smaller ones")


def run_keys(seed: int) -> jax.Array:
    """Makes the keys of agent, runner, phases, evaluation. Derived in one way only: no two seeds share any."""
    return jax.random.split(jax.random.key(seed), 4)


def phase_keys(key_phases: jax.Array, phase: int) -> jax.Array:
    """Makes the keys of a phase: of the analyses, of the fine-tuning."""
    return jax.random.split(jax.random.fold_in(key_phases, phase))


def make_agent(args: Args, env: devices.SharedEnv, table: GuidanceTable, key: jax.Array) -> tuple[Agent, Pytree]:
    """Makes the network, split into its static and its trained half."""
    obs, facts = jnp.zeros((1, env.obs_size), jnp.uint8), jnp.zeros((1, len(env.game.facts)), bool)
    advised = jnp.zeros((1, len(env.game.sub_goals)), bool)
    vectors = args.context.vectors(table, {"facts": facts, "advised": advised})
    num_kinds = len(env.game.kinds)
    num_features = jax.eval_shape(env.features, obs).shape[-1] + (num_kinds + 2) * NUM_FEATURES
    sizes = [basis.shape[1] for _, basis in vectors]
    num_changes = num_kinds * NUM_FEATURES + len(env.game.facts)
    widths = len(env.game.actions), num_changes, args.hidden_size, args.rnn_size
    network = ActorCritic(num_features, sizes, *widths, nnx.Rngs(key))
    graphdef, params = nnx.split(network)
    return Agent(env, graphdef, args.context), params


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_runner(args: Args, agent: Agent, params: Pytree, key: jax.Array) -> tuple[Runner, dict[str, jax.Array]]:
    """Begins all envs' first episodes. Returns the runner, and the situations that they are in."""
    key_env, key = jax.random.split(key)
    env_state = agent.env.reset(key_env, args.num_envs)
    zeros = jnp.zeros(args.num_envs)
    begun = {"episodic_return": zeros, "episodic_length": zeros.astype(jnp.int32)}
    begun["memory"] = jnp.zeros((args.num_envs, args.rnn_size))
    begun["previous"] = jnp.full(args.num_envs, len(agent.env.game.actions), jnp.int32)
    begun["paid"] = jnp.zeros((args.num_envs, agent.env.game.num_basic), jnp.int32)
    begun = agent.env.shard(begun)
    shared = {"params": params, "opt_state": make_optimizer(args).init(params), "key": key, "update": jnp.int32(0)}
    shared["failed"] = jnp.int32(0)
    shared["value_stats"] = jnp.array([0.0, 1.0])
    runner = Runner(env_state=env_state, **begun, **agent.env.replicate(shared))
    obs = agent.env.observe(env_state)[: args.num_envs * agent.context.guided]
    return runner, agent.env.replicate({"obs": obs, "facts": agent.env.facts(obs)})


def phase_metrics(args: Args, game: Game, sums: dict[str, Any], num_updates: int, totals: dict) -> dict[str, Any]:
    """Returns the tags of one phase, from the device's sums and from the episodes of all phases so far."""
    steps = num_updates * args.batch_size
    metrics = {f"losses/{name}": float(value) / num_updates for name, value in sums["losses"].items()}
    metrics["guidance/coverage"] = float(sums["covered_steps"]) / steps
    metrics["guidance/bonus_per_step"] = float(sums["bonus"]) / steps
    return metrics | episode_metrics(game, sums, totals)


def tune_adapter(
    args: Args, env: Any, table: HostTable, adapter: Any, key: jax.Array, report: Callable[[int, int], None]
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Fine-tunes the adapter. Returns metrics, and the lines of examples.jsonl.

    Training goes on where that fails: with loss or gradients that are no numbers, or without memory for it.
    """
    sft, examples = args.sft, table.examples(env, args.sft.sft_data)
    if not examples:
        if sft.sft_data == "best" and not args.llm.knows_the_game:
            adapter.warn_that_nothing_won()
        return {"adapter/cut_prompts": adapter.cut_prompts}, []
    measured, tuned = {}, {}
    try:
        measured |= table.agreement(env, adapter, key, "before")
        tuned = adapter.finetune(
            examples, key, epochs=sft.sft_epochs, learning_rate=sft.sft_learning_rate, batch_size=sft.sft_batch_size,
            lora_plus_ratio=sft.lora_plus_ratio, report=report,
        )  # fmt: skip
        measured |= table.agreement(env, adapter, key, "after")
        reason, way = "its loss or gradients became NaN or infinite", "a lower --sft-learning-rate"
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        tuned = {"examples": 0, **tuned, "sft_stopped": 1}
        reason, way = "it ran out of memory", "a smaller --sft-batch-size or --adapter"
    if tuned.get("sft_stopped"):
        kept = "the last good weights are kept and training goes on"
        adapter.warn(reason, f"a fine-tuning of the adapter was stopped, {reason}; {kept}; try {way}")
    tuned |= measured | {"cut_prompts": adapter.cut_prompts}
    read = examples[: tuned.get("examples", 0)]  # --sft-max-tokens leaves the others out
    lines = [{"prompt": prompt, "response": response} for prompt, response in read]
    return {f"adapter/{name}": value for name, value in tuned.items()}, lines


def print_dry_run(
    args: Args, table: HostTable, env: Any, adapter: Any, situations: dict[str, np.ndarray], key: jax.Array
) -> None:
    """Prints what the first pause would ask, and what the whole run would take."""
    llm_client.make_budget(args.llm)  # raises for flags that can't work, before anything is printed
    questions = table.choose_questions(env, situations)
    write_analyses(adapter, env.game, questions, key, args.sft.analyses)
    NoGuide(env.game).ask(questions)
    for i, question in enumerate(questions):
        print(f"==== question {i}: adapter prompt\n{question.adapter_prompt}")
        for message in question.messages[i > 0 :]:  # the system message is the same in all of them
            print(f"---- {message['role']}\n{message['content']}")
    pauses = min(args.updates_that_ask, 1) + max(0, -(-(args.updates_that_ask - 1) // args.updates_per_phase))
    calls = pauses * args.table.queries_per_phase if args.context.guided else 0
    print(f"==== in {pauses} pauses {llm_client.estimate(args.llm, calls, questions)}")


def main(args: Args, run: runs.Run) -> dict[str, Any] | None:
    """Asks at a pause, trains N updates, learns from what came of it. Returns the summary, None after Ctrl-C."""
    env = devices.share_env(make_env, args.env_id, args.num_envs, args.minibatch_size, args.num_devices)
    asks = args.context.guided and devices.is_leader()  # of several processes the first one asks for all
    guide = make_guide(args.llm, env.game, args.seed) if asks and not args.dry_run else NoGuide(env.game)
    guide.check()
    adapter = make_adapter(args.sft, args.seed, env.game) if asks else NoAdapter()
    table = HostTable(args.table, env)

    key_agent, key_runner, key_phases, key_evaluation = run_keys(args.seed)
    agent, params = make_agent(args, env, table.for_training(), key_agent)
    runner, situations = init_runner(args, agent, *env.put((params, key_runner)))
    situations = env.to_host(situations)
    if args.dry_run:
        return print_dry_run(args, table, env, adapter, situations, phase_keys(key_phases, 0)[0])
    runner, situations = run.start(env, runner, situations, table, adapter, guide)

    for phase in run.phases():
        key_analyse, key_sft = phase_keys(key_phases, phase)

        # Pause: ask about situations that no advice serves, and about advice that is not understood
        still_asks = asks and run.totals["global_step"] < args.updates_that_ask * args.batch_size
        with run.timed("guidance"):
            questions = table.choose_questions(env, situations) if still_asks else []
            retrieved = table.retrieved(questions, args.sft)
            write_analyses(adapter, env.game, questions, key_analyse, args.sft.analyses, retrieved)
            pause = guide.ask(questions, background=args.llm.llm_async)
            if not args.llm.llm_async:
                table.store(pause.wait())  # each sub-goal with its reasons is a row
                run.log_questions(questions, env.game)

        # Train: N updates in one jitted call, with a fixed table
        with run.timed("train"):
            num_updates = args.updates_in_phase(phase, run.totals["global_step"] // args.batch_size)
            fixed = env.put((table.for_training(), np.int32(num_updates)))
            runner, sums, *seen = jax.block_until_ready(train_phase(args, agent, runner, *fixed))
        sums, outcomes, situations, (found, history) = env.to_host((sums, *seen))
        sums = jax.tree.map(np.float64, sums)
        met = num_updates * args.context.situations_per_update
        situations = {name: array[:met] for name, array in situations.items()}

        # Learn: what came of each row, and of the situations met; what the adapter should have said there tunes it
        table.add_outcomes(outcomes)
        if asks:
            table.found.add(found, {name: array[:num_updates] for name, array in history.items()}, situations)
        run.append("outcomes.jsonl", table.outcome_lines(outcomes))
        worth, tuned = table.metrics(), {}
        if still_asks and args.tunes and run.due(args.sft.sft_every):
            with run.timed("sft"):
                tuned, lines = tune_adapter(args, env, table, adapter, key_sft, run.show_tuning)
            run.append("examples.jsonl", lines)
        if args.llm.llm_async:  # now, so that nothing is under way when a checkpoint is written
            with run.timed("guidance"):
                table.store(pause.wait())
                run.log_questions(questions, env.game)

        run.add(
            global_step=num_updates * args.batch_size,
            episodes=float(sums["episodes"]),
            achievements=sums["achievements"],
        )
        metrics = phase_metrics(args, env.game, sums, num_updates, run.totals)
        run.log_phase(metrics | worth | pause.metrics() | tuned)
        run.check_numbers(metrics["losses/skipped"], int(env.to_host(runner.failed)))
        run.save_if_due(env, runner, situations, table, adapter)

    run.save_adapter(adapter)
    if run.stopped:
        return None
    best = env.put(table.for_evaluation())
    result = evaluate(args, agent, runner.params, best, key_evaluation, run.show_evaluation)
    unguided = {} if args.context.guided else {"llm": "none", "adapter": "none"}
    return run.finish(result, {"guidance_bonus": args.bonus} | unguided)


def cli(argv: list[str] | None = None) -> int:
    """Runs `main` from the command line. Exit code 0; 2 for input that can't work; 130 after Ctrl-C."""
    return runs.launch(main, Args, check_args, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(cli())
