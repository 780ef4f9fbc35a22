"""The algorithm: GAE, PPO loss, table lookup, outcomes, pauses, phases. Mostly on the toy game, which compiles fast."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import llm_client
import rladapter_adapter
import rladapter_ppo as rl
from envs import make_env
from envs.vocabulary import ALWAYS_CARED, FACT_INDEX, FACTS, NUM_BASIC, SUB_GOAL_INDEX

TOY = rl.Args(
    env_id="Toy-v0", num_envs=8, num_steps=16, num_minibatches=4, hidden_size=32, total_timesteps=8 * 16 * 13,
    updates_per_phase=4, guidance_rows=8, queries_per_phase=4, adapter="none", learning_rate=5e-3,
)  # fmt: skip
EMPTY_TREE = ["tree in view"]


def setup(args, seed=0):
    """agent, runner, records of a toy run."""
    env = make_env(args.env_id, args.num_envs)
    agent, params = rl.make_agent(args, env, jax.random.key(seed))
    runner = rl.init_runner(args, agent, params, jax.random.key(seed + 1))
    return agent, runner, rl.Records(args, env.num_actions, env.observe(runner.env_state).shape[1:])


def key_of(names):
    return np.isin(np.arange(len(FACTS)), [FACT_INDEX[name] for name in names])


def query(row, candidate, facts, obs=(0, 0)):
    return rl.Query(row, candidate, np.array(obs, np.uint8), facts, [], None)


def store(records, row, candidate, facts, sub_goals, because):
    guidance = llm_client.Guidance(tuple(SUB_GOAL_INDEX[g] for g in sub_goals), tuple((FACT_INDEX[f], t) for f, t in because))
    rl.store_guidance(records, query(row, candidate, facts), guidance, "prompt", "analysis", llm_client.HashEmbedding(384))


# -------------------------------------------------------------------------------------------------------- GAE and losses


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
    advantages, _ = rl.compute_gae(reward, jnp.zeros((3, 1)), jnp.array([[False], [True], [False]]), jnp.zeros(1), 0.9, 0.9)
    assert float(advantages[0, 0]) == float(advantages[1, 0]) == 0.0


@dataclasses.dataclass(frozen=True)
class FixedAgent:
    """Two actions; the obs byte is the logit of action 1, the value is 0.5."""

    def __call__(self, params, table, obs, slot):
        logit = params * obs[:, 0].astype(jnp.float32)
        return jnp.stack([jnp.zeros_like(logit), logit], 1), jnp.full(obs.shape[0], 0.5)


def loss_of(log_ratio, advantage, args=rl.Args(norm_adv=False, ent_coef=0.0, vf_coef=0.0)):
    """PPO loss of one sample whose new probability is exp(log_ratio) times the old one."""
    zeros = jnp.zeros(1)
    batch = rl.Transition(
        obs=jnp.zeros((1, 1), jnp.uint8), slot=jnp.zeros(1, jnp.int32), action=jnp.zeros(1, jnp.int32),
        log_prob=jnp.log(jnp.array([0.5])) - log_ratio, value=zeros, reward=zeros, env_reward=zeros, done=zeros,
        entered=zeros, success=zeros, reached=zeros,
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
    agent, runner, records = setup(TOY)
    store(records, 0, 0, key_of(EMPTY_TREE), ["chop tree"], [("tree in view", True)])
    table = records.table()
    _, transitions, _ = rl.rollout(TOY, agent, runner, table, rl.make_index(table), jnp.zeros(8, jnp.int32))
    assert len(np.unique(transitions.slot)) == 2  # guided and unguided steps
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transitions)
    _, metrics = rl.ppo_loss(TOY, agent, runner.params, table, flat, flat.reward, flat.reward)
    assert abs(float(metrics["approx_kl"])) < 1e-6 and float(metrics["clipfrac"]) == 0.0
    other = dataclasses.replace(table, context=table.context[::-1] * 5.0)
    _, metrics = rl.ppo_loss(TOY, agent, runner.params, other, flat, flat.reward, flat.reward)
    assert abs(float(metrics["approx_kl"])) > 1e-6  # the context matters, so the check above can fail


# ------------------------------------------------------------------------------------------------------------- the table


def lookup(records, *situations, draw=0, tolerance=0):
    table = records.table()
    facts = jnp.asarray(np.stack([key_of(s) for s in situations]))
    args = dataclasses.replace(TOY, guidance_tolerance=tolerance)
    return rl.nearest_slot(args, table, rl.make_index(table), facts, jnp.full(len(situations), draw)).tolist()


NONE = 8 * 2  # the last slot of 8 rows with 2 candidates


def test_a_row_serves_every_state_that_shares_the_facts_it_cares_about():
    records = rl.Records(TOY, 3, (2,))
    store(records, 3, 0, key_of(["tree in view", "dark"]), ["chop tree"], [("tree in view", True), ("wood >= 1", False)])
    assert lookup(records, ["tree in view"], ["tree in view", "coal in view"]) == [6, 6]
    assert lookup(records, ["tree in view", "wood >= 1"], ["dark"], ["tree in view", "zombie near"]) == [NONE] * 3


def test_the_tolerance_is_in_wrong_facts():
    records = rl.Records(TOY, 3, (2,))
    store(records, 0, 0, key_of(["tree in view"]), ["chop tree"], [("tree in view", True), ("wood >= 1", False)])
    situations = (["tree in view", "wood >= 1"], ["wood >= 1"])
    assert lookup(records, *situations) == [NONE, NONE]
    assert lookup(records, *situations, tolerance=1) == [0, NONE]
    assert lookup(records, *situations, tolerance=2) == [0, 0]


def test_of_the_rows_that_fit_the_one_that_cares_most_wins():
    records = rl.Records(TOY, 3, (2,))
    store(records, 0, 0, key_of(["tree in view"]), ["chop tree"], [("tree in view", True)])
    store(records, 1, 0, key_of(["tree in view", "dark"]), ["sleep"], [("tree in view", True), ("dark", True)])
    assert lookup(records, ["tree in view", "dark"], ["tree in view"]) == [2, 0]


def test_an_exact_row_wins_over_a_nearer_wrong_one():
    records = rl.Records(TOY, 3, (2,))
    store(records, 0, 0, key_of(FACTS[:40]), ["sleep"], [])  # cares about everything
    store(records, 1, 0, key_of([]), ["chop tree"], [("dark", False)])
    one_off = list(FACTS[:39])
    assert lookup(records, [n for n in one_off if not n.endswith("low") and n != "zombie near"], tolerance=3) == [2]


def test_candidates_are_drawn_per_env_and_absent_ones_never():
    records = rl.Records(TOY, 3, (2,))
    store(records, 0, 0, key_of(EMPTY_TREE), ["chop tree"], [("tree in view", True)])
    assert {lookup(records, EMPTY_TREE, draw=d)[0] for d in range(4)} == {0}
    store(records, 0, 1, key_of(EMPTY_TREE), ["drink water"], [("tree in view", True)])
    assert {lookup(records, EMPTY_TREE, draw=d)[0] for d in range(4)} == {0, 1}


def test_an_empty_table_guides_nobody():
    records = rl.Records(TOY, 3, (2,))
    assert lookup(records, EMPTY_TREE, []) == [NONE, NONE]
    table = records.table()
    assert not np.asarray(table.context).any() and not np.asarray(table.goals).any()


def test_reasons_that_are_not_so_are_dropped_and_no_reasons_mean_all_facts():
    records = rl.Records(TOY, 3, (2,))
    store(records, 0, 0, key_of(EMPTY_TREE), ["chop tree"], [("tree in view", True), ("dark", True)])
    assert set(np.flatnonzero(records.care[0])) == {FACT_INDEX["tree in view"], *ALWAYS_CARED}
    store(records, 1, 0, key_of(EMPTY_TREE), ["chop tree"], [("dark", True)])
    assert records.care[1].all()


def test_without_guidance_a_bonus_counts_for_every_sub_goal():
    args = dataclasses.replace(TOY, guidance="none", guidance_bonus=0.5)
    _, runner, records = setup(args)
    agent, runner, records = setup(args)
    table = records.table()
    _, transitions, _ = rl.rollout(args, agent, runner, table, rl.make_index(table), jnp.zeros(8, jnp.int32))
    np.testing.assert_allclose(transitions.reward, transitions.env_reward * 1.5)
    assert rl.Args(guidance="none").bonus == 0.0 and rl.Args().bonus > 0.0


def test_the_bonus_is_for_advised_sub_goals_only():
    agent, runner, records = setup(TOY)
    store(records, 0, 0, key_of(EMPTY_TREE), ["chop tree"], [("tree in view", True)])
    store(records, 1, 0, key_of(["water in view"]), ["chop tree"], [("water in view", True)])
    table = records.table()
    _, t, _ = rl.rollout(TOY, agent, runner, table, rl.make_index(table), jnp.zeros(8, jnp.int32))
    chopped = np.asarray(t.reached)[..., SUB_GOAL_INDEX["chop tree"]]
    drunk = np.asarray(t.reached)[..., SUB_GOAL_INDEX["drink water"]]
    assert chopped.any() and drunk.any()
    np.testing.assert_allclose(t.reward - t.env_reward, chopped * TOY.bonus, atol=1e-6)
    assert (np.asarray(t.success) <= chopped).all()


def test_pause_lookup_keeps_the_slot_for_the_whole_phase():
    args = dataclasses.replace(TOY, guidance_lookup="pause")
    agent, runner, records = setup(args)
    store(records, 0, 0, key_of(EMPTY_TREE), ["chop tree"], [("tree in view", True)])
    store(records, 1, 0, key_of(["water in view"]), ["drink water"], [("water in view", True)])
    target = np.asarray(runner.env_state.target)
    runner, _, outcomes, _ = rl.train_phase(args, agent, runner, records.table(), jnp.int32(2))
    np.testing.assert_array_equal(runner.slot, target * 2)
    steps = np.asarray(outcomes["steps"])
    assert steps[0] == (target == 0).sum() * 32 and steps[2] == (target == 1).sum() * 32


# ------------------------------------------------------------------------------------------------ outcomes and candidates


def test_outcomes_count_visits_returns_at_entry_and_what_was_reached():
    args = dataclasses.replace(TOY, gamma=0.5)
    agent, runner, records = setup(args)
    slot = jnp.array([[0, 1], [0, 1], [2, 1]])
    zeros = jnp.zeros((3, 2))
    transitions = rl.Transition(
        obs=jnp.zeros((3, 2, 2), jnp.uint8), slot=slot, action=jnp.zeros((3, 2), jnp.int32), log_prob=zeros, value=zeros,
        reward=zeros + 9.0, env_reward=jnp.array([[1.0, 0.0], [0.0, 2.0], [4.0, 0.0]]), done=jnp.zeros((3, 2), bool),
        entered=jnp.array([[True, True], [False, False], [True, False]]), success=jnp.array([[False, True], [False] * 2, [False] * 2]),
        reached=jnp.zeros((3, 2, NUM_BASIC), bool).at[0, 1, 4].set(True),
    )  # fmt: skip
    outcomes = {name: np.asarray(v) for name, v in rl.slot_outcomes(args, agent, transitions, 4).items()}
    assert outcomes["visits"].tolist() == [1, 1, 1, 0] and outcomes["steps"].tolist() == [2, 3, 1, 0]
    assert outcomes["returns"].tolist() == [1 + 0.25 * 4, 0.5 * 2, 4, 0]  # environment's reward, no bonus, no value
    assert outcomes["successes"].tolist() == [0, 1, 0, 0]
    assert outcomes["reached"][1, 4] == 1 and outcomes["reached"].sum() == 1
    assert outcomes["actions"][:, 0].tolist() == [2, 3, 1, 0]


def with_outcomes(visits, means, variances):
    records = rl.Records(TOY, 3, (2,))
    for c, name in enumerate(("chop tree", "drink water")):
        store(records, 0, c, key_of(EMPTY_TREE), [name], [("tree in view", True)])
    records.visits[0], records.returns[0] = visits, np.array(visits) * means
    records.squares[0] = np.array(visits) * (np.array(variances) + np.array(means) ** 2)
    return records


def test_a_candidate_wins_only_with_enough_visits_and_a_clear_lead():
    assert with_outcomes([100, 100], [1.0, 2.0], [1.0, 1.0]).decided() == [(0, 1, 0)]
    assert with_outcomes([100, 100], [2.0, 1.0], [1.0, 1.0]).decided() == [(0, 0, 1)]
    assert with_outcomes([100, 10], [1.0, 2.0], [1.0, 1.0]).decided() == []
    assert with_outcomes([100, 100], [1.0, 1.05], [1.0, 1.0]).decided() == []


def test_evaluation_uses_the_winner():
    records = with_outcomes([100, 100], [1.0, 2.0], [1.0, 1.0])
    best = records.best_table()
    assert np.asarray(best.goals[0]).nonzero()[0].tolist() == [SUB_GOAL_INDEX["drink water"]]
    np.testing.assert_array_equal(best.context[0], records.context[0, 1])
    assert best.context.shape[0] == 8 + 1


def test_the_winner_is_what_the_adapter_learns_from():
    records = with_outcomes([100, 100], [1.0, 2.0], [1.0, 1.0])
    records.analyses[0] = ["loser", "winner"]
    seen = []

    class Spy(rladapter_adapter.NoAdapter):
        def finetune(self, examples, key, **_):
            seen.extend(examples)
            return {}

    rl.finetune(records, Spy(), jax.random.key(0))
    assert seen == [("prompt", "winner")]


def test_comprehension_scores():
    records = with_outcomes([10, 10], [0.0, 0.0], [1.0, 1.0])
    records.steps[0] = 10
    records.reached[0, 0, SUB_GOAL_INDEX["chop tree"]] = 10
    records.successes[0, 0] = 5
    args = {c: dataclasses.replace(TOY, comprehension=c) for c in ("cosine", "binary", "success", "none", "cosine-actions")}
    score = {c: rl.comprehension_scores(a, records) for c, a in args.items() if c != "cosine-actions"}
    low, high = 1 / (1 + np.exp(1)), 1 / (1 + np.exp(-9))  # cosine 0 and 1
    np.testing.assert_allclose(score["cosine"][0], [(low + high) / 2, low], atol=1e-4)
    assert score["binary"][0].tolist() == [1, 0] and score["success"][0].tolist() == [0.5, 0]
    assert np.isnan(score["none"]).all() and all(np.isnan(score[c][1:]).all() for c in score)
    records.actions[0, 0] = [3, 0, 1]
    actions = rl.comprehension_scores(args["cosine-actions"], records)[0, 0]
    assert 0 < actions < 1


# ---------------------------------------------------------------------------------------------------------------- a pause


def test_queries_go_to_the_most_frequent_situations_without_a_row():
    records = rl.Records(TOY, 3, (2,))
    store(records, 0, 0, key_of(EMPTY_TREE), ["chop tree"], [("tree in view", True), ("water in view", False), ("dark", False)])
    facts = np.stack([key_of(["tree in view"])] * 5 + [key_of(["water in view"])] * 3 + [key_of(["dark", "water in view"])] * 4)
    queries = rl.select_queries(TOY, records, np.zeros((12, 2), np.uint8), facts)
    asked = [set(np.flatnonzero(q.facts)) for q in queries if q.candidate == 0]
    assert asked == [{FACT_INDEX["water in view"], FACT_INDEX["dark"]}, {FACT_INDEX["water in view"]}]
    assert all(q.row != 0 for q in queries)
    assert queries[0].sub_goals == [SUB_GOAL_INDEX["chop tree"]] and queries[0].comprehension is None


def test_frequent_rows_get_a_second_candidate_and_a_beaten_one_is_asked_anew():
    records = rl.Records(TOY, 3, (2,))
    store(records, 0, 0, key_of(EMPTY_TREE), ["chop tree"], [("tree in view", True)])
    records.visits[0, 0] = 1000
    again = rl.select_queries(TOY, records, np.zeros((1, 2), np.uint8), key_of(EMPTY_TREE)[None])
    assert [(q.row, q.candidate) for q in again] == [(0, 1)]
    records = with_outcomes([100, 100], [2.0, 1.0], [1.0, 1.0])
    again = rl.select_queries(TOY, records, np.zeros((1, 2), np.uint8), key_of(EMPTY_TREE)[None])
    assert [(q.row, q.candidate) for q in again] == [(0, 1)]


def test_a_full_table_gives_up_the_rows_that_are_used_least():
    records = rl.Records(TOY, 3, (2,))
    for row in range(8):
        store(records, row, 0, key_of([FACTS[row]]), ["chop tree"], [])
        records.visits[row, 0] = 100 - row
    assert rl.free_rows(records, 2) == [7, 6]


class FailingGuide:
    name = "failing"

    def __init__(self, replies):
        self.replies = replies

    def complete(self, batch, samples):
        return self.replies[: len(batch)]


def test_a_reply_that_cannot_be_used_leaves_the_row_as_it_was_and_is_counted():
    records = rl.Records(TOY, 3, (2,))
    store(records, 0, 0, key_of(EMPTY_TREE), ["chop tree"], [("tree in view", True)])
    before = {name: value.copy() for name, value in records.arrays.items()}
    guide = FailingGuide([llm_client.Reply(text="I can't help with that."), llm_client.Reply(error="503", calls=1)])
    queries = [query(0, 1, key_of(EMPTY_TREE)), query(1, 0, key_of(["dark"]))]
    env = make_env("Toy-v0", 8)
    log, metrics = rl.refine_guidance(
        TOY, env, 0, records, queries, rladapter_adapter.NoAdapter(), guide, llm_client.HashEmbedding(384), jax.random.key(0)
    )
    assert metrics["llm/failures"] == 2 and metrics["guidance/valid_replies"] == 0 and all(r["error"] for r in log)
    for name, value in records.arrays.items():
        np.testing.assert_array_equal(value, before[name])
    json.dumps(log)


# ----------------------------------------------------------------------------------------------------------------- phases


def test_three_phases_and_a_short_one_compile_once():
    args = dataclasses.replace(TOY, hidden_size=24)
    agent, runner, records = setup(args)
    before = rl.train_phase._cache_size()
    for n in (4, 4, 4, 1):
        runner, metrics, _, samples = rl.train_phase(args, agent, runner, records.table(), jnp.int32(n))
    assert rl.train_phase._cache_size() == before + 1
    assert int(runner.update) == 13 and samples.shape == (4 * rl.SAMPLES_PER_UPDATE, 2)
    assert float(metrics["episodes"]) == 16


def test_the_craftax_runner_has_no_weak_types():
    """They would compile the phase twice."""
    args = rl.Args(num_envs=8, num_steps=8)
    env = make_env(args.env_id, args.num_envs)
    agent, params = jax.eval_shape(lambda: (0, 0)), None
    agent, params = rl.make_agent(args, env, jax.random.key(0))
    shapes = jax.eval_shape(lambda k: rl.init_runner(args, agent, params, k), jax.random.key(1))
    assert not [x for x in jax.tree.leaves(shapes) if getattr(x, "weak_type", False)]


@pytest.mark.parametrize("guidance", ["none", "full", "facts"])
def test_it_learns_the_toy_game(guidance):
    args = dataclasses.replace(TOY, guidance=guidance, total_timesteps=8 * 16 * 60, updates_per_phase=59, eval_episodes=64)
    agent, runner, records = setup(args)
    if guidance == "full":
        store(records, 0, 0, key_of(EMPTY_TREE), ["chop tree"], [("tree in view", True)])
    untrained = rl.evaluate(args, agent, runner.params, records.best_table(), jax.random.key(5))
    runner, _, _, _ = rl.train_phase(args, agent, runner, records.table(), jnp.int32(59))
    trained = rl.evaluate(args, agent, runner.params, records.best_table(), jax.random.key(5))
    assert untrained["episodic_return"] < 5 and trained["episodic_return"] > 7
    assert trained["eval_episodes"] == 64 and trained["episodic_length"] == 8
    assert set(trained["achievements"].values()) <= {i / 64 for i in range(65)}


@dataclasses.dataclass(frozen=True)
class Coin:
    """Probe env with a known value: reward 1 at every step, episodes of 4 steps, no observation of the time."""

    name: str = "Coin"
    num_actions: int = 2
    achievements: tuple[str, ...] = ("a",)

    def reset(self, key, num_envs):
        return jnp.zeros(num_envs, jnp.int32)

    def refill(self, key, state):
        return state

    def observe(self, state):
        return state[:, None].astype(jnp.uint8)

    def step(self, key, state, action):
        done = state >= 3
        empty = jnp.zeros((*state.shape, NUM_BASIC), bool)
        return jnp.where(done, 0, state + 1), jnp.ones(state.shape), done, {
            "reached": empty, "worked": empty, "achievements": jnp.zeros((*state.shape, 1), bool),
        }  # fmt: skip

    def features(self, obs):
        return jax.nn.one_hot(obs[..., 0], 4)

    def facts(self, obs):
        return jnp.zeros((*obs.shape[:-1], len(FACTS)), bool)


def test_the_critic_finds_the_known_value_of_a_probe_env():
    args = dataclasses.replace(TOY, gamma=0.5, guidance="none", anneal_lr=False, updates_per_phase=60)
    agent, params = rl.make_agent(args, Coin(), jax.random.key(0))
    runner = rl.init_runner(args, agent, params, jax.random.key(1))
    table = rl.Records(args, 2, (1,)).table()
    runner, metrics, _, _ = rl.train_phase(args, agent, runner, table, jnp.int32(60))
    _, value = agent(runner.params, table, jnp.arange(4, dtype=jnp.uint8)[:, None], jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(value, [1.875, 1.75, 1.5, 1.0], atol=0.1)


def test_the_learning_rate_falls_to_zero_over_the_run():
    assert float(rl.learning_rate(TOY, jnp.int32(0))) == pytest.approx(TOY.learning_rate)
    assert float(rl.learning_rate(TOY, jnp.int32(TOY.num_updates))) == 0.0
    assert float(rl.learning_rate(dataclasses.replace(TOY, anneal_lr=False), jnp.int32(5))) == pytest.approx(TOY.learning_rate)


def test_phases_add_up_to_the_updates():
    for updates in (1, 2, 4, 5, 6, 13):
        args = dataclasses.replace(TOY, total_timesteps=updates * TOY.batch_size - 3)
        assert args.num_updates == updates
        assert sum(args.updates_in_phase(p) for p in range(args.num_phases)) == updates
        assert all(1 <= args.updates_in_phase(p) <= 4 for p in range(args.num_phases))
