"""The algorithm: GAE, PPO loss, contexts, phases, evaluation. Mostly on the toy game, which compiles fast."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import guidance
import llm_client
import rladapter_adapter
import rladapter_ppo as rl
from envs import make_env
from envs.game import Game
from envs.toy import TOY as GAME
from guidance import HostTable, TableArgs
from utils.devices import SharedEnv
from utils.embeddings import HashEmbedding

TABLE = TableArgs(guidance_rows=8, queries_per_phase=4)
TOY = rl.Args(
    env_id="Toy-v0", num_envs=8, num_steps=16, num_minibatches=4, hidden_size=32, total_timesteps=8 * 16 * 13,
    updates_per_phase=4, table=TABLE, sft=rladapter_adapter.SftArgs(adapter="none"), learning_rate=5e-3,
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
    return guidance.draw_exposure(table, jax.random.key(9), facts)


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


@dataclasses.dataclass(frozen=True)
class FixedAgent:
    """Two actions; the obs byte is the logit of action 1, the value is 0.5."""

    def __call__(self, params, table, obs, advised, facts):
        logit = params * obs[:, 0].astype(jnp.float32)
        return jnp.stack([jnp.zeros_like(logit), logit], 1), jnp.full(obs.shape[0], 0.5)


def loss_of(log_ratio, advantage, args=rl.Args(norm_adv=False, ent_coef=0.0, vf_coef=0.0)):
    """PPO loss of one sample whose new probability is exp(log_ratio) times the old one."""
    zeros = jnp.zeros(1)
    batch = rl.Transition(
        obs=jnp.zeros((1, 1), jnp.uint8), facts=zeros, advised=zeros, action=jnp.zeros(1, jnp.int32),
        log_prob=jnp.log(jnp.array([0.5])) - log_ratio, value=zeros, reward=zeros, env_reward=zeros, done=zeros,
        reached=zeros,
    )  # fmt: skip
    return rl.ppo_loss(args, FixedAgent(), jnp.ones(()), None, batch, jnp.array([advantage]), jnp.array([1.5]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.0, 2.0, -2.0), (1.5, 2.0, -2.4), (0.5, 2.0, -1.0), (0.5, -2.0, 1.6), (1.5, -2.0, 3.0)],
)
def test_clipped_surrogate_by_hand(ratio, advantage, expected):
    loss, metrics = loss_of(float(np.log(ratio)), advantage)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert float(metrics["clipfrac"]) == (1.0 if abs(ratio - 1) > 0.2 else 0.0)


def test_value_and_entropy_terms_by_hand():
    loss, metrics = loss_of(0.0, 0.0, rl.Args(norm_adv=False, ent_coef=0.1, vf_coef=0.5))
    assert float(metrics["value_loss"]) == pytest.approx(0.5)
    assert float(metrics["entropy"]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(loss) == pytest.approx(0.25 - 0.1 * np.log(2), abs=1e-6)


def test_ratio_is_one_in_the_first_minibatch():
    """What the buffer stores is what the policy saw: the reference stored the new sentence for the old action."""
    agent, runner, host_table = setup(TOY)
    store(host_table, TREE)
    table = host_table.for_evaluation()
    _, transitions, _ = rl.rollout(TOY, agent, runner, table, exposure_of(agent, table, runner))
    assert 0 < transitions.advised.any(-1).mean() < 1  # guided and unguided steps
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transitions)
    _, metrics = rl.ppo_loss(TOY, agent, runner.params, table, flat, flat.reward, flat.reward)
    assert abs(float(metrics["approx_kl"])) < 1e-6 and float(metrics["clipfrac"]) == 0.0
    for other in (dataclasses.replace(flat, advised=~flat.advised), dataclasses.replace(flat, facts=~flat.facts)):
        _, metrics = rl.ppo_loss(TOY, agent, runner.params, table, other, flat.reward, flat.reward)
        assert abs(float(metrics["approx_kl"])) > 1e-6  # the context matters, so the check above can fail


# ---- what the policy is told


def test_the_context_is_the_embedding_of_the_advised_sub_goals():
    table = HostTable(TABLE, ENV).for_training()
    advised, facts = jnp.array([[True, False, True]]), jnp.array([[True, False]])

    def vectors(advised):
        return [np.asarray(weights @ basis)[0] for weights, basis in rl.AdviceContext.vectors(table, advised, facts)]

    total = HashEmbedding().encode([GAME.sub_goals[i] for i in (0, 2)]).sum(0)
    np.testing.assert_allclose(vectors(advised)[0], total / np.linalg.norm(total) * np.sqrt(384), atol=1e-4)
    np.testing.assert_array_equal(vectors(advised)[1], facts[0])
    assert not vectors(jnp.zeros_like(advised))[0].any()


def test_the_network_never_forms_the_context_vectors_but_uses_them():
    agent, runner, table = setup(TOY)
    network = nnx.merge(agent.graphdef, runner.params)
    features = agent.env.features(agent.env.observe(runner.env_state))[:3]
    parts = rl.AdviceContext.vectors(table.for_training(), jnp.eye(3, dtype=bool), jnp.eye(3, 2, dtype=bool))
    factored = network(features, parts)
    formed = network(features, [(jnp.eye(3), weights @ basis) for weights, basis in parts])
    for a, b in zip(factored, formed, strict=True):
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
    np.testing.assert_allclose(transitions.reward, transitions.env_reward * 1.5)
    assert rl.Args(guidance="none").bonus == 0.0 and rl.Args().bonus > 0.0


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
    chopped, drunk = np.asarray(t.reached)[..., GOAL["chop tree"]], np.asarray(t.reached)[..., GOAL["drink water"]]
    assert chopped.any() and drunk.any()
    np.testing.assert_allclose(t.reward - t.env_reward, chopped * TOY.bonus, atol=1e-6)


def test_pause_lookup_keeps_the_advice_for_the_whole_phase():
    args = dataclasses.replace(
        TOY, table=dataclasses.replace(TABLE, guidance_lookup="pause", trials=False)
    )
    agent, runner, table = setup(args)
    (tree,), (lake,) = store(table, TREE), store(table, LAKE)
    target = np.asarray(runner.env_state.target)  # whatever they see later, envs keep what they saw at the pause
    _, t, _ = rolled(args, table, agent, runner)
    np.testing.assert_array_equal(t.advised[:, :, GOAL["chop tree"]], np.tile(target == 0, (16, 1)))
    _, _, outcomes, _ = rl.train_phase(args, agent, runner, table.for_training(), jnp.int32(2))
    assert np.asarray(outcomes["steps"])[tree].tolist() == [0, (target == 0).sum() * 32]
    assert np.asarray(outcomes["steps"])[lake].tolist() == [0, (target == 1).sum() * 32]


# ---- phases


def test_three_phases_and_a_short_one_compile_once():
    args = dataclasses.replace(TOY, hidden_size=24)
    agent, runner, table = setup(args)
    before = rl.train_phase._cache_size()
    for n in (4, 4, 4, 1):
        runner, sums, _, situations = rl.train_phase(args, agent, runner, table.for_training(), jnp.int32(n))
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
    runner, _, _, _ = rl.train_phase(args, agent, runner, table.for_training(), jnp.int32(59))
    trained = rl.evaluate(args, agent, runner.params, table.for_evaluation(), jax.random.key(5))
    assert untrained["episodic_return"] < 5 and trained["episodic_return"] > 7
    assert trained["eval_episodes"] == 64 and trained["episodic_length"] == 8
    assert set(trained["achievements"].values()) <= {i / 64 for i in range(65)}


@dataclasses.dataclass(frozen=True)
class Coin:
    """Probe env with a known value: reward 1 at every step, episodes of 4 steps, no observation of the time."""

    num_pools: int = 1
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

    def facts(self, obs):
        return jnp.zeros((*obs.shape[:-1], 2), bool)


def test_the_critic_finds_the_known_value_of_a_probe_env():
    args = dataclasses.replace(TOY, gamma=0.5, guidance="none", anneal_lr=False, updates_per_phase=60)
    env = SharedEnv(Coin())
    table = HostTable(TABLE, env).for_training()
    agent, params = rl.make_agent(args, env, table, jax.random.key(0))
    runner, _ = rl.init_runner(args, agent, params, jax.random.key(1))
    runner, *_ = rl.train_phase(args, agent, runner, table, jnp.int32(60))
    advised, facts = jnp.zeros((4, 3), bool), jnp.zeros((4, 2), bool)
    _, value = agent(runner.params, table, jnp.arange(4, dtype=jnp.uint8)[:, None], advised, facts)
    np.testing.assert_allclose(value, [1.875, 1.75, 1.5, 1.0], atol=0.1)


def test_the_learning_rate_falls_to_zero_over_the_run():
    assert float(rl.learning_rate(TOY, jnp.int32(0))) == pytest.approx(TOY.learning_rate)
    assert float(rl.learning_rate(TOY, jnp.int32(TOY.num_updates))) == 0.0
    assert float(rl.learning_rate(dataclasses.replace(TOY, anneal_lr=False), jnp.int32(5))) == pytest.approx(
        TOY.learning_rate
    )


def test_phases_add_up_to_the_updates():
    for updates in (1, 2, 4, 5, 6, 13):
        args = dataclasses.replace(TOY, total_timesteps=updates * TOY.batch_size - 3)
        assert args.num_updates == updates
        sizes = []
        while sum(sizes) < updates:
            sizes.append(args.updates_in_phase(len(sizes), sum(sizes)))
        assert sizes[0] == 1 and sum(sizes) == updates and all(size == 4 for size in sizes[1:-1])
