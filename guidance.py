"""The guidance table: what was asked about, what the guide advised, what came of it.

    pause   questions = table.choose_questions(env, situations)   situations that no advice serves
            table.store(questions)                                each sub-goal with its reasons: a row
    step    in advice.py, on the device: the rows that fit, the things that they point at
    update  row_outcomes(...)                                     visits, returns, sub-goals reached
    phase   table.add_outcomes(outcomes)                          comprehension and trials, per row
            table.examples("best")                                analyses to tune the adapter on

A row is one piece of *advice*: a sub-goal and its reasons, the facts (true or false) that it rests
on. It serves every situation that agrees in those facts. A *trial* is an A/B test of one row: its
advice is withheld from one env in eight, for a phase at a time. docs/rladapter.md has a glossary.

K rows, P facts, S sub-goals of which G are basic, N envs, T steps, D size of an embedding.
Sums of shape (K, 2, ...) are for steps WITHOUT and WITH the advice.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from advice import NEVER, TOLERANCE, GuidanceTable
from envs.game import Game, Literals
from hindsight import Found
from llm_client import Question
from rladapter_adapter import FROM_PLAY, SftArgs, adapter_prompt
from utils import trials
from utils.comprehension import SCORES, Understood
from utils.embeddings import make_embedding
from utils.ranking import ranks
from utils.selection import farthest_first
from utils.trials import MIN_VISITS, WITH

OUTCOME_DECAY = 0.9  # what a visit of the phase before still counts: its policy is gone
SELDOM = 1 / 1000  # times a step that advice is expected to be followed at least, to be worth its row
IDLE = 0.2  # successes that are expected of a row in each phase, met or not
MAX_ASKED = 4096  # situations asked about that are remembered
MAX_ANALYSES = 512  # latest analyses that fine-tuning chooses from


@dataclass(frozen=True)
class TableArgs:
    """Flags of the guidance table."""

    guidance_lookup: Literal["step", "pause"] = "step"
    """step: advice is looked up at every step; pause: advice is drawn for each env once per phase and kept, as in the
    paper"""
    guidance_rows: int = 64
    """rows of the guidance table, one for each piece of advice"""
    guidance_support: int = 1
    """replies of the guide that advice must stand in before the player is given it; with 2 what a small LLM makes up
    once is not"""
    queries_per_phase: int = 16
    """questions to the guide at a pause, at most"""
    query_until: float = 1.0
    """share of the training after which nothing is asked and nothing tuned any more: with an annealed learning rate the
    policy can't learn what is said late"""
    trials: bool = True
    """A/B test of advice: two pieces at a time are withheld from 1 in 8 envs each, to measure whether advice helps"""
    comprehension: Literal["cosine", "cosine-actions", "binary", "success", "none"] = "cosine"
    """how well advice was understood. cosine: between embeddings of the sub-goals reached and advised; cosine-actions:
    of the actions taken, as in the paper; binary: was the advised sub-goal reached; success: share of visits that
    reached it; none: no score"""
    embed: str = "hash"
    """text embedding of the sub-goals' names. hash: needs no model; else a BERT's folder or hub id"""


