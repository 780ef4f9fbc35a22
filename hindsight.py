"""What RL finds out, in words: examples to fine-tune the adapter on, and a measure of what it says.

    phase   found.add(history, situations)     what came of a sample of situations, and what sub-goals take
            found.examples(...)                the analyses that would have been right there
            found.agreement(...)               how often what an adapter names was reached, and paid

*Hindsight*: of a situation that the player was in, the rarest sub-goal that it reached and was paid for soon after (or
reached, where none was paid for), where these steps paid more than is usual in such a situation: what is often reached
needs no advice. *Experience*: what was so whenever a sub-goal was reached and paid for. *Plans*: of two things that a
sub-goal takes near one is made beside the other, by what was found to bring it; and what one takes that was hardly
reached yet is guessed. What is found out comes of what a player can see and of its rewards; plans and guesses also of
names, and of what a player has to go to (`Game.things`, `Game.destinations`). Nothing comes of the game's rules. No LLM
is asked.

M situations, S steps of a phase, N envs, P facts, G basic sub-goals, O bytes of an observation.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from advice import possible_sub_goals
from envs.game import Game, can_hold
from rladapter_adapter import suggestion

HORIZON = 64  # steps that are looked ahead: what was reached, what it paid
MAX_REMEMBERED = 4096  # situations, the latest
HELD_OUT = 32  # of the latest phase's situations: these only measure
RIDGE = 10.0  # strength of the prior of `usual`: as many situations in which nothing was earned
MIN_TIMES = 5  # a sub-goal was reached so often before anything is said of what it takes
ALWAYS, OFTEN = 0.99, 0.7  # share of these times from which a fact counts as needed, unless it is true so often anyway
IMPLIED = 0.8  # share of the steps with a fact from which another one, true in these, adds nothing to it
PAYS = 0.5  # reward of a step from which what was reached in it was paid for: an achievement brings 1
OTHERS = 2  # sub-goals of which experience says what they take, beside the one that it suggests
ALIKE = 2  # words that a sub-goal's name shares with that of another one from which is guessed what it takes
MAX_FACTS = 5  # that a sentence says of what a sub-goal takes, the rarest ones


def look_ahead(
    history: dict[str, np.ndarray], steps: np.ndarray, envs: np.ndarray, num_goals: int
) -> dict[str, np.ndarray]:
    """Finds what came of situations within HORIZON steps, or to the end of the episode.

    Args:
        history: of a phase reward (S, N), done (S, N), reached (S, N, G / 8) packed bits
        steps, envs: (M,) which situations
    Returns:
        returns (M,); when (M, G), after how many steps each sub-goal was reached first, HORIZON for never; paid (M, G),
        was it reached in a step that PAYS (what was done before in this life does not); known (M,), False where the
        phase ends within HORIZON steps, also if the episode ends before that: of situations so late only those that end
        badly would be known
    """
    num_steps = len(history["done"])
    returns, alive = np.zeros(len(steps)), np.ones(len(steps), bool)
    when = np.full((len(steps), num_goals), HORIZON, np.int32)
    paid = np.zeros((len(steps), num_goals), bool)
    known = steps + HORIZON <= num_steps
    for ahead in range(HORIZON):
        at = np.minimum(steps + ahead, num_steps - 1), envs
        reached = np.unpackbits(history["reached"][at], axis=-1, count=num_goals).astype(bool) & alive[:, None]
        returns += history["reward"][at] * alive
        when = np.where(reached & (when == HORIZON), ahead, when)
        paid |= reached & (history["reward"][at] > PAYS)[:, None]
        alive = alive & ~history["done"][at]
    return {"returns": returns, "when": when, "paid": paid, "known": known}


def usual(facts: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Says what is usually earned in situations with these facts (M, P), by ridge regression on returns (M,): (M,)."""
    inputs = np.concatenate([facts, np.ones((len(facts), 1))], 1).astype(np.float64)
    weights = np.linalg.solve(inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1]), inputs.T @ returns)
    return inputs @ weights


def amount_of(fact: str) -> str:
    """Returns what a fact is an amount of, "iron >= 1" -> "iron"; any other fact as it is."""
    return fact.partition(" >= ")[0]


def thing_of(fact: str) -> str:
    """Returns what a fact is about: "iron >= 1", "iron in view" -> "iron"."""
    return re.split(" >= | in ", fact)[0]


