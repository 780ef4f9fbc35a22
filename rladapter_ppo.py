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

import llm_client
import rladapter_adapter
import runs
from envs import make_env
from envs.scores import crafter_score
from envs.vocabulary import ALWAYS_CARED, BASIC_SUB_GOALS, FACTS, NUM_BASIC, SUB_GOALS, sub_goals_text

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

    env_id: str = "Craftax-Classic-Symbolic-v1"
    """the environment: Craftax-Classic-Symbolic-v1 or Toy-v0"""
    total_timesteps: BigInt = 1_000_000
    """env steps of training, met to within one update"""
    learning_rate: float = 4.5e-4
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
    """a row may serve a state that differs from it in up to this many of the facts it cares about"""
    guidance_bonus: float | None = None
    """reward for each step of work towards an advised sub-goal; default 0.1 with guidance, 0 without. Without guidance
    a bonus counts for every basic sub-goal (the control)"""
    guidance_rows: int = 640
    """size of the guidance table"""
    updates_per_phase: int = 8
    """PPO updates between two pauses"""
    queries_per_phase: int = 28
    """LLM calls per pause, at most"""
    candidates: int = 2
    """answers per row of the table that are tried against each other"""
    comprehension: Literal["cosine", "cosine-actions", "binary", "success", "none"] = "cosine"
    """how well guidance was understood: cosine of sub-goals reached and advised; cosine-actions: of action names, as
    in the paper; binary: was any reached; success: share of visits that reached one"""
    adapter: str = "default"
    """default: a tiny LM, trained at first start and cached; none: no adapter; else a model folder in HF format"""
    sft_every: int = 4
    """phases between two fine-tunings of the adapter on its better candidates; 0 never"""
    llm: Literal["rules", "http", "random"] = "rules"
    """the guide. rules: an offline stand-in that is no LLM; http: any OpenAI-compatible server; random: a control"""
    llm_model: str = ""
    """model name for --llm http"""
    llm_base_url: str = "http://127.0.0.1:8000/v1"
    """address for --llm http; the key comes from OPENAI_API_KEY"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        return -(-self.total_timesteps // self.batch_size)

    @property
    def num_phases(self) -> int:
        return 1 + -(-(self.num_updates - 1) // self.updates_per_phase)

    def updates_in_phase(self, phase: int) -> int:
        """The first phase is one update: before it there is little to ask about."""
        first = 1 + (phase - 1) * self.updates_per_phase
        return 1 if phase == 0 else min(self.updates_per_phase, self.num_updates - first)

    @property
    def bonus(self) -> float:
        default = 0.1 if self.guidance == "full" else 0.0
        return default if self.guidance_bonus is None else self.guidance_bonus


def check_args(args: Args) -> None:
    """Raise ValueError with one line that names the flag for what can't work."""
    for name, low, high in (
        ("total_timesteps", 1, 10**15), ("num_envs", 1, 2**20), ("num_steps", 2, 2**20), ("num_minibatches", 1, 2**20),
        ("update_epochs", 1, 1000), ("hidden_size", 1, 2**16), ("guidance_rows", 1, 2**20), ("candidates", 1, 64),
        ("updates_per_phase", 1, 10**6), ("queries_per_phase", 0, 10**6), ("eval_episodes", 1, 10**7),
        ("save_every", 1, 10**9), ("sft_every", 0, 10**9), ("guidance_tolerance", 0, len(FACTS)), ("seed", 0, 2**32 - 1),
        ("gamma", 0, 1), ("gae_lambda", 0, 1), ("learning_rate", 0, 10), ("clip_coef", 0, 10), ("ent_coef", 0, 10),
        ("vf_coef", 0, 100), ("max_grad_norm", 0, 10**6), ("bonus", 0, 100),
    ):  # fmt: skip
        value = getattr(args, name)
        flag = "--guidance-bonus" if name == "bonus" else "--" + name.replace("_", "-")
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{flag}: {value} is out of range; choose {low} to {high}")
    if args.batch_size % args.num_minibatches:
        raise ValueError(
            f"--num-minibatches: {args.num_envs} envs x {args.num_steps} steps = {args.batch_size} samples can't be "
            f"divided into {args.num_minibatches} minibatches; change --num-envs, --num-steps or --num-minibatches"
        )
    if args.batch_size * 200 > 64 * 2**30:
        raise ValueError(f"--num-envs, --num-steps: a batch of {args.batch_size} samples is too large; choose smaller ones")
    if args.guidance_rows < args.queries_per_phase:
        raise ValueError(f"--guidance-rows: {args.guidance_rows} rows can't hold {args.queries_per_phase} queries per phase")


# --------------------------------------------------------------------------------------------------------------------
# Pytrees. N envs, T steps, K rows, C candidates, P facts, G basic sub-goals, D context, O bytes of observation,
# S = K C + 1 slots: a slot is one candidate of one row; the last slot is "no guidance".
# --------------------------------------------------------------------------------------------------------------------


