"""RLAdapter with PPO in JAX: a language model that adapts an LLM's guidance to what an RL agent makes of it.

    device, N updates per phase                     host, once per phase                         device
    envs.captions: state -> facts          ->  caption -> adapter: analysis -> LLM: sub-goals -> embedding
           ^                                                                                        |
    rollout, GAE, PPO  <-  context = table lookup at every step  <-  GuidanceTable <----------------+
           |                                                              ^
           +--- per row and candidate: visits, returns, sub-goals reached  ---> comprehension, outcome ---> fine-tuning

    python rladapter_ppo.py --seed 1                            # 1M steps of Crafter, offline guide, about 4 minutes
    python rladapter_ppo.py --guidance none                     # plain PPO
    python rladapter_ppo.py --llm http --llm-base-url http://127.0.0.1:8000/v1 --llm-model NAME
    python rladapter_ppo.py --resume runs/...                   # go on where a run was stopped

Paper: RLAdapter / AdaRefiner, arXiv 2309.17176. The file reads top to bottom: flags, pytrees, network, host half
(what happens at a pause), device half (what is jitted), evaluation, main.
"""

import dataclasses
import functools
import json
import math
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import devices
import embeddings
import llm_client
import rladapter_adapter
import runs
from envs import make_env
from envs.scores import crafter_score
from envs.vocabulary import BASIC_SUB_GOALS, FACTS, NUM_BASIC, SUB_GOAL_INDEX, SUB_GOALS, sub_goals_in_text

Pytree = Any
# 1e6 is how people write a budget; tyro's int refuses it
BigInt = Annotated[int, tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="INT", instance_from_str=lambda words: _big_int(words[0]),
    is_instance=lambda value: isinstance(value, int), str_from_instance=lambda value: [str(value)],
)]  # fmt: skip