LIMITS = {
    "guidance_rows": (1, 2**12), "guidance_support": (1, 2**16),
    "queries_per_phase": (0, 2**16), "query_until": (0.0, 1.0),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# On the host
# --------------------------------------------------------------------------------------------------


def empty_rows(num_rows: int, obs_size: int, game: Game) -> SimpleNamespace:
    """Makes the arrays of a table without advice. A checkpoint holds all of this namespace."""
    facts, arms = (num_rows, len(game.facts)), (num_rows, 2)
    return SimpleNamespace(
        obs=np.zeros((num_rows, obs_size), np.uint8),  # the situation that was asked about
        situation=np.zeros(facts, bool),  # its facts
        care=np.zeros(facts, bool),  # the facts that the advice rests on
        truth=np.zeros(facts, bool),  # which of these must be true; the others false
        valid=np.zeros(num_rows, bool),  # False for an empty row
        goal=np.zeros(num_rows, np.int32),  # the advised sub-goal
        advice_id=np.zeros(num_rows, np.int64),  # tells advice from the next one in this row
        times_asked=np.zeros(num_rows, np.int32),  # how often it was asked about again
        age=np.zeros(num_rows),  # phases since it was written; they fade too
        times_stated=np.zeros(num_rows, np.int32),  # in how many replies it was advised
        times_tried=np.zeros(num_rows, np.int32),  # in how many phases it was on trial
        before=np.zeros((num_rows, num_rows), np.int32),  # in how many replies it stood before that row
        trial=np.zeros(arms),  # sums over phases of difference / variance and of 1 / variance
        visits=np.zeros(arms),  # from here on: see `row_outcomes`
        steps=np.zeros(arms),
        returns=np.zeros(arms),
        squares=np.zeros(arms),
        successes=np.zeros(arms),
        reached=np.zeros((*arms, game.num_basic)),
        actions=np.zeros((*arms, len(game.actions))),
    )


@dataclass
class Analysis:
    """What the adapter once wrote, and the advice that the guide then gave."""

    prompt: str
    text: str
    advice: list[list[int]]  # sub-goal, row, advice_id of each piece of advice


class HostTable:
    """The host's table, with all that was said and all that came of it."""

    def __init__(self, args: TableArgs, env: Any):
        self.args, self.game = args, env.game
        embedding = make_embedding(args.embed)
        self.sub_goal_embeddings = embedding.encode(self.game.sub_goals)  # (S, D)
        self.action_embeddings = embedding.encode(self.game.actions)  # (A, D)
        self.rows = empty_rows(args.guidance_rows, env.obs_size, self.game)
        self.asked = np.zeros((MAX_ASKED, len(self.game.facts)), bool)  # situations, a ring
        self.num_asked = 0
        self.stated = self.holding = 0  # rules in the latest replies: all, and those that held where asked
        self.analyses: list[Analysis] = []  # the latest MAX_ANALYSES
        self.found = Found(self.game, env.obs_size)

    # ---- for the device

    def for_training(self) -> GuidanceTable:
        """Makes the device's table: advice on trial is withheld from some envs."""
        z, rows = self.trial_z(), self.rows
        if not self.args.trials:
            return self._on_device(np.ones(len(z)))
        on_trial = trials.choose(z, rows.times_tried, rows.visits.sum(1))
        rows.times_tried[on_trial] += 1
        return self._on_device(trials.show_probability(z), on_trial)

    def for_evaluation(self) -> GuidanceTable:
        """Makes the device's table with all advice but what has proved harmful."""
        return self._on_device(self.trial_z() >= -trials.DECIDED_AT_SE)

    def _on_device(self, show_probability: np.ndarray, on_trial: Sequence[int] = ()) -> GuidanceTable:
        rows = self.rows
        on_trial = [*on_trial, *[len(rows.valid)] * (trials.AT_ONCE - len(on_trial))]
        sign = np.where(rows.care, 1.0 - 2.0 * rows.truth, 0.0)
        offset = (rows.care & rows.truth).sum(1) + NEVER * ~self.given()
        return GuidanceTable(
            weights=jnp.asarray(sign.T, jnp.float32),
            offset=jnp.asarray(offset, jnp.float32),
            goals=jnp.asarray(np.arange(len(self.game.sub_goals)) == rows.goal[:, None]),
            show_probability=jnp.asarray(show_probability, jnp.float32),
            on_trial=jnp.asarray(on_trial, jnp.int32),
            urgency=jnp.asarray(ranks(rows.before), jnp.float32),
            kinds=jnp.asarray(self.game.kind_numbers[rows.goal], jnp.int32),
            sub_goal_embeddings=jnp.asarray(self.sub_goal_embeddings),
        )

    # ---- at a pause

    def given(self) -> np.ndarray:
        """Finds the rows that players are given where they fit (K,)."""
        return self.rows.valid & (self.rows.times_stated >= self.args.guidance_support)

    def fits(self, facts: np.ndarray) -> np.ndarray:
        """Finds the rows whose reasons hold: (M, P) -> (M, K)."""
        wrong = (facts[:, None] != self.rows.truth) & self.rows.care
        return self.given() & (wrong.sum(-1) <= TOLERANCE)

    def choose_questions(self, env: Any, situations: dict[str, np.ndarray]) -> list[Question]:
        """Chooses situations unlike all asked about before, then those whose advice works worst.

        Args:
            situations: obs (M, O) uint8 and facts (M, P) bool, a sample of all steps of the last phase.
                Without any (in a run without guidance) there are no questions.
        """
        obs, facts, rows = situations["obs"], situations["facts"], self.rows
        if not len(facts):
            return []
        scores = self.comprehension()
        weights = rows.valid * rows.visits.sum(1) * (1 - np.nan_to_num(scores, nan=1.0))
        worst = np.argsort(-weights, kind="stable").tolist()
        most = self.args.queries_per_phase
        again = [row for row in worst if weights[row] > MIN_VISITS][: most // 4]
        cares = rows.care[rows.valid].any(0)
        relevant = cares if cares.any() else slice(None)  # without any fact all situations would be alike
        asked = self.asked[: self.num_asked]
        new = farthest_first(facts[:, relevant], asked[:, relevant], most - len(again))
        questions = [self._question(obs[i], facts[i], scores) for i in new]
        for row in again:
            rows.times_asked[row] += 1
            question = self._question(rows.obs[row], rows.situation[row], scores)
            questions.append(dataclasses.replace(question, sample=int(rows.times_asked[row])))
        return [dataclasses.replace(q, caption=env.to_text(q.obs)) for q in questions]

    def _question(self, obs: np.ndarray, facts: np.ndarray, scores: np.ndarray) -> Question:
        """Makes a question, with the advice that the table has so far, and its mean score."""
        rows = np.flatnonzero(self.fits(facts[None])[0])
        known = scores[rows][~np.isnan(scores[rows])]
        sub_goals = list(dict.fromkeys(self.rows.goal[rows].tolist()))
        score = float(known.mean()) if len(known) else None
        return Question(obs.copy(), facts.copy(), sub_goals, score)

    def store(self, questions: list[Question]) -> None:
        """Writes what the guide advised into rows, and into the questions which rows those are."""
        self.stated = self.holding = 0
        for question in questions:
            if question.advice:
                self._write(question)
                self.asked[self.num_asked % MAX_ASKED] = question.situation
                self.num_asked += 1
            if question.analysis:
                ids = self.rows.advice_id
                advice = [[goal, row, int(ids[row])] for goal, row in question.rows.items()]
                analysis = Analysis(question.adapter_prompt, question.analysis, advice)
                self.analyses = [*self.analyses, analysis][-MAX_ANALYSES:]

    def _write(self, question: Question) -> None:
        """Writes each sub-goal of an answer into a row of its own, unless a row says so already.

        Advice is a rule: it is kept as it was stated, also where its reasons do not hold in the situation asked about.
        """
        for goal, reasons in question.advice:
            care, truth = self._rule(goal, reasons)
            self.stated += 1
            self.holding += not (care & (truth != question.situation)).any()
            row = self._row_with(goal, care, truth)
            if row is None:
                row = self._row_to_write(taken=list(question.rows.values()))
                if row is None:
                    break  # the table is smaller than this answer
                advice_id = self.rows.advice_id.max() + 1
                for array in vars(self.rows).values():
                    array[row] = 0
                self.rows.before[:, row] = 0
                self.rows.obs[row], self.rows.situation[row] = question.obs, question.situation
                self.rows.care[row], self.rows.truth[row], self.rows.goal[row] = care, truth, goal
                self.rows.valid[row], self.rows.advice_id[row] = True, advice_id
            self.rows.times_stated[row] += row not in question.rows.values()
            self.rows.before[list(question.rows.values()), row] += 1
            question.rows[goal] = row
        question.because = [self.reasons_text(row) for row in question.rows.values()]

    def reasons_text(self, row: int) -> list[str]:
        """Returns what a row's advice rests on, in words."""
        return self.game.reasons_text(self.rows.care[row], self.rows.truth[row])

    def _rule(self, goal: int, reasons: Literals) -> tuple[np.ndarray, np.ndarray]:
        """Returns what advice rests on: facts that count (P,), and which of them must be true (P,).

        Advice without reasons rests on what the game says its sub-goal needs; on nothing, if that is nothing.
        """
        care, truth = np.zeros((2, len(self.game.facts)), bool)
        for index, true in reasons:
            care[index], truth[index] = True, true
        if not reasons:
            needs = self.game.needs_matrix[goal]
            care, truth = needs != 0, needs > 0
        return care, truth

    def _row_with(self, goal: int, care: np.ndarray, truth: np.ndarray) -> int | None:
        """Finds the row that gives this advice already."""
        rows = self.rows
        same = (rows.care == care).all(1) & (rows.truth == truth).all(1) & rows.valid & (rows.goal == goal)
        return int(same.argmax()) if same.any() else None

    def _row_to_write(self, taken: list[int]) -> int | None:
        """Finds a row to write into: an empty one first, then the one that is worth least."""
        worth = np.where(self.rows.valid, self.worth(), 0.0)
        worth[taken] = np.inf
        row = int(worth.argmin())
        return None if row in taken else row

    def worth(self) -> np.ndarray:
        """Returns (K,) how much more often rows' sub-goals are reached where rows hold than at any time.

        By steps, and with a success in advance for each time that the guide said so, and one expected: new advice is
        worth 1. What holds at all times is reached there as often as ever, what names the wrong time less often. A
        sub-goal without a detector is never reached; and what never holds is worth a little less each phase.
        """
        rows, num_basic = self.rows, self.game.num_basic
        steps = rows.steps.sum(1)
        reached = np.pad(rows.reached.sum(1), ((0, 0), (0, 1)))  # (K, G + 1), last what has no detector
        goal = np.minimum(rows.goal, num_basic)
        usual = (reached.sum(0) / max(steps.sum(), 1.0))[goal]
        own = reached[np.arange(len(goal)), goal]
        return (own + rows.times_stated) / (steps * np.maximum(usual, SELDOM) + 1 + IDLE * rows.age)

    # ---- after a phase

    def add_outcomes(self, outcomes: dict[str, Any]) -> None:
        """Folds in one phase's sums (`row_outcomes`); older ones fade."""
        sums = {name: np.asarray(value, np.float64) for name, value in outcomes.items()}
        self.rows.trial *= OUTCOME_DECAY
        self.rows.age = OUTCOME_DECAY * self.rows.age + 1
        if sums:
            self.rows.trial += trials.phase_trial(sums)
        for name, value in sums.items():
            array = getattr(self.rows, name)
            array *= OUTCOME_DECAY
            array += value

    def trial_z(self) -> np.ndarray:
        """Returns (K,) standard errors by which the return with advice leads that without it."""
        return trials.trial_z(self.rows.trial)

    def comprehension(self) -> np.ndarray:
        """Returns (K,) how well advice was understood, 0 to 1; NaN where it was never given."""
        rows, names = self.rows, self.sub_goal_embeddings
        understood = Understood(
            visits=rows.visits[:, WITH],
            successes=rows.successes[:, WITH],
            reached=rows.reached[:, WITH],
            actions=rows.actions[:, WITH],
            advice=names[rows.goal],
            sub_goal_names=names[: self.game.num_basic],
            action_names=self.action_embeddings,
        )
        score = SCORES[self.args.comprehension](understood)
        return np.where(rows.steps[:, WITH] > 0, score, np.nan)

    def examples(self, env: Any, sft_data: str) -> list[tuple[str, str]]:
        """Chooses at most MAX_ANALYSES (prompt, analysis) pairs to fine-tune the adapter on, the most telling first.

        all: every analysis, as in the reference, the latest first. best: those that named a sub-goal which the guide
        then advised, in advice that has won its trial. hindsight, experience, plans: of hindsight.py.
        """
        if sft_data in FROM_PLAY:
            return self.found.examples(sft_data, MAX_ANALYSES, self._prompts(env))
        rows, won = self.rows, self.rows.valid & (self.trial_z() > trials.DECIDED_AT_SE)
        winners = set(rows.advice_id[won].tolist())
        if sft_data not in ("best", "all"):
            raise ValueError(f"--sft-data {sft_data}: nothing here makes its pairs")
        chosen: dict[tuple[str, str], None] = {}
        for analysis in reversed(self.analyses):
            named = self.game.sub_goals_in_text(analysis.text)
            useful = any(goal in named and i in winners for goal, _, i in analysis.advice)
            if sft_data == "all" or useful:
                chosen[analysis.prompt, analysis.text] = None
        return list(chosen)

    def retrieved(self, questions: list[Question], sft: SftArgs) -> list[str]:
        """Returns what --analyses retrieved tells in the adapter's place, for each question; [] if nothing is known."""
        if sft.analyses != "retrieved" or not questions:
            return []
        lessons = self.found.lessons(sft.sft_data, MAX_ANALYSES)
        return self.found.retrieved(np.stack([q.situation for q in questions]), lessons)

    def _prompts(self, env: Any) -> Callable[[np.ndarray, np.ndarray], str]:
        """Returns a function that makes the adapter's prompt for a situation: obs (O,), facts (P,)."""
        scores = self.comprehension()

        def prompt_of(obs: np.ndarray, facts: np.ndarray) -> str:
            question = self._question(obs, facts, scores)
            return adapter_prompt(self.game, env.to_text(obs), question.sub_goals, question.comprehension)

        return prompt_of

    def agreement(self, env: Any, adapter: Any, key: Any, when: str) -> dict[str, float | None]:
        """Measures what the adapter names in situations of the latest phase that only measure (`Found.agreement`).

        Args:
            when: before or after the fine-tuning, part of the metric's name; before it what could be named anyway is
                measured too: any sub-goal that is possible, and what the game's own rules advise first
        """
        found, game = self.found, self.game
        rows, prompts = found.held_out(self._prompts(env))
        if not prompts:
            return {}
        every = max(1, -(-len(prompts) // adapter.affordable_analyses(prompts)))
        rows, prompts = rows[::every], prompts[::every]
        named = [game.sub_goals_in_text(text) for text in adapter.analyse(prompts, key)]
        measured = {f"agreement_{when}": found.agreement(rows, named)}
        if when == "before":
            advice = (game.advise(game.truths(found.arrays.facts[row]), {}) for row in rows)
            first = [[goal for goal, _ in some if goal < game.num_basic][:1] for some in advice]
            measured["agreement_possible"] = found.agreement(rows, found.possible(rows))
            measured["agreement_rules"] = found.agreement(rows, first)
        return measured

    def outcome_lines(self, outcomes: dict[str, Any]) -> list[dict[str, Any]]:
        """Makes a line of outcomes.jsonl for each row and arm that was used in this phase."""
        scores, lines = self.comprehension(), []
        for line in trials.arm_lines(outcomes):
            row = line["row"]
            lines.append({
                **line,
                "sub_goal": self.game.sub_goals[self.rows.goal[row]],
                "because": self.reasons_text(row),
                "reached": {self.game.sub_goals[goal]: n for goal, n in line["reached"].items()},
                "comprehension": None if np.isnan(scores[row]) else float(scores[row]),
            })  # fmt: skip
        return lines

    def metrics(self) -> dict[str, float | None]:
        """Returns what the table is worth, each row counted by its visits."""
        scores, z, visits = self.comprehension(), self.trial_z(), self.rows.visits[:, WITH]
        weights, total = np.where(np.isnan(scores), 0, visits), float(visits.sum())
        score, successes = (np.nan_to_num(scores) * weights).sum(), self.rows.successes[:, WITH].sum()
        return {
            "guidance/comprehension": float(score / weights.sum()) if weights.sum() else None,
            "guidance/goal_success": float(successes) / total if total else None,
            "guidance/rows": int(self.rows.valid.sum()),
            "guidance/rows_unmet": int((self.given() & (self.rows.visits.sum(1) == 0)).sum()),
            "guidance/rules_stated": self.stated,
            "guidance/rules_holding": self.holding,
            "guidance/trials_decided": int((np.abs(z) > trials.DECIDED_AT_SE).sum()),
            "guidance/trials_won": int((z > trials.DECIDED_AT_SE).sum()),
        }

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns what a checkpoint must hold: arrays, and the rest as JSON has it."""
        analyses = [dataclasses.asdict(analysis) for analysis in self.analyses]
        rest = {"num_asked": self.num_asked, "analyses": analyses, "rules": [self.stated, self.holding]}
        rest["found"] = self.found.num
        return vars(self.rows) | {"asked": self.asked} | self.found.state(), rest

    def load_state(self, arrays: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Takes what `state` gave. Raises an error of any kind for what it can't have given."""
        arrays = {name: np.array(value) for name, value in arrays.items()}
        found = rest.get("found", 0)
        self.found.load_state(arrays, found)
        arrays.setdefault("truth", arrays["situation"])  # older runs kept only rules that held where asked
        arrays.setdefault("age", np.zeros(len(arrays["times_asked"])))
        arrays.setdefault("times_stated", np.ones_like(arrays["times_asked"]))
        self.asked, self.num_asked = arrays.pop("asked"), rest["num_asked"]
        self.stated, self.holding = rest.get("rules", (0, 0))
        self.rows = SimpleNamespace(**arrays)
        self.analyses = [Analysis(**analysis) for analysis in rest["analyses"]]
        numbers = [self.num_asked, self.stated, self.holding, found]
        for analysis in self.analyses:
            if not (isinstance(analysis.prompt, str) and isinstance(analysis.text, str)):
                raise TypeError("an analysis is no text")
            numbers += [number for goal, row, advice_id in analysis.advice for number in (goal, row, advice_id)]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise TypeError("a number of the table is none")
