"""`Game`: the words of one game, for everybody who speaks about it: adapter, guide, guidance table, logs.

An env has a `game`. Nothing outside a game's own files knows what can be seen, done or advised in it. The glossary in
docs/rladapter.md explains the terms.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Reasons of advice as indices into Game.facts, each with its truth
Literals = tuple[tuple[int, bool], ...]
# What the rules of a game advise: indices into Game.sub_goals with their reasons in words, the most urgent first
Advice = list[tuple[int, tuple[str, ...]]]
# Sub-goals that an analysis names -> what it says that they take, in facts; () where it says nothing of that
Heard = Mapping[int, tuple[str, ...]]

MAX_NAME = 200  # characters of a name that are looked at
FILLER = {"a", "an", "the", "some", "any", "more", "your", "nearby", "nearest", "closest", "to", "please"}


@dataclass(frozen=True, eq=False)
class Game:
    """Facts, sub-goals and rules of one game.

    Equal to itself only, and hashable, so that an env that holds it can be a static argument of `jax.jit`.
    """

    name: str
    """prefix of the game's own tags: <name>/score"""
    actions: tuple[str, ...]
    """(A,) the actions in words, for the comprehension score of the paper"""
    achievements: tuple[str, ...]
    """what an episode can unlock, with underscores"""
    facts: tuple[str, ...]
    """(P,) named booleans about a situation: all that advice may rest on"""
    sub_goals: tuple[str, ...]
    """(S,) all that can be advised; first the basic ones, whose detectors the env has, then those without"""
    num_basic: int
    """G, how many of the sub-goals are basic"""
    prompt: str
    """paragraphs for the guide: what the game is, and its rules"""
    needs: Mapping[str, tuple[str, ...]]
    """what the game demands of each basic sub-goal now, as facts; "not " in front of one that must be false"""
    kinds: tuple[str, ...]
    """(W,) kinds of things that advice can point at"""
    things: Mapping[str, str]
    """which kind of thing a sub-goal is about; none for those that need no thing in view"""
    advise: Callable[[dict[str, bool], Heard], Advice]
    """the offline guide `rules`: advice for a situation (the truth of every fact), given what the adapter's analysis
    names"""
    believers: Mapping[str, Callable[[dict[str, bool], Heard], Advice]] = field(default_factory=dict)
    """offline guides that know another game, by the value of --rules-knowledge"""
    destinations: Mapping[str, str] = field(default_factory=dict)
    """fact that holds where a sub-goal is reached -> the one with which to set out: "iron in view" -> "iron known" """
    doing: tuple[str, ...] = ()
    """facts that say what the player is doing: true while it works on a sub-goal, and no reason to set out"""
    acts: Mapping[str, str] = field(default_factory=dict)
    """which action a sub-goal is, where it is a single one that has another name"""
    sub_goal_aliases: Mapping[str, str] = field(default_factory=dict)
    """other words for a sub-goal, with commas between them"""
    fact_aliases: Mapping[str, str] = field(default_factory=dict)
    """other words for a fact, with commas between them"""
    word_forms: Mapping[str, str] = field(default_factory=dict)
    """plurals and the like: a word that is read as another one"""

    @property
    def basic_sub_goals(self) -> tuple[str, ...]:
        return self.sub_goals[: self.num_basic]

    @property
    def composite_sub_goals(self) -> tuple[str, ...]:
        return self.sub_goals[self.num_basic :]

    @functools.cached_property
    def fact_numbers(self) -> dict[str, int]:
        """Returns the index of each fact, by its own name."""
        return {name: i for i, name in enumerate(self.facts)}

    @functools.cached_property
    def sub_goal_numbers(self) -> dict[str, int]:
        """Returns the index of each sub-goal, by its own name."""
        return {name: i for i, name in enumerate(self.sub_goals)}

    @functools.cached_property
    def kind_numbers(self) -> np.ndarray:
        """(S,) the kind of thing that each sub-goal is about; W for none."""
        kinds = [self.things.get(name) for name in self.sub_goals]
        return np.array([len(self.kinds) if kind is None else self.kinds.index(kind) for kind in kinds])

    @functools.cached_property
    def action_numbers(self) -> np.ndarray:
        """(S,) the action that each sub-goal is; A for one that takes more than that."""
        names = [self.acts.get(name, name) for name in self.sub_goals]
        return np.array([self.actions.index(name) if name in self.actions else len(self.actions) for name in names])

    @functools.cached_property
    def needs_matrix(self) -> np.ndarray:
        """(S, P) what the game demands of each sub-goal now: 1 for facts that must be true, -1 for false ones."""
        matrix = np.zeros((len(self.sub_goals), len(self.facts)), np.float32)
        for name, needs in self.needs.items():
            for text in needs:
                fact, truth = self.read_fact(text)
                matrix[self.sub_goal_numbers[name], fact] = 1 if truth else -1
        return matrix

    def normalise(self, text: str) -> str:
        """Returns lower-case words without fillers and plurals: "Chop the Trees!" -> "chop tree"."""
        words = re.findall(r"[a-z0-9>=]+", text.lower())
        return " ".join(self.word_forms.get(word, word) for word in words if word not in FILLER)

    @functools.cached_property
    def _known_sub_goals(self) -> dict[str, int]:
        return self._known(self.sub_goals, self.sub_goal_aliases)

    @functools.cached_property
    def _known_facts(self) -> dict[str, int]:
        return self._known(self.facts, self.fact_aliases)

    def _known(self, names: tuple[str, ...], aliases: Mapping[str, str]) -> dict[str, int]:
        """Maps the normal forms of names and aliases to indices."""
        known: dict[str, int] = {}
        for i, name in enumerate(names):
            for form in (name, *aliases.get(name, "").split(",")):
                if form.strip():
                    known.setdefault(self.normalise(form), i)
        return known

    def read_sub_goal(self, text: str) -> int | None:
        """Returns the index of a sub-goal in anybody's words, None if it is none."""
        return self._known_sub_goals.get(self.normalise(text[:MAX_NAME]))

    def read_fact(self, text: str) -> tuple[int, bool] | None:
        """Returns (index, truth) of a fact in anybody's words, "not " or "no " in front of a false one; else None."""
        form = re.sub(r"\s*(>=|=>)\s*", " >= ", text[:MAX_NAME].lower().replace("≥", ">="))
        truth = True
        for negated, positive in ((r"^\s*(?:not|no)\s+", ""), (r"\bnot\s+", ""), (r"\s<\s*(?=\d)", " >= ")):
            form, changed = re.subn(negated, positive, form)
            truth ^= changed % 2 == 1
        index = self._known_facts.get(self.normalise(form))
        return None if index is None else (index, truth)

    def sub_goals_in_text(self, text: str) -> list[int]:
        """Finds basic sub-goals that a free text names literally, in order of appearance, each once.

        What is said of something else ("To mine iron takes unlocked make stone pickaxe.") names nothing.
        """
        lowered = re.sub(r"(\bto [^.]*)?\btakes [^.]*", "", text.lower())
        return list(dict.fromkeys(self.sub_goal_numbers[name] for name in self._any_basic.findall(lowered)))

    @functools.cached_property
    def _any_basic(self) -> re.Pattern[str]:
        """Finds the names of basic sub-goals, the longest that fits."""
        names = sorted(self.basic_sub_goals, key=len, reverse=True)
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")

    def heard_in_text(self, text: str) -> dict[int, tuple[str, ...]]:
        """Finds the sub-goals that an analysis names, as `sub_goals_in_text`, and the facts that each is said to take.

        "To mine iron takes iron in view." says it, and after naming it "It takes iron in view.", as `experience_text`.
        What must be near is a place to go to (`destinations`): who waits until it is near never goes. Not so where the
        sub-goal is about no thing. A sentence with anything that is no fact, or with a fact and its contrary, is not
        heard.
        """
        heard: dict[int, tuple[str, ...]] = dict.fromkeys(self.sub_goals_in_text(text), ())
        named = None  # last
        for sentence in text.lower().split("."):
            subject, takes, listed = sentence.partition("takes ")
            named = (self.sub_goals_in_text(subject) or [named])[-1]
            if takes and named is not None:
                facts = [None if name.count("not ") > 1 else self.read_fact(name) for name in listed.split(",")]
                if None in facts:
                    continue
                texts = [("" if true else "not ") + self.facts[i] for i, true in facts]
                if can_hold([*texts, *(self.destinations.get(text, text) for text in texts)]):
                    away = self.destinations if self.sub_goals[named] in self.things else {}
                    heard[named] = tuple(dict.fromkeys(away.get(text, text) for text in texts))
        return heard

    def added_up(self, facts: Iterable[str]) -> list[str]:
        """Returns facts, each once, amounts of the same thing added up: the largest up to the sum that is a fact."""
        amounts: dict[str, list[int]] = {}  # no numbers of what is no amount
        for text in facts:
            name, _, number = text.partition(" >= ")
            if number.isdigit():
                amounts.setdefault(name, []).append(int(number))
            else:
                amounts.setdefault(text, [])
        return [self._largest(name, numbers) if numbers else name for name, numbers in amounts.items()]

    def _largest(self, name: str, numbers: Sequence[int]) -> str:
        more = (f"{name} >= {number}" for number in range(sum(numbers), max(numbers), -1))
        return next((text for text in more if text in self.fact_numbers), f"{name} >= {max(numbers)}")

    @staticmethod
    def experience_text(facts: Iterable[str], sub_goal: str | None = None) -> str:
        """Returns a sentence that says what a sub-goal, or the one named last, takes, in facts."""
        return f"{f'To {sub_goal}' if sub_goal else 'It'} takes {', '.join(facts)}."

    def sub_goals_text(self, indices: Iterable[int]) -> str:
        """Returns the names in the given order, "none" if empty."""
        return ", ".join(self.sub_goals[i] for i in indices) or "none"

    def reasons_text(self, care: np.ndarray, situation: np.ndarray) -> list[str]:
        """Returns the facts of a situation (P,) that are cared about (P,) in words, "not " before false ones."""
        return [("" if situation[i] else "not ") + self.facts[i] for i in np.flatnonzero(care)]

    def truths(self, situation: Sequence[bool]) -> dict[str, bool]:
        """Returns the truth of each fact by its name, from (P,)."""
        return {name: bool(truth) for name, truth in zip(self.facts, situation, strict=True)}


def holds(truths: Mapping[str, bool], reasons: Iterable[str]) -> bool:
    """Says whether each of these facts is as it is said to be; "not " stands in front of a false one."""
    return all(truths[text.removeprefix("not ")] != text.startswith("not ") for text in reasons)


def can_hold(reasons: Sequence[str]) -> bool:
    """Says whether no fact stands beside its contrary."""
    return not any(f"not {text}" in reasons for text in reasons)