def _big_int(word: str) -> int:
    value = float(word)
    if not value.is_integer():
        raise ValueError(f"{word} is not a whole number")
    return int(word) if word.lstrip("+-").isdigit() else int(value)


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    exp_name: str = "rladapter_ppo"
    """name of this experiment, part of the run folder's name"""
    seed: int = 1
    """seed of everything random: worlds, actions, weights, minibatches, the adapter's sampling"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    run_dir: Path | None = None
    """the run's folder; default runs/<env-id>__<exp-name>__<seed>__<time>"""
    resume: Path | None = None
    """go on with this run: all other flags come from it, only --total-timesteps may be given anew"""
    save_every: int = 5
    """phases between two checkpoints; the last phase and Ctrl-C save too"""
    eval_episodes: int = 256
    """episodes of the final evaluation, rounded up to a multiple of num_envs"""
    debug_nans: bool = False
    """stop with a traceback where the first NaN appears (jax_debug_nans)"""
    jit: bool = True
    """--no-jit runs everything op by op, to step through it with a debugger; very slow"""
    num_devices: int = 1
    """devices that share the envs, of each process"""
    distributed: bool = False
    """be one of several processes with the same flags: under SLURM, or with JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID set"""

    env_id: str = "Craftax-Classic-Symbolic-v1"
    """the environment: Craftax-Classic-Symbolic-v1 or Toy-v0"""
    total_timesteps: BigInt = 1_000_000
    """env steps of training, met to within one update"""
    learning_rate: float = 1e-3
    """of Adam"""
    num_envs: int = 64
    """parallel games"""
    num_steps: int = 96
    """steps per env and update"""
    anneal_lr: bool = True
    """let the learning rate fall to zero over the run"""
    gamma: float = 0.925
    """discount"""
    gae_lambda: float = 0.625
    """lambda of generalized advantage estimation"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    update_epochs: int = 4
    """epochs per update"""
    norm_adv: bool = True
    """normalise advantages per minibatch"""
    clip_coef: float = 0.2
    """PPO's clipping range"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """clip the global norm of the gradient at this"""
    hidden_size: int = 256
    """width of the network's layers"""

    guidance: Literal["full", "none", "facts"] = "full"
    """full: adapter and LLM; none: plain PPO; facts: the facts that guidance may depend on as context, the control"""
    guidance_lookup: Literal["step", "pause"] = "step"
    """step: the context follows the state at every step; pause: drawn once per phase and kept, as in the paper"""
    guidance_tolerance: int = 0
    """advice also serves a state that differs in up to this many of the facts it rests on"""
    guidance_bonus: float | None = None
    """reward for each step of work towards an advised sub-goal; default 0.1 with guidance, 0 without. Without guidance
    a bonus counts for every basic sub-goal (the control)"""
    guidance_rows: int = 64
    """size of the guidance table, in pieces of advice"""
    updates_per_phase: int = 8
    """PPO updates between two pauses"""
    queries_per_phase: int = 16
    """LLM calls per pause, at most"""
    candidates: int = 2
    """2: every piece of advice is tried against saying nothing, in one env of eight; 1: no trials"""
    comprehension: Literal["cosine", "cosine-actions", "binary", "success", "none"] = "cosine"
    """how well guidance was understood: cosine of sub-goals reached and advised; cosine-actions: of action names, as
    in the paper; binary: was any reached; success: share of visits that reached one"""
    adapter: str = "assets/adapter-tiny"
    """a Llama, Qwen2 or Qwen3 folder in Hugging Face format, a hub id, or a folder of LoRA weights; none: no adapter"""
    sft_every: int = 4
    """phases between two fine-tunings of the adapter; 0 never"""
    sft_data: Literal["best", "all"] = "best"
    """which of the latest 512 analyses it is tuned on. best: those that named advice which the guide took up and which
    won its trial; all: every one, as in the paper"""
    sft_epochs: int = 2
    """epochs of a fine-tuning"""
    sft_learning_rate: float = 2e-4
    """of Adam in fine-tuning"""
    lora_rank: int = 8
    """rank of the LoRA weights that are fine-tuned"""
    lora_alpha: float = 16.0
    """their scale, times rank"""
    lora_dropout: float = 0.0
    """dropout before them in fine-tuning"""
    lora_targets: tuple[str, ...] = rladapter_adapter.PROJECTIONS
    """projections that have them"""
    embed: str = "hash"
    """embedding of the sub-goals' names. hash: no model; else a BERT's folder or Hugging Face hub id"""
    llm: Literal["rules", "http", "random", "replay"] = "rules"
    """the guide. rules: an offline stand-in that is no LLM; http: any OpenAI-compatible server; random: a control;
    replay: what the guide of another run said"""
    llm_model: str = ""
    """model name for --llm http"""
    llm_base_url: str = "http://127.0.0.1:8000/v1"
    """address for --llm http; the key comes from OPENAI_API_KEY"""
    llm_structured: Literal["auto", "json_schema", "text"] = "auto"
    """ask for replies in a JSON schema: json_schema always, text never, auto until the server refuses or ignores it"""
    llm_concurrency: int = 32
    """requests to the server under way at a time"""
    llm_timeout: float = 60.0
    """seconds that the server may be silent; a call may take twice that with its retries"""
    llm_deadline: float = 600.0
    """seconds that all calls of one pause may take"""
    llm_max_calls: int | None = None
    """calls that the run may make, the check before training left out; then it goes on with the guidance it has"""
    llm_max_cost: float | None = None
    """money that the run may spend on calls, in the currency of the prices"""
    llm_price_in: float = 0.0
    """price of a million prompt tokens"""
    llm_price_out: float = 0.0
    """price of a million completion tokens"""
    llm_cache: Path | None = None
    """file of replies that are not asked for again; default llm.sqlite in $RLADAPTER_CACHE; none: no cache"""
    llm_replay: Path | None = None
    """folder of the run that --llm replay repeats"""
    llm_async: bool = False
    """ask while the device trains; answers are used one phase later"""
    dry_run: bool = False
    """print the prompts of one pause, and the calls, tokens and cost to expect, and stop"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        return -(-self.total_timesteps // self.batch_size)

    @property
    def table_rows(self) -> int:
        return self.guidance_rows if self.guidance == "full" else 1

    def updates_in_phase(self, phase: int, updates_done: int) -> int:
        """The first phase is one update, because before it there is little to ask about; the last one may be short."""
        return min(1 if phase == 0 else self.updates_per_phase, self.num_updates - updates_done)

    @property
    def bonus(self) -> float:
        default = 0.1 if self.guidance == "full" else 0.0
        return default if self.guidance_bonus is None else self.guidance_bonus


def check_args(args: Args) -> None:
    """Raise ValueError with one line that names the flag for what can't work."""
    for name, low, high in (
        ("total_timesteps", 1, 10**15), ("num_envs", 1, 2**20), ("num_steps", 2, 2**20), ("num_minibatches", 1, 2**20),
        ("update_epochs", 1, 1000), ("hidden_size", 1, 2**16), ("guidance_rows", 1, 2**16), ("candidates", 1, 2),
        ("num_devices", 1, 2**16),
        ("updates_per_phase", 1, 10**6), ("queries_per_phase", 0, 10**6), ("eval_episodes", 1, 10**7),
        ("save_every", 1, 10**9), ("sft_every", 0, 10**9), ("sft_epochs", 1, 10**6), ("seed", 0, 2**32 - 1),
        ("sft_learning_rate", 0, 10),
        ("guidance_tolerance", 0, len(FACTS)),
        ("gamma", 0, 1), ("gae_lambda", 0, 1), ("learning_rate", 0, 10), ("clip_coef", 0, 10), ("ent_coef", 0, 10),
        ("vf_coef", 0, 100), ("max_grad_norm", 0, 10**6), ("bonus", 0, 100),
        ("llm_concurrency", 1, 4096), ("llm_timeout", 0.01, 10**6), ("llm_deadline", 0.01, 10**6),
        ("llm_max_calls", 0, 10**9), ("llm_max_cost", 0, 10**9), ("llm_price_in", 0, 10**6),
        ("llm_price_out", 0, 10**6),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is None:
            continue
        flag = "--guidance-bonus" if name == "bonus" else "--" + name.replace("_", "-")
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{flag}: {value} is out of range; choose {low} to {high}")
    if args.batch_size % args.num_minibatches:
        raise ValueError(
            f"--num-minibatches: {args.num_envs} envs x {args.num_steps} steps = {args.batch_size} samples can't be "
            f"divided into {args.num_minibatches} minibatches; change --num-envs, --num-steps or --num-minibatches"
        )
    if args.batch_size * 200 > 64 * 2**30:
        raise ValueError(
            f"--num-envs, --num-steps: a batch of {args.batch_size} samples is too large; choose smaller ones"
        )


def make_mesh(args: Args) -> Any:
    """The devices of all processes, None for a single one. Raises ValueError for what can't be split over them."""
    mesh = devices.make_mesh(args.num_devices)
    total = devices.count(mesh)
    if args.num_envs % total:
        raise ValueError(f"--num-envs: {args.num_envs} can't be divided among {total} devices (--num-devices)")
    if args.batch_size // args.num_minibatches % total:
        raise ValueError(
            f"--num-minibatches: minibatches of {args.batch_size // args.num_minibatches} samples can't be divided "
            f"among {total} devices (--num-devices)"
        )
    return mesh


# --------------------------------------------------------------------------------------------------------------------
# Pytrees. N envs, T steps, K rows of the table, P facts, S sub-goals, G = 22 of them basic, M bits of context, D its
# size as a vector, O bytes of observation. A row is one piece of advice: a sub-goal and the facts that it rests on.
# --------------------------------------------------------------------------------------------------------------------


def pytree(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@pytree
class GuidanceTable:
    """What the guide said, fixed between two pauses. A row serves every state that shares the facts it cares about."""

    keys: jax.Array  # (K, P) bool, the facts of the situation that was asked about
    care: jax.Array  # (K, P) bool, the facts that the advice rests on
    valid: jax.Array  # (K,) bool, False for an empty row
    goals: jax.Array  # (K, S) bool, one-hot, the advised sub-goal
    show: jax.Array  # (K,) f32, probability that an env is given this advice (it is drawn once per env and phase)
    names: jax.Array  # (S, D) f32, embedding of each sub-goal


@pytree
class Lookup:
    """The table in the form that makes a lookup two matmuls, and what is drawn once per phase."""

    weights: jax.Array  # (P, K) f32
    offset: jax.Array  # (K,) f32
    shown: jax.Array  # (N, K) bool
    pinned: jax.Array  # (N, K) bool, rows that fitted when the phase began, for --guidance-lookup pause


@pytree
class Transition:
    """One step of all envs, with the context that the policy saw."""

    obs: jax.Array  # (N, O) uint8
    context: jax.Array  # (N, M) bool, see CONTEXTS
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


# --------------------------------------------------------------------------------------------------------------------
# Network
# --------------------------------------------------------------------------------------------------------------------


class ActorCritic(nnx.Module):
    """Features and context are summed in the first layer, as in the paper; actor and critic have one of their own."""

    def __init__(self, num_features: int, context_sizes: tuple[int, ...], num_actions: int, width: int, rngs: nnx.Rngs):
        hidden_init = nnx.initializers.orthogonal(math.sqrt(2.0))
        self.features = nnx.Linear(num_features, width, kernel_init=hidden_init, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, kernel_init=hidden_init, rngs=rngs)
        self.context = nnx.List([linear(size, width) for size in context_sizes])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.actor_hidden = nnx.Linear(width, width, kernel_init=hidden_init, rngs=rngs)
        self.actor_norm = nnx.LayerNorm(width, rngs=rngs)
        self.actor = nnx.Linear(width, num_actions, kernel_init=nnx.initializers.orthogonal(0.01), rngs=rngs)
        self.critic_hidden = nnx.Linear(width, width, kernel_init=hidden_init, rngs=rngs)
        self.critic_norm = nnx.LayerNorm(width, rngs=rngs)
        self.critic = nnx.Linear(width, 1, kernel_init=nnx.initializers.orthogonal(1.0), rngs=rngs)

    def __call__(self, features: jax.Array, context: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
        """features (B, F), context pairs of weights (B, M) and basis (M, D) -> logits (B, A), value (B,)

        The context vectors are weights @ basis (B, D). They are never formed: few vectors make up all of them, and
        to project those instead of every sample's sum is many times cheaper. One matmul for all is cheaper than a sum.
        """
        inputs = jnp.concatenate([features, *(weights for weights, _ in context)], 1)
        projected = [layer(basis) for layer, (_, basis) in zip(self.context, context, strict=True)]  # (M, width) each
        kernel = jnp.concatenate([self.features.kernel[...], *projected])
        x = nnx.relu(self.norm(inputs @ kernel + self.features.bias[...][None]))
        logits = self.actor(nnx.relu(self.actor_norm(self.actor_hidden(x))))
        value = self.critic(nnx.relu(self.critic_norm(self.critic_hidden(x))))
        return logits, value[:, 0]


@dataclass(frozen=True)
class Agent:
    """The static half of the policy: hashable, so that it can be a static argument of jit."""

    env: Any
    graphdef: Any
    guidance: str
    mesh: Any = None  # of the devices that share the envs; None: a single one

    def __call__(
        self, params: Pytree, table: GuidanceTable, obs: jax.Array, context: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(B, O) uint8, (B, M) bool -> logits (B, A), value (B,)"""
        return nnx.merge(self.graphdef, params)(self.env.features(obs), EMBEDDINGS[self.guidance](table, context))


def embed_advice(table: GuidanceTable, context: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """(B, S + P) bool -> the sum of the advised sub-goals' embeddings (S, D), scaled to norm sqrt(D); the facts."""
    advised, facts = context[:, : len(table.names)].astype(jnp.float32), context[:, len(table.names) :]
    norm = jnp.sqrt(jnp.maximum(((advised @ (table.names @ table.names.T)) * advised).sum(1, keepdims=True), 1e-12))
    return [(advised * math.sqrt(table.names.shape[1]) / norm, table.names), *embed_facts(table, facts)]


def embed_facts(table: GuidanceTable, context: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """(B, P) bool -> the facts as they are."""
    return [(context.astype(jnp.float32), jnp.eye(context.shape[1]))]


# What the policy is told, in bits: (N, S) advised, (N, P) facts -> (N, M); and how it reads them.
#
# The facts that advice may rest on, what is unlocked among them, are worth much to a policy without memory, and the
# guide has read them all: a policy that is given advice but not its reasons loses to one that sees the facts alone.
CONTEXTS = {
    "full": lambda advised, facts: jnp.concatenate([advised, facts], axis=1),
    "facts": lambda advised, facts: facts,  # the control
    "none": lambda advised, facts: facts[:, :0],
}
EMBEDDINGS = {"full": embed_advice, "facts": embed_facts, "none": lambda table, context: []}


def context_sizes(args: Args) -> tuple[int, ...]:
    """D of each pair that EMBEDDINGS gives."""
    names = (embeddings.make_embedding(args.embed).dim,) if args.guidance == "full" else ()
    return names if args.guidance == "none" else (*names, len(FACTS))


def make_agent(args: Args, env: Any, key: jax.Array, mesh: Any = None) -> tuple[Agent, Pytree]:
    """The network, split into its static and its trained half."""
    num_features = jax.eval_shape(lambda k: env.features(env.observe(env.reset(k, 1))), key).shape[-1]
    network = ActorCritic(num_features, context_sizes(args), env.num_actions, args.hidden_size, nnx.Rngs(key))
    graphdef, params = nnx.split(network)
    return Agent(env, graphdef, args.guidance, mesh), params


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam without its learning rate, which `learning_rate` gives: a resumed run may span another total."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5))


def learning_rate(args: Args, update: jax.Array) -> jax.Array:
    fraction = jnp.maximum(0.0, 1.0 - update / args.num_updates) if args.anneal_lr else 1.0
    return args.learning_rate * fraction


def init_runner(args: Args, agent: Agent, params: Pytree, key: jax.Array) -> Runner:
    key_env, key = jax.random.split(key)
    per_env = {
        "env_state": agent.env.reset(key_env, args.num_envs),
        "episodic_return": jnp.zeros(args.num_envs), "episodic_length": jnp.zeros(args.num_envs, jnp.int32),
    }  # fmt: skip
    shared = {"params": params, "opt_state": make_optimizer(args).init(params), "key": key, "update": jnp.int32(0)}
    return Runner(**devices.split(agent.mesh, per_env), **devices.replicate(agent.mesh, shared))


# --------------------------------------------------------------------------------------------------------------------
# Host half: what happens at a pause
# --------------------------------------------------------------------------------------------------------------------

HIDDEN, SHOWN = 0, 1  # the two candidates of a row: saying nothing, giving its advice
HIDE = 1 / 8  # share of the envs that are not given a piece of advice on trial
MIN_VISITS = 10  # of each of the two in a phase before that phase counts in their comparison
MARGIN = 3.0  # standard errors by which the better one must lead: many are watched, and every phase
SAMPLES_PER_UPDATE = 256  # situations kept of each rollout, for the next pause to choose from
OLD = 0.9  # what a visit of the phase before still counts: the policy it came from is gone
MEMORY = 4096  # situations asked about that are remembered
SAID = 512  # latest analyses that fine-tuning chooses from


class Records:
    """The host's copy of the guidance table, with all that was said and all that came of it."""

    def __init__(self, args: Args, num_actions: int, obs_shape: tuple[int, ...]):
        rows = args.table_rows
        self.trials = args.candidates == 2
        self.arrays = {
            "obs": np.zeros((rows, *obs_shape), np.uint8),
            "keys": np.zeros((rows, len(FACTS)), bool),
            "care": np.zeros((rows, len(FACTS)), bool),
            "valid": np.zeros(rows, bool),
            "goal": np.zeros(rows, np.int32),
            "stamp": np.zeros(rows, np.int64),  # tells one piece of advice from the next one in the same row
            "times_asked": np.zeros(rows, np.int32),
            "visits": np.zeros((rows, 2), np.float64),  # from here on: sums for HIDDEN and SHOWN
            "steps": np.zeros((rows, 2), np.float64),
            "returns": np.zeros((rows, 2), np.float64),
            "squares": np.zeros((rows, 2), np.float64),
            "successes": np.zeros((rows, 2), np.float64),
            "reached": np.zeros((rows, 2, NUM_BASIC), np.float64),
            "actions": np.zeros((rows, 2, num_actions), np.float64),
            "evidence": np.zeros((rows, 2), np.float64),  # sums over phases of difference / variance, 1 / variance
            "asked": np.zeros((MEMORY, len(FACTS)), bool),
            "num_asked": np.zeros((), np.int64),
        }
        # The latest answers: prompt, analysis, [sub-goal, row, stamp] of the advice that the guide then gave
        self.said: list[tuple[str, str, list[list[int]]]] = []
        self.names = embeddings.make_embedding(args.embed).encode(SUB_GOALS)

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["arrays"][name]
        except KeyError:
            raise AttributeError(name) from None

    def table(self) -> GuidanceTable:
        """For training: advice on trial is hidden from some envs, harmful advice from most."""
        lead = self.lead()
        show = np.select([lead > MARGIN, lead < -MARGIN], [1.0, HIDE], 1 - HIDE) if self.trials else np.ones(len(lead))
        return self._table(show)

    def best_table(self) -> GuidanceTable:
        """For evaluation: all advice but what has proved harmful."""
        return self._table(self.lead() >= -MARGIN)

    def _table(self, show: np.ndarray) -> GuidanceTable:
        goals = np.arange(len(SUB_GOALS)) == self.goal[:, None]
        show = show.astype(np.float32)
        return GuidanceTable(*map(jnp.array, (self.keys, self.care, self.valid, goals, show, self.names)))

    def fits(self, facts: np.ndarray) -> np.ndarray:
        """(M, P) -> (M, K) does the row agree with the situation in all the facts it cares about?"""
        wrong = (facts[:, None] != self.keys) & self.care
        return self.valid & ~wrong.any(-1)

    def lead(self) -> np.ndarray:
        """(K,) standard errors by which the return with a row's advice leads that without; 0 where not compared yet."""
        return self.evidence[:, 0] / np.sqrt(np.maximum(self.evidence[:, 1], 1e-9))

    def add_outcomes(self, outcomes: dict[str, np.ndarray]) -> None:
        """Fold in one phase's sums; older ones fade.

        With and without advice are compared within the phase: returns grow while the policy learns, and so does the
        share of envs that are given advice that works; sums over phases would mistake the one for the other.
        """
        self.arrays["evidence"] *= OLD
        if outcomes:
            self.arrays["evidence"] += phase_evidence(outcomes)
        for name, sums in outcomes.items():
            self.arrays[name] *= OLD
            self.arrays[name] += np.asarray(sums, np.float64)

    def remember(self, facts: np.ndarray) -> None:
        self.asked[int(self.num_asked) % MEMORY] = facts
        self.arrays["num_asked"] += 1


def phase_evidence(outcomes: dict[str, Any]) -> np.ndarray:
    """(K, 2) of one phase: difference of the mean returns (shown - hidden) / its variance, and 1 / its variance."""
    visits, returns, squares = (np.asarray(outcomes[name], np.float64) for name in ("visits", "returns", "squares"))
    n = np.maximum(visits, 1)
    mean = returns / n
    variance = (np.maximum(squares / n - mean**2, 1e-4) / n).sum(1)
    precision = np.where((visits >= MIN_VISITS).all(1), 1 / variance, 0.0)
    return np.stack([(mean[:, SHOWN] - mean[:, HIDDEN]) * precision, precision], 1)


@dataclass
class Query:
    """One question of a pause, with what the agent was told there before and how well that was understood."""

    obs: np.ndarray  # (O,) uint8
    facts: np.ndarray  # (P,) bool
    sub_goals: list[int]
    comprehension: float | None
    times_asked: int = 0


def select_queries(args: Args, records: Records, obs: np.ndarray, facts: np.ndarray) -> list[Query]:
    """What to ask about: situations unlike all that were asked about before, then frequent advice that works worst.

    Unlike is counted in the facts that advice rests on so far; of the situations that are equally unlike, the most
    frequent one comes first.

    Args:
        obs, facts: (M, O) uint8, (M, P) bool, a sample of all steps of the last phase
    """
    scores = comprehension_scores(args, records)
    weights = records.visits.sum(1) * (1 - np.nan_to_num(scores, nan=1.0))
    again = [int(row) for row in np.argsort(-weights, kind="stable") if weights[row] > MIN_VISITS]
    again = again[: args.queries_per_phase // 4]
    relevant = records.care[records.valid].any(0) if records.valid.any() else np.ones(len(FACTS), bool)
    asked = records.asked[: int(records.num_asked)]
    new = most_unlike(facts[:, relevant], asked[:, relevant], args.queries_per_phase - len(again))
    situations = [(obs[i], facts[i], 0) for i in new]
    for row in again:
        records.times_asked[row] += 1
        situations.append((records.obs[row], records.keys[row], int(records.times_asked[row])))
    return [Query(o, f, *advice_so_far(records, scores, f), times) for o, f, times in situations]


def most_unlike(facts: np.ndarray, asked: np.ndarray, n: int) -> list[int]:
    """Up to n indices into facts (M, P): greedily the situation that differs most from those asked (and chosen)."""
    situations, first, counts = np.unique(facts, axis=0, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    situations, first = situations[order].astype(np.float32), first[order]

    def distance(other: np.ndarray) -> np.ndarray:
        other = other.astype(np.float32)
        return situations.sum(1)[:, None] + other.sum(1) - 2 * situations @ other.T  # Hamming

    nearest = distance(asked).min(1) if len(asked) else np.full(len(situations), np.inf)
    chosen: list[int] = []
    while len(chosen) < n and nearest.max() > 0:
        i = int(nearest.argmax())
        chosen.append(int(first[i]))
        nearest = np.minimum(nearest, distance(situations[i : i + 1])[:, 0])
    return chosen


def advice_so_far(records: Records, scores: np.ndarray, facts: np.ndarray) -> tuple[list[int], float | None]:
    """Sub-goals that the table advises in a situation (P,), and the mean comprehension score of that advice."""
    rows = np.flatnonzero(records.fits(facts[None])[0])
    known = scores[rows][~np.isnan(scores[rows])]
    return list(dict.fromkeys(records.goal[rows].tolist())), float(known.mean()) if len(known) else None


def comprehension_scores(args: Args, records: Records) -> np.ndarray:
    """(K,) how well the agent understood each piece of advice, 0 to 1; NaN where it was never given."""
    given = records.steps[:, SHOWN] > 0
    visits = np.maximum(records.visits[:, SHOWN], 1e-9)
    if args.comprehension == "none":
        return np.full(given.shape, np.nan)
    success = np.clip(records.successes[:, SHOWN] / visits, 0, 1)
    if args.comprehension == "binary":
        score = (records.successes[:, SHOWN] > 0).astype(np.float64)
    elif args.comprehension == "success":
        score = success
    else:
        done, names = records.reached[:, SHOWN], records.names[:NUM_BASIC]
        if args.comprehension == "cosine-actions":
            done = records.actions[:, SHOWN]
            names = embeddings.make_embedding(args.embed).encode(action_names(done.shape[1]))
        did, said = done @ names, records.names[records.goal]  # (K, D)
        norm = np.linalg.norm(did, axis=1) * np.linalg.norm(said, axis=1)
        score = reference_score((did * said).sum(1) / np.maximum(norm, 1e-9))
        if args.comprehension == "cosine":  # nothing was reached in the other visits: their cosine is 0
            score = success * score + (1 - success) * reference_score(0.0)
    return np.where(given, score, np.nan)


def reference_score(cosine: Any) -> Any:
    """The reference's comprehension score of a cosine."""
    return 1 / (1 + np.exp(-10 * (cosine - 0.1)))


def action_names(num_actions: int) -> list[str]:
    from craftax.craftax_classic.constants import Action

    return [action.name.lower().replace("_", " ") for action in Action][:num_actions]


@dataclass
class Pause:
    """One pause's questions, and the guide at work on them."""

    queries: list[Query]
    captions: list[str]
    prompts: list[str]  # for the adapter
    analyses: list[str]
    messages: list[list[dict[str, str]]]
    samples: list[int]
    replies: Any  # () -> list[Reply], waits for them
    seconds: float  # that asking took so far


def ask_guide(args: Args, env: Any, queries: list[Query], adapter: Any, llm: Any, key: jax.Array) -> Pause:
    """Ask the adapter about all queries in one batch, and then the guide; with --llm-async without waiting for it."""
    start = time.perf_counter()
    captions = [env.to_text(query.obs) for query in queries]
    prompts = [
        rladapter_adapter.adapter_prompt(caption, query.sub_goals, query.comprehension)
        for caption, query in zip(captions, queries, strict=True)
    ]
    analyses = adapter.analyse(prompts, key) if queries else []
    messages = [
        llm_client.build_messages(caption, query.sub_goals, analysis)
        for caption, query, analysis in zip(captions, queries, analyses, strict=True)
    ]
    samples = [query.times_asked for query in queries]
    replies = functools.partial(llm.complete, messages, samples) if queries else list
    if args.llm_async:
        replies = in_background(replies)
    return Pause(queries, captions, prompts, analyses, messages, samples, replies, time.perf_counter() - start)


def in_background(function: Any) -> Any:
    """Start a function that does not raise in a thread; returns a function that waits for its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)  # a second Ctrl-C need not wait
    thread.start()

    def wait() -> Any:
        thread.join()
        return results[0]

    return wait


def store_answers(
    phase: int, records: Records, pause: Pause, llm: Any
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Wait for the guide, and write what it says into the records. A reply that can't be used leaves them as they were.

    Returns:
        one log record per query; sums for the metrics
    """
    start = time.perf_counter()
    replies = pause.replies()
    waited = time.perf_counter() - start
    log = []
    for query, caption, prompt, analysis, message, sample, reply in zip(
        pause.queries, pause.captions, pause.prompts, pause.analyses, pause.messages, pause.samples, replies,
        strict=True,
    ):  # fmt: skip
        rows, error = {}, reply.error
        try:
            rows = {} if error else store_guidance(records, query, llm_client.parse_reply(reply.text))
        except ValueError as problem:
            error = str(problem)
        if analysis:
            advice = [[goal, row, int(records.stamp[row])] for goal, row in rows.items()]
            records.said = [*records.said, (prompt, analysis, advice)][-SAID:]
        log.append({
            "phase": phase, "key": literals(query.facts, query.facts), "rows": list(rows.values()), "caption": caption,
            "adapter_prompt": prompt, "analysis": analysis, "messages": message, "sample": sample, "model": llm.name,
            "reply": reply.text, "sub_goals": [SUB_GOALS[goal] for goal in rows],
            "because": [literals(records.care[row], records.keys[row]) for row in rows.values()],
            "error": error, "skipped": reply.skipped, "cached": reply.cached, "calls": reply.calls,
            "prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens, "cost": reply.cost,
            "seconds": reply.seconds,
        })  # fmt: skip
    skipped, errors = sum(r.skipped for r in replies), sum(bool(record["error"]) for record in log)
    metrics = {
        "llm/calls": sum(r.calls for r in replies), "llm/cache_hits": sum(r.cached for r in replies),
        "llm/failures": errors - skipped, "llm/skipped": skipped,
        "llm/prompt_tokens": sum(r.prompt_tokens for r in replies),
        "llm/completion_tokens": sum(r.completion_tokens for r in replies),
        "llm/cost": sum(r.cost for r in replies), "llm/seconds": sum(r.seconds for r in replies),
        "guidance/valid_replies": len(log) - errors, "time/llm_wait": waited,
        "time/guidance": pause.seconds + time.perf_counter() - start,
    }  # fmt: skip
    if seconds := [r.seconds for r in replies if r.calls]:
        quantiles = np.quantile(seconds, (0.5, 0.95, 1.0)).tolist()
        metrics |= {f"llm/seconds_{name}": q for name, q in zip(("p50", "p95", "max"), quantiles, strict=True)}
    return log, metrics


def literals(care: np.ndarray, key: np.ndarray) -> list[str]:
    """The facts cared about in words, "not " in front of false ones."""
    return [("" if key[i] else "not ") + FACTS[i] for i in np.flatnonzero(care)]


def store_guidance(records: Records, query: Query, guidance: llm_client.Guidance) -> dict[int, int]:
    """Write each sub-goal of an answer into a row of its own, unless a row says so already; {sub-goal: row}."""
    rows: dict[int, int] = {}
    for goal, because in zip(guidance.sub_goals, guidance.because, strict=True):
        care = np.zeros(len(FACTS), bool)
        # A reason that is not so in this situation was misread and counts for nothing; with none left, all facts do.
        care[[index for index, truth in because if query.facts[index] == truth] or slice(None)] = True
        same = (records.care == care).all(1) & (((records.keys ^ query.facts) & care).sum(1) == 0)
        same &= records.valid & (records.goal == goal)
        if same.any():
            rows[goal] = int(same.argmax())
            continue
        taken = list(rows.values())
        use = np.where(records.valid, 1 + records.visits.sum(1), 0.0)  # an empty row first, then the one used least
        use[taken] = np.inf
        row = int(use.argmin())
        if row in taken:
            break  # a table smaller than this answer
        stamp = records.stamp.max() + 1
        for name in records.arrays:
            if name not in ("asked", "num_asked"):
                records.arrays[name][row] = 0
        records.obs[row], records.keys[row], records.care[row] = query.obs, query.facts, care
        records.valid[row], records.goal[row], records.stamp[row] = True, goal, stamp
        rows[goal] = row
    records.remember(query.facts)
    return rows


def finetune(args: Args, records: Records, adapter: Any, key: jax.Array) -> dict[str, float]:
    """Tune the adapter on what RL found out (`--sft-data`)."""
    start = time.perf_counter()
    won = {int(records.stamp[row]) for row in np.flatnonzero(records.valid & (records.lead() > MARGIN))}
    examples = choose_examples(args.sft_data, records.said, won)
    tuned = adapter.finetune(examples, key, args.sft_epochs, args.sft_learning_rate) if examples else {}
    tuned |= {"cut_prompts": adapter.cut_prompts}
    return {"time/sft": time.perf_counter() - start} | {f"adapter/{name}": value for name, value in tuned.items()}


def choose_examples(
    sft_data: str, said: list[tuple[str, str, list[list[int]]]], won: set[int]
) -> list[tuple[str, str]]:
    """(prompt, analysis) pairs to train on. best: where the guide took up a sub-goal that the analysis named, and that
    advice has proved its worth (its stamp is in `won`); all: every one, as the reference does."""
    chosen = set()
    for prompt, analysis, advice in said:
        named = sub_goals_in_text(analysis)
        if sft_data == "all" or any(goal in named and stamp in won for goal, _, stamp in advice):
            chosen.add((prompt, analysis))
    return sorted(chosen)


def examples_of_run(folder: Path, sft_data: str = "best") -> list[tuple[str, str]]:
    """What `finetune` would train on after a run's last phase, from its guidance.jsonl and outcomes.jsonl alone."""
    guidance, outcomes = (runs.read_log(folder, f"{name}.jsonl") for name in ("guidance", "outcomes"))
    said: list[tuple[str, str, list[list[int]]]] = []
    rows: dict[int, dict[str, Any]] = {}
    later = runs.read_config(folder)["flags"]["llm_async"]  # answers serve from the next phase on

    def read_answers(phase: int) -> None:
        for line in (line for line in guidance if line["phase"] == phase):
            for row, goal, because in zip(line["rows"], line["sub_goals"], line["because"], strict=True):
                if row not in rows or (rows[row]["goal"], rows[row]["because"]) != (goal, because):
                    stamp = 1 + max((row["stamp"] for row in rows.values()), default=0)
                    rows[row] = {"goal": goal, "because": because, "stamp": stamp, "evidence": np.zeros(2)}
            advice = [[SUB_GOAL_INDEX[rows[row]["goal"]], row, rows[row]["stamp"]] for row in line["rows"]]
            said.extend([(line["adapter_prompt"], line["analysis"], advice)] if line["analysis"] else [])

    def read_outcomes(phase: int) -> None:
        sums = {name: np.zeros((1 + max(rows, default=0), 2)) for name in ("visits", "returns", "squares")}
        for line in (line for line in outcomes if line["phase"] == phase):
            at, mean = (line["row"], line["candidate"]), line["return_mean"]
            sums["visits"][at], sums["returns"][at] = line["visits"], line["visits"] * mean
            sums["squares"][at] = line["visits"] * (line["return_variance"] + mean**2)
        evidence = phase_evidence(sums)
        for row, advice in rows.items():
            advice["evidence"] = OLD * advice["evidence"] + evidence[row]

    for phase in range(1 + max((line["phase"] for line in guidance), default=-1)):
        for read in (read_outcomes, read_answers) if later else (read_answers, read_outcomes):
            read(phase)
    won = {r["stamp"] for r in rows.values() if r["evidence"][0] > MARGIN * np.sqrt(max(r["evidence"][1], 1e-9))}
    return choose_examples(sft_data, said[-SAID:], won)


# --------------------------------------------------------------------------------------------------------------------
# Device half: everything from here to `evaluate` is pure and runs inside jit
# --------------------------------------------------------------------------------------------------------------------


def make_lookup(args: Args, table: GuidanceTable, key: jax.Array, facts: jax.Array) -> Lookup:
    """Draw who is shown what, and find the rows that fit now (facts: (N, P))."""
    sign = jnp.where(table.care, 1.0 - 2.0 * table.keys, 0.0)
    offset = (table.care & table.keys).sum(1) + 1e6 * ~table.valid
    shown = jax.random.uniform(key, (facts.shape[0], table.valid.shape[0])) < table.show
    lookup = Lookup(sign.T, offset, shown, jnp.zeros_like(shown))
    return dataclasses.replace(lookup, pinned=fitting_rows(args, lookup, facts))


def fitting_rows(args: Args, lookup: Lookup, facts: jax.Array) -> jax.Array:
    """(N, P) -> (N, K) rows that agree with the facts they care about, all but `guidance_tolerance`."""
    wrong = facts.astype(jnp.float32) @ lookup.weights + lookup.offset
    return wrong <= args.guidance_tolerance + 0.5


def rows_in_force(args: Args, lookup: Lookup, facts: jax.Array) -> jax.Array:
    """(N, K) rows that fit: at this step, or at the pause with --guidance-lookup pause."""
    return fitting_rows(args, lookup, facts) if args.guidance_lookup == "step" else lookup.pinned


def find_advice(args: Args, table: GuidanceTable, lookup: Lookup, facts: jax.Array) -> jax.Array:
    """(N, S) sub-goals advised to every env. Without guidance all are: a bonus is for any, nothing is looked up."""
    if args.guidance != "full":
        return jnp.ones((facts.shape[0], table.goals.shape[1]), bool)
    rows = rows_in_force(args, lookup, facts) & lookup.shown
    return rows.astype(jnp.float32) @ table.goals.astype(jnp.float32) > 0


def look(
    args: Args, agent: Agent, table: GuidanceTable, lookup: Lookup, env_state: Pytree
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What every env shows and is told: obs (N, O), context (N, M) for the policy, advised (N, S) for the bonus."""
    obs = devices.each(agent.mesh, agent.env.observe)(env_state)
    facts = agent.env.facts(obs)
    advised = find_advice(args, table, lookup, facts)
    return obs, CONTEXTS[args.guidance](advised, facts), advised


def step_envs(agent: Agent, key: jax.Array, env_state: Pytree, action: jax.Array) -> tuple:
    """`env.step` with a key of its own for every env, the same on any number of devices."""
    return devices.each(agent.mesh, agent.env.step)(jax.random.split(key, action.shape[0]), env_state, action)


def refill_envs(agent: Agent, key: jax.Array, env_state: Pytree) -> Pytree:
    return devices.each(agent.mesh, agent.env.refill)(jax.random.split(key, agent.env.num_pools), env_state)


def sample_action(key: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(N, A) -> action (N,), its log-probability (N,)"""
    action = jax.random.categorical(key, logits)
    return action, action_log_prob(logits, action)


def action_log_prob(logits: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]


def rollout(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, lookup: Lookup
) -> tuple[Runner, Transition, dict[str, jax.Array]]:
    """T steps of all envs.

    Returns:
        the runner; transitions with a leading axis T; sums over steps and ended episodes
    """
    key, key_refill, key_steps = jax.random.split(runner.key, 3)

    def step(carry: Runner, key_step: jax.Array) -> tuple[Runner, tuple[Transition, dict[str, jax.Array]]]:
        key_action, key_env = jax.random.split(key_step)
        obs, context, advised = look(args, agent, table, lookup, carry.env_state)
        logits, value = agent(carry.params, table, obs, context)
        action, log_prob = sample_action(key_action, logits)
        env_state, env_reward, done, info = step_envs(agent, key_env, carry.env_state, action)
        worked = info["worked"] & advised[:, :NUM_BASIC]
        transition = Transition(
            obs=obs, context=context, action=action, log_prob=log_prob, value=value, env_reward=env_reward, done=done,
            reward=env_reward + args.bonus * worked.sum(1), reached=info["reached"],
        )  # fmt: skip
        episodic_return, episodic_length = carry.episodic_return + env_reward, carry.episodic_length + 1
        ended = {
            "covered_steps": advised.any(1).sum(),
            "episodes": done.sum(),
            "episodic_return": (episodic_return * done).sum(),
            "episodic_length": (episodic_length * done).sum(),
            "achievements": (info["achievements"] & done[:, None]).sum(0),
        }
        carry = dataclasses.replace(
            carry, env_state=env_state, episodic_return=jnp.where(done, 0.0, episodic_return),
            episodic_length=jnp.where(done, 0, episodic_length),
        )  # fmt: skip
        return carry, (transition, ended)

    runner, (transitions, ended) = jax.lax.scan(step, runner, jax.random.split(key_steps, args.num_steps))
    env_state = refill_envs(agent, key_refill, runner.env_state)
    sums = jax.tree.map(lambda x: x.sum(0).astype(jnp.float32), ended)
    return dataclasses.replace(runner, key=key, env_state=env_state), transitions, sums


def compute_gae(
    reward: jax.Array, value: jax.Array, done: jax.Array, last_value: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation (arXiv 1506.02438).

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


def ppo_loss(
    args: Args,
    agent: Agent,
    params: Pytree,
    table: GuidanceTable,
    batch: Transition,
    advantages: jax.Array,
    returns: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate, value and entropy loss of one minibatch (B,), and what CleanRL logs about it."""
    logits, value = agent(params, table, batch.obs, batch.context)
    log_ratio = action_log_prob(logits, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = jnp.clip(ratio, 1.0 - args.clip_coef, 1.0 + args.clip_coef)
    policy_loss = jnp.maximum(-advantages * ratio, -advantages * clipped).mean()
    value_loss = 0.5 * jnp.square(value - returns).mean()
    log_probs = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(1).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    metrics = {
        "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy,
        "approx_kl": ((ratio - 1.0) - log_ratio).mean(),
        "clipfrac": (jnp.abs(ratio - 1.0) > args.clip_coef).mean(),
    }  # fmt: skip
    return loss, metrics


def update_agent(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, transitions: Transition, last_value: jax.Array
) -> tuple[Runner, dict[str, jax.Array]]:
    """Epochs of minibatch updates on one rollout; the mean of the losses."""
    advantages, returns = compute_gae(
        transitions.reward, transitions.value, transitions.done, last_value, args.gamma, args.gae_lambda
    )
    # Whole on every device, so that a minibatch is any of all samples; each device takes its part of the minibatch.
    rollouts = devices.replicate(agent.mesh, (transitions, advantages, returns))
    flat = jax.tree.map(lambda x: x.reshape(args.batch_size, *x.shape[2:]), rollouts)
    optimizer, rate = make_optimizer(args), learning_rate(args, runner.update)

    def minibatch(
        carry: tuple[Pytree, Pytree], indices: jax.Array
    ) -> tuple[tuple[Pytree, Pytree], dict[str, jax.Array]]:
        params, opt_state = carry
        indices = devices.split(agent.mesh, indices)
        batch, batch_advantages, batch_returns = jax.tree.map(lambda x: x[indices], flat)
        loss = functools.partial(ppo_loss, args, agent)
        grads, metrics = jax.grad(loss, has_aux=True)(params, table, batch, batch_advantages, batch_returns)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, opt_state), metrics

    key, key_shuffle = jax.random.split(runner.key)
    keys = jax.random.split(key_shuffle, args.update_epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, args.batch_size))(keys)
    order = order.reshape(args.update_epochs * args.num_minibatches, -1)
    (params, opt_state), metrics = jax.lax.scan(minibatch, (runner.params, runner.opt_state), order)
    metrics = jax.tree.map(jnp.mean, metrics)
    metrics["explained_variance"] = 1.0 - jnp.var(flat[2] - flat[0].value) / (jnp.var(flat[2]) + 1e-8)
    runner = dataclasses.replace(runner, params=params, opt_state=opt_state, key=key, update=runner.update + 1)
    return runner, metrics


def row_outcomes(
    args: Args, agent: Agent, table: GuidanceTable, lookup: Lookup, transitions: Transition
) -> dict[str, jax.Array]:
    """What came of each row in one rollout, for envs it was hidden from and shown to: sums of shape (K, 2, ...).

    visits: times a state that the row fits was entered; returns, squares: of the discounted reward of the environment
    from there to the end of the rollout, with neither bonus nor value function, since both would favour advice that
    merely promises more bonus; successes: visits in which its sub-goal was reached; steps, reached, actions: while it
    fitted. A visit that began in an earlier rollout counts as steps only.
    """
    zeros = jnp.zeros_like(transitions.value)
    _, returns = compute_gae(transitions.env_reward, zeros, transitions.done, zeros[0], args.gamma, 1.0)
    fresh = jnp.concatenate([jnp.zeros_like(transitions.done[:1]), transitions.done[:-1]])

    def add_up(shown: jax.Array, pinned: jax.Array, *rollouts: Any) -> jax.Array:
        mine = dataclasses.replace(lookup, shown=shown, pinned=pinned)
        return add_up_outcomes(args, agent.env, table.goals, mine, *rollouts)[None]

    # Every device adds up its own envs: they meet once and not at every step.
    add_up = devices.each(agent.mesh, add_up, (0, 0, 1, 1, 1))
    sums = add_up(lookup.shown, lookup.pinned, transitions, returns, fresh).sum(0)
    outcomes = {name: sums[..., i] for i, name in enumerate(("visits", "returns", "squares", "successes", "steps"))}
    return outcomes | {"reached": sums[..., 5 : 5 + NUM_BASIC], "actions": sums[..., 5 + NUM_BASIC :]}


def add_up_outcomes(
    args: Args, env: Any, goals: jax.Array, lookup: Lookup, transitions: Transition, returns: jax.Array,
    fresh: jax.Array,
) -> jax.Array:  # fmt: skip
    """(T, N) returns, fresh: an episode begins with this step -> (K, 2, ...) sums over the steps and these envs."""
    basic = goals[:, :NUM_BASIC].astype(jnp.float32)
    groups = jnp.stack([~lookup.shown, lookup.shown]).astype(jnp.float32)  # (2, N, K)

    def step(carry: tuple, x: tuple) -> tuple[tuple, None]:
        before, counted, succeeded, sums = carry  # (N, K) bool: fitted before, visit is counted, sub-goal was reached
        t, return_t, fresh_t = x
        fits = rows_in_force(args, lookup, env.facts(t.obs))
        entered = fits & (~before | fresh_t[:, None])
        counted = (counted | entered) & fits
        hit = (t.reached.astype(jnp.float32) @ basic.T > 0) & counted
        success = hit & (~succeeded | entered)
        per_visit = jnp.stack([jnp.ones_like(return_t), return_t, return_t**2], 1)
        per_step = [jnp.ones((*fresh_t.shape, 1)), t.reached, jax.nn.one_hot(t.action, env.num_actions)]
        add = [
            jnp.einsum("gnk,nc->kgc", groups * entered, per_visit),
            jnp.einsum("gnk->kg", groups * success)[..., None],
            jnp.einsum("gnk,nc->kgc", groups * fits, jnp.concatenate(per_step, 1)),
        ]
        return (fits, counted, hit | (succeeded & counted & ~entered), sums + jnp.concatenate(add, -1)), None

    nothing = jnp.zeros_like(lookup.shown)
    start = rows_in_force(args, lookup, env.facts(transitions.obs[0]))
    sums = jnp.zeros((start.shape[1], 2, 5 + NUM_BASIC + env.num_actions))
    (_, _, _, sums), _ = jax.lax.scan(step, (start, nothing, nothing, sums), (transitions, returns, fresh))
    return sums


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))
def train_phase(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, num_updates: jax.Array
) -> tuple[Runner, dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """num_updates (traced, at most updates_per_phase) PPO updates with a fixed guidance table. The runner is donated.

    Returns:
        runner; metrics, sums over the phase; outcomes, sums per row; a sample of the situations met (U * 256, O)
    """
    key, key_lookup = jax.random.split(runner.key)
    obs = devices.each(agent.mesh, agent.env.observe)(runner.env_state)
    lookup = make_lookup(args, table, key_lookup, agent.env.facts(obs))
    runner = dataclasses.replace(runner, key=key)

    def one_update(i: jax.Array, carry: tuple) -> tuple:
        runner, metrics, outcomes, samples = carry
        runner, transitions, sums = rollout(args, agent, runner, table, lookup)
        last_obs, last_context, _ = look(args, agent, table, lookup, runner.env_state)
        _, last_value = agent(runner.params, table, last_obs, last_context)
        key, key_sample = jax.random.split(runner.key)
        runner, losses = update_agent(args, agent, dataclasses.replace(runner, key=key), table, transitions, last_value)
        chosen = jax.random.randint(key_sample, (SAMPLES_PER_UPDATE,), 0, args.batch_size)
        sample = transitions.obs.reshape(args.batch_size, -1)[chosen]
        sums |= losses | {"bonus": (transitions.reward - transitions.env_reward).sum()}
        new_outcomes = row_outcomes(args, agent, table, lookup, transitions) if args.guidance == "full" else {}
        metrics, outcomes = jax.tree.map(jnp.add, (metrics, outcomes), (sums, new_outcomes))
        return runner, metrics, outcomes, jax.lax.dynamic_update_index_in_dim(samples, sample, i, 0)

    metrics = {name: jnp.zeros(()) for name in METRICS} | {"achievements": jnp.zeros(len(agent.env.achievements))}
    outcomes = {}
    if args.guidance == "full":
        shape = (table.valid.shape[0], 2)
        outcomes = {name: jnp.zeros(shape) for name in ("visits", "returns", "squares", "successes", "steps")}
        outcomes["reached"] = jnp.zeros((*shape, NUM_BASIC))
        outcomes["actions"] = jnp.zeros((*shape, agent.env.num_actions))
    samples = jnp.zeros((args.updates_per_phase, SAMPLES_PER_UPDATE, obs.shape[-1]), jnp.uint8)
    carry = (runner, metrics, outcomes, samples)
    runner, metrics, outcomes, samples = jax.lax.fori_loop(0, num_updates, one_update, carry)
    return runner, *devices.replicate(agent.mesh, (metrics, outcomes, samples.reshape(-1, obs.shape[-1])))


LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
METRICS = (*LOSSES, "bonus", "covered_steps", "episodes", "episodic_return", "episodic_length")


# --------------------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def start_evaluation(args: Args, agent: Agent, key: jax.Array) -> dict[str, Any]:
    """What `evaluate_steps` carries: fresh episodes, and counts of each env."""
    key_env, key = jax.random.split(key)
    n, zeros = args.num_envs, functools.partial(jnp.zeros, args.num_envs)
    per_env = {
        "env_state": agent.env.reset(key_env, n), "pinned": jnp.zeros((n, args.table_rows), bool),
        "so_far": zeros(), "length": zeros(jnp.int32), "episodes": zeros(jnp.int32), "episodic_return": zeros(),
        "episodic_length": zeros(jnp.int32), "achievements": jnp.zeros((n, len(agent.env.achievements)), jnp.int32),
    }  # fmt: skip
    return devices.split(agent.mesh, per_env) | {"key": devices.replicate(agent.mesh, key)}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def evaluate_steps(
    args: Args, agent: Agent, params: Pytree, carry: dict[str, Any], table: GuidanceTable, num_episodes: jax.Array,
    redraw: jax.Array,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:  # fmt: skip
    """num_steps steps of all envs; each env counts its first num_episodes episodes only.

    Returns:
        the carry; sums over the envs so far, and the `fewest` episodes that an env has ended
    """
    key, key_refill, key_steps, key_lookup = jax.random.split(carry["key"], 4)
    facts = agent.env.facts(devices.each(agent.mesh, agent.env.observe)(carry["env_state"]))
    lookup = make_lookup(args, table, key_lookup, facts)
    lookup = dataclasses.replace(lookup, pinned=jnp.where(redraw, lookup.pinned, carry["pinned"]))

    def step(carry: dict[str, Any], key_step: jax.Array) -> tuple[dict[str, Any], None]:
        key_action, key_env = jax.random.split(key_step)
        obs, context, _ = look(args, agent, table, lookup, carry["env_state"])
        action, _ = sample_action(key_action, agent(params, table, obs, context)[0])
        env_state, reward, done, info = step_envs(agent, key_env, carry["env_state"], action)
        counts = done & (carry["episodes"] < num_episodes)
        so_far, length = carry["so_far"] + reward, carry["length"] + 1
        return carry | {
            "env_state": env_state,
            "so_far": jnp.where(done, 0.0, so_far), "length": jnp.where(done, 0, length),
            "episodes": carry["episodes"] + counts,
            "episodic_return": carry["episodic_return"] + so_far * counts,
            "episodic_length": carry["episodic_length"] + length * counts,
            "achievements": carry["achievements"] + (info["achievements"] & counts[:, None]),
        }, None  # fmt: skip

    carry, _ = jax.lax.scan(step, carry, jax.random.split(key_steps, args.num_steps))
    env_state = refill_envs(agent, key_refill, carry["env_state"])
    names = "episodes", "episodic_return", "episodic_length", "achievements"
    sums = {name: carry[name].sum(0) for name in names} | {"fewest": carry["episodes"].min()}
    carry |= {"key": key, "env_state": env_state, "pinned": lookup.pinned}
    return carry, devices.replicate(agent.mesh, sums)


def evaluate(
    args: Args, agent: Agent, params: Pytree, table: GuidanceTable, key: jax.Array, progress: Any = None
) -> dict[str, Any]:
    """Fresh episodes of the trained policy: sampled actions, frozen table, every env the same number of whole episodes.

    Returns:
        eval_episodes, episodic_return, episodic_length, score, reward_percent, achievements {name: rate}
    """
    num_episodes = -(-args.eval_episodes // args.num_envs)
    total, num_achievements = num_episodes * args.num_envs, len(agent.env.achievements)
    carry, chunk, sums = start_evaluation(args, agent, key), 0, {"fewest": 0}
    while sums["fewest"] < num_episodes:
        redraw = devices.everywhere(agent.mesh, np.bool_(chunk % args.updates_per_phase == 0))
        carry, sums = evaluate_steps(args, agent, params, carry, table, np.int32(num_episodes), redraw)
        sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
        chunk += 1
        if progress:
            progress(int(sums["episodes"]), total)
    rates, episodic_return = sums["achievements"] / total, float(sums["episodic_return"]) / total
    return {
        "eval_episodes": total,
        "episodic_return": episodic_return,
        "episodic_length": float(sums["episodic_length"]) / total,
        "reward_percent": 100 * episodic_return / num_achievements,
        "score": crafter_score(rates),
        "achievements": dict(zip(agent.env.achievements, rates.tolist(), strict=True)),
    }


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


def make_adapter(args: Args) -> Any:
    """The adapter of --adapter. Raises ValueError, one line, for what is no model."""
    if args.adapter == "none" or args.guidance != "full":
        return rladapter_adapter.NoAdapter()
    try:
        lora = rladapter_adapter.LoraConfig(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    except ValueError as error:
        raise ValueError(f"--lora-rank, --lora-alpha, --lora-dropout, --lora-targets: {error}") from None
    try:
        return rladapter_adapter.load_adapter(args.adapter, lora, args.seed)
    except ValueError as error:
        raise ValueError(f"--adapter: {error}; or use --adapter none") from None


def make_llm(args: Args) -> Any:
    llm = llm_client.make_llm(
        args.llm, model=args.llm_model, base_url=args.llm_base_url, seed=args.seed, replay_run=args.llm_replay,
        cache=args.llm_cache or runs.cache_folder() / "llm.sqlite",
        max_calls=args.llm_max_calls, max_cost=args.llm_max_cost, price_in=args.llm_price_in,
        price_out=args.llm_price_out, structured=args.llm_structured, concurrency=args.llm_concurrency,
        timeout=args.llm_timeout, deadline=args.llm_deadline,
    )  # fmt: skip
    if args.guidance == "full":
        llm.check()
    return llm


LLM_TOTALS = (
    "llm_calls", "llm_cache_hits", "llm_failures", "llm_skipped", "llm_prompt_tokens", "llm_completion_tokens",
    "llm_cost",
)  # fmt: skip


def dry_run(args: Args) -> None:
    """Print what one pause would ask, about random situations, and what the whole run would at most take."""
    env, adapter = make_env(args.env_id, args.num_envs), make_adapter(args)
    budget = llm_client.Budget(args.llm_max_calls, args.llm_max_cost, args.llm_price_in, args.llm_price_out)
    obs = np.asarray(env.random_observations(jax.random.key(args.seed), SAMPLES_PER_UPDATE))
    records = Records(args, env.num_actions, obs.shape[1:])
    queries = select_queries(args, records, obs, np.asarray(env_facts(env, obs))) if args.guidance == "full" else []
    pause = ask_guide(args, env, queries, adapter, llm_client.OfflineGuide(), jax.random.key(args.seed))
    for i, (prompt, messages) in enumerate(zip(pause.prompts, pause.messages, strict=True)):
        print(f"==== query {i}: adapter prompt\n{prompt}")
        for message in messages[i > 0 :]:  # the system message is the same in all of them
            print(f"---- {message['role']}\n{message['content']}")
    pauses = 1 + -(-(args.num_updates - 1) // args.updates_per_phase)
    calls = pauses * args.queries_per_phase if args.guidance == "full" else 0
    calls = calls if args.llm_max_calls is None else min(calls, args.llm_max_calls)
    each = max((llm_client.estimate_tokens(messages) for messages in pause.messages), default=0)
    cost = budget.price(calls * each, calls * llm_client.MAX_TOKENS)
    print(
        f"==== at most {calls} calls in {pauses} pauses, without repairs; about {calls * each} prompt tokens, at most "
        f"{calls * llm_client.MAX_TOKENS} completion tokens; cost {cost:.2f} (--llm-price-in, --llm-price-out)"
    )


class Counters:
    """What a run adds up over all its sessions; saved with each checkpoint."""

    def __init__(self, **values: float):
        self.values = {
            "global_step": 0, "wall_seconds": 0.0, "compile_seconds": 0.0, "episodes": 0.0, "achievements": [],
            "llm_queries": 0, **dict.fromkeys(LLM_TOTALS, 0),
        } | values  # fmt: skip

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def steps_per_second(self) -> float:
        return self.values["global_step"] / (self.values["wall_seconds"] - self.values["compile_seconds"])

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values[name] += value


def phase_metrics(
    args: Args, agent: Agent, counters: Counters, sums: dict[str, Any], num_updates: int
) -> dict[str, Any]:
    """The tags of one phase from the device's sums; None where no episode ended."""
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    episodes = float(sums["episodes"])
    unlocked = (np.array(counters["achievements"]) if counters["achievements"] else 0) + sums["achievements"]
    counters.values["achievements"] = unlocked.tolist()
    counters.add(global_step=num_updates * args.batch_size, episodes=episodes)
    record = {f"losses/{name}": float(sums[name]) / num_updates for name in LOSSES}
    record["guidance/coverage"] = float(sums["covered_steps"]) / (num_updates * args.batch_size)
    record["guidance/bonus_per_step"] = float(sums["bonus"]) / (num_updates * args.batch_size)
    record["charts/episodes"] = episodes
    if episodes:
        mean_return, rates = float(sums["episodic_return"]) / episodes, sums["achievements"] / episodes
        record |= {
            "charts/episodic_return": mean_return, "charts/episodic_length": float(sums["episodic_length"]) / episodes,
            "crafter/reward_percent": 100 * mean_return / len(agent.env.achievements),
            "crafter/score": crafter_score(rates),
            "crafter/score_all_episodes": crafter_score(unlocked / counters["episodes"]),
        }  # fmt: skip
        record |= {f"achievements/{name}": float(r) for name, r in zip(agent.env.achievements, rates, strict=True)}
    return record


def outcome_records(phase: int, records: Records, scores: np.ndarray, outcomes: dict[str, Any]) -> list[dict[str, Any]]:
    """One object per row and candidate (0 hidden, 1 shown) that was used in this phase."""
    sums = {name: np.asarray(value, np.float64) for name, value in outcomes.items()}
    lines = []
    for row, candidate in np.argwhere(sums["steps"] > 0).tolist():
        at = row, candidate
        visits = max(sums["visits"][at], 1.0)
        mean = sums["returns"][at] / visits
        lines.append({
            "phase": phase, "row": row, "candidate": candidate, "sub_goal": SUB_GOALS[records.goal[row]],
            "because": literals(records.care[row], records.keys[row]),
            "visits": int(sums["visits"][at]), "steps": int(sums["steps"][at]), "return_mean": mean,
            "return_variance": max(sums["squares"][at] / visits - mean**2, 0.0),
            "successes": int(sums["successes"][at]),
            "reached": {BASIC_SUB_GOALS[g]: int(n) for g, n in enumerate(sums["reached"][at]) if n},
            "comprehension": None if np.isnan(scores[row]) else float(scores[row]),
        })  # fmt: skip
    return lines


def guidance_metrics(records: Records, scores: np.ndarray) -> dict[str, Any]:
    """What the table is worth, each row counted by its visits."""
    weights = np.where(np.isnan(scores), 0, records.visits[:, SHOWN])
    visits, lead = float(records.visits[:, SHOWN].sum()), records.lead()
    return {
        "guidance/comprehension": float((np.nan_to_num(scores) * weights).sum() / weights.sum())
        if weights.sum()
        else None,
        "guidance/goal_success": float(records.successes[:, SHOWN].sum()) / visits if visits else None,
        "guidance/rows": int(records.valid.sum()),
        "guidance/pairs_decided": int((np.abs(lead) > MARGIN).sum()),
        "guidance/pairs_won": int((lead > MARGIN).sum()),
    }


def ahead_of_time(args: Args, function: Any, *values: Any) -> tuple[Any, float]:
    """The compiled function, without its two static arguments, and the seconds that took."""
    if not args.jit:
        return functools.partial(function, *values[:2]), 0.0
    start = time.perf_counter()
    return function.lower(*values).compile(), time.perf_counter() - start


class StopRequest:
    """Ctrl-C once: finish the phase, save, stop. Twice: stop at once."""

    def __init__(self, console: Any):
        self.asked, self.console = False, console
        signal.signal(signal.SIGINT, self)

    def __call__(self, *_: Any) -> None:
        if self.asked:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.asked = True
        self.console.print("Stopping after this phase, then saving. Ctrl-C again stops at once.")


@dataclass
class Session:
    """All that the host keeps between the phases of a run."""

    args: Args
    folder: Path
    agent: Agent
    runner: Runner
    records: Records
    samples: np.ndarray  # (U * 256, O) uint8, situations of the last phase
    adapter: Any
    llm: Any
    checkpoints: runs.Checkpoints | None  # of several processes the leader has them
    counters: Counters
    phase: int  # the next one
    setup_seconds: float  # loading, reset: no part of SPS

    @property
    def finished(self) -> bool:
        return self.counters["global_step"] >= self.args.num_updates * self.args.batch_size


def prepare(args: Args, folder: Path, resume: bool, argv: list[str]) -> Session:
    """Check everything, then make or read the run folder. Raises ValueError, one line, for what can't work."""
    start, leads = time.perf_counter(), devices.is_leader()
    mesh = make_mesh(args)
    env = make_env(args.env_id, args.num_envs, devices.count(mesh))
    if args.track:
        runs.import_wandb()
    if not resume and leads:
        runs.check_free(folder)
    # Of several processes the first one asks adapter and LLM; the others are handed the table.
    llm = make_llm(args) if leads else llm_client.OfflineGuide()
    adapter = make_adapter(args) if leads else rladapter_adapter.NoAdapter()
    key_agent, key_runner = jax.random.split(jax.random.key(args.seed))
    agent, params = make_agent(args, env, key_agent, mesh)
    params, key_runner = devices.everywhere(mesh, (devices.from_leader(params), key_runner))
    runner, obs = jax.jit(first_runner, static_argnums=(0, 1))(args, agent, params, key_runner)
    obs = np.asarray(obs)
    records = Records(args, env.num_actions, obs.shape[1:])
    samples = np.resize(obs, (args.updates_per_phase * SAMPLES_PER_UPDATE, *obs.shape[1:]))
    if not resume and leads:
        runs.create(folder, {"flags": flags(args), "argv": argv} | runs.describe_machine())
    checkpoints = runs.Checkpoints(folder) if leads else None
    session = Session(args, folder, agent, runner, records, samples, adapter, llm, checkpoints, Counters(), 0, 0.0)
    if resume:
        load_checkpoint(session)
    session.setup_seconds = time.perf_counter() - start
    return session


def first_runner(args: Args, agent: Agent, params: Pytree, key: jax.Array) -> tuple[Runner, jax.Array]:
    """`init_runner`, and what its envs show (N, O)."""
    runner = init_runner(args, agent, params, key)
    return runner, devices.replicate(agent.mesh, agent.env.observe(runner.env_state))


def current_table(session: Session) -> GuidanceTable:
    """The leader's guidance table, on all devices."""
    return devices.everywhere(session.agent.mesh, devices.from_leader(session.records.table()))


def checkpoint_arrays(session: Session) -> dict[str, Any]:
    return {
        "runner": devices.whole(session.agent.mesh, session.runner), "records": session.records.arrays,
        "adapter": devices.whole(None, session.adapter.state()), "samples": session.samples,
    }  # fmt: skip


def save_checkpoint(session: Session, phase: int) -> None:
    """Only the leader writes; all must call it, as each holds a part of the envs."""
    arrays, extra = checkpoint_arrays(session), {"counters": session.counters.values, "said": session.records.said}
    if devices.is_leader():
        session.checkpoints.save(phase, arrays, extra)


def load_checkpoint(session: Session) -> None:
    """The leader reads, and hands the others what they need."""
    saved, phase, extra = checkpoint_arrays(session), 0, {}
    if devices.is_leader():
        phase, saved, extra = session.checkpoints.restore(saved)
    phase, extra = devices.told_by_leader((phase, extra))
    session.runner = devices.like(devices.from_leader(saved["runner"]), session.runner)
    session.samples = np.array(saved["samples"])
    session.records.arrays = {name: np.array(value) for name, value in saved["records"].items()}
    session.records.said = [tuple(said) for said in extra["said"]]
    session.adapter.load_state(saved["adapter"])
    session.counters, session.phase = Counters(**extra["counters"]), phase + 1
    lost = [a for a in runs.read_log(session.folder, "guidance.jsonl") if a["phase"] >= session.phase]
    if session.args.llm == "http":  # these phases are trained anew, but their calls were made and paid for
        for name in ("calls", "cost", "prompt_tokens", "completion_tokens"):
            session.counters.add(**{f"llm_{name}": sum(answer[name] for answer in lost)})
    totals = session.counters
    session.llm.resume(totals["llm_queries"], totals["llm_calls"], totals["llm_cost"])
    if devices.is_leader():
        runs.cut_logs(session.folder, session.phase)


def run_phase(session: Session, train_compiled: Any, log: runs.Log) -> dict[str, Any]:
    """One pause and one phase of training: the method. Returns the metrics."""
    args, records, counters, phase = session.args, session.records, session.counters, session.phase
    start, env = time.perf_counter(), session.agent.env
    key = jax.random.fold_in(jax.random.key(args.seed + 1), phase)
    queries = []
    if args.guidance == "full" and devices.is_leader():
        queries = select_queries(args, records, session.samples, np.asarray(env_facts(env, session.samples)))
    pause = ask_guide(args, env, queries, session.adapter, session.llm, key)
    if not args.llm_async:
        asked = use_answers(session, pause, log)

    num_updates = args.updates_in_phase(phase, counters["global_step"] // args.batch_size)
    table = current_table(session)  # here the other processes wait for the leader
    updates = devices.everywhere(session.agent.mesh, np.int32(num_updates))
    train_start = time.perf_counter()
    out = jax.block_until_ready(train_compiled(session.runner, table, updates))
    train_seconds = time.perf_counter() - train_start
    session.runner, sums, outcomes, samples = out
    session.samples = np.resize(np.asarray(samples)[: num_updates * SAMPLES_PER_UPDATE], samples.shape)
    records.add_outcomes(outcomes)
    scores = comprehension_scores(args, records)
    log.append("outcomes.jsonl", outcome_records(phase, records, scores, outcomes) if outcomes else [])

    due = args.sft_every and (phase + 1) % args.sft_every == 0
    tuned = finetune(args, records, session.adapter, jax.random.fold_in(key, 1)) if due else {}
    # Asynchronous answers come in here, at the end of the phase in which they were asked for, and serve the next one.
    # So nothing is under way when a checkpoint is written, and a resumed run has the same answers at the same time.
    if args.llm_async:
        asked = use_answers(session, pause, log)
    metrics = phase_metrics(args, session.agent, counters, sums, num_updates)
    metrics |= guidance_metrics(records, scores) | asked | tuned | {"time/train": train_seconds}
    counters.add(wall_seconds=time.perf_counter() - start)
    session.phase += 1
    return {"phase": phase, "global_step": counters["global_step"], "charts/SPS": counters.steps_per_second} | metrics


def use_answers(session: Session, pause: Pause, log: runs.Log) -> dict[str, float]:
    """Wait for the guide, put its answers into the records, the log and the totals. Returns the metrics."""
    counters, step = session.counters, session.counters["global_step"]
    answers, asked = store_answers(session.phase, session.records, pause, session.llm)
    log.append("guidance.jsonl", [{"global_step": step} | answer for answer in answers])
    counters.add(llm_queries=len(answers))
    counters.add(**{name: asked[name.replace("_", "/", 1)] for name in LLM_TOTALS})
    return asked


@functools.partial(jax.jit, static_argnums=0)
def env_facts(env: Any, obs: jax.Array) -> jax.Array:
    return env.facts(obs)


def warm_up_adapter(session: Session) -> float:
    """Let the adapter compile what it will need; the seconds that took."""
    start, args = time.perf_counter(), session.args
    captions = [session.agent.env.to_text(obs) for obs in session.samples[: args.queries_per_phase]]
    for times in (1, 2):  # captions of fresh games are short, later ones are about twice as long
        prompts = [rladapter_adapter.adapter_prompt(caption * times, [], None) for caption in captions]
        session.adapter.warm_up(prompts, fine_tuning=args.sft_every > 0)
    return time.perf_counter() - start


def train(session: Session, progress: Any) -> dict[str, Any] | None:
    """All phases and the final evaluation. Returns the summary, None if Ctrl-C stopped it."""
    args, counters, mesh = session.args, session.counters, session.agent.mesh
    log = runs.NoLog()
    if devices.is_leader():
        log = runs.Log(session.folder, args.track, {"flags": flags(args)}, first_step=counters["global_step"])
    stop = StopRequest(progress.console)
    values = args, session.agent, session.runner, current_table(session), devices.everywhere(mesh, np.int32(1))
    train_compiled, compile_seconds = ahead_of_time(args, train_phase, *values)
    compile_seconds += warm_up_adapter(session)
    counters.add(compile_seconds=compile_seconds, wall_seconds=compile_seconds)
    progress.console.print(
        f"compiled in {compile_seconds:.1f} s; {args.num_updates} updates, a pause every {args.updates_per_phase}"
    )
    total = args.num_updates * args.batch_size
    task = progress.add_task("training", total=total, completed=counters["global_step"], status="")
    stopping = False
    while not session.finished and not stopping:
        metrics = run_phase(session, train_compiled, log)
        log.metrics(metrics | {"time/compile": compile_seconds})
        progress.update(task, completed=counters["global_step"], status=status_line(metrics, counters))
        stopping = bool(devices.from_leader(np.bool_(stop.asked)))
        if stopping or session.finished or session.phase % args.save_every == 0:
            save_checkpoint(session, session.phase - 1)
    if devices.is_leader():
        save_adapter(session)
        session.checkpoints.close()
    session.llm.close()
    log.close()
    if not session.finished:
        return None
    progress.update(task, description="evaluating")
    start = time.perf_counter()
    table = devices.everywhere(mesh, devices.from_leader(session.records.best_table()))
    key = devices.everywhere(mesh, jax.random.fold_in(jax.random.key(args.seed), 2))
    result = evaluate(args, session.agent, session.runner.params, table, key, lambda done, total: progress.update(
        task, status=f"{done} of {total} episodes"))  # fmt: skip
    seconds = {"eval_seconds": time.perf_counter() - start, "setup_seconds": session.setup_seconds}
    summary = summarise(args, counters, result) | seconds
    if devices.is_leader():
        runs.write_summary(session.folder, summary)
    return summary


def save_adapter(session: Session) -> None:
    try:
        if session.args.sft_every:
            session.adapter.save(session.folder / "adapter")
    except OSError as error:
        print(f"warning: can't write {session.folder / 'adapter'} ({error.strerror})", file=sys.stderr)


def status_line(record: dict[str, Any], counters: Counters) -> str:
    mean_return, score = record.get("charts/episodic_return"), record.get("crafter/score")
    learned = "" if mean_return is None else f"return {mean_return:.2f}  score {score:.1f}%  "
    return f"{learned}{record['charts/SPS']:,.0f} steps/s  {counters['llm_calls']} calls"


def summarise(args: Args, counters: Counters, result: dict[str, Any]) -> dict[str, Any]:
    unlocked = np.array(counters["achievements"] or [0.0])
    return {
        "global_step": counters["global_step"],
        **result,
        "score_all_episodes": crafter_score(unlocked / counters["episodes"]) if counters["episodes"] else None,
        "SPS": counters.steps_per_second,
        "wall_seconds": counters["wall_seconds"], "compile_seconds": counters["compile_seconds"],
        **{name: counters[name] for name in LLM_TOTALS},
        "seed": args.seed, "env_id": args.env_id, "guidance": args.guidance, "guidance_lookup": args.guidance_lookup,
        "guidance_bonus": args.bonus, "llm": args.llm if args.guidance == "full" else "none",
        "llm_model": args.llm_model, "llm_async": args.llm_async, "embed": args.embed,
        "adapter": args.adapter if args.guidance == "full" else "none", "candidates": args.candidates,
        "sft_every": args.sft_every, "sft_data": args.sft_data, "comprehension": args.comprehension,
    }  # fmt: skip


def flags(args: Args) -> dict[str, Any]:
    """As in config.json."""
    plain = {Path: str, tuple: list}
    values = dataclasses.asdict(args)
    return {name: next((f(v) for kind, f in plain.items() if isinstance(v, kind)), v) for name, v in values.items()}


def resumed_args(args: Args, argv: list[str]) -> Args:
    """The run's own flags; of those given now only --total-timesteps may differ. Raises ValueError otherwise."""
    saved = runs.read_config(args.resume)["flags"]
    names = {field.name for field in dataclasses.fields(Args)}
    if set(saved) != names:
        odd = ", ".join(sorted(set(saved) ^ names))
        raise ValueError(
            f"--resume: {args.resume} was made by another version of this script (flags that differ: {odd})"
        )
    paths = ("run_dir", "resume", "llm_cache", "llm_replay")
    paths = {name: saved[name] and Path(saved[name]) for name in paths}
    base = Args(**saved | paths | {"lora_targets": tuple(saved["lora_targets"])})
    given = tyro.cli(Args, args=argv, default=base)
    changed = [
        name for name in names - {"resume", "total_timesteps", "run_dir"} if getattr(given, name) != getattr(base, name)
    ]
    if changed:
        flag = "--" + changed[0].replace("_", "-")
        raise ValueError(
            f"{flag}: a resumed run keeps its flags, only --total-timesteps may change; start anew without --resume"
        )
    return dataclasses.replace(given, resume=None, run_dir=base.run_dir)


def configure_jax(args: Args) -> None:
    jax.config.update("jax_debug_nans", args.debug_nans)
    jax.config.update("jax_disable_jit", not args.jit)
    jax.config.update("jax_compilation_cache_dir", str(runs.cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def start(args: Args, argv: list[str]) -> tuple[Path, Session | None]:
    """The run's folder and all that training needs; no session after --dry-run. Raises ValueError, one line."""
    resume = args.resume
    args = resumed_args(args, argv) if resume else args
    check_args(args)
    configure_jax(args)
    if args.distributed:
        devices.initialize()
    folder = resume or args.run_dir or runs.default_folder(args.env_id, args.exp_name, args.seed)
    if args.dry_run:
        dry_run(args)
        return folder, None
    return folder, prepare(args, folder, resume is not None, argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for input that can't work; 130 after Ctrl-C."""
    with devices.all_or_none():
        return run(sys.argv[1:] if argv is None else argv)


def run(argv: list[str]) -> int:
    args = tyro.cli(Args, args=argv)
    status = TextColumn("{task.percentage:>3.0f}%  {task.fields[status]}")
    columns = TextColumn("{task.description}"), BarColumn(), status, TimeElapsedColumn(), TimeRemainingColumn()
    try:
        try:
            folder, session = start(args, argv)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return devices.leave(2)
        if session is None:
            return 0
        with Progress(*columns, console=Console(quiet=not devices.is_leader())) as progress:
            summary = train(session, progress)
    except KeyboardInterrupt:
        print("stopped at once; what was saved before can be resumed", file=sys.stderr)
        return devices.leave(130)
    if not devices.is_leader():
        return 130 if summary is None else 0
    if summary is None:
        print(f"stopped; continue with: python rladapter_ppo.py --resume {folder}")
        return 130
    shown = {name: value for name, value in summary.items() if name != "achievements"}
    print(json.dumps({name: round(v, 2) if isinstance(v, float) else v for name, v in shown.items()}, indent=2))
    print(f"results: {folder}/summary.json   curves: tensorboard --logdir {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
