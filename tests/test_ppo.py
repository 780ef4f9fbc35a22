"""The algorithm: GAE, PPO loss, contexts, phases, evaluation. Mostly on the toy game, which compiles fast."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from craftax.craftax_classic.envs.craftax_state import EnvParams
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import llm_client
import rladapter_adapter
import rladapter_ppo as rl
from advice import AdviceContext, draw_exposures, reward_to_go
from envs import make_env
from envs.crafter.env import CraftaxEnv
from envs.game import Game
from envs.toy import TOY as GAME
from guidance import HostTable, TableArgs
from utils.devices import SharedEnv
from utils.embeddings import HashEmbedding

TABLE = TableArgs(guidance_rows=8, queries_per_phase=4)
TOY = rl.Args(
    env_id="Toy-v0", num_envs=8, num_steps=16, num_minibatches=4, hidden_size=32, rnn_size=16, learning_rate=5e-3,
    total_timesteps=8 * 16 * 13, updates_per_phase=4, table=TABLE, sft=rladapter_adapter.SftArgs(adapter="none"),
)  # fmt: skip
ENV = SharedEnv(make_env("Toy-v0", 8))
FACT, GOAL = GAME.fact_numbers, GAME.sub_goal_numbers


def setup(args, seed=0):
    """agent, runner, table of a toy run."""
    table = HostTable(args.table, ENV)
    agent, params = rl.make_agent(args, ENV, table.for_training(), jax.random.key(seed))
    runner, _ = rl.init_runner(args, agent, params, jax.random.key(seed + 1))
    return agent, runner, table


def store(table, advice):
    """advice: {sub-goal: [(fact, truth), ...]}; the rows it went to. About a tree, unless the reasons say otherwise."""
    facts = [name for reasons in advice.values() for name, truth in reasons if truth]
    situation = np.isin(np.arange(2), [FACT[name] for name in facts])
    question = llm_client.Question(np.zeros(2, np.uint8), situation, [], None)
    question.advice = tuple(
        (GOAL[goal], tuple((FACT[fact], truth) for fact, truth in reasons)) for goal, reasons in advice.items()
    )
    table.store([question])
    return list(question.rows.values())


TREE = {"chop tree": [("tree in view", True)]}
LAKE = {"drink water": [("water in view", True)]}


def exposure_of(agent, table, runner):
    facts = agent.env.facts(agent.env.observe(runner.env_state))
    return draw_exposures(table, jax.random.key(9), facts)


# ---- GAE and losses


def gae_by_loop(reward, value, done, last_value, gamma, lam):
    advantages = np.zeros_like(reward)
    for n in range(reward.shape[1]):
        advantage = 0.0
        for t in reversed(range(len(reward))):
            next_value = last_value[n] if t == len(reward) - 1 else value[t + 1, n]
            alive = 1.0 - done[t, n]
            advantage = reward[t, n] + gamma * alive * next_value - value[t, n] + gamma * lam * alive * advantage
            advantages[t, n] = advantage
    return advantages


floats = st.floats(-10, 10, width=32)


@settings(max_examples=30, deadline=None)
@given(
    arrays(np.float32, (7, 2), elements=floats), arrays(np.float32, (7, 2), elements=floats), arrays(bool, (7, 2)),
    arrays(np.float32, 2, elements=floats), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_gae_is_the_loop_of_its_definition(reward, value, done, last_value, gamma, lam):
    advantages, returns = rl.compute_gae(*map(jnp.asarray, (reward, value, done, last_value)), gamma, lam)
    expected = gae_by_loop(reward, value, done, last_value, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-3)
    np.testing.assert_allclose(returns, expected + value, atol=1e-3)


def test_gae_does_not_leak_over_the_end_of_an_episode():
    reward = jnp.array([[0.0], [0.0], [100.0]])
    advantages, _ = rl.compute_gae(
        reward, jnp.zeros((3, 1)), jnp.array([[False], [True], [False]]), jnp.zeros(1), 0.9, 0.9
    )
    assert float(advantages[0, 0]) == float(advantages[1, 0]) == 0.0


def fixed_agent(params, table, seen, memory):
    """Two actions; the obs byte is the logit of action 1, the value is 0.5."""
    logit = params * seen["obs"][..., 0].astype(jnp.float32)
    return jnp.stack([jnp.zeros_like(logit), logit], -1), jnp.full(logit.shape, 0.5), memory, None


def transition(**given):
    """A Transition that holds None but for what is given."""
    return rl.Transition(**dict.fromkeys(field.name for field in dataclasses.fields(rl.Transition)) | given)


def loss_of(log_ratio, advantage, args=rl.Args(ent_coef=0.0, vf_coef=0.0, predict_coef=0.0)):
    """PPO loss of one sample whose new probability is exp(log_ratio) times the old one."""
    batch = transition(
        obs=jnp.zeros((1, 1, 1), jnp.uint8), action=jnp.zeros((1, 1), jnp.int32), memory=jnp.zeros((1, 1, 0)),
        log_prob=jnp.log(jnp.array([[0.5]])) - log_ratio,
    )  # fmt: skip
    return rl.ppo_loss(args, fixed_agent, jnp.ones(()), None, batch, jnp.array([[advantage]]), jnp.array([[1.5]]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.0, 2.0, -2.0), (1.5, 2.0, -2.4), (0.5, 2.0, -1.0), (0.5, -2.0, 1.6), (1.5, -2.0, 3.0)],
)
def test_clipped_surrogate_by_hand(ratio, advantage, expected):
    loss, metrics = loss_of(float(np.log(ratio)), advantage)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert float(metrics["clipfrac"]) == (1.0 if abs(ratio - 1) > 0.2 else 0.0)


def test_value_and_entropy_terms_by_hand():
    loss, metrics = loss_of(0.0, 0.0, rl.Args(ent_coef=0.1, vf_coef=0.5, predict_coef=0.0))
    assert float(metrics["value_loss"]) == pytest.approx(0.5)
    assert float(metrics["entropy"]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(loss) == pytest.approx(0.25 - 0.1 * np.log(2), abs=1e-6)


def second_rollout(args, agent, runner, table):
    """What was played in a rollout that begins within an episode."""
    exposure = exposure_of(agent, table, runner)
    rollout = jax.jit(rl.rollout, static_argnums=(0, 1))
    runner, _, _ = rollout(args, agent, runner, table, exposure)
    return rollout(args, agent, runner, table, exposure)[1]


def largest_log_ratio(agent, params, table, batch):
    """How far replayed log-probabilities are from the stored ones."""
    seen = {name: getattr(batch, name) for name in rl.SEEN}
    logits, *_ = agent(params, table, seen, batch.memory[0])
    return float(jnp.abs(rl.action_log_prob(logits, batch.action) - batch.log_prob).max())


@pytest.mark.parametrize("rnn_size", [16, 0])
def test_ratio_is_one_in_the_first_minibatch(rnn_size):
    """What the buffer stores is what the policy saw: the reference stored the new sentence for the old action. And
    memory is clean at the ends of episodes."""
    args = dataclasses.replace(TOY, rnn_size=rnn_size, num_steps=11)
    agent, runner, host_table = setup(args)
    store(host_table, TREE)
    table = host_table.for_evaluation()
    transitions = second_rollout(args, agent, runner, table)
    assert 0 < transitions.advised.any(-1).mean() < 1  # guided and unguided steps
    batch = jax.tree.map(lambda x: x[:, jnp.array([5, 2])], transitions)  # as in a minibatch of two envs
    assert batch.done[:-1].any(0).all() and not batch.done[-1].any()
    assert (batch.previous[1:] == jnp.where(batch.done, len(GAME.actions), batch.action)[:-1]).all()
    assert largest_log_ratio(agent, runner.params, table, batch) < 1e-6
    _, metrics = rl.ppo_loss(args, agent, runner.params, table, batch, batch.reward, batch.reward)
    assert abs(float(metrics["approx_kl"])) < 1e-6 and float(metrics["clipfrac"]) == 0.0

    others = [{"advised": ~batch.advised}, {"facts": ~batch.facts}, {"pointed": 1 - batch.pointed % 2},
              {"hinted": jnp.zeros_like(batch.hinted)}]  # fmt: skip
    if rnn_size:
        assert batch.memory[0].any() and len(batch.memory) == 1
        goes_on = jnp.where(batch.previous == len(GAME.actions), 0, batch.previous)
        others += [{"memory": jnp.zeros_like(batch.memory)}, {"previous": goes_on}]
    for other in others:  # all of that matters, so the check above can fail
        assert largest_log_ratio(agent, runner.params, table, dataclasses.replace(batch, **other)) > 1e-6, [*other]


def test_ratio_is_one_in_crafter_over_the_ends_of_short_lives():
    """With what the player remembers of its life in the observation, which is also clean at the ends of episodes."""
    args = rl.Args(num_envs=8, num_steps=8, num_minibatches=2, hidden_size=16, rnn_size=16, table=TABLE)
    env = SharedEnv(CraftaxEnv(pool_size=32, params=EnvParams(max_timesteps=5)))
    host_table = HostTable(TABLE, env)
    rows = host_table.rows
    rows.valid[:3], rows.times_stated[:3], rows.goal[:3] = True, 1, [0, 3, 4]  # advice for all: tree, grass, water
    table = host_table.for_evaluation()
    agent, params = rl.make_agent(args, env, table, jax.random.key(0))
    runner, _ = rl.init_runner(args, agent, params, jax.random.key(1))
    transitions = second_rollout(args, agent, runner, table)
    assert transitions.done[:-1].any(0).all() and transitions.memory[0].any() and transitions.advised.any()
    assert (transitions.pointed < len(env.game.kinds)).any()
    assert largest_log_ratio(agent, params, table, transitions) < 1e-6
    other = dataclasses.replace(transitions, memory=jnp.zeros_like(transitions.memory))
    assert largest_log_ratio(agent, params, table, other) > 1e-6


def test_the_prediction_loss_against_a_loop():
    """What ends an episode leads nowhere, and what the last step of a rollout leads to is not known."""
    agent, runner, host_table = setup(TOY)
    table = host_table.for_evaluation()
    batch = second_rollout(dataclasses.replace(TOY, num_steps=11), agent, runner, table)
    assert batch.done[:-1].any()
    seen = {name: getattr(batch, name) for name in rl.SEEN}
    *_, hidden = agent(runner.params, table, seen, batch.memory[0])
    predicted = nnx.merge(agent.graphdef, runner.params).predict(hidden, batch.action)
    near = ENV.nearest(batch.obs)
    state = np.concatenate([near.reshape(*near.shape[:2], -1), batch.facts], -1)
    errors = [
        0.0 if batch.done[t, n] else ((predicted[t, n] - (state[t + 1, n] - state[t, n])) ** 2).sum()
        for t in range(len(state) - 1)
        for n in range(state.shape[1])
    ]
    loss = rl.predict_loss(agent, runner.params, hidden, batch)
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-4)


def places(*kinds):
    """Places (1, 2, 3) of two kinds of things; None for one that is not known."""
    return np.array([[(0, 0, 0) if kind is None else (*kind, 2) for kind in kinds]])


@pytest.mark.parametrize(
    ("pointed", "before", "now", "steps"),
    [
        (0, places((0, 3), None), places((0, 2), None), 1),
        (0, places((0, 3), None), places((0, 4), None), -1),
        (0, places((0, 3), (1, 0)), places((0, 3), (2, 0)), 0),  # only the first thing pointed at counts
        (1, places((0, 3), (-2, 0)), places((0, 3), (-1, 0)), 1),
        (0, places((0, 1), None), places((3, 1), None), 0),  # another one is the nearest now: no step
        (0, places((0, 1), None), places(None, None), 0),  # it is used up
        (0, places(None, None), places((0, 1), None), 0),
        (2, places((0, 2), (0, 2)), places((0, 1), (0, 1)), 0),  # nothing is pointed at
    ],
)
def test_steps_closer(pointed, before, now, steps):
    env = SimpleNamespace(places=lambda obs: obs, game=SimpleNamespace(kinds=("tree", "water")))
    seen = {"pointed": jnp.array([[pointed, 2]]), "obs": jnp.asarray(before)}
    assert float(rl.steps_closer(env, seen, jnp.asarray(now))[0]) == steps


def test_memory_says_nothing_of_the_episode_before():
    """Two lives that begin alike are alike to the policy, whatever came before them."""
    agent, runner, table = setup(TOY)
    target = jnp.zeros(8, jnp.int32).at[4:].set(jnp.arange(4) % 2)
    runner = dataclasses.replace(runner, env_state=dataclasses.replace(runner.env_state, target=target))
    transitions = second_rollout(TOY, agent, runner, table.for_evaluation())
    begins = np.asarray(transitions.previous == len(GAME.actions))
    value, target = np.asarray(transitions.value)[begins], np.asarray(transitions.obs)[begins][:, 0]
    assert begins.sum() >= 16 and len(set(target)) == 2
    for thing in (0, 1):
        np.testing.assert_allclose(value[target == thing], value[target == thing][0], atol=1e-6)
    inside = np.asarray(transitions.value)[~begins]
    assert inside.std() > 1e-4


def test_the_memory_carries_what_was_seen_before():
    """The same observation after another past is another one to the policy; without memory it is not."""
    for rnn_size in (16, 0):
        agent, runner, table = setup(dataclasses.replace(TOY, rnn_size=rnn_size))
        seen = {
            "obs": jnp.array([[[0, 0], [1, 0]], [[0, 1], [0, 1]]], jnp.uint8), "facts": jnp.zeros((2, 2, 2), bool),
            "advised": jnp.zeros((2, 2, 3), bool), "pointed": jnp.full((2, 2, 2), 2),
            "previous": jnp.array([[3, 3], [0, 0]]), "hinted": jnp.full((2, 2), 3),
        }  # fmt: skip
        logits, value, memory, _ = agent(runner.params, table.for_training(), seen, jnp.zeros((2, rnn_size)))
        assert abs(value[0, 0] - value[0, 1]) > 1e-4 and (abs(value[1, 0] - value[1, 1]) > 1e-6) == bool(rnn_size)
        assert memory.shape == (2, rnn_size) and logits.shape == (2, 2, 3)


# ---- what the policy is told


def test_the_context_is_the_embedding_of_the_advised_sub_goals():
    table = HostTable(TABLE, ENV).for_training()
    seen = {"advised": jnp.array([[True, False, True]]), "facts": jnp.array([[True, False]])}

    def vectors(**seen):
        return [np.asarray(weights @ basis)[0] for weights, basis in AdviceContext.vectors(table, seen)]

    total = HashEmbedding().encode([GAME.sub_goals[i] for i in (0, 2)]).sum(0)
    np.testing.assert_allclose(vectors(**seen)[0], total / np.linalg.norm(total) * np.sqrt(384), atol=1e-4)
    np.testing.assert_array_equal(vectors(**seen)[1], seen["facts"][0])
    assert not vectors(**seen | {"advised": jnp.zeros((1, 3), bool)})[0].any()


def test_the_network_never_forms_the_context_vectors_but_uses_them():
    agent, runner, table = setup(TOY)
    network = nnx.merge(agent.graphdef, runner.params)
    inputs = network.features.in_features
    features = jax.random.normal(jax.random.key(0), (1, 3, inputs))
    advised, facts = jnp.eye(3, dtype=bool), jnp.eye(3, 2, dtype=bool)
    seen = {"advised": advised[None], "facts": facts[None]}
    parts = AdviceContext.vectors(table.for_training(), seen)
    rest = *[jnp.zeros((1, 3), jnp.int32)] * 2, jnp.ones((3, TOY.rnn_size))  # hinted, previous, memory
    factored = network(features, parts, *rest)
    formed = network(features, [(jnp.eye(3)[None], weights[0] @ basis) for weights, basis in parts], *rest)
    for a, b in zip(factored[:3], formed[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_unknown_guidance_is_never_taken_for_unguided():
    with pytest.raises(KeyError):
        rl.Args(guidance="films").context  # noqa: B018
    assert [rl.Args(guidance=name).context.guided for name in ("full", "facts", "none")] == [True, False, False]


def rolled(args, host_table, agent, runner):
    table = host_table.for_evaluation()
    return rl.rollout(args, agent, runner, table, exposure_of(agent, table, runner))


def test_without_guidance_a_bonus_counts_for_every_sub_goal():
    args = dataclasses.replace(TOY, guidance="none", guidance_bonus=0.5)
    agent, runner, table = setup(args)
    _, transitions, _ = rolled(args, table, agent, runner)
    faded = fading(np.asarray(transitions.reached), np.asarray(transitions.done), args.bonus_fade)
    np.testing.assert_allclose(transitions.reward - transitions.env_reward, 0.5 * faded.sum(-1), atol=1e-6)
    assert 0 < faded[faded > 0].min() < 1  # some were repeated
    assert rl.Args(guidance="none").bonus == 0.0 and rl.Args().bonus > 0.0


def fading(worked, done, fade):
    """(T, N, G) what share of a bonus each piece of work is paid: fade ** (how often it was paid in this episode)."""
    paid, shares = np.zeros(worked.shape[1:]), []
    for now, ended in zip(worked, done, strict=True):
        shares.append(now * fade**paid)
        paid = (paid + now) * ~ended[:, None]
    return np.stack(shares)


@pytest.mark.parametrize("guidance_flag", ["none", "facts"])
def test_without_guidance_the_coverage_is_zero(guidance_flag):
    """It read 1.0: the sub-goals that a bonus is for were taken for advice."""
    args = dataclasses.replace(TOY, guidance=guidance_flag, guidance_bonus=0.5)
    agent, runner, table = setup(args)
    store(table, TREE)
    assert not rolled(args, table, agent, runner)[1].advised.any()


def test_the_bonus_is_for_advised_sub_goals_only():
    agent, runner, table = setup(TOY)
    store(table, TREE)
    store(table, {"rest": [("water in view", False)]})
    _, t, _ = rolled(TOY, table, agent, runner)
    advised = np.asarray(t.advised)[..., :2]
    assert (np.asarray(t.reached) & advised)[..., 0].any() and (np.asarray(t.reached) & ~advised)[..., 1].any()
    faded = fading(np.asarray(t.reached) & advised, np.asarray(t.done), TOY.bonus_fade)
    np.testing.assert_allclose(t.reward - t.env_reward, TOY.bonus * faded.sum(-1), atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Farm:
    """A game in which one sub-goal is worked towards with every action, for ever; episodes of 50 steps."""

    num_pools: int = 1
    view: tuple[int, int] = (3, 3)
    game: Game = GAME

    def reset(self, key, num_envs):
        return jnp.zeros(num_envs, jnp.int32)

    def refill(self, keys, state):
        return state

    def observe(self, state):
        return jnp.stack([state * 0, state], -1).astype(jnp.uint8)

    def step(self, keys, state, action):
        worked = jnp.broadcast_to(jnp.array([True, False]), (*state.shape, 2))
        done = state >= 49
        info = {"reached": worked, "worked": worked, "achievements": worked}
        return jnp.where(done, 0, state + 1), jnp.zeros(state.shape), done, info

    def features(self, obs):
        return obs.astype(jnp.float32)

    def places(self, obs):
        return jnp.zeros((*obs.shape[:-1], 2, 3), jnp.int32)

    def facing(self, obs):
        return jnp.broadcast_to(jnp.array([-1, 0]), (*obs.shape[:-1], 2))

    def facts(self, obs):
        return obs[..., :1] == jnp.arange(2)

    def to_text(self, obs):
        return "You see: a tree."


@pytest.mark.parametrize(("flag", "fade"), [("full", 0.8), ("none", 0.8), ("full", 0.5), ("full", 0.0)])
def test_a_bonus_can_not_be_farmed(flag, fade):
    """However often one thing is done in an episode, it is paid guidance_bonus / (1 - fade) at most; with --bonus-fade
    0 that is once. The next episode pays anew."""
    args = dataclasses.replace(TOY, guidance=flag, guidance_bonus=0.1, bonus_fade=fade, num_steps=100)
    env, table = SharedEnv(Farm()), HostTable(TABLE, SharedEnv(Farm()))
    store(table, TREE)
    agent, params = rl.make_agent(args, env, table.for_evaluation(), jax.random.key(0))
    runner, _ = rl.init_runner(args, agent, params, jax.random.key(1))
    runner, t, _ = rolled(args, table, agent, runner)
    episodes = np.asarray(t.reward - t.env_reward).reshape(2, 50, 8).sum(1)
    np.testing.assert_allclose(episodes, 0.1 * (1 - fade**50) / (1 - fade), rtol=1e-4)
    assert (episodes <= 0.1 / (1 - fade) + 1e-6).all() and not runner.paid.any()


def test_a_policy_that_repeats_what_pays_is_not_paid_without_end():
    """The right action at every step of the toy, the advice for both; a sum over both sub-goals and all episodes."""
    args = dataclasses.replace(TOY, bonus_fade=0.5, num_steps=64)
    agent, runner, table = setup(args)
    store(table, TREE)
    store(table, LAKE)
    table = table.for_evaluation()
    exposure, step, total, worst = exposure_of(agent, table, runner), jax.jit(rl.play_step, static_argnums=(0, 1)), 0, 0
    greedy = Exploiter(agent.env, agent.graphdef, agent.context)
    for key in jax.random.split(jax.random.key(0), 64):
        runner, t, _ = step(args, greedy, runner, table, exposure, key)
        total += t.reward - t.env_reward
        worst = max(worst, float(total.max()))
        assert (t.env_reward == 1).all() and (runner.paid.sum(1) == (runner.env_state.time)).all()
        total = jnp.where(t.done, 0.0, total)
    assert 0 < worst <= 2 * args.bonus / (1 - args.bonus_fade)


class Exploiter(rl.Agent):
    """A scripted policy: the action that pays."""

    def __call__(self, params, table, seen, memory):
        right = jax.nn.one_hot(seen["obs"][..., 0], 3)
        return 100 * right, jnp.zeros(right.shape[:-1]), memory, None


def test_pause_lookup_keeps_the_advice_for_the_whole_phase():
    args = dataclasses.replace(
        TOY, table=dataclasses.replace(TABLE, guidance_lookup="pause", trials=False)
    )
    agent, runner, table = setup(args)
    (tree,), (lake,) = store(table, TREE), store(table, LAKE)
    target = np.asarray(runner.env_state.target)  # whatever they see later, envs keep what they saw at the pause
    _, t, _ = rolled(args, table, agent, runner)
    np.testing.assert_array_equal(t.advised[:, :, GOAL["chop tree"]], np.tile(target == 0, (16, 1)))
    _, _, outcomes, *_ = rl.train_phase(args, agent, runner, table.for_training(), jnp.int32(2))
    assert np.asarray(outcomes["steps"])[tree].tolist() == [0, (target == 0).sum() * 32]
    assert np.asarray(outcomes["steps"])[lake].tolist() == [0, (target == 1).sum() * 32]


# ---- phases


def test_three_phases_and_a_short_one_compile_once():
    args = dataclasses.replace(TOY, hidden_size=24)
    agent, runner, table = setup(args)
    before = rl.train_phase._cache_size()
    for n in (4, 4, 4, 1):
        runner, sums, _, situations, _ = rl.train_phase(args, agent, runner, table.for_training(), jnp.int32(n))
    assert rl.train_phase._cache_size() == before + 1
    assert int(runner.update) == 13 and float(sums["episodes"]) == 16
    met = {name: array.shape for name, array in situations.items()}
    assert met == {"obs": (4 * 256, 2), "facts": (4 * 256, 2)}
    facts = agent.env.facts(situations["obs"])
    np.testing.assert_array_equal(situations["facts"][:256], facts[:256])  # of one update


def test_the_craftax_runner_has_no_weak_types():
    """They would compile the phase twice."""
    args = rl.Args(num_envs=8, num_steps=8)
    env = SharedEnv(make_env(args.env_id, args.num_envs))
    agent, params = rl.make_agent(args, env, HostTable(args.table, env).for_training(), jax.random.key(0))
    shapes = jax.eval_shape(lambda k: rl.init_runner(args, agent, params, k), jax.random.key(1))
    assert not [x for x in jax.tree.leaves(shapes) if getattr(x, "weak_type", False)]


@pytest.mark.parametrize("guidance", ["none", "full", "facts"])
def test_it_learns_the_toy_game(guidance):
    args = dataclasses.replace(
        TOY, guidance=guidance, total_timesteps=8 * 16 * 60, updates_per_phase=59, eval_episodes=64
    )
    agent, runner, table = setup(args)
    if guidance == "full":
        store(table, TREE)
    untrained = rl.evaluate(args, agent, runner.params, table.for_evaluation(), jax.random.key(5))
    runner, *_ = rl.train_phase(args, agent, runner, table.for_training(), jnp.int32(59))
    trained = rl.evaluate(args, agent, runner.params, table.for_evaluation(), jax.random.key(5))
    assert untrained["episodic_return"] < 5 and trained["episodic_return"] > 7
    assert trained["eval_episodes"] == 64 and trained["episodic_length"] == 8
    assert set(trained["achievements"].values()) <= {i / 64 for i in range(65)}


@dataclasses.dataclass(frozen=True)
class Coin:
    """Probe env with a known value: reward 1 at every step, episodes of 4 steps, no observation of the time."""

    num_pools: int = 1
    view: tuple[int, int] = (3, 3)
    game: Game = dataclasses.replace(GAME, achievements=("a",), actions=("left", "right"))

    def reset(self, key, num_envs):
        return jnp.zeros(num_envs, jnp.int32)

    def refill(self, keys, state):
        return state

    def observe(self, state):
        return state[:, None].astype(jnp.uint8)

    def step(self, keys, state, action):
        done = state >= 3
        empty = jnp.zeros((*state.shape, 2), bool)
        return jnp.where(done, 0, state + 1), jnp.ones(state.shape), done, {
            "reached": empty, "worked": empty, "achievements": jnp.zeros((*state.shape, 1), bool),
        }  # fmt: skip

    def features(self, obs):
        return jax.nn.one_hot(obs[..., 0], 4)

    def places(self, obs):
        return jnp.zeros((*obs.shape[:-1], 2, 3), jnp.int32)

    def facing(self, obs):
        return jnp.zeros((*obs.shape[:-1], 2), jnp.int32)

    def facts(self, obs):
        return jnp.zeros((*obs.shape[:-1], 2), bool)


def test_the_critic_finds_the_known_value_of_a_probe_env():
    args = dataclasses.replace(TOY, gamma=0.5, guidance="none", anneal_lr=False, updates_per_phase=60)
    env = SharedEnv(Coin())
    table = HostTable(TABLE, env).for_training()
    agent, params = rl.make_agent(args, env, table, jax.random.key(0))
    runner, _ = rl.init_runner(args, agent, params, jax.random.key(1))
    runner, *_ = rl.train_phase(args, agent, runner, table, jnp.int32(60))
    _, t, _ = jax.jit(rl.rollout, static_argnums=(0, 1))(args, agent, runner, table, exposure_of(agent, table, runner))
    expected = np.array([1.875, 1.75, 1.5, 1.0])[np.asarray(t.obs)[..., 0]]
    np.testing.assert_allclose(t.value, expected, atol=0.1)  # in units of reward, though the network's are others


def test_value_targets_are_standardised_by_a_running_mean():
    args = dataclasses.replace(TOY, value_ema=0.9, num_minibatches=1, update_epochs=1)
    agent, runner, host_table = setup(args)
    table = host_table.for_evaluation()
    _, transitions, _ = rolled(args, host_table, agent, runner)
    last_value = jnp.zeros(8)
    _, returns = rl.compute_gae(transitions.reward, transitions.value, transitions.done, last_value, 0.97, 0.625)
    after, losses = rl.update_agent(args, agent, runner, table, transitions, last_value)
    moments = np.array([returns.mean(), (returns**2).mean()])
    stats = 0.9 * np.array([0.0, 1.0]) + 0.1 * moments
    np.testing.assert_allclose(after.value_stats, stats, rtol=1e-5)
    mean, deviation = stats[0], np.sqrt(stats[1] - stats[0] ** 2)
    standard = (np.asarray(transitions.value) - 0.0) / 1.0  # the network's value, as stats were 0 and 1 in the rollout
    targets = (np.asarray(returns) - mean) / deviation
    assert float(losses["value_loss"]) == pytest.approx(0.5 * ((standard - targets) ** 2).mean(), rel=1e-4)


def test_the_learning_rate_rises_and_then_falls_to_zero_over_the_run():
    args = dataclasses.replace(TOY, total_timesteps=TOY.batch_size * 40, lr_warmup=0.1)  # 4 updates of 40
    rates = [float(rl.learning_rate(args, jnp.int32(i))) / args.learning_rate for i in range(41)]
    assert rates[:4] == pytest.approx([0.25, 0.5 * 39 / 40, 0.75 * 38 / 40, 37 / 40], abs=1e-6)
    assert rates[4:] == pytest.approx([1 - i / 40 for i in range(4, 41)], abs=1e-6) and rates[-1] == 0
    level = dataclasses.replace(args, anneal_lr=False)
    assert [float(rl.learning_rate(level, jnp.int32(i))) / args.learning_rate for i in (1, 3, 39)] == pytest.approx(
        [0.5, 1, 1], abs=1e-6
    )
    at_once = dataclasses.replace(args, lr_warmup=0.0)
    assert float(rl.learning_rate(at_once, jnp.int32(0))) == pytest.approx(args.learning_rate)


@settings(max_examples=20, deadline=None)
@given(arrays(np.float32, (6, 2), elements=st.floats(-4, 4, width=32)), arrays(bool, (6, 2)))
def test_reward_to_go_against_a_loop(reward, done):
    expected, later = np.zeros_like(reward), np.zeros(2)
    for t in reversed(range(6)):
        later = reward[t] + later * ~done[t]
        expected[t] = later
    np.testing.assert_allclose(reward_to_go(jnp.asarray(reward), jnp.asarray(done)), expected, atol=1e-4)


def test_phases_add_up_to_the_updates():
    for updates in (1, 2, 4, 5, 6, 13):
        args = dataclasses.replace(TOY, total_timesteps=updates * TOY.batch_size - 3)
        assert args.num_updates == updates
        sizes = []
        while sum(sizes) < updates:
            sizes.append(args.updates_in_phase(len(sizes), sum(sizes)))
        assert sizes[0] == 1 and sum(sizes) == updates and all(size == 4 for size in sizes[1:-1])
