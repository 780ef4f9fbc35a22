"""The guidance table: lookup, rows, questions, answers, outcomes, trials, comprehension, examples."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import advice as lookup
import guidance
import llm_client
import rladapter_adapter
import rladapter_ppo as rl
from envs.crafter import CRAFTER
from envs.crafter.vocabulary import FACTS, NUM_BASIC, SUB_GOALS
from envs.game import holds
from envs.toy import TOY as TOY_GAME
from guidance import HostTable, TableArgs
from utils import trials
from utils.ranking import ranks
from utils.trials import CONTROL_SHARE, DECIDED_AT_SE, WITH

ARGS = TableArgs(guidance_rows=8, queries_per_phase=4)
FACT, GOAL = CRAFTER.fact_numbers, CRAFTER.sub_goal_numbers
EMPTY_TREE = ["tree in view"]
TREE = {"chop tree": [("tree in view", True)]}


@dataclasses.dataclass(frozen=True)
class Words:
    """Of an env what the table needs: its words."""

    game = CRAFTER
    obs_size = 2

    def to_text(self, obs):
        return f"a caption of {obs.tolist()}"

    def map_over_envs(self, function, axes):
        return function


def table_of(**changes):
    return HostTable(dataclasses.replace(ARGS, **changes), Words())


def situation_of(names):
    return np.isin(np.arange(len(FACTS)), [FACT[name] for name in names])


def question_about(names, obs=(0, 0)):
    return llm_client.Question(np.array(obs, np.uint8), situation_of(names), [], None)


def store(table, names, advice):
    """advice: {sub-goal: [(fact, truth), ...]}; the rows it went to"""
    question = question_about(names)
    question.advice = tuple(
        (GOAL[goal], tuple((FACT[fact], truth) for fact, truth in reasons)) for goal, reasons in advice.items()
    )
    table.store([question])
    return list(question.rows.values())


# ---- lookup


def advised(host_table, *situations):
    """Names of the sub-goals that the device advises in each situation, all advice shown."""
    table, facts = host_table.for_evaluation(), jnp.asarray(np.stack([situation_of(s) for s in situations]))
    exposure = lookup.draw_exposures(table, jax.random.key(0), facts)
    known = jnp.zeros((len(facts), len(CRAFTER.kinds)), bool)
    found = lookup.AdviceContext.advise(rl.Args(table=ARGS), CRAFTER, table, exposure, facts, known)["advised"]
    return [{SUB_GOALS[i] for i in np.flatnonzero(row)} for row in np.asarray(found)]


def test_advice_serves_every_state_that_shares_the_facts_it_rests_on():
    table = table_of()
    store(table, ["tree in view", "dark"], {"chop tree": [("tree in view", True), ("wood >= 1", False)]})
    assert advised(table, ["tree in view"], ["tree in view", "coal in view"]) == [{"chop tree"}] * 2
    assert advised(table, ["tree in view", "wood >= 1"], ["dark"]) == [set()] * 2


def test_the_tolerance_is_in_wrong_facts(monkeypatch):
    table = table_of()
    store(table, ["tree in view"], {"chop tree": [("tree in view", True), ("wood >= 1", False)]})
    situations = (["tree in view", "wood >= 1"], ["wood >= 1"])
    for tolerance, expected in ((0, [set(), set()]), (1, [{"chop tree"}, set()]), (2, [{"chop tree"}] * 2)):
        monkeypatch.setattr(lookup, "TOLERANCE", tolerance)
        assert advised(table, *situations) == expected


def test_all_advice_that_fits_is_given():
    table = table_of()
    store(table, ["tree in view", "dark"], TREE | {"sleep": [("dark", True)]})
    assert advised(table, ["tree in view", "dark"], ["tree in view"], []) == [
        {"chop tree", "sleep"},
        {"chop tree"},
        set(),
    ]


def test_device_and_host_agree_on_what_fits():
    table, rng = table_of(), np.random.default_rng(0)
    for goal in SUB_GOALS[:8]:
        facts = rng.random(len(FACTS)) < 0.5
        reasons = [(FACTS[i], bool(facts[i])) for i in rng.choice(len(FACTS), 2, replace=False)]
        store(table, [FACTS[i] for i in np.flatnonzero(facts)], {goal: reasons})
    facts = rng.random((64, len(FACTS))) < 0.5
    host = [{SUB_GOALS[g] for g in table.rows.goal[row]} for row in table.fits(facts)]
    assert host == advised(table, *[[FACTS[i] for i in np.flatnonzero(f)] for f in facts])
    assert 0 < sum(map(len, host)) < 64 * 8


def test_an_empty_table_guides_nobody():
    assert advised(table_of(), EMPTY_TREE, []) == [set(), set()]


# ---- rows


def test_the_same_advice_takes_one_row():
    table = table_of()
    first = store(table, EMPTY_TREE, TREE)
    assert store(table, [*EMPTY_TREE, "dark"], TREE) == first and table.rows.valid.sum() == 1
    assert store(table, EMPTY_TREE, {"sleep": TREE["chop tree"]}) != first
    store(table, [], {"chop tree": [("tree in view", False)]})
    assert table.rows.valid.sum() == 3


def test_advice_is_the_rule_that_it_states():
    """A reply once said "sleep, because energy low" of a rested player: it was kept for rested players only."""
    table, tree, dark = table_of(), FACT["tree in view"], FACT["dark"]
    store(table, EMPTY_TREE, {"chop tree": [("tree in view", True), ("dark", False)], "sleep": [("dark", True)]})
    assert [np.flatnonzero(table.rows.care[row]).tolist() for row in (0, 1)] == [sorted((tree, dark)), [dark]]
    facts = np.zeros((4, len(FACTS)), bool)  # nothing, a tree, the dark, both
    facts[[1, 3], tree] = facts[[2, 3], dark] = True
    assert table.fits(facts)[:, :2].tolist() == [[False, False], [True, False], [False, True], [False, True]]
    on_device = lookup.fitting_rows(table.for_evaluation(), jnp.asarray(facts))
    assert np.array_equal(on_device, table.fits(facts))
    assert table.reasons_text(0) == ["tree in view", "not dark"] and table.reasons_text(1) == ["dark"]
    told = table.metrics()
    assert (told["guidance/rules_stated"], told["guidance/rules_holding"], told["guidance/rows_unmet"]) == (2, 1, 2)
    table.rows.visits[0, WITH] = 1
    assert table.metrics()["guidance/rows_unmet"] == 1
    table.args = dataclasses.replace(table.args, guidance_support=2)
    assert table.metrics()["guidance/rows_unmet"] == 0  # nobody is given what was stated once
    assert store(table, ["dark"], {"sleep": [("dark", True)]}) == [1]  # the same rule, where it holds
    told = table.metrics()
    assert (told["guidance/rules_stated"], told["guidance/rules_holding"]) == (1, 1)


def test_advice_without_reasons_rests_on_what_its_sub_goal_needs():
    table = table_of()
    store(table, ["dark"], {"mine iron": [], "chop grass": [], "survival": []})
    assert table.reasons_text(0) == ["unlocked make stone pickaxe", "iron in view"]
    assert table.reasons_text(1) == table.reasons_text(2) == []  # these need nothing, and are advised everywhere


def test_tables_of_older_runs_are_read():
    table, other = table_of(), table_of()
    store(table, EMPTY_TREE, TREE)
    arrays, rest = table.state()
    since = "truth", "age", "times_stated"
    other.load_state({name: array for name, array in arrays.items() if name not in since}, rest)
    facts = np.array([situation_of(EMPTY_TREE), situation_of([])])
    assert np.array_equal(other.fits(facts), table.fits(facts)) and table.fits(facts).any()


def test_a_full_table_gives_up_the_row_that_is_worth_least():
    table = table_of()
    for row in range(8):
        assert store(table, [FACTS[row]], {"chop tree": [(FACTS[row], True)]}) == [row]
    table.rows.steps[:, 1] = 1000
    table.rows.reached[:, 1, GOAL["chop tree"]] = [90, 80, 10, 70, 60, 50, 40, 30]
    assert store(table, ["dark"], {"sleep": []}) == [2]
    assert table.rows.valid.all() and table.rows.steps[2].sum() == 0
    many = {goal: [("dark", True)] for goal in SUB_GOALS[:12]}
    assert len(store(table, ["dark"], many)) == 8  # an answer larger than the table


def test_what_advice_is_worth():
    """The right time for a rare sub-goal is worth most, the wrong time for it least; always is worth as much as new."""
    table = table_of()
    iron, tree, idle = GOAL["mine iron"], GOAL["chop tree"], slice(5, 8)
    goals = [iron, iron, iron, tree, SUB_GOALS.index("survival"), *[iron] * 3]
    rows = table.rows
    rows.times_stated[:] = 1
    rows.goal[:], rows.steps[:5, 1] = goals, [100, 10_000, 1000, 10_000, 5000]
    rows.reached[:5, 1, iron] = 20, 20, 0, 20, 0  # 60 times in 26,100 steps
    rows.reached[3, 1, tree] = 300
    worth = table.worth()
    assert worth[0] == pytest.approx(21 / (100 * 60 / 26_100 + 1))
    assert worth[0] > worth[3] > worth[1] > worth[2] > worth[4]  # tree: 2.6 times as often as elsewhere
    assert worth[4] == pytest.approx(1 / (5 + 1)) and np.all(worth[idle] == 1)
    rows.times_stated[2] = 3  # the guide said it three times
    assert table.worth()[2] == pytest.approx(3 * worth[2])
    table.add_outcomes({})
    assert np.all(table.worth()[idle] == pytest.approx(1 / 1.2))  # never met
    assert worth[0] > 1 > worth[1]


def test_advice_that_works_is_worth_its_row_for_ever():
    table = table_of()
    table.rows.goal[:2], table.rows.valid[:2] = GOAL["mine iron"], True
    table.rows.times_stated[:2] = 1
    for _ in range(300):
        seen = np.zeros((8, 2)), np.zeros((8, 2, NUM_BASIC))
        seen[0][:2, 1], seen[1][:2, 1, GOAL["mine iron"]] = (100, 30_000), (2, 10)
        for name, value in zip(("steps", "reached"), seen, strict=True):
            array = getattr(table.rows, name)
            array *= 0.9
            array += value
        table.rows.age = 0.9 * table.rows.age + 1
    worth = table.worth()
    assert worth[0] > 2 > 1 > worth[1]


def test_advice_is_given_once_enough_replies_stated_it():
    table = table_of(guidance_support=2)
    dark, tree = [("dark", True)], [("tree in view", True)]
    store(table, ["dark"], {"sleep": dark, "chop tree": tree})
    facts = np.array([situation_of(["dark", "tree in view"])])
    assert not table.fits(facts).any() and advised(table, ["dark", "tree in view"]) == [set()]
    store(table, ["dark"], {"sleep": dark, "chop grass": dark})
    assert advised(table, ["dark", "tree in view"]) == [{"sleep"}] and table.fits(facts).sum() == 1
    assert table.rows.valid.sum() == 3  # the others are kept until they are said again
    store(table, [], {"chop grass": dark})
    assert advised(table, ["dark", "tree in view"]) == [{"sleep", "chop grass"}]


def test_a_rule_that_is_stated_again_counts_again():
    table = table_of()
    store(table, ["dark"], {"sleep": [("dark", True)]})
    store(table, ["dark"], {"sleep": [("dark", True)], "chop tree": []})
    assert table.rows.times_stated[:3].tolist() == [2, 1, 0]


def test_arrays_that_were_assigned_are_saved_and_come_back():
    """A `__getattr__` over a dict of arrays once let an assignment make an attribute that no checkpoint saw."""
    table, other = table_of(), table_of()
    store(table, EMPTY_TREE, TREE)
    table.rows.visits = table.rows.visits + 7
    arrays, rest = table.state()
    assert (arrays["visits"] == 7).all()
    other.load_state(arrays, json.loads(json.dumps(rest)))
    for name, array in table.state()[0].items():
        np.testing.assert_array_equal(other.state()[0][name], array)
    assert other.num_asked == 1 and advised(other, EMPTY_TREE) == [{"chop tree"}]


# ---- outcomes and trials


def test_outcomes_count_visits_returns_at_entry_and_what_was_reached():
    """Two envs, four steps; the row fits where a tree is in view; it is withheld from the second env."""
    host_table = table_of()
    (row,) = store(host_table, EMPTY_TREE, TREE)
    trees = jnp.array([[0, 0], [1, 1], [1, 0], [0, 1]]).astype(bool)
    facts = jnp.zeros((4, 2, len(FACTS)), bool).at[..., FACT["tree in view"]].set(trees)
    reached = jnp.zeros((4, 2, NUM_BASIC), bool).at[1, 0, 0].set(True).at[2, 0, 0].set(True).at[2, 1, 0].set(True)
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(rl.Transition))
    t = rl.Transition(**nothing | {
        "facts": facts, "action": jnp.ones((4, 2), jnp.int32), "reward": jnp.full((4, 2), 9.0),
        "env_reward": jnp.array([[5.0, 0.0], [1.0, 2.0], [0.0, 0.0], [4.0, 8.0]]),
        "done": jnp.zeros((4, 2), bool), "reached": reached,
    })  # fmt: skip
    table = host_table.for_training()
    exposure = lookup.draw_exposures(table, jax.random.key(0), facts[0])
    exposure = dataclasses.replace(exposure, shown=jnp.tile(jnp.array([[True], [False]]), (1, 8)))
    args = rl.Args(gamma=0.5, table=ARGS)

    def outcomes(transitions):
        found = lookup.AdviceContext.outcomes(args, Words(), table, exposure, transitions)
        return {name: np.asarray(v)[row] for name, v in found.items()}

    out = outcomes(t)
    assert out["visits"].tolist() == [2, 1] and out["steps"].tolist() == [2, 2]  # [without, with]
    # the environment's reward: no bonus, no value, no discount
    assert out["returns"].tolist() == [(2 + 8) + 8, 1 + 4]
    assert out["squares"].tolist() == [10**2 + 8**2, 5**2]
    assert out["successes"].tolist() == [0, 1]  # once a visit; the other env reached it outside
    assert out["reached"][1, 0] == 2 and out["reached"].sum() == 2 and out["actions"][:, 1].tolist() == [2, 2]
    ended = outcomes(dataclasses.replace(t, done=t.done.at[1, 0].set(True)))
    assert ended["visits"].tolist() == [2, 2]  # a new episode in the same situation is a new visit
    assert ended["returns"].tolist() == [18, 1 + 4]  # the first one's return ends with its episode


def with_outcomes(visits, means, variances):
    """A table of one row after a phase with these visits, mean returns and variances: [without, with]."""
    table = table_of()
    store(table, EMPTY_TREE, TREE)
    table.add_outcomes(phase_sums(visits, means, variances))
    return table


def phase_sums(visits, means, variances):
    sums = {name: np.zeros((8, 2)) for name in ("visits", "returns", "squares", "successes", "steps")}
    sums |= {"reached": np.zeros((8, 2, NUM_BASIC)), "actions": np.zeros((8, 2, len(CRAFTER.actions)))}
    sums["visits"][0], sums["returns"][0] = visits, np.array(visits) * means
    sums["squares"][0] = np.array(visits) * (np.array(variances) + np.array(means) ** 2)
    return sums


@pytest.mark.parametrize(
    ("visits", "means", "show", "kept"),
    [
        ([100, 100], [1.0, 2.0], 1.0, True), ([100, 100], [2.0, 1.0], CONTROL_SHARE, False),
        ([5, 100], [1.0, 9.0], 1.0, True), ([100, 100], [1.0, 1.1], 1.0, True), ([100, 5], [9.0, 1.0], 1.0, True),
    ],
)  # fmt: skip
def test_advice_is_judged_only_with_enough_visits_and_a_clear_lead(visits, means, show, kept):
    table = with_outcomes(visits, means, [1.0, 1.0])
    training = table.for_training()
    assert float(training.show_probability[0]) == pytest.approx(show)
    undecided = abs(table.trial_z()[0]) <= DECIDED_AT_SE
    assert (0 in np.asarray(training.on_trial)) == undecided == (abs(means[1] - means[0]) < 0.5 or min(visits) < 10)
    assert bool(table.for_evaluation().show_probability[0]) == kept


def test_evidence_is_gathered_over_phases_and_by_hand():
    table = with_outcomes([20, 20], [1.0, 1.5], [1.0, 1.0])
    assert table.trial_z()[0] == pytest.approx(0.5 / np.sqrt(0.1), rel=1e-6)
    for _ in range(5):
        table.add_outcomes(phase_sums([20, 20], [1.0, 1.5], [1.0, 1.0]))
    assert table.trial_z()[0] > DECIDED_AT_SE
    assert table.metrics()["guidance/trials_decided"] == table.metrics()["guidance/trials_won"] == 1


def test_advice_that_helps_is_not_condemned_because_returns_grow_while_it_is_withheld():
    """It happened: early phases show it to most envs, late ones, when returns are higher, to few."""
    table = with_outcomes([20, 140], [0.5, 0.6], [1.0, 1.0])
    for _ in range(4):
        table.add_outcomes(phase_sums([140, 20], [2.0, 2.1], [1.0, 1.0]))
    pooled = table.rows.returns[0] / table.rows.visits[0]
    assert pooled[1] < pooled[0] and table.trial_z()[0] > 0


def shown_to(table, num_envs=4096):
    """(N, K) which env is shown which row, as training draws it."""
    facts = jnp.zeros((num_envs, len(FACTS)), bool)
    return np.asarray(lookup.draw_exposures(table.for_training(), jax.random.key(3), facts).shown)


def test_without_trials_all_advice_is_shown():
    table = with_outcomes([100, 100], [1.0, 1.1], [1.0, 1.0])
    assert shown_to(table)[:, 1:].all() and 0.85 < shown_to(table)[:, 0].mean() < 0.9
    table.args = dataclasses.replace(ARGS, trials=False)
    assert shown_to(table).all()


def test_two_rows_are_on_trial_at_a_time_and_all_in_turn():
    table = table_of()
    for name in ("tree in view", "dark", "coal in view"):
        store(table, [name], {"chop tree": [(name, True)]})
    assert table.for_training().on_trial.tolist() == [8, 8]  # never used: there is nothing to learn of them
    table.rows.visits[:3, 1] = [30, 20, 10]
    pairs = [table.for_training().on_trial.tolist() for _ in range(3)]
    assert pairs == [[0, 1], [2, 0], [1, 2]] and table.rows.times_tried[:4].tolist() == [2, 2, 2, 0]
    withheld = ~shown_to(table)  # rows 0 and 1 once more
    assert withheld.any(0).tolist() == [True, True, *[False] * 6] and withheld.sum(1).max() == 1
    assert all(abs(share - CONTROL_SHARE) < 0.02 for share in withheld[:, :2].mean(0))


def test_a_new_row_begins_its_trials_anew():
    table = table_of(guidance_rows=1)
    store(table, EMPTY_TREE, TREE)
    table.rows.times_tried[0] = 5
    store(table, ["dark"], {"sleep": [("dark", True)]})
    assert table.rows.times_tried.tolist() == [0]


@pytest.mark.parametrize(("analysis", "expected"), [("It should chop tree.", 1), ("It should sleep.", 0)])
def test_the_adapter_learns_from_what_it_named_and_what_won(analysis, expected):
    table = with_outcomes([100, 100], [1.0, 2.0], [1.0, 1.0])
    advice = [[GOAL["chop tree"], 0, int(table.rows.advice_id[0])]]
    table.analyses = [guidance.Analysis("prompt", analysis, advice)]
    assert table.examples(Words(), "best") == [("prompt", analysis)] * expected
    table.rows.trial[0, 0] *= -1  # now it lost
    assert table.examples(Words(), "best") == [] and table.examples(Words(), "all") == [("prompt", analysis)]
    with pytest.raises(ValueError, match="--sft-data deaths: nothing here"):  # of a fork that forgot to make them
        table.examples(Words(), "deaths")
    with pytest.raises(ValueError, match="--sft-data deaths: nothing here"):
        table.found.lessons("deaths", 1)


def test_advice_in_a_row_that_was_overwritten_wins_nothing():
    table = with_outcomes([100, 100], [1.0, 2.0], [1.0, 1.0])
    table.analyses = [guidance.Analysis("prompt", "Chop tree.", [[GOAL["chop tree"], 0, 1]])]
    assert table.examples(Words(), "best")
    table.rows.advice_id[0] = 2  # another piece of advice stands there now
    assert not table.examples(Words(), "best")


class ReadsOne(rladapter_adapter.NoAdapter):
    def finetune(self, examples, *settings, **more):
        return {"examples": 1}


class OutOfMemory(ReadsOne):
    def finetune(self, examples, *settings, **more):
        raise MemoryError

    def warn(self, *_):
        pass


@pytest.mark.parametrize("adapter", [OutOfMemory(), ReadsOne()])
def test_tuning_the_adapter_gives_the_examples_that_were_read_to_the_log(adapter):
    table, args = table_of(), rl.Args(sft=rladapter_adapter.SftArgs(sft_data="all"))
    table.analyses = [guidance.Analysis("a", "b", []), guidance.Analysis("c", "d", [])]
    metrics, lines = rl.tune_adapter(args, Words(), table, adapter, jax.random.key(0), print)
    stopped = isinstance(adapter, OutOfMemory)
    assert lines == [{"prompt": "c", "response": "d"}][: 1 - stopped]  # the latest
    expected = {"adapter/cut_prompts": 0, "adapter/examples": 1 - stopped}
    assert metrics == expected | ({"adapter/sft_stopped": 1} if stopped else {})


@pytest.mark.parametrize("knowledge, sft_data, warned", [
    ("minecraft", "best", 1), ("expert", "best", 0), ("minecraft", "experience", 0),
])  # fmt: skip
def test_it_is_said_when_best_finds_nothing_for_a_guide_that_needs_help(knowledge, sft_data, warned):
    class Counts(ReadsOne):
        said = 0

        def warn_that_nothing_won(self):
            self.said += 1

    args = rl.Args(
        sft=rladapter_adapter.SftArgs(sft_data=sft_data), llm=llm_client.LlmArgs(rules_knowledge=knowledge)
    )  # fmt: skip
    adapter = Counts()
    rl.tune_adapter(args, Words(), table_of(), adapter, jax.random.key(0), print)
    assert adapter.said == warned


def test_flags_say_how_the_adapter_is_tuned():
    given = []

    class Watched(ReadsOne):
        def finetune(self, examples, key, **settings):
            given.append(settings)
            return {}

    sft = rladapter_adapter.SftArgs(sft_data="all", sft_epochs=3, sft_learning_rate=0.5, sft_batch_size=4)
    table = table_of()
    table.analyses = [guidance.Analysis("a", "b", [])]
    rl.tune_adapter(rl.Args(sft=sft), Words(), table, Watched(), jax.random.key(0), print)
    assert given == [
        {"epochs": 3, "learning_rate": 0.5, "batch_size": 4, "lora_plus_ratio": 50, "report": print}
    ]  # fmt: skip


def test_comprehension_scores():
    table = with_outcomes([0, 10], [0.0, 0.0], [1.0, 1.0])
    table.rows.steps[0, WITH] = 10
    table.rows.reached[0, WITH, GOAL["chop tree"]] = 10
    table.rows.successes[0, WITH] = 5

    def score(name):
        table.args = dataclasses.replace(ARGS, comprehension=name)
        return table.comprehension()

    low, high = 1 / (1 + np.exp(1)), 1 / (1 + np.exp(-9))  # cosine 0 and 1
    assert score("cosine")[0] == pytest.approx((low + high) / 2, abs=1e-4)
    assert score("binary")[0] == 1 and score("success")[0] == 0.5
    assert np.isnan(score("none")).all() and all(np.isnan(score(name)[1:]).all() for name in guidance.SCORES)
    table.rows.actions[0, WITH, :3] = [3, 0, 1]
    assert 0 < score("cosine-actions")[0] < 1
    before = score("cosine")[0]
    table.rows.reached[0, WITH] = np.roll(table.rows.reached[0, WITH], 7)
    assert score("cosine")[0] < before


# ---- questions


def choose(table, *situations):
    facts = np.stack([situation_of(s) for s in situations])
    return table.choose_questions(Words(), {"obs": np.zeros((len(facts), 2), np.uint8), "facts": facts})


def test_questions_go_to_the_situations_most_unlike_those_asked_about():
    table = table_of()
    because = [(name, False) for name in ("water in view", "dark", "coal in view")] + [("tree in view", True)]
    store(table, EMPTY_TREE, {"chop tree": because})
    near, far = ["tree in view", "dark"], ["water in view", "dark", "coal in view"]
    questions = choose(table, EMPTY_TREE, near, near, near, far, [*EMPTY_TREE, "asleep"])
    assert [set(np.flatnonzero(q.situation)) for q in questions] == [
        {FACT[n] for n in far},
        {FACT[n] for n in near},
    ]
    assert questions[0].sub_goals == [] and questions[0].comprehension is None
    assert questions[0].caption == "a caption of [0, 0]"
    table.args = dataclasses.replace(ARGS, queries_per_phase=1)
    assert len(choose(table, near, far)) == 1
    table.args = ARGS
    store(table, near, {"chop tree": because})
    store(table, far, {"chop tree": because})
    assert choose(table, EMPTY_TREE, near, far) == []


def test_of_situations_as_unlike_the_most_frequent_comes_first():
    questions = choose(table_of(queries_per_phase=1), ["dark"], ["asleep"], ["asleep"])
    assert np.flatnonzero(questions[0].situation).tolist() == [FACT["asleep"]]


def test_frequent_advice_that_is_not_understood_is_asked_about_again_with_its_score():
    table = with_outcomes([0, 1000], [0.0, 1.0], [1.0, 1.0])
    table.rows.steps[0, WITH] = 2000
    (again,) = choose(table, EMPTY_TREE)
    assert again.sub_goals == [GOAL["chop tree"]] and again.sample == 1
    assert again.comprehension == pytest.approx(1 / (1 + np.e))
    assert choose(table, EMPTY_TREE)[0].sample == 2
    table.rows.reached[0, WITH, 0] = table.rows.successes[0, WITH] = 1000
    assert choose(table, EMPTY_TREE) == []


def test_it_goes_on_asking_when_no_advice_cares_about_anything():
    """All situations were alike then, and nothing was asked from the second pause on."""
    table = table_of()
    store(table, EMPTY_TREE, {"survival": []})
    assert table.rows.valid.any() and not table.rows.care[table.rows.valid].any()
    assert len(choose(table, EMPTY_TREE, ["dark"], ["asleep"])) == 2


def test_without_situations_nothing_is_asked():
    nothing = {"obs": np.zeros((0, 2), np.uint8), "facts": np.zeros((0, len(FACTS)), bool)}
    assert table_of().choose_questions(Words(), nothing) == []


# ---- answers


class FixedGuide(llm_client.Guide):
    name = "fixed"

    def __init__(self, *replies):
        super().__init__(CRAFTER)
        self.replies = replies

    def complete(self, questions):
        return list(self.replies[: len(questions)])


def answer(table, guide, *questions):
    pause = guide.ask(list(questions))
    table.store(pause.wait())
    return [question.log_line(CRAFTER, guide.name) for question in questions], pause.metrics()


def test_a_reply_that_cannot_be_used_leaves_the_table_as_it_was_and_is_counted():
    table = table_of()
    store(table, EMPTY_TREE, TREE)
    before = {name: np.copy(value) for name, value in table.state()[0].items()}
    guide = FixedGuide(llm_client.Reply(text="I can't help with that."), llm_client.Reply(error="503", calls=1))
    log, metrics = answer(table, guide, question_about(EMPTY_TREE), question_about(["dark"]))
    assert metrics["llm/failures"] == 2 and metrics["guidance/valid_replies"] == 0 and all(r["error"] for r in log)
    for name, value in table.state()[0].items():
        np.testing.assert_array_equal(value, before[name])
    json.dumps(log)


def test_an_answer_goes_from_the_guide_into_the_table():
    table = table_of()
    reply = llm_client.Reply(text='{"sub_goals": {"chop tree": ["tree in view"]}}', calls=1, prompt_tokens=7)
    log, metrics = answer(table, FixedGuide(reply), question_about([*EMPTY_TREE, "dark"]))
    assert advised(table, EMPTY_TREE, ["dark"]) == [{"chop tree"}, set()]
    assert metrics["llm/calls"] == 1 and metrics["llm/prompt_tokens"] == 7 and metrics["llm/failures"] == 0
    assert log[0]["sub_goals"] == ["chop tree"] and log[0]["because"] == [["tree in view"]] and log[0]["rows"] == [0]
    assert log[0]["situation"] == ["tree in view", "dark"]


def test_two_games_live_in_one_process():
    """Sub-goals and facts were once globals of one module."""
    assert TOY_GAME.read_fact("tree in view") == (0, True) and CRAFTER.read_fact("tree in view")[0] > 0
    assert TOY_GAME.read_sub_goal("drink from the lake") == 1
    assert CRAFTER.read_sub_goal("mine diamond") is not None and TOY_GAME.read_sub_goal("mine diamond") is None


def test_a_loser_is_shown_to_few_and_all_others_to_all():
    z = np.array([-9.0, 0.0, 9.0])
    assert trials.show_probability(z).tolist() == [CONTROL_SHARE, 1.0, 1.0]


def test_trials_take_the_undecided_the_least_tried_and_the_most_used():
    z, tried, visits = np.zeros(6), np.array([3, 0, 0, 0, 1, 0]), np.array([9.0, 5, 7, 0, 99, 80])
    z[5] = DECIDED_AT_SE + 0.1
    assert trials.choose(z, tried, visits) == [2, 1]  # 3 was never used, 5 is decided
    assert trials.choose(-z, tried, visits) == [2, 1] and trials.choose(z[3:], tried[3:], visits[3:]) == [1]
    assert trials.choose(z, tried, np.zeros(6)) == []


@pytest.mark.parametrize("on_trial", [[2, 0], [1, 3], [3, 3]])
def test_an_env_lacks_one_option_on_trial_at_most(on_trial):
    """3 stands for no option."""
    show = jnp.ones(3)
    missing = ~np.asarray(trials.draw_shown(jax.random.key(1), show, jnp.array(on_trial), 8192))
    for option in range(3):
        share = CONTROL_SHARE if option in on_trial else 0.0
        assert abs(missing[:, option].mean() - share) < 4 * np.sqrt(share * (1 - share) / 8192) + 1e-9
    assert missing.sum(1).max() == min(1, sum(option < 3 for option in on_trial))


def test_a_loser_on_no_trial_is_shown_to_the_control_share():
    shown = np.asarray(trials.draw_shown(jax.random.key(2), jnp.array([1.0, CONTROL_SHARE]), jnp.array([0, 2]), 8192))
    assert abs(shown[:, 1].mean() - CONTROL_SHARE) < 0.02 and abs(shown[:, 0].mean() - 1 + CONTROL_SHARE) < 0.02


# ---- urgency, and what advice points at


def test_the_order_of_replies_becomes_the_urgency_of_rows():
    table = table_of()
    order = [("sleep", [("dark", True)]), ("chop tree", [("tree in view", True)]), ("mine coal", [("dark", True)])]
    for first, second in ((0, 1), (1, 2), (0, 2)):
        store(table, ["dark", "tree in view"], dict([order[first], order[second]]))
    most_urgent_first = np.argsort(np.asarray(table.for_training().urgency)).tolist()
    names = [SUB_GOALS[table.rows.goal[row]] for row in most_urgent_first if table.rows.valid[row]]
    assert names == ["sleep", "chop tree", "mine coal"]
    assert table.rows.before.sum() == 3
    for row in range(3, 8):
        store(table, [FACTS[row]], {"chop tree": [(FACTS[row], True)]})
    table.rows.steps[0, 1] = 90_000  # and never followed
    store(table, ["asleep"], {"chop grass": [("asleep", True)]})  # over row 0
    assert not table.rows.before[0].any() and not table.rows.before[:, 0].any() and table.rows.before.sum() == 1


@pytest.mark.parametrize("seed", range(3))
def test_ranks_recover_an_order_from_parts_of_it(seed):
    rng = np.random.default_rng(seed)
    order, before = rng.permutation(10), np.zeros((10, 10))
    for _ in range(200):
        chosen = np.sort(rng.choice(10, 3, replace=False))  # a reply names three of ten, in order
        for i, first in enumerate(chosen):
            before[order[first], order[chosen[i + 1 :]]] += 1
    assert ranks(before)[order].tolist() == list(range(10))


def test_ranks_hold_what_was_never_compared_in_the_middle():
    before = np.zeros((5, 5))
    before[3, 1] = before[3, 0] = before[1, 0] = 4
    found = ranks(before)
    assert sorted(found) == list(range(5)) and found[3] == 0 and found[0] == 4
    assert ranks(np.zeros((3, 3))).tolist() == [0, 1, 2]


def test_ranks_weigh_replies_that_contradict_each_other():
    before = np.array([[0, 5, 1], [2, 0, 5], [1, 1, 0]])
    assert ranks(before).tolist() == [0, 1, 2]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_is_pointed_at_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    active, kinds = rng.random((5, 7)) < rng.random(), rng.integers(0, 4, 7)  # 3 for nothing
    urgency, known = rng.permutation(7).astype(np.float32), rng.random((5, 3)) < 0.7
    found = lookup.two_kinds(jnp.asarray(known), jnp.asarray(active), jnp.asarray(urgency), jnp.asarray(kinds))
    hinted = lookup.one_action(jnp.asarray(active), jnp.asarray(urgency), jnp.asarray(kinds), 3)
    for env, (pair, action) in enumerate(zip(found.tolist(), hinted.tolist(), strict=True)):
        in_order = [int(kinds[k]) for k in np.argsort(urgency) if active[env, k] and kinds[k] < 3]
        expected = list(dict.fromkeys(kind for kind in in_order if known[env, kind]))
        assert pair == [*expected, 3, 3][:2] and action == [*in_order, 3][0]


def test_what_the_game_allows_against_its_needs():
    """In words, as the guide would check it."""
    rng = np.random.default_rng(0)
    facts = rng.random((64, len(FACTS))) < 0.7
    found = np.asarray(lookup.possible_sub_goals(CRAFTER, jnp.asarray(facts)))
    for row, situation in zip(found, facts, strict=True):
        expected = [holds(CRAFTER.truths(situation), CRAFTER.needs.get(goal, ())) for goal in SUB_GOALS]
        assert row.tolist() == expected
    assert 0 < found[:, GOAL["sleep"]].mean() < 1  # it needs a false fact
    assert 0 < found[:, GOAL["make stone pickaxe"]].mean() < 1


def told(pointer, context="full", known=(), needs=()):
    """What an env is told that sees a tree, whose food is low and of which `needs` are true as well: how many
    sub-goals, the things that they point at, the action that is hinted."""
    table = table_of()
    sleep_first = {"sleep": [("food low", True)], "attack cow": [("food low", True)]}
    then = {"chop tree": [("tree in view", True)], "place stone": [("food low", True)],
            "mine diamond": [("tree in view", True)]}  # fmt: skip
    situation = situation_of(["tree in view", "food low", *needs])
    question = question_about(["tree in view", "food low"])
    question.advice = tuple(
        (GOAL[goal], tuple((FACT[fact], truth) for fact, truth in reasons))
        for goal, reasons in (sleep_first | then).items()
    )
    table.store([question])
    device, facts = table.for_evaluation(), jnp.asarray(situation)[None]
    exposure = lookup.draw_exposures(device, jax.random.key(0), facts)
    args, known = rl.Args(pointer=pointer, table=ARGS), jnp.asarray(np.isin(CRAFTER.kinds, known))[None]
    advice = lookup.CONTEXTS[context].advise(args, CRAFTER, device, exposure, facts, known)
    things = [[*CRAFTER.kinds, None][kind] for kind in advice["pointed"][0].tolist()]
    return int(advice["advised"].sum()), things, [*CRAFTER.actions, None][int(advice["hinted"][0])]


def test_advice_points_at_the_things_of_the_most_urgent_that_are_known():
    assert told("advice", known=CRAFTER.kinds)[:2] == (5, ["cow", "tree"])  # sleep is about no thing
    assert told("advice", known=("diamond", "water", "tree"))[1] == ["tree", "diamond"]
    assert told("advice", known=("diamond", "water"))[1] == ["diamond", None]
    assert told("advice", known=("water", "iron"))[1] == [None, None]
    assert told("advice", "facts", CRAFTER.kinds) == told("advice", "none", CRAFTER.kinds) == (0, [None, None], None)


def test_advice_that_is_one_action_hints_at_it_where_the_game_allows_it():
    """Place stone is the one of those five that is one action, apart from sleep, which comes first."""
    tired = ("energy full",)  # a need of sleep: it must be false
    assert told("advice")[2] == "sleep"
    assert told("advice", needs=("stone >= 1",))[2] == "sleep"
    assert told("advice", needs=("stone >= 1", *tired))[2] == "place stone"
    assert told("advice", needs=tired)[2] is None
    assert told("none", needs=("stone >= 1",))[2] is None


def test_the_controls_of_the_pointer_do_without_advice():
    assert told("none", known=CRAFTER.kinds) == (5, [None, None], None)
    seen = ("tree in view", "water in view", "iron in view")
    pickaxe = (*seen, "unlocked make stone pickaxe")
    assert told("fixed", known=CRAFTER.kinds, needs=seen)[:2] == (5, ["water", "tree"])  # iron takes the pickaxe
    for context in ("facts", "none"):
        assert told("fixed", context, CRAFTER.kinds, pickaxe)[:2] == (0, ["iron", "water"])
        assert told("fixed", context, ("tree", "iron"), pickaxe)[1] == ["iron", "tree"]
        assert told("fixed", context, ("tree", "water", "iron"), ("tree in view",))[1] == ["tree", None]
        # the last one that is possible: of place stone and sleep, sleep
        assert [told("fixed", context, needs=needs)[2] for needs in ((), ("stone >= 1", "energy full"))] == [
            "sleep", "place furnace"
        ]  # fmt: skip


def test_every_action_that_is_a_sub_goal_is_known_as_one():
    acts = {goal: CRAFTER.actions[i] for goal, i in zip(SUB_GOALS, CRAFTER.action_numbers, strict=True)
            if i < len(CRAFTER.actions)}  # fmt: skip
    made = {goal: goal for goal in SUB_GOALS if goal.startswith("make ") and goal != "make workshop"}
    placed = {"place plant": "place plant", "place furnace": "place furnace", "place stone": "place stone"}
    assert acts == made | placed | {"place crafting table": "place table", "sleep": "sleep"}


def test_advice_that_an_env_is_denied_does_not_point():
    table = table_of()
    store(table, EMPTY_TREE, TREE)
    facts = jnp.tile(jnp.asarray(situation_of(EMPTY_TREE)), (2, 1))
    exposure = lookup.draw_exposures(table.for_evaluation(), jax.random.key(0), facts)
    exposure = dataclasses.replace(exposure, shown=jnp.array([[True] * 8, [False] * 8]))
    known = jnp.ones((2, len(CRAFTER.kinds)), bool)
    advice = lookup.AdviceContext.advise(rl.Args(table=ARGS), CRAFTER, table.for_evaluation(), exposure, facts, known)
    nothing = len(CRAFTER.kinds)
    assert advice["pointed"].tolist() == [[CRAFTER.kinds.index("tree"), nothing], [nothing] * 2]
    assert advice["advised"].sum(1).tolist() == [1, 0]
