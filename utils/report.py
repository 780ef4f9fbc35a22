"""One page about a run, or about several side by side: report.html, a single file that needs no network.

    write_report(Path("report.html"), [Path("runs/guided-1"), Path("runs/facts-1")])

Here the numbers are found and put into order; report.html.jinja says how they look. What comes from a log or an LLM is
untrusted: jinja2 escapes it, the page's script gets it as JSON and shows it as text only, and the page's
Content-Security-Policy lets nothing else run and nothing be fetched. A file that a run lacks leaves a sentence on the
page, not an error.
"""

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from jinja2.utils import htmlsafe_json_dumps

from utils.run_folder import clean_line, read_log
from utils.trials import MIN_VISITS

FILES = ("config.json", "summary.json", "eval.json", "metrics.jsonl", "guidance.jsonl", "outcomes.jsonl")
NO_LLM = {  # the guides that are none
    "rules": "no LLM: a list of rules",
    "shuffled": "no LLM: a list of rules, its sub-goals exchanged with each other",
    "random": "no LLM: advice is drawn at random",
    "echo": "no LLM: advice is what the adapter's analysis says",
}
MAX_QUESTIONS_BYTES = 7_000_000  # of the questions on the page, as JSON
MAX_FILM_BYTES = 8_000_000  # of the films within the page; more are links
MAX_TEXT = 4000  # characters of one text of a question
MAX_ADVICE = 200  # pieces of advice listed
MAX_WORDS = 40  # sub-goals in the table of words
MAX_POINTS = 250  # of a curve
FILM_TYPES = {".mp4": "video/mp4", ".gif": "image/gif"}
EVALUATION = ("eval_episodes", "episodic_return", "episodic_length", "score", "reward_percent", "achievements")

Record = dict[str, Any]
Advice = tuple[str, tuple[str, ...]]  # a sub-goal, and the facts that it rests on


def write_report(path: Path, folders: list[Path], human: dict[str, float] | None = None) -> None:
    """Writes one page about runs, the first of which is the main one. A failure leaves no half of a page.

    Args:
        human: success rates of human experts in %, by the name of the achievement
    Raises:
        ValueError, one line, for a folder that is no run; OSError where the page can't be written
    """
    if not folders:
        raise ValueError("report: no run is named; give the folder of at least one")
    runs = [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]
    html = render(page(runs, human or {}, path.parent))
    temporary = path.with_name(path.name + ".tmp")
    try:
        # A reply may hold half a surrogate pair, which UTF-8 can't.
        temporary.write_text(html, encoding="utf-8", errors="replace", newline="\n")
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def render(content: Record) -> str:
    """Fills the template. Raises jinja2.UndefinedError where it names what is not there."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    env = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"fixed": fixed, "count": count, "percent": percent, "csp_hash": csp_hash, "words": in_words}
    return env.get_template("report.html.jinja").render(content)


# --------------------------------------------------------------------------------------------------------------------
# A run, as far as it can be read
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunData:
    """What a run's folder holds; empty where a file is missing, which `missing` then says."""

    name: str
    folder: Path
    config: Record
    summary: Record
    eval: Record
    metrics: list[Record]
    guidance: list[Record]
    outcomes: list[Record]
    missing: dict[str, str]  # file -> what is wrong with it

    @property
    def flags(self) -> Record:
        flags = self.config.get("flags")
        return flags if isinstance(flags, dict) else {}


def read_run(folder: Path, name: str) -> RunData:
    """Reads what is there. Raises ValueError, one line, if that is nothing."""
    missing = {file: "is missing" for file in FILES if not (folder / file).is_file()}
    if len(missing) == len(FILES):
        raise ValueError(f"report: {clean_line(str(folder))} is no run folder (none of {', '.join(FILES)} is in it)")
    found = {Path(file).stem: read_file(folder, file, missing) for file in FILES}
    return RunData(name=name, folder=folder, missing=missing, **found)


