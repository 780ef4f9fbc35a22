"""The algorithm: GAE, PPO loss, table lookup, outcomes, pauses, phases. Mostly on the toy game, which compiles fast."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import embeddings
import llm_client
import rladapter_adapter
import rladapter_ppo as rl
from envs import make_env
from envs.vocabulary import FACT_INDEX, FACTS, NUM_BASIC, SUB_GOAL_INDEX, SUB_GOALS

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


def query(facts, obs=(0, 0)):
    return rl.Query(np.array(obs, np.uint8), facts, [], None)


def store(records, facts, advice):
    """advice: {sub-goal: [(fact, truth), ...]}; the rows it went to"""
    goals = tuple(SUB_GOAL_INDEX[goal] for goal in advice)
    because = tuple(tuple((FACT_INDEX[fact], truth) for fact, truth in reasons) for reasons in advice.values())
    rows = rl.store_guidance(records, query(facts), llm_client.Guidance(goals, because))
    return list(rows.values())


TREE = {"chop tree": [("tree in view", True)]}
LAKE = {"drink water": [("water in view", True)]}


def lookup_of(args, agent, table, runner):
    return rl.make_lookup(args, table, jax.random.key(9), agent.env.facts(agent.env.observe(runner.env_state)))


def advised_in(transitions):
    """The sub-goals among the bits of the context, (..., S)."""
    return np.asarray(transitions.context)[..., : len(SUB_GOALS)]


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

    def __call__(self, params, table, obs, context):
        logit = params * obs[:, 0].astype(jnp.float32)
        return jnp.stack([jnp.zeros_like(logit), logit], 1), jnp.full(obs.shape[0], 0.5)


def loss_of(log_ratio, advantage, args=rl.Args(norm_adv=False, ent_coef=0.0, vf_coef=0.0)):
    """PPO loss of one sample whose new probability is exp(log_ratio) times the old one."""
    zeros = jnp.zeros(1)
    batch = rl.Transition(
        obs=jnp.zeros((1, 1), jnp.uint8), context=zeros, action=jnp.zeros(1, jnp.int32),
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
    agent, runner, records = setup(TOY)
    store(records, key_of(EMPTY_TREE), TREE)
    table = records.best_table()
    _, transitions, _ = rl.rollout(TOY, agent, runner, table, lookup_of(TOY, agent, table, runner))
    assert 0 < advised_in(transitions).any(-1).mean() < 1  # guided and unguided steps
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transitions)
    _, metrics = rl.ppo_loss(TOY, agent, runner.params, table, flat, flat.reward, flat.reward)
    assert abs(float(metrics["approx_kl"])) < 1e-6 and float(metrics["clipfrac"]) == 0.0
    other = dataclasses.replace(flat, context=~flat.context)
    _, metrics = rl.ppo_loss(TOY, agent, runner.params, table, other, flat.reward, flat.reward)
    assert abs(float(metrics["approx_kl"])) > 1e-6  # the context matters, so the check above can fail


# ---- the table


def advised(records, *situations, tolerance=0):
    """Names of the sub-goals that the device advises in each situation, all advice shown."""
    args = dataclasses.replace(TOY, guidance_tolerance=tolerance)
    table, facts = records.best_table(), jnp.asarray(np.stack([key_of(s) for s in situations]))
    lookup = rl.make_lookup(args, table, jax.random.key(0), facts)
    found = np.asarray(rl.find_advice(args, table, lookup, facts))
    return [{SUB_GOALS[i] for i in np.flatnonzero(row)} for row in found]


def test_advice_serves_every_state_that_shares_the_facts_it_rests_on():
    records = rl.Records(TOY, 3, (2,))
    store(records, key_of(["tree in view", "dark"]), {"chop tree": [("tree in view", True), ("wood >= 1", False)]})
    assert advised(records, ["tree in view"], ["tree in view", "coal in view"]) == [{"chop tree"}] * 2
    assert advised(records, ["tree in view", "wood >= 1"], ["dark"]) == [set()] * 2


def test_the_tolerance_is_in_wrong_facts():
    records = rl.Records(TOY, 3, (2,))
    store(records, key_of(["tree in view"]), {"chop tree": [("tree in view", True), ("wood >= 1", False)]})
    situations = (["tree in view", "wood >= 1"], ["wood >= 1"])
    assert advised(records, *situations) == [set(), set()]
    assert advised(records, *situations, tolerance=1) == [{"chop tree"}, set()]
    assert advised(records, *situations, tolerance=2) == [{"chop tree"}] * 2


def test_all_advice_that_fits_is_given():
    records = rl.Records(TOY, 3, (2,))
    store(records, key_of(["tree in view", "dark"]), TREE | {"sleep": [("dark", True)]})
    assert advised(records, ["tree in view", "dark"], ["tree in view"], []) == [
        {"chop tree", "sleep"},
        {"chop tree"},
        set(),
    ]


def test_device_and_host_agree_on_what_fits():
    records, rng = rl.Records(TOY, 3, (2,)), np.random.default_rng(0)
    for goal in SUB_GOALS[:8]:
        facts = rng.random(len(FACTS)) < 0.5
        store(records, facts, {goal: [(FACTS[i], bool(facts[i])) for i in rng.choice(len(FACTS), 2, replace=False)]})
    facts = rng.random((64, len(FACTS))) < 0.5
    host = [{SUB_GOALS[g] for g in records.goal[row]} for row in records.fits(facts)]
    assert host == advised(records, *[[FACTS[i] for i in np.flatnonzero(f)] for f in facts])
    assert 0 < sum(map(len, host)) < 64 * 8


def test_an_empty_table_guides_nobody():
    records = rl.Records(TOY, 3, (2,))
    assert advised(records, EMPTY_TREE, []) == [set(), set()]


def test_the_same_advice_takes_one_row():
    records = rl.Records(TOY, 3, (2,))
    first = store(records, key_of(EMPTY_TREE), TREE)
    assert store(records, key_of([*EMPTY_TREE, "dark"]), TREE) == first and records.valid.sum() == 1
    assert store(records, key_of(EMPTY_TREE), {"sleep": TREE["chop tree"]}) != first
    store(records, key_of([]), {"chop tree": [("tree in view", False)]})
    assert records.valid.sum() == 3


def test_reasons_that_are_not_so_are_dropped_and_no_reasons_mean_all_facts():
    records = rl.Records(TOY, 3, (2,))
    store(
        records, key_of(EMPTY_TREE), {"chop tree": [("tree in view", True), ("dark", True)], "sleep": [("dark", True)]}
    )
    assert np.flatnonzero(records.care[0]).tolist() == [FACT_INDEX["tree in view"]]
    assert records.care[1].all()


def test_a_full_table_gives_up_the_row_that_is_used_least():
    records = rl.Records(TOY, 3, (2,))
    for row in range(8):
        assert store(records, key_of([FACTS[row]]), {"chop tree": []}) == [row]
    records.visits[:, 1] = [9, 8, 1, 7, 6, 5, 4, 3]
    assert store(records, key_of(["dark"]), {"sleep": []}) == [2]
    assert records.valid.all() and records.visits[2].sum() == 0
    many = {goal: [("dark", True)] for goal in SUB_GOALS[:12]}
    assert len(store(records, key_of(["dark"]), many)) == 8  # an answer larger than the table


def test_the_context_is_the_embedding_of_the_advised_sub_goals():
    records = rl.Records(TOY, 3, (2,))
    rows = jnp.asarray(np.isin(np.arange(len(SUB_GOALS)), [0, 4]))[None]
    facts = make_env("Toy-v0", 1).facts(jnp.zeros((1, 2), jnp.uint8))

    def vector(rows):
        parts = rl.embed_advice(records.table(), rl.CONTEXTS["full"](rows, facts))
        return [np.asarray(weights @ basis)[0] for weights, basis in parts]

    expected = embeddings.embed_sub_goals(embeddings.HashEmbedding(384), [0, 4]) * np.sqrt(384)
    np.testing.assert_allclose(vector(rows)[0], expected, atol=1e-4)
    np.testing.assert_array_equal(vector(rows)[1], facts[0])
    assert not vector(jnp.zeros_like(rows))[0].any()


def test_the_network_never_forms_the_context_vectors_but_uses_them():
    agent, runner, records = setup(TOY)
    network = nnx.merge(agent.graphdef, runner.params)
    context = jnp.eye(3, len(SUB_GOALS) + len(FACTS), dtype=bool)
    features = agent.env.features(agent.env.observe(runner.env_state))[:3]
    parts = rl.embed_advice(records.table(), context)
    factored = network(features, parts)
    formed = network(features, [(jnp.eye(3), weights @ basis) for weights, basis in parts])
    for a, b in zip(factored, formed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def rolled(args, records, agent, runner, table=None):
    table = table or records.best_table()
    return rl.rollout(args, agent, runner, table, lookup_of(args, agent, table, runner))[1]


def test_without_guidance_a_bonus_counts_for_every_sub_goal():
    args = dataclasses.replace(TOY, guidance="none", guidance_bonus=0.5)
    agent, runner, records = setup(args)
    transitions = rolled(args, records, agent, runner)
    np.testing.assert_allclose(transitions.reward, transitions.env_reward * 1.5)
    assert rl.Args(guidance="none").bonus == 0.0 and rl.Args().bonus > 0.0


def test_the_bonus_is_for_advised_sub_goals_only():
    agent, runner, records = setup(TOY)
    store(records, key_of(EMPTY_TREE), TREE | {"sleep": [("water in view", False)]})
    t = rolled(TOY, records, agent, runner)
    chopped = np.asarray(t.reached)[..., SUB_GOAL_INDEX["chop tree"]]
    drunk = np.asarray(t.reached)[..., SUB_GOAL_INDEX["drink water"]]
    assert chopped.any() and drunk.any()
    np.testing.assert_allclose(t.reward - t.env_reward, chopped * TOY.bonus, atol=1e-6)


def test_pause_lookup_keeps_the_advice_for_the_whole_phase():
    args = dataclasses.replace(TOY, guidance_lookup="pause", candidates=1)
    agent, runner, records = setup(args)
    tree, lake = store(records, key_of([]), {"chop tree": [], "drink water": []})
    records.care[:] = key_of(["tree in view"])  # whatever they see later, envs keep what they saw at the pause
    records.keys[tree] = key_of(EMPTY_TREE)
    target = np.asarray(runner.env_state.target)
    t = rolled(args, records, agent, runner)
    np.testing.assert_array_equal(advised_in(t)[:, :, SUB_GOAL_INDEX["chop tree"]], np.tile(target == 0, (16, 1)))
    _, _, outcomes, _ = rl.train_phase(args, agent, runner, records.table(), jnp.int32(2))
    assert np.asarray(outcomes["steps"])[tree].tolist() == [0, (target == 0).sum() * 32]
    assert np.asarray(outcomes["steps"])[lake].tolist() == [0, (target == 1).sum() * 32]


# ---- outcomes and trials


def test_outcomes_count_visits_returns_at_entry_and_what_was_reached():
    """Two envs, four steps; the row fits where a tree is in view; it is hidden from the second env."""
    args = dataclasses.replace(TOY, gamma=0.5)
    agent, _, records = setup(args)
    (row,) = store(records, key_of(EMPTY_TREE), TREE)
    target = jnp.array([[1, 1], [0, 0], [0, 1], [1, 0]])  # 0: a tree
    zeros = jnp.zeros((4, 2))
    reached = jnp.zeros((4, 2, NUM_BASIC), bool).at[1, 0, 0].set(True).at[2, 0, 0].set(True).at[2, 1, 0].set(True)
    transitions = rl.Transition(
        obs=jnp.stack([target, jnp.zeros_like(target)], -1).astype(jnp.uint8), context=jnp.zeros((4, 2, 89), bool),
        action=jnp.ones((4, 2), jnp.int32), log_prob=zeros, value=zeros, reward=zeros + 9.0,
        env_reward=jnp.array([[5.0, 0.0], [1.0, 2.0], [0.0, 0.0], [4.0, 8.0]]), done=jnp.zeros((4, 2), bool),
        reached=reached,
    )  # fmt: skip
    table = records.table()
    lookup = rl.make_lookup(args, table, jax.random.key(0), agent.env.facts(transitions.obs[0]))
    lookup = dataclasses.replace(lookup, shown=jnp.tile(jnp.array([[True], [False]]), (1, 8)))
    out = {name: np.asarray(v)[row] for name, v in rl.row_outcomes(args, agent, table, lookup, transitions).items()}
    assert out["visits"].tolist() == [2, 1] and out["steps"].tolist() == [2, 2]  # [hidden, shown]
    assert out["returns"].tolist() == [2 + 8 / 4 + 8, 1 + 4 / 4]  # environment's reward, no bonus, no value
    assert out["squares"].tolist() == [16 + 64, 4]
    assert out["successes"].tolist() == [0, 1]  # once a visit; the other env reached it outside
    assert out["reached"][1, 0] == 2 and out["reached"].sum() == 2 and out["actions"][:, 1].tolist() == [2, 2]
    ended = dataclasses.replace(transitions, done=transitions.done.at[1, 0].set(True))
    again = rl.row_outcomes(args, agent, table, lookup, ended)
    assert np.asarray(again["visits"])[row].tolist() == [2, 2]  # a new episode in the same situation is a new visit


def with_outcomes(visits, means, variances):
    """Records of one row after a phase with these visits, mean returns and variances: [hidden, shown]."""
    records = rl.Records(TOY, 3, (2,))
    store(records, key_of(EMPTY_TREE), TREE)
    records.add_outcomes(phase_sums(visits, means, variances))
    return records


def phase_sums(visits, means, variances):
    sums = {name: np.zeros((8, 2)) for name in ("visits", "returns", "squares", "successes", "steps")}
    sums |= {"reached": np.zeros((8, 2, NUM_BASIC)), "actions": np.zeros((8, 2, 3))}
    sums["visits"][0], sums["returns"][0] = visits, np.array(visits) * means
    sums["squares"][0] = np.array(visits) * (np.array(variances) + np.array(means) ** 2)
    return sums


@pytest.mark.parametrize(
    ("visits", "means", "show", "kept"),
    [
        ([100, 100], [1.0, 2.0], 1.0, True), ([100, 100], [2.0, 1.0], rl.HIDE, False),
        ([5, 100], [1.0, 9.0], 1 - rl.HIDE, True), ([100, 100], [1.0, 1.1], 1 - rl.HIDE, True),
        ([100, 5], [9.0, 1.0], 1 - rl.HIDE, True),
    ],
)  # fmt: skip
def test_advice_is_judged_only_with_enough_visits_and_a_clear_lead(visits, means, show, kept):
    records = with_outcomes(visits, means, [1.0, 1.0])
    assert float(records.table().show[0]) == pytest.approx(show)
    assert bool(records.best_table().show[0]) == kept


def test_evidence_is_gathered_over_phases_and_by_hand():
    records = with_outcomes([20, 20], [1.0, 1.5], [1.0, 1.0])
    assert records.lead()[0] == pytest.approx(0.5 / np.sqrt(0.1), rel=1e-6)
    for _ in range(5):
        records.add_outcomes(phase_sums([20, 20], [1.0, 1.5], [1.0, 1.0]))
    assert records.lead()[0] > rl.MARGIN


def test_advice_that_helps_is_not_condemned_because_returns_grow_while_it_is_hidden():
    """It happened: early phases show it to most envs, late ones, when returns are higher, to few."""
    records = with_outcomes([20, 140], [0.5, 0.6], [1.0, 1.0])
    for _ in range(4):
        records.add_outcomes(phase_sums([140, 20], [2.0, 2.1], [1.0, 1.0]))
    pooled = records.returns[0] / records.visits[0]
    assert pooled[1] < pooled[0] and records.lead()[0] > 0


def test_without_trials_all_advice_is_shown():
    records = rl.Records(dataclasses.replace(TOY, candidates=1), 3, (2,))
    assert np.asarray(records.table().show).all()


@pytest.mark.parametrize(("analysis", "expected"), [("It should chop tree.", 1), ("It should sleep.", 0)])
def test_the_adapter_learns_from_what_it_named_and_what_won(analysis, expected):
    records = with_outcomes([100, 100], [1.0, 2.0], [1.0, 1.0])
    records.said = [("prompt", analysis, [[SUB_GOAL_INDEX["chop tree"], 0, int(records.stamp[0])]])]
    seen = []

    class Spy(rladapter_adapter.NoAdapter):
        def finetune(self, examples, *_):
            seen.extend(examples)
            return {}

    rl.finetune(TOY, records, Spy(), jax.random.key(0))
    assert seen == [("prompt", analysis)] * expected
    records.arrays["evidence"][0, 0] *= -1  # now it lost
    rl.finetune(TOY, records, Spy(), jax.random.key(0))
    assert len(seen) == expected


def test_comprehension_scores():
    records = with_outcomes([0, 10], [0.0, 0.0], [1.0, 1.0])
    records.steps[0, 1] = 10
    records.reached[0, 1, SUB_GOAL_INDEX["chop tree"]] = 10
    records.successes[0, 1] = 5
    args = {
        c: dataclasses.replace(TOY, comprehension=c) for c in ("cosine", "binary", "success", "none", "cosine-actions")
    }
    score = {c: rl.comprehension_scores(a, records) for c, a in args.items() if c != "cosine-actions"}
    low, high = 1 / (1 + np.exp(1)), 1 / (1 + np.exp(-9))  # cosine 0 and 1
    assert score["cosine"][0] == pytest.approx((low + high) / 2, abs=1e-4)
    assert score["binary"][0] == 1 and score["success"][0] == 0.5
    assert np.isnan(score["none"]).all() and all(np.isnan(score[c][1:]).all() for c in score)
    records.actions[0, 1] = [3, 0, 1]
    assert 0 < rl.comprehension_scores(args["cosine-actions"], records)[0] < 1
    records.reached[0, 1] = np.roll(records.reached[0, 1], 7)
    assert rl.comprehension_scores(args["cosine"], records)[0] < score["cosine"][0]


# ---- a pause


def select(records, *situations, **changes):
    facts = np.stack([key_of(s) for s in situations])
    return rl.select_queries(dataclasses.replace(TOY, **changes), records, np.zeros((len(facts), 2), np.uint8), facts)


def test_queries_go_to_the_situations_most_unlike_those_asked_about():
    records = rl.Records(TOY, 3, (2,))
    because = [(name, False) for name in ("water in view", "dark", "coal in view")] + [("tree in view", True)]
    store(records, key_of(EMPTY_TREE), {"chop tree": because})
    near, far = ["tree in view", "dark"], ["water in view", "dark", "coal in view"]
    queries = select(records, EMPTY_TREE, near, near, near, far, [*EMPTY_TREE, "asleep"])
    assert [set(np.flatnonzero(q.facts)) for q in queries] == [
        {FACT_INDEX[n] for n in far},
        {FACT_INDEX[n] for n in near},
    ]
    assert queries[0].sub_goals == [] and queries[0].comprehension is None
    assert len(select(records, near, far, queries_per_phase=1)) == 1
    records.remember(key_of(near))
    records.remember(key_of(far))
    assert select(records, EMPTY_TREE, near, far) == []


def test_of_situations_as_unlike_the_most_frequent_comes_first():
    records = rl.Records(TOY, 3, (2,))
    queries = select(records, ["dark"], ["asleep"], ["asleep"], queries_per_phase=1)
    assert np.flatnonzero(queries[0].facts).tolist() == [FACT_INDEX["asleep"]]


def test_frequent_advice_that_is_not_understood_is_asked_about_again_with_its_score():
    records = with_outcomes([0, 1000], [0.0, 1.0], [1.0, 1.0])
    records.steps[0, 1] = 2000
    (again,) = select(records, EMPTY_TREE)
    assert again.sub_goals == [SUB_GOAL_INDEX["chop tree"]] and again.times_asked == 1
    assert again.comprehension == pytest.approx(1 / (1 + np.e))
    assert select(records, EMPTY_TREE)[0].times_asked == 2
    records.reached[0, 1, 0] = records.successes[0, 1] = 1000
    assert select(records, EMPTY_TREE) == []


class FixedGuide:
    name = "fixed"

    def __init__(self, *replies):
        self.replies = replies

    def complete(self, batch, samples):
        return list(self.replies[: len(batch)])


def refine(records, guide, *queries):
    env = make_env("Toy-v0", 8)
    pause = rl.ask_guide(TOY, env, list(queries), rladapter_adapter.NoAdapter(), guide, jax.random.key(0))
    return rl.store_answers(0, records, pause, guide)


def test_a_reply_that_cannot_be_used_leaves_the_table_as_it_was_and_is_counted():
    records = rl.Records(TOY, 3, (2,))
    store(records, key_of(EMPTY_TREE), TREE)
    before = {name: value.copy() for name, value in records.arrays.items()}
    guide = FixedGuide(llm_client.Reply(text="I can't help with that."), llm_client.Reply(error="503", calls=1))
    log, metrics = refine(records, guide, query(key_of(EMPTY_TREE)), query(key_of(["dark"])))
    assert metrics["llm/failures"] == 2 and metrics["guidance/valid_replies"] == 0 and all(r["error"] for r in log)
    for name, value in records.arrays.items():
        np.testing.assert_array_equal(value, before[name])
    json.dumps(log)


def test_an_answer_goes_from_the_guide_into_the_table():
    records = rl.Records(TOY, 3, (2,))
    reply = llm_client.Reply(text='{"sub_goals": {"chop tree": ["tree in view"]}}', calls=1, prompt_tokens=7)
    log, metrics = refine(records, FixedGuide(reply), query(key_of([*EMPTY_TREE, "dark"])))
    assert advised(records, EMPTY_TREE, ["dark"]) == [{"chop tree"}, set()]
    assert metrics["llm/calls"] == 1 and metrics["llm/prompt_tokens"] == 7 and metrics["llm/failures"] == 0
    assert log[0]["sub_goals"] == ["chop tree"] and log[0]["because"] == [["tree in view"]] and log[0]["rows"] == [0]


# ---- phases


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
    agent, params = rl.make_agent(args, env, jax.random.key(0))
    shapes = jax.eval_shape(lambda k: rl.init_runner(args, agent, params, k), jax.random.key(1))
    assert not [x for x in jax.tree.leaves(shapes) if getattr(x, "weak_type", False)]


@pytest.mark.parametrize("guidance", ["none", "full", "facts"])
def test_it_learns_the_toy_game(guidance):
    args = dataclasses.replace(
        TOY, guidance=guidance, total_timesteps=8 * 16 * 60, updates_per_phase=59, eval_episodes=64
    )
    agent, runner, records = setup(args)
    if guidance == "full":
        store(records, key_of(EMPTY_TREE), TREE)
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
    num_pools: int = 1
    num_actions: int = 2
    achievements: tuple[str, ...] = ("a",)

    def reset(self, key, num_envs):
        return jnp.zeros(num_envs, jnp.int32)

    def refill(self, keys, state):
        return state

    def observe(self, state):
        return state[:, None].astype(jnp.uint8)

    def step(self, keys, state, action):
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
    _, value = agent(runner.params, table, jnp.arange(4, dtype=jnp.uint8)[:, None], jnp.zeros((4, 0), bool))
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