class Plan(NamedTuple):
    """What a sub-goal takes that is worth reaching for the sake of a goal: of another one, or of itself; in facts."""

    sub_goal: int
    goal: int
    takes: tuple[str, ...]


def enough(takes: dict[int, list[str]], told: Iterable[Sequence[str]]) -> dict[int, list[str]]:
    """Returns `takes` where what ends with an amount of something ends with the largest that anything told takes.

    Args:
        takes: of each sub-goal facts, last what it brought, "not " before it
        told: facts that something takes each
    """
    most: dict[str, int] = {}
    for name, _, number in (text.partition(" >= ") for texts in told for text in texts):
        if number.isdigit() and not name.startswith("not "):
            most[name] = max(most.get(name, 0), int(number))
    new = {}
    for goal, texts in takes.items():
        name, _, number = texts[-1].removeprefix("not ").partition(" >= ")
        more = texts[-1].startswith("not ") and number.isdigit() and int(number) < most.get(name, 0)
        new[goal] = [*texts[:-1], f"not {name} >= {most[name]}"] if more else texts
    return new


class Found:
    """What was found out so far: the latest situations with what came of them, and counts of all phases."""

    def __init__(self, game: Game, obs_size: int):
        num_facts, goals = len(game.facts), game.num_basic
        self.game, self.num = game, 0  # situations so far
        self.arrays = SimpleNamespace(
            obs=np.zeros((MAX_REMEMBERED, obs_size), np.uint8),
            facts=np.zeros((MAX_REMEMBERED, num_facts), bool),
            when=np.zeros((MAX_REMEMBERED, goals), np.int32),  # of `look_ahead`
            paid=np.zeros((MAX_REMEMBERED, goals), bool),
            returns=np.zeros(MAX_REMEMBERED),
            held=np.zeros(MAX_REMEMBERED, bool),  # measures only, until there is a later phase
            times=np.zeros(goals),  # how often each sub-goal was reached and paid for
            true_then=np.zeros((goals, num_facts)),  # how often each fact was true then
            followed=np.zeros(goals),  # after how many of these times a step is known that follows
            brought=np.zeros((goals, num_facts)),  # how often each fact was false then, and true in that step
            together=np.zeros((num_facts, num_facts)),  # in how many of all steps were both facts true
            steps=np.zeros(()),
        )

    def add(self, sums: dict[str, np.ndarray], history: dict[str, np.ndarray], met: dict[str, np.ndarray]) -> None:
        """Takes in a phase of U updates, T steps each. Without any history there is nothing to learn for.

        Args:
            sums: times, true_then, followed, brought, together, steps, as above
            history: reward (U, T, N), done (U, T, N), reached (U, T, N, G / 8) packed bits; chosen (U, M / U), which
                of the T * N situations of an update were met
            met: these: obs (M, O), facts (M, P)
        """
        if not history:
            return
        arrays = self.arrays
        for name, value in sums.items():
            setattr(arrays, name, getattr(arrays, name) + value)
        num_updates, num_steps, num_envs = history["done"].shape
        update = np.repeat(np.arange(num_updates), history["chosen"].shape[1])
        step, env = np.divmod(history["chosen"].ravel(), num_envs)
        whole = {name: history[name].reshape(-1, *history[name].shape[2:]) for name in ("reward", "done", "reached")}
        came = look_ahead(whole, update * num_steps + step, env, self.game.num_basic)
        new = np.flatnonzero(came["known"])[-MAX_REMEMBERED:]
        rows = (self.num + np.arange(len(new))) % MAX_REMEMBERED
        arrays.held[:] = False
        for name, source in (("obs", met), ("facts", met), ("when", came), ("paid", came), ("returns", came)):
            getattr(arrays, name)[rows] = source[name][new]
        arrays.held[rows[:: max(1, len(rows) // HELD_OUT)][:HELD_OUT]] = True
        self.num += len(new)

    def gains(self) -> np.ndarray:
        """Returns what each remembered situation brought, beyond what is usual there: (M,)."""
        most = min(self.num, MAX_REMEMBERED)
        facts, returns = self.arrays.facts[:most], self.arrays.returns[:most]
        return returns - usual(facts, returns) if most else returns

    def takes(self) -> dict[int, list[str]]:
        """Returns what was so whenever a sub-goal was reached and paid for, and is not so anyway, where that is known.

        At most MAX_FACTS facts, the rarest, and none that is mostly there with another of them: "wood >= 2" and not
        "wood >= 1". Last what it brought, "not " before it: who has that need not set out. An amount of what others
        take, the largest ("not wood >= 2"), else what is there longest ("not unlocked collect drink").
        """
        goals, facts = np.flatnonzero(self.arrays.times >= MIN_TIMES).tolist(), self.game.facts
        true = self.arrays.together.diagonal()
        needs = {goal: self._needs(goal) for goal in goals}
        amounts = {}  # of each thing the largest that any sub-goal takes
        for i in sorted({i for found in needs.values() for i in found if " >= " in facts[i]}, key=lambda i: true[i]):
            amounts.setdefault(amount_of(facts[i]), i)
        texts = {}
        for goal in goals:
            brought = self._brought(goal)
            wanted = [amounts[name] for i in brought if (name := amount_of(facts[i])) in amounts]
            last = [i for i in wanted if i not in needs[goal]] or brought
            texts[goal] = [facts[i] for i in needs[goal]] + [f"not {facts[i]}" for i in last[:1]]
        return {goal: text for goal, text in texts.items() if text}

    def _needs(self, goal: int) -> list[int]:
        """Finds the facts that were true whenever a sub-goal was reached and paid for, the rarest first."""
        arrays, true = self.arrays, self.arrays.together.diagonal()
        always = (arrays.true_then[goal] >= ALWAYS * arrays.times[goal]) & (true < OFTEN * max(arrays.steps, 1.0))
        return self._rarest(np.flatnonzero(always).tolist())

    def _rarest(self, facts: Iterable[int]) -> list[int]:
        """Returns at most MAX_FACTS of these, the rarest first, and none that is mostly there with another of them."""
        together, found = self.arrays.together, []
        for i in sorted(facts, key=lambda i: (together[i, i], i)):
            if not any(together[i, other] >= IMPLIED * together[other, other] for other in found):
                found.append(i)
        return [i for i in found if self.game.facts[i] not in self.game.doing][:MAX_FACTS]

    def plans(self, takes: dict[int, list[str]]) -> list[Plan]:
        """Returns what is worth making here, as another sub-goal takes it near: a furnace beside the table.

        That takes what both take, amounts added up, but for what is made; and that it is not here yet. Only for a
        sub-goal that takes two things near: a single one can be gone to. It is made by one that is about no thing.
        """
        game, plans = self.game, []
        near = {goal: {game.destinations.get(text) for text in texts} - {None} for goal, texts in takes.items()}
        goals = [goal for goal in takes if len(near[goal]) > 1]
        for maker in (maker for maker in takes if game.sub_goals[maker] not in game.things):
            for made in (game.facts[i] for i in self._brought(maker) if game.facts[i] in game.destinations):
                for goal in (goal for goal in goals if made in takes[goal]):
                    needed = [text for text in takes[maker] if not text.startswith("not ")]
                    needed += self._left_out(goal, needed, takes)
                    needed += [text for text in takes[goal] if not text.startswith("not ") and text != made]
                    ends = [text for text in takes[goal] if text.startswith("not ")]
                    plans.append(Plan(maker, goal, (*game.added_up(needed), f"not {made}", *ends)))
        return [plan for plan in plans if can_hold(plan.takes)]

    def _left_out(self, goal: int, amounts: list[str], takes: dict[int, list[str]]) -> list[str]:
        """Returns what a sub-goal takes of the same things though its list has nothing of them, as of what is usual.

        Of one that was hardly reached yet what the one takes that is named most alike.
        """
        like = goal if self.arrays.times[goal] >= MIN_TIMES else self._alike(goal, takes)
        then, times = self.arrays.true_then[like], self.arrays.times[like]
        names = {amount_of(text) for text in amounts} - {amount_of(text) for text in takes[goal]}
        ones = [f"{name} >= 1" for name in names if f"{name} >= 1" in self.game.fact_numbers]
        return [text for text in ones if then[self.game.fact_numbers[text]] >= ALWAYS * times > 0]

    def _alike(self, goal: int, takes: dict[int, list[str]]) -> int:
        """Returns the known (not guessed) sub-goal that is named most like this one; this one if none is."""
        words = self._words()
        known = [i for i in takes if self.arrays.times[i] >= MIN_TIMES]
        alike = max(known, key=lambda i: (len(words[goal] & words[i]), -self.arrays.times[i]), default=goal)
        return alike if len(words[goal] & words[alike]) >= ALIKE else goal

    def _words(self) -> list[set[str]]:
        """Returns the words of each basic sub-goal's name."""
        return [set(self.game.normalise(name).split()) for name in self.game.basic_sub_goals]

    def guesses(self, takes: dict[int, list[str]]) -> dict[int, list[str]]:
        """Returns what sub-goals may take of which that is not known: as `takes`, whose value is given.

        What the one that is named most alike takes, what is in the name, and what can be got or made and is of no known
        use, unless another such sub-goal has it in its name; but nothing that was not so when it was reached.
        """
        game, guesses = self.game, {}
        words, things = self._words(), {thing_of(text) for text in game.facts}
        unknown = [goal for goal in range(game.num_basic) if goal not in takes and self.arrays.times[goal] < MIN_TIMES]
        had = {i: thing_of(game.facts[i]) for goal in takes for i in self._brought(goal) if self._is_had(i)}
        used = {amount_of(text) for texts in takes.values() for text in texts}  # also any amount of it
        unused = {i for i in had if amount_of(game.facts[i]) not in used}
        for goal in unknown:
            if (alike := self._alike(goal, takes)) == goal:
                continue
            new = words[goal] - words[alike]
            claimed = set().union(*(words[other] for other in unknown if other != goal))
            more = {i for i, thing in had.items() if thing in new or (i in unused and thing not in claimed)}
            if not new & things <= {had[i] for i in more}:
                continue  # nobody has what it is about
            needs = {game.fact_numbers[text] for text in takes[alike] if text in game.fact_numbers}
            end = takes[alike][-1].replace(game.sub_goals[alike], game.sub_goals[goal])
            ends = [end] if end not in takes[alike] and end.removeprefix("not ") in game.fact_numbers else []
            seen = self.arrays.true_then[goal] >= self.arrays.times[goal]
            needed = [game.facts[i] for i in self._rarest(i for i in needs | more if seen[i])]
            guesses[goal] = [*needed, *ends] if needed else []
        return {goal: texts for goal, texts in guesses.items() if texts and can_hold(texts)}

    def _is_had(self, fact: int) -> bool:
        """Is a fact an amount of something, or that something is near?"""
        return " >= " in self.game.facts[fact] or self.game.facts[fact] in self.game.destinations

    def _brought(self, goal: int) -> list[int]:
        """Finds the facts that became true whenever a sub-goal was reached and paid for, the most frequent first."""
        arrays = self.arrays
        new = arrays.brought[goal] >= ALWAYS * max(arrays.followed[goal], MIN_TIMES)
        return [i for i in np.argsort(-arrays.together.diagonal(), kind="stable").tolist() if new[i]]

    def examples(
        self,
        source: str,
        most: int,
        prompt_of: Callable[[np.ndarray, np.ndarray], str],
    ) -> list[tuple[str, str]]:
        """Makes (prompt, analysis) pairs, the most telling first.

        Args:
            source: hindsight; experience, which also says what this sub-goal takes, and what some others do; or plans,
                which also says what to make on the spot for some of these, and guesses
            most: pairs
            prompt_of: the adapter's prompt for obs (O,) and facts (P,)
        """
        lessons, arrays = self.lessons(source, most), self.arrays
        return list({(prompt_of(arrays.obs[i], arrays.facts[i]), text): None for i, text in lessons.items()})

    def lessons(self, source: str, most: int) -> dict[int, str]:
        """Returns the analyses that would have been right in remembered situations; arguments as of `examples`."""
        if source not in ("hindsight", "experience", "plans"):
            raise ValueError(f"--sft-data {source}: nothing here makes its pairs")
        known = {} if source == "hindsight" else self.takes()
        guesses, plans = {}, []
        if source == "plans":
            guesses = self.guesses(known)
            plans = self.plans(known | guesses)
            known = enough(known, [*known.values(), *guesses.values(), *(plan.takes for plan in plans)])
        told = [Plan(i, i, tuple(texts)) for i, texts in (known | guesses).items()] + plans
        texts = {}
        for i in self.most_telling()[:most]:
            goal = self.worth_saying(i)
            said = [suggestion([self.game.sub_goals[goal]])]
            said += [self.game.experience_text(known[goal])] if goal in known else []
            texts[i] = " ".join([*said, *self.of_others(goal, told, np.random.default_rng(i))])
        return texts

    def retrieved(self, facts: np.ndarray, lessons: Mapping[int, str]) -> list[str]:
        """Returns for each situation (M, P) the lesson of the one that agrees in most facts; [] without lessons."""
        if not lessons:
            return []
        apart = (facts[:, None] != self.arrays.facts[list(lessons)]).sum(-1)  # (M, lessons)
        return [list(lessons.values())[i] for i in apart.argmin(1)]

    def of_others(self, goal: int, told: list[Plan], rng: np.random.Generator) -> list[str]:
        """Returns sentences: what OTHERS that are drawn by rng from what can be told take, none of them this sub-goal.

        Those with the rarer goals are drawn more often: what is often reached needs no advice.
        """
        told = [plan for plan in told if plan.sub_goal != goal]
        chance = 1 / np.sqrt(np.maximum(self.arrays.times[[plan.goal for plan in told]], MIN_TIMES))
        num = min(OTHERS, len(told))
        drawn = rng.choice(len(told), num, replace=False, p=chance / chance.sum()) if num else []
        takes = {told[i].sub_goal: told[i].takes for i in drawn}  # of a sub-goal that is drawn twice the last
        return [self.game.experience_text(facts, self.game.sub_goals[i]) for i, facts in takes.items()]

    def worth_saying(self, i: int) -> int | None:
        """Returns the rarest sub-goal that was paid for after a situation; where none was, that was reached."""
        paid, reached = (np.flatnonzero(found[i]) for found in (self.arrays.paid, self.arrays.when < HORIZON))
        reached = paid if len(paid) else reached
        return int(reached[self.arrays.times[reached].argmin()]) if len(reached) else None

    def most_telling(self) -> list[int]:
        """Returns the situations that make examples: of each sub-goal that is worth saying first the one that brought
        most, the rarest sub-goal first, then of each the second, and so on."""
        gains, turns, order = self.gains(), dict.fromkeys(range(self.game.num_basic), 0), []
        for i in np.argsort(-gains, kind="stable").tolist():
            goal = self.worth_saying(i)
            if gains[i] > 0 and goal is not None and not self.arrays.held[i]:
                turns[goal] += 1
                order.append((turns[goal], self.arrays.times[goal], len(order), i))
        return [i for *_, i in sorted(order)]

    def held_out(self, prompt_of: Callable[[np.ndarray, np.ndarray], str]) -> tuple[np.ndarray, list[str]]:
        """Returns the situations that only measure, and the adapter's prompts for them."""
        rows = np.flatnonzero(self.arrays.held)
        return rows, [prompt_of(self.arrays.obs[i], self.arrays.facts[i]) for i in rows]

    def agreement(self, rows: np.ndarray, named: Iterable[Sequence[int]]) -> float | None:
        """Returns the share of the sub-goals named for situations that were reached there, and paid; None without any.

        A sub-goal that is named for a situation agrees with what RL found out if it was reached within HORIZON steps,
        where these steps brought more than is usual.
        """
        gains, agreed = self.gains(), []
        for row, goals in zip(rows, named, strict=True):
            agreed += [bool(gains[row] > 0 and self.arrays.when[row, goal] < HORIZON) for goal in goals]
        return float(np.mean(agreed)) if agreed else None

    def possible(self, rows: np.ndarray) -> list[list[int]]:
        """Returns the sub-goals that have all that the game demands of them, in situations."""
        can = np.asarray(possible_sub_goals(self.game, self.arrays.facts[rows]))[:, : self.game.num_basic]
        return [np.flatnonzero(row).tolist() for row in can]

    def state(self) -> dict[str, np.ndarray]:
        return {f"found_{name}": value for name, value in vars(self.arrays).items()}

    def load_state(self, arrays: dict[str, Any], num: int) -> None:
        """Takes what `state` gave."""
        self.num = num
        for name in vars(self.arrays):
            if f"found_{name}" in arrays:
                setattr(self.arrays, name, np.array(arrays.pop(f"found_{name}")))