def read_file(folder: Path, file: str, missing: dict[str, str]) -> Any:
    """Reads a log or an object; notes in `missing` what can't be read."""
    kind = list if file.endswith(".jsonl") else dict
    if file in missing:
        return kind()
    try:
        content = read_log(folder, file) if kind is list else json.loads((folder / file).read_text())
    except (OSError, ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        content = None
    if not isinstance(content, kind):
        missing[file] = "can't be read"
    elif not content:
        unread = kind is list and (folder / file).stat().st_size  # no line of it is a record
        missing[file] = "can't be read" if unread else "is empty"
    return content if isinstance(content, kind) else kind()


def distinct_names(folders: list[Path]) -> list[str]:
    """Names runs after their folders, with as many of the folders above as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{p[-1]} ({number})" for number, p in enumerate(parts, 1)]  # one folder given twice


def number(value: Any) -> float | None:
    """None for what is no finite number: logs have null, and NaN where a loss was."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def text(value: Any, limit: int = MAX_TEXT) -> str:
    value = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return value if len(value) <= limit else value[:limit] + " … (cut)"


def texts(value: Any) -> tuple[str, ...]:
    return tuple(map(text, value)) if isinstance(value, list) else ()


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of an object."""
    items = value.items() if isinstance(value, dict) else ()
    return {name: found for name, x in items if (found := number(x)) is not None}


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


def page(runs: list[RunData], human: dict[str, float], beside: Path) -> Record:
    """Everything that the template shows. `beside`: the folder of the page, for links."""
    asked = next((run for run in runs if run.guidance), runs[0])  # whose questions are shown
    worth = worth_of_advice(asked.outcomes)
    questions, total = within_size([question_row(q, worth) for q in asked.guidance], MAX_QUESTIONS_BYTES)
    achievements = achievement_rows(runs, human)
    panels = [panel for title, tag, from_zero in PANELS if (panel := make_panel(runs, title, tag, from_zero))]
    return {
        "runs": [run_header(run) for run in runs],
        "panels": panels,
        "chart": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        "achievements": achievements,
        "human_known": any(row["human"] is not None for row in achievements),
        "num_above": sum((row["rates"][0] or 0.0) > row["human"] for row in achievements if row["human"] is not None),
        "asked": asked,
        "num_questions": total,
        "num_shown": len(questions),
        "advice": advice_rows(worth)[:MAX_ADVICE],
        "num_advice": len(worth),
        "min_visits": MIN_VISITS,
        "then_and_now": then_and_now(asked.guidance),
        "words": word_table(asked),
        "habits": habit_rows(runs),
        "deaths": death_rows(runs),
        "costs": [(label, kind, [cost_of(run, name) for run in runs]) for label, kind, name in COSTS],
        "times": [(label, "seconds", [seconds_of(run, name) for run in runs]) for label, name in TIMES],
        "films": films_of(runs, beside),
        "flags": flag_rows(runs),
        "data": {"panels": [panel["data"] for panel in panels], "questions": questions},
    }


def run_header(run: RunData) -> Record:
    """One run's headline numbers, and where it came from."""
    result, source = evaluation_of(run)
    guide, note = guide_of(run)
    rates = numbers(result.get("achievements"))
    steps = run.summary.get("global_step") or (run.metrics[-1].get("global_step") if run.metrics else None)
    commit = text(run.config.get("git_commit"))
    versions = run.config.get("versions")
    return {name: number(result.get(name)) for name in EVALUATION if name != "achievements"} | {
        "name": run.name,
        "env_id": text(run.flags.get("env_id") or run.summary.get("env_id")),
        "source": source,
        "eval_notes": eval_notes(run),
        "reached": sum(rate > 0 for rate in rates.values()),
        "num_achievements": len(rates),
        "score_all_episodes": number(run.summary.get("score_all_episodes")),
        "steps": number(steps),
        "guide": guide,
        "guide_note": note,
        "calls": cost_of(run, "calls"),
        "cost": cost_of(run, "cost"),
        "missing": run.missing,
        "command": command_of(run),
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty"),
        "device": text(run.config.get("device")),
        "num_cpus": number(run.config.get("num_cpus")),
        "versions": {text(k): text(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
    }


def evaluation_of(run: RunData) -> tuple[Record, str]:
    """The newest evaluation, and what it is; else what the last phase's training episodes reached."""
    for result, made_by in ((run.eval, "eval.json"), (run.summary, "the end of training")):
        if number(result.get("episodic_return")) is not None:
            return result, f"{count(result.get('eval_episodes'))} fresh episodes, {made_by}"
    last = next((m for m in reversed(run.metrics) if number(m.get("charts/episodic_return")) is not None), {})
    result = {name: last.get(f"charts/{name}") for name in ("episodic_return", "episodic_length")}
    result |= {name: value_at(last, "/" + name) for name in ("score", "reward_percent")}
    result["achievements"] = {
        tag.removeprefix("achievements/"): rate for tag, rate in last.items() if tag.startswith("achievements/")
    }
    source = f"training episodes of phase {last['phase']}, no evaluation yet" if last else "nothing was measured yet"
    return result, source


def eval_notes(run: RunData) -> dict[str, str]:
    """What eval.json says about how it was made: another env, no advice, another checkpoint change what it means."""
    if number(run.eval.get("episodic_return")) is None:
        return {}
    return {
        name: text(value) for name, value in run.eval.items()
        if name not in EVALUATION and not isinstance(value, dict | list) and value is not None
    }  # fmt: skip


def guide_of(run: RunData) -> tuple[str, str]:
    """Names the guide of a run, and says so where it is no LLM."""
    given = {**run.flags, **run.summary}
    if given.get("guidance") in ("none", "facts") or given.get("llm") == "none":
        return "none", "the policy is given facts, no advice" if given.get("guidance") == "facts" else "no guidance"
    kind, model = text(given.get("llm")), text(given.get("llm_model"))
    models = sorted({text(q.get("model")).removeprefix("http:") for q in run.guidance})
    knowledge = text(run.flags.get("rules_knowledge", "expert"))
    for name in (kind, model, *models):
        if name in NO_LLM:
            other = f", which knows {knowledge} instead of this game" * (name == "rules" and knowledge != "expert")
            return name, NO_LLM[name] + other
    if kind == "replay":
        return kind, f"repeats what the guide of another run said: {text(run.flags.get('llm_replay'))}"
    return model or kind or ", ".join(models) or "not known", "an LLM behind a server" if kind == "http" else ""


def command_of(run: RunData) -> str:
    """The command that trains this run again, in a folder of its own; empty if it is not known."""
    argv = run.config.get("argv")
    if not isinstance(argv, list):
        return ""
    words, kept = iter(map(text, argv)), []
    for word in words:
        name, has_value, _ = word.replace("_", "-").partition("=")
        if name != "--run-dir":
            kept.append(word)
        elif not has_value:
            next(words, None)
    renamed = any(word.replace("_", "-").startswith("--exp-name") for word in kept)
    script = "rladapter_ppo" if renamed else text(run.flags.get("exp_name")) or "rladapter_ppo"
    return shlex.join(["python", f"{script}.py", *kept])


def flag_rows(runs: list[RunData]) -> list[Record]:
    """All flags, those first in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.flags)
    rows = []
    for name in names:
        values = [text(run.flags[name]) if name in run.flags else "–" for run in runs]
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


# --------------------------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------------------------

# Title, tag in metrics.jsonl (a game's own begins with its name), does the axis begin at 0?
PANELS = (
    ("Return", "charts/episodic_return", True),
    ("Score, %", "/score", True),
    ("Comprehension", "guidance/comprehension", True),
    ("Entropy", "losses/entropy", True),
    ("Value loss", "losses/value_loss", True),
    ("Policy loss", "losses/policy_loss", False),
    ("Prediction loss", "losses/predict_loss", True),
    ("Fine-tuning loss of the adapter", "adapter/sft_loss", True),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 44, 350, 10, 164  # of a panel, and where its axes are


def value_at(record: Record, tag: str) -> float | None:
    """The number under a tag, or under the first that ends with it."""
    return number(next((value for name, value in record.items() if name == tag or name.endswith(tag)), None))


def curve_of(run: RunData, tag: str) -> list[tuple[float, float]]:
    """(env steps, value) of each phase that has both, at most MAX_POINTS."""
    points = [(number(record.get("global_step")), value_at(record, tag)) for record in run.metrics]
    return evenly([point for point in points if None not in point], MAX_POINTS)


def make_panel(runs: list[RunData], title: str, tag: str, from_zero: bool) -> Record | None:
    """One small chart with a curve for each run. None if no run has any number for it."""
    curves = [curve_of(run, tag) for run in runs]
    if not any(curves):
        return None
    values = [value for curve in curves for _, value in curve]
    y_ticks = nice_ticks(min(values + [0.0] * from_zero), max(values))
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)
    last_step = max(step for curve in curves for step, _ in curve) or 1

    def x_at(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / last_step, 1)

    def y_at(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    lines = []
    for run, curve in enumerate(curves):
        points = [(x_at(step), y_at(value)) for step, value in curve]
        lines.append({"run": run, "points": points, "last": short(curve[-1][1]) if curve else "–"})
    said = [f"{run.name} from {short(c[0][1])} to {short(c[-1][1])}" for run, c in zip(runs, curves, strict=True) if c]
    return {
        "title": title,
        "summary": f"{title} against env steps: {'; '.join(said)}",
        "lines": lines,
        "last_step": last_step,
        "x_ticks": [(x_at(step), in_short(step)) for step in nice_ticks(0, last_step) if step <= last_step],
        "y_ticks": [(y_at(y), in_short(y)) for y in y_ticks],
        "data": {"last_step": last_step, "curves": curves},
    }


def nice_ticks(low: float, high: float) -> list[float]:
    """About four round numbers, which the interval begins and ends within a step of."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.6g}") for i in range(first, max(last, first + 1) + 1)]


# --------------------------------------------------------------------------------------------------------------------
# Achievements, habits, deaths
# --------------------------------------------------------------------------------------------------------------------


def achievement_rows(runs: list[RunData], human: dict[str, float]) -> list[Record]:
    """Success rates in %, those that the main run reaches most often first."""
    rates = [numbers(evaluation_of(run)[0].get("achievements")) for run in runs]
    names = dict.fromkeys(name for of_run in rates for name in of_run)
    rows = [
        {"name": name, "human": human.get(name),
         "rates": [100 * of_run[name] if name in of_run else None for of_run in rates]}
        for name in names
    ]  # fmt: skip
    return sorted(rows, key=lambda row: [-(rate or 0.0) for rate in row["rates"]])


def habit_rows(runs: list[RunData]) -> list[Record]:
    """How often what a person would do was done, of the occasions to do it."""
    habits = [run.eval.get("habits") for run in runs]
    habits = [found if isinstance(found, dict) else {} for found in habits]
    rows = []
    for name in dict.fromkeys(name for of_run in habits for name in of_run):
        of_runs = [of_run.get(name) if isinstance(of_run.get(name), dict) else {} for of_run in habits]
        what = next((text(habit["what"]) for habit in of_runs if habit.get("what")), "")
        rows.append({"name": name, "what": what, "cells": [habit_cell(habit) for habit in of_runs]})
    return rows


def habit_cell(habit: Record) -> dict[str, float | None]:
    taken = share(habit.get("sensible"), habit.get("occasions"))
    return {"share": taken, "per_episode": number(habit.get("per_episode"))}


def death_rows(runs: list[RunData]) -> list[tuple[str, list[float | None]]]:
    """(cause, share of the episodes in each run), the most frequent of the main run first."""
    shares = [numbers(run.eval.get("deaths")) for run in runs]
    causes = dict.fromkeys(cause for of_run in shares for cause in of_run)
    rows = [(cause, [of_run.get(cause) for of_run in shares]) for cause in causes]
    return sorted(rows, key=lambda row: [-(x or 0.0) for x in row[1]])


# --------------------------------------------------------------------------------------------------------------------
# Guidance
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worth:
    """What came of a piece of advice, over the whole run."""

    visits: int
    successes: int
    difference: float | None  # return with it minus return without it; None: it was not on trial
    standard_error: float | None


def worth_of_advice(outcomes: list[Record]) -> dict[Advice, Worth]:
    """Adds up outcomes.jsonl. The arms of a trial are compared within a phase, as training does."""
    by_advice: dict[Advice, dict[Any, dict[bool, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for line in outcomes:
        advice = text(line.get("sub_goal")), texts(line.get("because"))
        by_advice[advice][line["phase"]][bool(line.get("with_advice"))] = numbers(line)
    worth = {}
    for advice, phases in by_advice.items():
        given = [arms[True] for arms in phases.values() if True in arms]
        visits, successes = (int(sum(arm.get(name, 0) for arm in given)) for name in ("visits", "successes"))
        worth[advice] = Worth(visits, successes, *compare_arms(list(phases.values())))
    return worth


def compare_arms(phases: list[dict[bool, dict[str, float]]]) -> tuple[float | None, float | None]:
    """The difference of the mean returns with and without advice, and its standard error.

    Phases count by the inverse of their variance (`utils.trials.phase_trial`), all alike however long ago.
    """
    weighted = total = 0.0
    for arms in phases:
        if len(arms) < 2 or min(arm.get("visits", 0) for arm in arms.values()) < MIN_VISITS:
            continue
        variance = sum(max(arm.get("return_variance", 0.0), 1e-4) / arm["visits"] for arm in arms.values())
        weighted += (arms[True].get("return_mean", 0.0) - arms[False].get("return_mean", 0.0)) / variance
        total += 1 / variance
    return (weighted / total, total**-0.5) if total else (None, None)


def advice_rows(worth: dict[Advice, Worth]) -> list[Record]:
    """The advice that was in force most often first."""
    rows = [
        {"sub_goal": sub_goal, "because": because, "worth": w, "success": share(w.successes, w.visits)}
        for (sub_goal, because), w in worth.items()
    ]
    return sorted(rows, key=lambda row: -row["worth"].visits)


def question_row(question: Record, worth: dict[Advice, Worth]) -> Record:
    """A question of guidance.jsonl as the page's script shows it, with what came of its advice."""
    before, comprehension = before_of(question)
    advice = list(zip(texts(question.get("sub_goals")), reasons_of(question), strict=False))
    known = [w for w in (worth.get(key) for key in advice) if w is not None]
    visits = sum(w.visits for w in known)
    tried = [(w.difference, w.standard_error**-2) for w in known if w.difference is not None]
    return {
        "phase": number(question["phase"]),
        "step": number(question.get("global_step")),
        "caption": text(question.get("caption")),
        "before": before,
        "comprehension": comprehension,
        "analysis": text(question.get("analysis")),
        "reply": text(question.get("reply")),
        "error": text(question.get("error")),
        "calls": number(question.get("calls")),
        "cached": bool(question.get("cached")),
        "advice": [[*key, *outcome(worth.get(key))] for key in advice],
        "visits": visits if known else None,
        "success": share(sum(w.successes for w in known), visits),
        "difference": sum(d * p for d, p in tried) / sum(p for _, p in tried) if tried else None,
    }


def outcome(worth: Worth | None) -> list[float | None]:
    """[visits, success, difference, its standard error] for the page's script"""
    if worth is None:
        return [None] * 4
    return [worth.visits, share(worth.successes, worth.visits), worth.difference, worth.standard_error]


def reasons_of(question: Record) -> list[tuple[str, ...]]:
    because = question.get("because")
    return [texts(reasons) for reasons in because] if isinstance(because, list) else []


def before_of(question: Record) -> tuple[str, float | None]:
    """The sub-goals that were advised before, and how well they were understood, out of the adapter's prompt."""
    prompt = text(question.get("adapter_prompt"))
    if not prompt and isinstance(question.get("messages"), list) and question["messages"]:  # there is no adapter
        asked = question["messages"][-1]
        prompt = text(asked.get("content")) if isinstance(asked, dict) else ""
    sub_goals = re.findall(r"^Previous sub-goals: (.*?)\.?$", prompt, re.M)
    score = re.findall(r"^Comprehension score: (\d+(?:\.\d+)?)", prompt, re.M)
    return sub_goals[-1] if sub_goals else "", float(score[-1]) if score else None


def within_size(rows: list[Record], limit: int) -> tuple[list[Record], int]:
    """Keeps as many rows, evenly spaced, as fit into `limit` bytes of JSON. Returns them and how many there were."""
    sizes = [len(htmlsafe_json_dumps(row)) for row in rows]
    kept = len(rows)
    while kept > 1 and (size := sum(evenly(sizes, kept))) > limit:
        kept = max(min(kept - 1, int(kept * limit / size)), 1)
    return evenly(rows, kept), len(rows)


def evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


# --------------------------------------------------------------------------------------------------------------------
# The adapter's words
# --------------------------------------------------------------------------------------------------------------------


def then_and_now(guidance: list[Record], wanted: int = 3) -> list[list[Record]]:
    """What the adapter wrote early, midway and late about the same situation, or about those that are most alike."""
    said = [question for question in guidance if question.get("analysis") and number(question["phase"]) is not None]
    phases = sorted({question["phase"] for question in said})
    if len(phases) < 3:
        return []
    width = max(len(phases) // 5, 1)
    starts = 0, (len(phases) - width) // 2, len(phases) - width
    times = [set(phases[start : start + width]) for start in starts]
    early, middle, late = (evenly([q for q in said if q["phase"] in time], 100) for time in times)
    triples = [[most_alike(early, anchor), anchor, most_alike(late, anchor)] for anchor in middle]
    triples.sort(key=lambda triple: sorted(alike(q, triple[1]) for q in (triple[0], triple[2])), reverse=True)
    by_caption: dict[str, list[Record]] = {}
    for triple in triples:
        by_caption.setdefault(text(triple[1].get("caption")), triple)
    return [[then_row(q, triple[1]) for q in triple] for triple in list(by_caption.values())[:wanted]]


def most_alike(questions: list[Record], anchor: Record) -> Record:
    return max(questions, key=lambda question: alike(question, anchor))


def alike(a: Record, b: Record) -> tuple[bool, float]:
    """Are the captions of two situations the same? Which share of their facts have they in common?"""
    facts_a, facts_b = set(texts(a.get("situation"))), set(texts(b.get("situation")))
    in_common = len(facts_a & facts_b) / max(len(facts_a | facts_b), 1)
    return a.get("caption") == b.get("caption"), in_common


def then_row(question: Record, anchor: Record) -> Record:
    before, comprehension = before_of(question)
    same, in_common = alike(question, anchor)
    return {
        "phase": question["phase"],
        "caption": text(question.get("caption")),
        "same": same,
        "in_common": in_common,
        "before": before,
        "comprehension": comprehension,
        "analysis": text(question.get("analysis")),
    }


def word_table(run: RunData) -> list[Record]:
    """How many % of the analyses, and of the replies, name each sub-goal, in each third of the run."""
    phases = [number(question["phase"]) for question in run.guidance]
    last = max((phase for phase in phases if phase is not None), default=0)
    names = {name for q in run.guidance for name in texts(q.get("sub_goals"))}
    names |= {text(line["sub_goal"]) for line in run.outcomes if line.get("sub_goal")}
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})\b")
    asked, written, replied = Counter(), [Counter() for _ in range(3)], [Counter() for _ in range(3)]
    for phase, question in zip(phases, run.guidance, strict=True):
        third = min(int(3 * (phase or 0) / (last + 1)), 2)
        asked[third] += 1
        written[third].update(set(pattern.findall(text(question.get("analysis")).lower())) if names else ())
        replied[third].update(set(texts(question.get("sub_goals"))))
    rows = [
        {"name": name, "written": [percent_of(written[t][name], asked[t]) for t in range(3)],
         "replied": [percent_of(replied[t][name], asked[t]) for t in range(3)],
         "total": sum(c[name] for c in written + replied)}
        for name in names
    ]  # fmt: skip
    rows = [row for row in rows if row["total"]]
    return sorted(rows, key=lambda row: (-row["total"], row["name"]))[:MAX_WORDS]


# --------------------------------------------------------------------------------------------------------------------
# Cost, time, films
# --------------------------------------------------------------------------------------------------------------------

COSTS = (
    ("questions", "count", "questions"), ("calls of the guide", "count", "calls"), ("retries", "count", "retries"),
    ("answers from the cache", "count", "cache_hits"), ("failures", "count", "failures"),
    ("not asked, the budget was spent", "count", "skipped"), ("prompt tokens", "count", "prompt_tokens"),
    ("completion tokens", "count", "completion_tokens"), ("cost", "money", "cost"),
)  # fmt: skip
TIMES = (
    ("training", "time/train"), ("guidance", "time/guidance"), ("waiting for the guide, of that", "time/llm_wait"),
    ("fine-tuning the adapter", "time/sft"), ("compilation", "time/compile"), ("all phases", "wall_seconds"),
    ("setting up", "setup_seconds"), ("final evaluation", "eval_seconds"),
)  # fmt: skip


def cost_of(run: RunData, name: str) -> float | None:
    """A total of summary.json, or added up from the phases so far."""
    total = number(run.summary.get(f"llm_{name}"))
    if total is not None:
        return total
    if name == "questions":
        return len(run.guidance) or None
    return total_of(run.metrics, f"llm/{name}")


def seconds_of(run: RunData, name: str) -> float | None:
    return total_of(run.metrics, name) if "/" in name else number(run.summary.get(name))


def total_of(records: list[Record], tag: str) -> float | None:
    values = [value for record in records if (value := number(record.get(tag))) is not None]
    return sum(values) if values else None


def films_of(runs: list[RunData], beside: Path) -> list[Record]:
    """The films of all runs, within the page as far as MAX_FILM_BYTES go; else as a link."""
    films, left = [], MAX_FILM_BYTES
    for run in runs:
        for path in film_paths(run.folder):
            with contextlib.suppress(OSError):  # taken away meanwhile
                size, uri = path.stat().st_size, ""
                if size <= left:
                    left -= size
                    uri = f"data:{FILM_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
                link = quote(os.path.relpath(path, beside).replace(os.sep, "/"))
                film = {"run": run.name, "name": path.name, "uri": uri, "link": link, "megabytes": size / 1e6}
                films.append(film | {"is_video": path.suffix == ".mp4"})
    return films


def film_paths(folder: Path) -> list[Path]:
    """One file of each film: the MP4, which is smaller, or else the GIF."""
    found = {path.stem: path for suffix in (".gif", ".mp4") for path in folder.glob(f"film-*{suffix}")}
    return [found[stem] for stem in sorted(found, key=lambda stem: (len(stem), stem))]


# --------------------------------------------------------------------------------------------------------------------
# Numbers in words
# --------------------------------------------------------------------------------------------------------------------


def share(part: Any, whole: Any) -> float | None:
    part, whole = number(part), number(whole)
    return part / whole if part is not None and whole else None


def percent_of(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def fixed(value: Any, digits: int = 2, sign: bool = False) -> str:
    """A number with so many digits behind the point, "–" for none."""
    value = number(value)
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def count(value: Any) -> str:
    value = number(value)
    return "–" if value is None else f"{value:,.0f}"


def percent(value: Any, digits: int = 0) -> str:
    """A share in percent."""
    value = number(value)
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def short(value: float) -> str:
    """Three digits that count, as the page's script writes them below the pointer."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def in_short(value: float) -> str:
    """1,500,000 as 1.5M"""
    size, letter = next(((s, x) for s, x in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, ""))
    return f"{value / size:.3g}{letter}"


def in_words(name: str) -> str:
    return name.replace("_", " ")


def csp_hash(content: str) -> str:
    """The source expression that lets an inline style or script of exactly this content be used."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(content).encode()).digest()).decode()