def pytree(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@pytree
class GuidanceTable:
    """What the guide said, fixed between two pauses. A row serves every state that shares the facts it cares about."""

    keys: jax.Array  # (K, P) bool, the facts of the situation that was asked about
    care: jax.Array  # (K, P) bool, the facts that the answer rests on
    num_valid: jax.Array  # (K,) int32, candidates of the row; 0: an empty row
    context: jax.Array  # (S, D) f32, embedding of the sub-goals; zero in the last slot
    goals: jax.Array  # (S, G) bool, what the bonus counts for


@pytree
class Transition:
    """One step of all envs. The context is stored as its slot: the table does not change before the update."""

    obs: jax.Array  # (N, O) uint8
    slot: jax.Array  # (N,) int32
    action: jax.Array  # (N,) int32
    log_prob: jax.Array  # (N,) f32
    value: jax.Array  # (N,) f32
    reward: jax.Array  # (N,) f32, with bonus
    env_reward: jax.Array  # (N,) f32, without
    done: jax.Array  # (N,) bool, the episode ended with this step
    entered: jax.Array  # (N,) bool, another slot than at the step before
    success: jax.Array  # (N,) bool, first time in this visit that an advised sub-goal was reached
    reached: jax.Array  # (N, G) bool


@pytree
class Runner:
    """All that training carries from update to update."""

    params: Pytree
    opt_state: Pytree
    env_state: Pytree
    key: jax.Array
    update: jax.Array  # () int32
    slot: jax.Array  # (N,) int32, of the last step
    fresh: jax.Array  # (N,) bool, the next step begins an episode
    succeeded: jax.Array  # (N,) bool, an advised sub-goal was reached in this visit of the slot
    episodic_return: jax.Array  # (N,) f32, so far, without bonus
    episodic_length: jax.Array  # (N,) int32


# --------------------------------------------------------------------------------------------------------------------
# Network
# --------------------------------------------------------------------------------------------------------------------


class ActorCritic(nnx.Module):
    """Features and context are summed in the first layer (as in the paper), then actor and critic have one of their own."""

    def __init__(self, num_features: int, context_dim: int, num_actions: int, width: int, rngs: nnx.Rngs):
        hidden_init = nnx.initializers.orthogonal(math.sqrt(2.0))
        self.features = nnx.Linear(num_features, width, kernel_init=hidden_init, rngs=rngs)
        self.context = nnx.Linear(context_dim, width, use_bias=False, kernel_init=hidden_init, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.actor_hidden = nnx.Linear(width, width, kernel_init=hidden_init, rngs=rngs)
        self.actor_norm = nnx.LayerNorm(width, rngs=rngs)
        self.actor = nnx.Linear(width, num_actions, kernel_init=nnx.initializers.orthogonal(0.01), rngs=rngs)
        self.critic_hidden = nnx.Linear(width, width, kernel_init=hidden_init, rngs=rngs)
        self.critic_norm = nnx.LayerNorm(width, rngs=rngs)
        self.critic = nnx.Linear(width, 1, kernel_init=nnx.initializers.orthogonal(1.0), rngs=rngs)

    def __call__(self, features: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, F), (B, D) -> logits (B, A), value (B,)"""
        x = nnx.relu(self.norm(self.features(features) + self.context(context)))
        logits = self.actor(nnx.relu(self.actor_norm(self.actor_hidden(x))))
        value = self.critic(nnx.relu(self.critic_norm(self.critic_hidden(x))))
        return logits, value[:, 0]


@dataclass(frozen=True)
class Agent:
    """The static half of the policy: hashable, so that it can be a static argument of jit."""

    env: Any
    graphdef: Any
    guidance: str

    def __call__(self, params: Pytree, table: GuidanceTable, obs: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, O) uint8, (B,) int32 -> logits (B, A), value (B,)"""
        context = self.env.facts(obs).astype(jnp.float32) if self.guidance == "facts" else table.context[slot]
        return nnx.merge(self.graphdef, params)(self.env.features(obs), context)


def make_agent(args: Args, env: Any, key: jax.Array) -> tuple[Agent, Pytree]:
    """The network, split into its static and its trained half."""
    num_features = jax.eval_shape(lambda k: env.features(env.observe(env.reset(k, 1))), key).shape[-1]
    context_dim = len(FACTS) if args.guidance == "facts" else context_size(args)
    network = ActorCritic(num_features, context_dim, env.num_actions, args.hidden_size, nnx.Rngs(key))
    graphdef, params = nnx.split(network)
    return Agent(env, graphdef, args.guidance), params


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam without its learning rate, which `learning_rate` gives: a resumed run may span another total."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5))


def learning_rate(args: Args, update: jax.Array) -> jax.Array:
    fraction = jnp.maximum(0.0, 1.0 - update / args.num_updates) if args.anneal_lr else 1.0
    return args.learning_rate * fraction


def init_runner(args: Args, agent: Agent, params: Pytree, key: jax.Array) -> Runner:
    key_env, key = jax.random.split(key)
    zeros = functools.partial(jnp.zeros, args.num_envs)
    return Runner(
        params=params,
        opt_state=make_optimizer(args).init(params),
        env_state=agent.env.reset(key_env, args.num_envs),
        key=key,
        update=jnp.zeros((), jnp.int32),
        slot=zeros(jnp.int32),
        fresh=jnp.ones(args.num_envs, bool),
        succeeded=zeros(bool),
        episodic_return=zeros(jnp.float32),
        episodic_length=zeros(jnp.int32),
    )


# --------------------------------------------------------------------------------------------------------------------
# Host half: what happens at a pause
# --------------------------------------------------------------------------------------------------------------------

CONTEXT_SIZE = 384
MIN_VISITS = 30  # of each of two candidates before they are compared
MARGIN = 1.0  # standard errors by which the better one must lead
SAMPLES_PER_UPDATE = 256  # situations kept of each rollout, for the next pause to choose from
OLD = 0.9  # what a visit of the phase before still counts: the policy it came from is gone


def context_size(args: Args) -> int:
    return CONTEXT_SIZE if args.guidance == "full" else 1


class Records:
    """The host's copy of the guidance table, with all that was said and all that came of it."""

    def __init__(self, args: Args, num_actions: int, obs_shape: tuple[int, ...]):
        rows, candidates = args.guidance_rows if args.guidance == "full" else 1, args.candidates
        self.arrays = {
            "obs": np.zeros((rows, *obs_shape), np.uint8),
            "keys": np.zeros((rows, len(FACTS)), bool),
            "care": np.zeros((rows, len(FACTS)), bool),
            "num_valid": np.zeros(rows, np.int32),
            "context": np.zeros((rows, candidates, context_size(args)), np.float32),
            "goals": np.zeros((rows, candidates, len(SUB_GOALS)), bool),
            "visits": np.zeros((rows, candidates), np.float64),
            "steps": np.zeros((rows, candidates), np.float64),
            "returns": np.zeros((rows, candidates), np.float64),  # sum over visits
            "squares": np.zeros((rows, candidates), np.float64),
            "successes": np.zeros((rows, candidates), np.float64),
            "reached": np.zeros((rows, candidates, NUM_BASIC), np.float64),
            "actions": np.zeros((rows, candidates, num_actions), np.float64),
        }
        self.prompts = [[""] * candidates for _ in range(rows)]  # adapter's prompt and answer: what it is tuned on
        self.analyses = [[""] * candidates for _ in range(rows)]
        self.null_goals = np.full((1, NUM_BASIC), args.guidance != "full")  # without guidance a bonus is for anything

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["arrays"][name]
        except KeyError:
            raise AttributeError(name) from None

    def table(self) -> GuidanceTable:
        return self._table(self.context, self.goals, self.num_valid)

    def best_table(self) -> GuidanceTable:
        """Only the best candidate of each row: what evaluation uses."""
        rows, best = np.arange(len(self.keys)), self.best_candidate()
        return self._table(self.context[rows, best][:, None], self.goals[rows, best][:, None], np.minimum(self.num_valid, 1))

    def _table(self, context: np.ndarray, goals: np.ndarray, num_valid: np.ndarray) -> GuidanceTable:
        flat = np.concatenate([context.reshape(-1, context.shape[-1]), np.zeros((1, context.shape[-1]), np.float32)])
        goals = np.concatenate([goals[..., :NUM_BASIC].reshape(-1, NUM_BASIC), self.null_goals])
        return GuidanceTable(*map(jnp.asarray, (self.keys, self.care, num_valid, flat, goals)))

    def fits(self, facts: np.ndarray) -> np.ndarray:
        """(M, P) -> (M,) is there a row that agrees in all the facts it cares about?"""
        return wrong_facts(self.keys, self.care, self.num_valid, facts).min(1) == 0

    def lead(self) -> np.ndarray:
        """(K, C) standard errors by which a candidate's mean return leads the row's first; 0 where not comparable."""
        visits = np.maximum(self.visits, 1)
        mean = self.returns / visits
        variance = np.maximum(self.squares / visits - mean**2, 1e-6) / visits
        lead = (mean - mean[:, :1]) / np.sqrt(variance + variance[:, :1])
        comparable = (self.visits >= MIN_VISITS) & (self.visits[:, :1] >= MIN_VISITS)
        return np.where(comparable, lead, 0.0)

    def best_candidate(self) -> np.ndarray:
        """(K,) the first candidate, unless another one has beaten it."""
        lead = self.lead()
        return np.where(lead.max(1) > MARGIN, lead.argmax(1), 0)

    def decided(self) -> list[tuple[int, int, int]]:
        """(row, winner, loser) wherever two candidates of a row differ by more than the margin."""
        lead = self.lead()
        return [
            (int(row), *((int(c), 0) if lead[row, c] > 0 else (0, int(c))))
            for row, c in zip(*np.nonzero(np.abs(lead) > MARGIN), strict=True)
        ]

    def add_outcomes(self, outcomes: dict[str, np.ndarray]) -> None:
        """Fold in one phase's sums per slot; older ones fade."""
        for name, per_slot in outcomes.items():
            total = self.arrays[name]
            total *= OLD
            total += np.asarray(per_slot, np.float64)[:-1].reshape(total.shape)


def wrong_facts(keys: np.ndarray, care: np.ndarray, num_valid: np.ndarray, facts: np.ndarray) -> np.ndarray:
    """(M, K) facts that a row cares about and that differ; more than all facts for an empty row."""
    sign = np.where(care, 1 - 2 * keys.astype(np.float32), 0)  # (K, P) +1 cares and false, -1 cares and true
    return facts.astype(np.float32) @ sign.T + (care & keys).sum(1) + (num_valid == 0) * 1000.0


@dataclass
class Query:
    """One question of a pause: a new row, or another candidate for an old one."""

    row: int
    candidate: int
    obs: np.ndarray  # (O,) uint8
    facts: np.ndarray  # (P,) bool
    sub_goals: list[int]  # earlier advice in this situation or the one most like it
    comprehension: float | None  # and how well it was understood


def select_queries(args: Args, records: Records, obs: np.ndarray, facts: np.ndarray) -> list[Query]:
    """What to ask about: situations that no row fits, the most frequent first; then rows that deserve another answer.

    Situations are grouped by the facts that rows in the table usually care about: two that differ in nothing else will
    most likely be served by one answer.

    Args:
        obs, facts: (M, O) uint8, (M, P) bool, a sample of all steps of the last phase
    """
    scores = comprehension_scores(args, records)
    unfit = np.flatnonzero(~records.fits(facts))
    asked = records.num_valid > 0
    usual = records.care[asked].mean(0) > 0.1 if asked.any() else np.ones(len(FACTS), bool)
    _, first, counts = np.unique(facts[unfit][:, usual], axis=0, return_index=True, return_counts=True)
    new = unfit[first[np.argsort(-counts, kind="stable")]]
    num_again = args.queries_per_phase // 4 if args.candidates > 1 and asked.any() else 0
    new = new[: args.queries_per_phase - num_again]
    rows = free_rows(records, len(new))
    queries = [Query(row, 0, obs[i], facts[i], *nearest_advice(records, scores, facts[i])) for row, i in zip(rows, new, strict=True)]
    for row, candidate in rows_to_ask_again(args, records, set(rows))[: args.queries_per_phase - len(new)]:
        best = records.best_candidate()[row]
        advice = list(np.flatnonzero(records.goals[row, best]))
        score = scores[row, best]
        queries.append(Query(row, candidate, records.obs[row], records.keys[row], advice, None if np.isnan(score) else float(score)))
    return queries


def free_rows(records: Records, n: int) -> list[int]:
    """Empty rows, then the ones that were used least."""
    order = np.lexsort((records.visits.sum(1), records.num_valid > 0))
    return [int(row) for row in order[:n]]


def nearest_advice(records: Records, scores: np.ndarray, facts: np.ndarray) -> tuple[list[int], float | None]:
    """Sub-goals and comprehension score of the row that fits best; none where the table is empty."""
    if not (records.num_valid > 0).any():
        return [], None
    row = int(wrong_facts(records.keys, records.care, records.num_valid, facts[None])[0].argmin())
    best = int(records.best_candidate()[row])
    score = scores[row, best]
    return list(np.flatnonzero(records.goals[row, best])), None if np.isnan(score) else float(score)


def rows_to_ask_again(args: Args, records: Records, taken: set[int]) -> list[tuple[int, int]]:
    """(row, candidate) of frequent rows: first those that lack a candidate, then the beaten candidates of the others."""
    if args.candidates == 1:
        return []
    visits = records.visits.sum(1)
    lacking = [
        (int(row), int(records.num_valid[row]))
        for row in np.argsort(-visits, kind="stable")
        if 0 < records.num_valid[row] < args.candidates and visits[row] >= MIN_VISITS and row not in taken
    ]
    full = records.num_valid == args.candidates
    beaten = [(row, loser) for row, _, loser in sorted(records.decided(), key=lambda d: -visits[d[0]]) if full[row] and loser > 0 and row not in taken]
    return lacking + beaten


def comprehension_scores(args: Args, records: Records) -> np.ndarray:
    """(K, C) how well the agent understood each candidate, 0 to 1; NaN where it was never tried."""
    tried = records.steps > 0
    advised = records.goals[..., :NUM_BASIC].astype(np.float64)
    if args.comprehension == "none":
        return np.full(tried.shape, np.nan)
    if args.comprehension == "binary":
        score = ((records.reached * advised).sum(-1) > 0).astype(np.float64)
    elif args.comprehension == "success":
        score = records.successes / np.maximum(records.visits, 1e-9)
    else:
        embedding = llm_client.HashEmbedding(CONTEXT_SIZE)
        done, names = records.reached, BASIC_SUB_GOALS
        if args.comprehension == "cosine-actions":
            done, names = records.actions, action_names(records.actions.shape[-1])
        did = done @ embedding.encode(list(names))  # (K, C, D)
        said = records.goals @ embedding.encode(list(SUB_GOALS))
        norm = np.linalg.norm(did, axis=-1) * np.linalg.norm(said, axis=-1)
        cosine = (did * said).sum(-1) / np.maximum(norm, 1e-9)
        score = reference_score(cosine)
        if args.comprehension == "cosine":  # nothing was reached in the other visits: their cosine is 0
            share = np.clip(records.successes / np.maximum(records.visits, 1e-9), 0, 1)
            score = share * score + (1 - share) * reference_score(0.0)
    return np.where(tried, np.clip(score, 0, 1), np.nan)


def reference_score(cosine: Any) -> Any:
    """The reference's comprehension score of a cosine."""
    return 1 / (1 + np.exp(-10 * (cosine - 0.1)))


def action_names(num_actions: int) -> list[str]:
    from craftax.craftax_classic.constants import Action

    return [action.name.lower().replace("_", " ") for action in Action][:num_actions]


def refine_guidance(
    args: Args, env: Any, phase: int, records: Records, queries: list[Query], adapter: Any, llm: Any, embedding: Any, key: jax.Array
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Ask adapter and LLM about all queries in one batch, and write what they say into the records.

    A reply that can't be used leaves its row as it was.

    Returns:
        one log record per query; sums for the metrics
    """
    start = time.perf_counter()
    captions = [env.to_text(query.obs) for query in queries]
    prompts = [rladapter_adapter.adapter_prompt(c, q.sub_goals, q.comprehension) for c, q in zip(captions, queries, strict=True)]
    analyses = adapter.analyse(prompts, key) if queries else []
    messages = [llm_client.build_messages(c, q.sub_goals, a) for c, q, a in zip(captions, queries, analyses, strict=True)]
    replies = llm.complete(messages, [query.candidate for query in queries]) if queries else []
    log = []
    for query, caption, prompt, analysis, message, reply in zip(queries, captions, prompts, analyses, messages, replies, strict=True):
        guidance, error = None, reply.error
        if not error:
            try:
                guidance = llm_client.parse_reply(reply.text)
            except ValueError as problem:
                error = str(problem)
        if guidance is not None:
            store_guidance(records, query, guidance, prompt, analysis, embedding)
        log.append({
            "phase": phase, "row": query.row, "candidate": query.candidate, "key": true_facts(query.facts),
            "care": [FACTS[i] for i in np.flatnonzero(records.care[query.row])] if guidance else [],
            "caption": caption, "adapter_prompt": prompt, "analysis": analysis, "messages": message, "model": llm.name,
            "reply": reply.text, "sub_goals": [SUB_GOALS[i] for i in guidance.sub_goals] if guidance else [],
            "because": [("" if truth else "not ") + FACTS[i] for i, truth in guidance.because] if guidance else [],
            "error": error, "cached": reply.cached, "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens, "seconds": reply.seconds,
        })  # fmt: skip
    failures = sum(bool(record["error"]) for record in log)
    metrics = {
        "llm/calls": sum(r.calls for r in replies), "llm/cache_hits": sum(r.cached for r in replies),
        "llm/prompt_tokens": sum(r.prompt_tokens for r in replies), "llm/failures": failures,
        "llm/completion_tokens": sum(r.completion_tokens for r in replies), "llm/seconds": sum(r.seconds for r in replies),
        "guidance/valid_replies": len(log) - failures, "time/guidance": time.perf_counter() - start,
    }  # fmt: skip
    return log, metrics


def true_facts(facts: np.ndarray) -> list[str]:
    return [FACTS[i] for i in np.flatnonzero(facts)]


def store_guidance(records: Records, query: Query, guidance: Any, prompt: str, analysis: str, embedding: Any) -> None:
    """Write one usable answer into its row and candidate."""
    row, candidate = query.row, query.candidate
    care = np.zeros(len(FACTS), bool)
    # A reason that is not so in this situation was misread and counts for nothing; with no reason left, all facts do.
    care[[index for index, truth in guidance.because if query.facts[index] == truth] or slice(None)] = True
    care[list(ALWAYS_CARED)] = True
    if candidate == 0:
        for name in records.arrays:
            records.arrays[name][row] = 0
        records.obs[row], records.keys[row], records.care[row] = query.obs, query.facts, care
    else:
        records.care[row] |= care
    records.num_valid[row] = max(records.num_valid[row], candidate + 1)
    records.context[row, candidate] = llm_client.embed_sub_goals(embedding, guidance.sub_goals) * math.sqrt(CONTEXT_SIZE)
    records.goals[row, candidate] = np.isin(np.arange(len(SUB_GOALS)), guidance.sub_goals)
    for name in ("visits", "steps", "returns", "squares", "successes", "reached", "actions"):
        records.arrays[name][row, candidate] = 0
    records.prompts[row][candidate], records.analyses[row][candidate] = prompt, analysis


def finetune(records: Records, adapter: Any, key: jax.Array) -> dict[str, float]:
    """Tune the adapter on the analyses that won against another candidate of their row."""
    start = time.perf_counter()
    winners = {(row, winner) for row, winner, _ in records.decided()}
    examples = [(records.prompts[row][c], records.analyses[row][c]) for row, c in sorted(winners) if records.analyses[row][c]]
    tuned = adapter.finetune(examples, key) if examples else {}
    return {"time/sft": time.perf_counter() - start} | {f"adapter/{name}": value for name, value in tuned.items()}


# --------------------------------------------------------------------------------------------------------------------
# Device half: everything from here to `evaluate` is pure and runs inside jit
# --------------------------------------------------------------------------------------------------------------------


@pytree
class TableIndex:
    """The table's keys in the form that makes a lookup one matmul, made once per phase."""

    weights: jax.Array  # (P, K) f32
    offset: jax.Array  # (K,) f32


def make_index(table: GuidanceTable) -> TableIndex:
    """score = 64 * (wrong facts) - (facts cared about): the lowest fits best, and of rows that fit the most specific."""
    sign = jnp.where(table.care, 1.0 - 2.0 * table.keys, 0.0)
    empty = table.num_valid == 0
    offset = 64.0 * (table.care & table.keys).sum(1) - table.care.sum(1) + 1e6 * empty
    return TableIndex(64.0 * sign.T, offset)


def nearest_slot(args: Args, table: GuidanceTable, index: TableIndex, facts: jax.Array, draw: jax.Array) -> jax.Array:
    """The slot whose row fits the facts, within the tolerance; the last slot where none does.

    Args:
        facts: (N, P) bool
        draw: (N,) int32 >= 0, which of the row's candidates an env takes
    Returns:
        (N,) int32
    """
    num_slots = table.context.shape[0]
    num_candidates = (num_slots - 1) // table.num_valid.shape[0]
    score = facts.astype(jnp.float32) @ index.weights + index.offset  # (N, K)
    row = jnp.argmin(score, axis=1)
    slot = row * num_candidates + draw % jnp.maximum(table.num_valid[row], 1)
    return jnp.where(score.min(axis=1) <= 64.0 * args.guidance_tolerance, slot, num_slots - 1).astype(jnp.int32)


def find_slot(args: Args, agent: Agent, table: GuidanceTable, index: TableIndex, obs: jax.Array, draw: jax.Array) -> jax.Array:
    """(N,) the slot of every env; plain PPO and the control look nothing up."""
    if args.guidance != "full":
        return jnp.full(obs.shape[0], table.context.shape[0] - 1, jnp.int32)
    return nearest_slot(args, table, index, agent.env.facts(obs), draw)


def sample_action(key: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(N, A) -> action (N,), its log-probability (N,)"""
    action = jax.random.categorical(key, logits)
    return action, action_log_prob(logits, action)


def action_log_prob(logits: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]


def rollout(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, index: TableIndex, draw: jax.Array
) -> tuple[Runner, Transition, dict[str, jax.Array]]:
    """T steps of all envs.

    Returns:
        the runner; transitions with a leading axis T; sums over the episodes that ended
    """
    key, key_refill, key_steps = jax.random.split(runner.key, 3)

    def step(carry: Runner, key_step: jax.Array) -> tuple[Runner, tuple[Transition, dict[str, jax.Array]]]:
        key_action, key_env = jax.random.split(key_step)
        obs = agent.env.observe(carry.env_state)
        slot = find_slot(args, agent, table, index, obs, draw) if args.guidance_lookup == "step" else carry.slot
        logits, value = agent(carry.params, table, obs, slot)
        action, log_prob = sample_action(key_action, logits)
        env_state, env_reward, done, info = agent.env.step(key_env, carry.env_state, action)
        entered = carry.fresh | (slot != carry.slot)
        advised = table.goals[slot]
        hit = (info["reached"] & advised).any(1)
        succeeded = carry.succeeded & ~entered
        transition = Transition(
            obs=obs, slot=slot, action=action, log_prob=log_prob, value=value, env_reward=env_reward, done=done,
            reward=env_reward + args.bonus * (info["worked"] & advised).sum(1), entered=entered,
            success=hit & ~succeeded, reached=info["reached"],
        )  # fmt: skip
        episodic_return, episodic_length = carry.episodic_return + env_reward, carry.episodic_length + 1
        ended = {
            "episodes": done.sum(),
            "episodic_return": (episodic_return * done).sum(),
            "episodic_length": (episodic_length * done).sum(),
            "achievements": (info["achievements"] & done[:, None]).sum(0),
        }
        carry = dataclasses.replace(
            carry, env_state=env_state, slot=slot, fresh=done, succeeded=succeeded | hit,
            episodic_return=jnp.where(done, 0.0, episodic_return), episodic_length=jnp.where(done, 0, episodic_length),
        )  # fmt: skip
        return carry, (transition, ended)

    runner, (transitions, ended) = jax.lax.scan(step, runner, jax.random.split(key_steps, args.num_steps))
    env_state = agent.env.refill(key_refill, runner.env_state)
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

    def step(carry: tuple[jax.Array, jax.Array], x: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        advantage, next_value = carry
        reward_t, value_t, done_t = x
        delta = reward_t + gamma * next_value * (1.0 - done_t) - value_t
        advantage = delta + gamma * lam * (1.0 - done_t) * advantage
        return (advantage, value_t), advantage

    start = (jnp.zeros_like(last_value), last_value)
    _, advantages = jax.lax.scan(step, start, (reward, value, done.astype(jnp.float32)), reverse=True)
    return advantages, advantages + value


def ppo_loss(
    args: Args, agent: Agent, params: Pytree, table: GuidanceTable, batch: Transition, advantages: jax.Array, returns: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate, value and entropy loss of one minibatch (B,), and what CleanRL logs about it."""
    logits, value = agent(params, table, batch.obs, batch.slot)
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
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (transitions, advantages, returns))
    optimizer, rate = make_optimizer(args), learning_rate(args, runner.update)

    def minibatch(carry: tuple[Pytree, Pytree], indices: jax.Array) -> tuple[tuple[Pytree, Pytree], dict[str, jax.Array]]:
        params, opt_state = carry
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


def slot_outcomes(args: Args, agent: Agent, transitions: Transition, num_slots: int) -> dict[str, jax.Array]:
    """What came of each slot in one rollout, as sums: visits, steps, returns at entry, sub-goals reached, actions.

    The return is the discounted reward of the environment until the end of the rollout, with neither bonus nor value
    function: both would favour a candidate that merely promises more bonus.
    """
    zeros = jnp.zeros_like(transitions.value)
    _, returns = compute_gae(transitions.env_reward, zeros, transitions.done, zeros[0], args.gamma, 1.0)
    entered = transitions.entered.astype(jnp.float32)
    per_step = {
        "visits": entered, "steps": jnp.ones_like(entered), "returns": entered * returns,
        "squares": entered * returns**2, "successes": transitions.success.astype(jnp.float32),
    }  # fmt: skip
    actions = jax.nn.one_hot(transitions.action, agent.env.num_actions)
    columns = jnp.concatenate([jnp.stack(list(per_step.values()), -1), transitions.reached, actions], -1)  # (T, N, .)
    sums = jax.ops.segment_sum(columns.reshape(-1, columns.shape[-1]), transitions.slot.reshape(-1), num_slots)
    outcomes = {name: sums[:, i] for i, name in enumerate(per_step)}
    outcomes["reached"] = sums[:, len(per_step) : len(per_step) + NUM_BASIC]
    return outcomes | {"actions": sums[:, len(per_step) + NUM_BASIC :]}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))
def train_phase(
    args: Args, agent: Agent, runner: Runner, table: GuidanceTable, num_updates: jax.Array
) -> tuple[Runner, dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """num_updates (traced, at most updates_per_phase) PPO updates with a fixed guidance table. The runner is donated.

    Returns:
        runner; metrics, sums over the phase; outcomes, sums per slot; a sample of the situations met (U * 256, O)
    """
    key, key_draw = jax.random.split(runner.key)
    draw = jax.random.randint(key_draw, (args.num_envs,), 0, 2**30)
    index = make_index(table)
    obs = agent.env.observe(runner.env_state)
    # With --guidance-lookup pause this is the phase's one lookup; otherwise the first step overwrites it.
    drawn = find_slot(args, agent, table, index, obs, draw)
    slot = drawn if args.guidance_lookup == "pause" else runner.slot
    runner = dataclasses.replace(runner, key=key, slot=slot)
    num_slots = table.context.shape[0]

    def one_update(i: jax.Array, carry: tuple) -> tuple:
        runner, metrics, outcomes, samples = carry
        runner, transitions, sums = rollout(args, agent, runner, table, index, draw)
        last_obs = agent.env.observe(runner.env_state)
        last_slot = find_slot(args, agent, table, index, last_obs, draw) if args.guidance_lookup == "step" else runner.slot
        _, last_value = agent(runner.params, table, last_obs, last_slot)
        key, key_sample = jax.random.split(runner.key)
        runner, losses = update_agent(args, agent, dataclasses.replace(runner, key=key), table, transitions, last_value)
        chosen = jax.random.randint(key_sample, (SAMPLES_PER_UPDATE,), 0, args.batch_size)
        sample = transitions.obs.reshape(args.batch_size, -1)[chosen]
        sums |= losses | {"bonus": (transitions.reward - transitions.env_reward).sum()}
        sums["covered_steps"] = (transitions.slot < num_slots - 1).sum().astype(jnp.float32)
        new = (sums, slot_outcomes(args, agent, transitions, num_slots))
        metrics, outcomes = jax.tree.map(jnp.add, (metrics, outcomes), new)
        return runner, metrics, outcomes, jax.lax.dynamic_update_index_in_dim(samples, sample, i, 0)

    zero = jnp.zeros(())
    metrics = {name: zero for name in METRICS} | {"achievements": jnp.zeros(len(agent.env.achievements))}
    outcomes = {name: jnp.zeros(num_slots) for name in ("visits", "steps", "returns", "squares", "successes")}
    outcomes["reached"] = jnp.zeros((num_slots, NUM_BASIC))
    outcomes["actions"] = jnp.zeros((num_slots, agent.env.num_actions))
    samples = jnp.zeros((args.updates_per_phase, SAMPLES_PER_UPDATE, obs.shape[-1]), jnp.uint8)
    carry = (runner, metrics, outcomes, samples)
    runner, metrics, outcomes, samples = jax.lax.fori_loop(0, num_updates, one_update, carry)
    return runner, metrics, outcomes, samples.reshape(-1, obs.shape[-1])


LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
METRICS = (*LOSSES, "bonus", "covered_steps", "episodes", "episodic_return", "episodic_length")


# --------------------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def evaluate_steps(
    args: Args, agent: Agent, params: Pytree, carry: dict[str, Any], table: GuidanceTable, num_episodes: jax.Array, redraw: jax.Array
) -> dict[str, Any]:
    """num_steps steps of all envs; each env counts its first num_episodes episodes only."""
    index = make_index(table)
    draw = jnp.zeros(args.num_envs, jnp.int32)
    obs = agent.env.observe(carry["env_state"])
    carry["slot"] = jnp.where(redraw, find_slot(args, agent, table, index, obs, draw), carry["slot"])
    key, key_refill, key_steps = jax.random.split(carry["key"], 3)

    def step(carry: dict[str, Any], key_step: jax.Array) -> tuple[dict[str, Any], None]:
        key_action, key_env = jax.random.split(key_step)
        obs = agent.env.observe(carry["env_state"])
        slot = find_slot(args, agent, table, index, obs, draw) if args.guidance_lookup == "step" else carry["slot"]
        action, _ = sample_action(key_action, agent(params, table, obs, slot)[0])
        env_state, reward, done, info = agent.env.step(key_env, carry["env_state"], action)
        counts = done & (carry["episodes"] < num_episodes)
        so_far, length = carry["so_far"] + reward, carry["length"] + 1
        return {
            "env_state": env_state, "key": carry["key"], "slot": slot,
            "so_far": jnp.where(done, 0.0, so_far), "length": jnp.where(done, 0, length),
            "episodes": carry["episodes"] + counts,
            "episodic_return": carry["episodic_return"] + so_far * counts,
            "episodic_length": carry["episodic_length"] + length * counts,
            "achievements": carry["achievements"] + (info["achievements"] & counts[:, None]).sum(0),
        }, None  # fmt: skip

    carry, _ = jax.lax.scan(step, carry, jax.random.split(key_steps, args.num_steps))
    return carry | {"key": key, "env_state": agent.env.refill(key_refill, carry["env_state"])}


def evaluate(
    args: Args, agent: Agent, params: Pytree, table: GuidanceTable, key: jax.Array, progress: Any = None
) -> dict[str, Any]:
    """Fresh episodes of the trained policy: sampled actions, frozen table, every env the same number of whole episodes.

    Returns:
        eval_episodes, episodic_return, episodic_length, score, reward_percent, achievements {name: rate}
    """
    num_episodes = -(-args.eval_episodes // args.num_envs)
    key_env, key = jax.random.split(key)
    n, num_achievements = args.num_envs, len(agent.env.achievements)
    carry = {
        "env_state": agent.env.reset(key_env, n), "key": key, "slot": jnp.zeros(n, jnp.int32),
        "so_far": jnp.zeros(n), "length": jnp.zeros(n, jnp.int32), "episodes": jnp.zeros(n, jnp.int32),
        "episodic_return": jnp.zeros(n), "episodic_length": jnp.zeros(n, jnp.int32),
        "achievements": jnp.zeros(num_achievements, jnp.int32),
    }  # fmt: skip
    chunk = 0
    while int(carry["episodes"].min()) < num_episodes:
        carry = evaluate_steps(args, agent, params, carry, table, num_episodes, chunk % args.updates_per_phase == 0)
        chunk += 1
        if progress:
            progress(int(carry["episodes"].sum()), num_episodes * n)
    total = num_episodes * n
    rates = np.asarray(carry["achievements"], np.float64) / total
    episodic_return = float(carry["episodic_return"].sum()) / total
    return {
        "eval_episodes": total,
        "episodic_return": episodic_return,
        "episodic_length": float(carry["episodic_length"].sum()) / total,
        "reward_percent": 100 * episodic_return / num_achievements,
        "score": crafter_score(rates),
        "achievements": dict(zip(agent.env.achievements, rates.tolist(), strict=True)),
    }


# --------------------------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------------------------


def make_adapter(args: Args, progress: Any) -> Any:
    """The adapter of --adapter; the default one is trained first if this machine has none yet."""
    if args.adapter == "none" or args.guidance != "full":
        return rladapter_adapter.NoAdapter()
    if args.adapter != "default":
        return rladapter_adapter.load_adapter(args.adapter, seed=args.seed)
    folder = rladapter_adapter.default_adapter_folder()
    if not (folder / "config.json").exists():
        progress.console.print(f"First start: training the default adapter, once, into {folder}")
        env = make_env("Craftax-Classic-Symbolic-v1", 64)
        captions = [env.to_text(obs) for obs in np.asarray(env.random_observations(jax.random.key(0), 3000))]
        task = progress.add_task("default adapter", total=None, status="")
        rladapter_adapter.train_default_adapter(
            captions, folder,
            progress=lambda step, total, loss: progress.update(task, completed=step, total=total, status=f"loss {loss:.2f}"),
        )  # fmt: skip
        progress.remove_task(task)
    return rladapter_adapter.load_adapter(folder, seed=args.seed)


def make_llm(args: Args) -> Any:
    llm = llm_client.make_llm(args.llm, model=args.llm_model, base_url=args.llm_base_url, seed=args.seed)
    if args.guidance == "full":
        llm.check()
    return llm


class Counters:
    """What a run adds up over all its sessions; saved with each checkpoint."""

    def __init__(self, **values: float):
        self.values = {
            "global_step": 0, "llm_calls": 0, "llm_failures": 0, "wall_seconds": 0.0, "compile_seconds": 0.0,
            "episodes": 0.0, "achievements": [],
        } | values  # fmt: skip

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values[name] += value


def phase_metrics(args: Args, agent: Agent, counters: Counters, sums: dict[str, Any], num_updates: int) -> dict[str, Any]:
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
    """One object per row and candidate that was used in this phase."""
    sums = {name: np.asarray(value, np.float64) for name, value in outcomes.items()}
    candidates = records.visits.shape[1]
    lines = []
    for slot in np.flatnonzero(sums["steps"][:-1]):
        row, candidate = divmod(int(slot), candidates)
        visits = max(sums["visits"][slot], 1.0)
        mean = sums["returns"][slot] / visits
        score = scores[row, candidate]
        lines.append({
            "phase": phase, "row": row, "candidate": candidate, "visits": int(sums["visits"][slot]),
            "steps": int(sums["steps"][slot]), "return_mean": mean,
            "return_variance": max(sums["squares"][slot] / visits - mean**2, 0.0),
            "successes": int(sums["successes"][slot]),
            "reached": {BASIC_SUB_GOALS[g]: int(n) for g, n in enumerate(sums["reached"][slot]) if n},
            "comprehension": None if np.isnan(score) else float(score),
        })  # fmt: skip
    return lines


def guidance_metrics(records: Records, scores: np.ndarray) -> dict[str, Any]:
    """What the table is worth, each row counted by its visits."""
    weights = np.where(np.isnan(scores), 0, records.visits)
    mean = float((np.nan_to_num(scores) * weights).sum() / weights.sum()) if weights.sum() else None
    visits = float(records.visits.sum())
    return {
        "guidance/comprehension": mean,
        "guidance/goal_success": float(records.successes.sum()) / visits if visits else None,
        "guidance/rows": int((records.num_valid > 0).sum()),
        "guidance/pairs_decided": len(records.decided()),
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


def train(args: Args, folder: Path, resume: bool, progress: Any) -> dict[str, Any] | None:
    """The method. Returns the summary, None if Ctrl-C stopped it."""
    start = time.perf_counter()
    env = make_env(args.env_id, args.num_envs)
    key_agent, key_runner, key_host, key_eval = jax.random.split(jax.random.key(args.seed), 4)
    agent, params = make_agent(args, env, key_agent)
    runner = jax.jit(init_runner, static_argnums=(0, 1))(args, agent, params, key_runner)
    llm, adapter = make_llm(args), make_adapter(args, progress)
    embedding = llm_client.HashEmbedding(CONTEXT_SIZE)
    samples = env.observe(runner.env_state)
    records = Records(args, env.num_actions, samples.shape[1:])
    samples = np.resize(np.asarray(samples), (args.updates_per_phase * SAMPLES_PER_UPDATE, *samples.shape[1:]))
    env_facts = jax.jit(env.facts)
    counters, first_phase = Counters(), 0
    checkpoints = runs.Checkpoints(folder)
    if resume:
        saved = {"runner": runner, "records": records.arrays, "adapter": adapter.state(), "samples": samples}
        last, saved, extra = checkpoints.restore(saved)
        runner, samples = saved["runner"], np.array(saved["samples"])
        records.arrays = {name: np.array(value) for name, value in saved["records"].items()}
        records.prompts, records.analyses = extra["prompts"], extra["analyses"]
        adapter.load_state(saved["adapter"])
        counters, first_phase = Counters(**extra["counters"]), last + 1
        runs.cut_logs(folder, first_phase)
    log = runs.Log(folder, args.track, {"flags": flags(args)})
    stop = StopRequest(progress.console)
    setup_seconds = time.perf_counter() - start  # reset, the adapter's first training: no part of SPS
    compiled, compile_seconds = ahead_of_time(args, train_phase, args, agent, runner, records.table(), jnp.int32(1))
    progress.console.print(f"compiled in {compile_seconds:.1f} s; {args.num_phases} phases of {args.updates_per_phase} updates")
    counters.add(compile_seconds=compile_seconds, wall_seconds=compile_seconds)
    task = progress.add_task("training", total=args.num_updates * args.batch_size, completed=counters["global_step"], status="")

    phase = first_phase - 1
    for phase in range(first_phase, args.num_phases):
        phase_start = time.perf_counter()
        key_phase = jax.random.fold_in(key_host, phase)
        queries = select_queries(args, records, samples, np.asarray(env_facts(samples))) if args.guidance == "full" else []
        answers, asked = refine_guidance(args, env, phase, records, queries, adapter, llm, embedding, key_phase)
        log.append("guidance.jsonl", [{"global_step": counters["global_step"]} | answer for answer in answers])
        num_updates = args.updates_in_phase(phase)
        train_start = time.perf_counter()
        runner, sums, outcomes, samples = jax.block_until_ready(compiled(runner, records.table(), jnp.int32(num_updates)))
        train_seconds = time.perf_counter() - train_start
        samples = np.resize(np.asarray(samples)[: num_updates * SAMPLES_PER_UPDATE], samples.shape)
        records.add_outcomes(outcomes)
        scores = comprehension_scores(args, records)
        tuned = {}
        if args.sft_every and (phase + 1) % args.sft_every == 0:
            tuned = finetune(records, adapter, jax.random.fold_in(key_phase, 1))
        record = phase_metrics(args, agent, counters, sums, num_updates)
        counters.add(llm_calls=asked["llm/calls"], llm_failures=asked["llm/failures"], wall_seconds=time.perf_counter() - phase_start)
        sps = counters["global_step"] / (counters["wall_seconds"] - counters["compile_seconds"])
        record |= guidance_metrics(records, scores) | asked | tuned
        record |= {"charts/SPS": sps, "time/train": train_seconds, "time/compile": compile_seconds}
        log.append("outcomes.jsonl", outcome_records(phase, records, scores, outcomes))
        log.metrics({"phase": phase, "global_step": counters["global_step"]} | record)
        progress.update(task, completed=counters["global_step"], status=status_line(record, counters))
        if stop.asked or (phase + 1) % args.save_every == 0 or phase + 1 == args.num_phases:
            arrays = {"runner": runner, "records": records.arrays, "adapter": adapter.state(), "samples": samples}
            extra = {"counters": counters.values, "prompts": records.prompts, "analyses": records.analyses}
            checkpoints.save(phase, arrays, extra)
        if stop.asked:
            break
    checkpoints.close()
    llm.close()
    if phase + 1 < args.num_phases:
        log.close()
        return None
    progress.update(task, description="evaluating")
    eval_start = time.perf_counter()
    result = evaluate(args, agent, runner.params, records.best_table(), key_eval, lambda done, total: progress.update(
        task, status=f"{done} of {total} episodes"))  # fmt: skip
    summary = summarise(args, counters, result) | {"eval_seconds": time.perf_counter() - eval_start, "setup_seconds": setup_seconds}
    log.close()
    runs.write_summary(folder, summary)
    return summary


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
        "SPS": counters["global_step"] / (counters["wall_seconds"] - counters["compile_seconds"]),
        "wall_seconds": counters["wall_seconds"], "compile_seconds": counters["compile_seconds"],
        "llm_calls": counters["llm_calls"], "llm_failures": counters["llm_failures"],
        "seed": args.seed, "env_id": args.env_id, "guidance": args.guidance, "guidance_lookup": args.guidance_lookup,
        "guidance_bonus": args.bonus, "llm": args.llm if args.guidance == "full" else "none", "llm_model": args.llm_model,
        "adapter": args.adapter if args.guidance == "full" else "none", "candidates": args.candidates,
        "sft_every": args.sft_every, "comprehension": args.comprehension,
    }  # fmt: skip


def flags(args: Args) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(args).items()}


def resumed_args(args: Args, argv: list[str]) -> Args:
    """The run's own flags; of those given now only --total-timesteps may differ. Raises ValueError otherwise."""
    saved = runs.read_config(args.resume)["flags"]
    names = {field.name for field in dataclasses.fields(Args)}
    if set(saved) != names:
        odd = ", ".join(sorted(set(saved) ^ names))
        raise ValueError(f"--resume: {args.resume} was made by another version of this script (flags that differ: {odd})")
    base = Args(**saved | {name: saved[name] and Path(saved[name]) for name in ("run_dir", "resume")})
    given = tyro.cli(Args, args=argv, default=base)
    changed = [name for name in names - {"resume", "total_timesteps", "run_dir"} if getattr(given, name) != getattr(base, name)]
    if changed:
        flag = "--" + changed[0].replace("_", "-")
        raise ValueError(f"{flag}: a resumed run keeps its flags, only --total-timesteps may change; start a new run without --resume")
    return dataclasses.replace(given, resume=None, run_dir=base.run_dir)


def configure_jax(args: Args) -> None:
    jax.config.update("jax_debug_nans", args.debug_nans)
    jax.config.update("jax_disable_jit", not args.jit)
    cache = rladapter_adapter.default_adapter_folder().parent / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for input that can't work; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    args = tyro.cli(Args, args=argv)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%  {task.fields[status]}")
    try:
        resume = args.resume
        if resume is not None:
            args = resumed_args(args, argv)
        check_args(args)
        configure_jax(args)
        make_env(args.env_id, args.num_envs)
        folder = resume or args.run_dir or runs.default_folder(args.env_id, args.exp_name, args.seed)
        if resume is None:
            runs.create(folder, {"flags": flags(args), "argv": argv} | runs.describe_machine())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
            summary = train(args, folder, resume is not None, progress)
    except ValueError as error:
        if args.debug_nans:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; what was saved before can be resumed", file=sys.stderr)
        return 130
    if summary is None:
        print(f"stopped; continue with: python rladapter_ppo.py --resume {folder}")
        return 130
    shown = {name: round(value, 2) if isinstance(value, float) else value for name, value in summary.items() if name != "achievements"}
    print(json.dumps(shown, indent=2))
    print(f"results: {folder}/summary.json   curves: tensorboard --logdir {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
