"""Results: small files made from run folders, committed under benchmarks/results/<suite>/<variant>-<seed>.json.

    command, git_commit, versions, device, num_cpus    where it came from
    summary                                            the run's summary.json
    curve                                              columns global_step, episodic_return, score, llm_calls (so far)
                                                       at up to 50 of the run's phases; older results have no score and
                                                       no llm_calls
    advice                                             what the guide was told and said (`advice`, `heard`); {} without
                                                       guidance
    said                                               the first SAID analyses and replies of the last pause
    habits, original                                   of runs that evaluate.py played, in their own env and in the
                                                       original game: its files in short, or null

`python benchmarks/plot.py --collect` makes them.
"""

import json
import lzma
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from run import VARIANTS, differing_flag, flags_of

from envs import make_env
from envs.game import Game, holds
from utils import run_folder
from utils.llm_http import clean

CURVE_POINTS = 50
SAID = 10  # analyses and replies that are kept
LONGEST = 240  # characters of each
Result = dict[str, Any]
Results = dict[str, dict[int, Result]]  # variant -> seed -> result


def read_run(folder: Path) -> Result:
    """The result of a finished run folder. Raises ValueError if a file is missing or broken."""
    try:
        return _read_run(folder)
    except (OSError, ValueError, KeyError) as problem:
        raise ValueError(f"{folder} can't be read ({problem!r}); train this run again") from None


def _read_run(folder: Path) -> Result:
    config = json.loads((folder / "config.json").read_text())
    words = config["argv"]
    if "--run-dir" in words:
        at = words.index("--run-dir")
        words = words[:at] + words[at + 2 :]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    answers = run_folder.read_log(folder, "guidance.jsonl")
    game = make_env(config["flags"]["env_id"], 1).game
    return {
        "command": shlex.join(["python", "rladapter_ppo.py", *words]),
        **{name: config[name] for name in ("git_commit", "versions", "device", "num_cpus")},
        "summary": json.loads((folder / "summary.json").read_text()),
        "curve": curve(metrics),
        "advice": advice(metrics) | heard(game, answers),
        "said": said(answers),
        "habits": habits(folder / "eval.json"),
        "original": original(folder / "eval-crafter.json"),
    }


def advice(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the phases that have them: comprehension; agreement (`Found.agreement`) of the adapter before and
    after its fine-tunings, of any possible sub-goal and of the game's own rules; and the share of the rules that held
    where the guide was asked."""
    names = ("guidance/comprehension", *(f"adapter/agreement_{of}" for of in ("before", "after", "possible", "rules")))
    columns = {name: [m[name] for m in metrics if m.get(name) is not None] for name in names}
    found = {name.partition("/")[2]: float(np.mean(values)) for name, values in columns.items() if values}
    stated, holding = (sum(m.get(f"guidance/rules_{name}") or 0 for m in metrics) for name in ("stated", "holding"))
    return found | ({"holding": holding / stated} if stated else {})


def heard(game: Game, answers: list[dict[str, Any]]) -> dict[str, float]:
    """Shares: of the replies, usable ones; of these, where an analysis names a sub-goal, those that advise what it
    names first; of the basic sub-goals that are advised, those that had there all that the game demands. {} without."""
    usable = [answer for answer in answers if not answer["error"]]
    named = [(game.sub_goals_in_text(answer["analysis"]), answer["sub_goals"]) for answer in usable]
    heeded = [game.sub_goals[goals[0]] in advised for goals, advised in named if goals]
    possible = [can_be_done(game, name, answer["situation"]) for answer in usable for name in answer["sub_goals"]
                if name in game.basic_sub_goals]  # fmt: skip
    shares = {"usable": len(usable) / len(answers)} if answers else {}
    measured = {"heeded": heeded, "possible": possible}
    return shares | {name: float(np.mean(cases)) for name, cases in measured.items() if cases}


def can_be_done(game: Game, sub_goal: str, situation: list[str]) -> bool:
    """Has a situation, the facts that are true there, all that the game demands of a basic sub-goal?"""
    return holds({fact: fact in situation for fact in game.facts}, game.needs[sub_goal])


def said(answers: list[dict[str, Any]]) -> list[list[str]]:
    """[analysis, reply] of the last pause, the first SAID of them, none left out; one line each, long ones cut off."""
    last = [answer for answer in answers if answer["phase"] == answers[-1]["phase"]]
    texts = [(answer["analysis"], compact(answer["reply"]) or answer["error"]) for answer in last[:SAID]]
    return [[clean(text, LONGEST) for text in pair] for pair in texts]


def compact(reply: str) -> str:
    """JSON without the white space that some models lay it out with; other text as it is."""
    try:
        return json.dumps(json.loads(reply), separators=(",", ":"))
    except (ValueError, RecursionError):
        return reply


def habits(path: Path) -> dict[str, Any] | None:
    """What evaluate.py saw a run's agent do: counts of habits, what ended its lives. None if it did not look."""
    found = read_evaluation(path)
    if not found or "habits" not in found:
        return None
    counts = {name: [habit["occasions"], habit["sensible"]] for name, habit in found["habits"].items()}
    return how(path, found) | {"counts": counts, "deaths": found["deaths"]}


def original(path: Path) -> dict[str, Any] | None:
    """How the agent of a run did in the original of its game. None if it did not play there."""
    found = read_evaluation(path)
    return found and how(path, found, "--env-id", found["env_id"]) | {"achievements": found["achievements"]}


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """An evaluation that evaluate.py wrote; None if there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def how(path: Path, found: dict[str, Any], *words: str) -> dict[str, Any]:
    """The command of an evaluation, the commit that it was made with, its main numbers."""
    flags = ["--episodes", str(found["eval_episodes"]), "--seed", str(found["seed"])]
    flags += ["--num-envs", str(found["num_envs"])] if "num_envs" in found else []  # older evaluations lack it
    command = shlex.join(["python", "evaluate.py", path.parent.name, *flags, *words])
    kept = ("git_commit", "eval_episodes", "episodic_return", "score")
    return {"command": command} | {name: found[name] for name in kept}


def curve(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Columns of the phases in which an episode ended, up to 50 of them, the first and the last included."""
    calls = np.cumsum([m.get("llm/calls") or 0 for m in metrics])
    ended = [i for i, m in enumerate(metrics) if m.get("charts/episodic_return") is not None]
    kept = (
        [ended[i] for i in np.unique(np.linspace(0, len(ended) - 1, CURVE_POINTS).round().astype(int))] if ended else []
    )
    return {
        "global_step": [metrics[i]["global_step"] for i in kept],
        "episodic_return": [round(metrics[i]["charts/episodic_return"], 3) for i in kept],
        "score": [round(score_of(metrics[i]), 3) for i in kept],
        "llm_calls": [int(calls[i]) for i in kept],
    }


def score_of(record: dict[str, Any]) -> float:
    """Of a phase, under the game's own tag."""
    return next(value for tag, value in record.items() if tag.endswith("/score"))


def collect(suite: str, runs_dir: Path, results_dir: Path, allow_dirty: bool = False) -> list[Path]:
    """Write a result for each finished run of VARIANTS in runs_dir; the paths written.

    Raises ValueError, before anything is written, for a run with other flags than its variant has, or of a commit
    with changes that were not committed.
    """
    found = {}
    for folder in sorted(path.parent for path in runs_dir.glob("*/summary.json")):
        variant, _, seed = folder.name.rpartition("-")
        if variant not in VARIANTS or not seed.isdigit():
            no_variant = f"{variant!r} is no variant of benchmarks/run.py"
            what = no_variant if seed.isdigit() else "the folder's name is not <variant>-<seed>"
            raise ValueError(f"{folder}: {what}; move it away")
        result = read_run(folder)
        flags = json.loads((folder / "config.json").read_text())["flags"]
        difference = differing_flag(flags, flags_of(suite, variant, int(seed), flags["total_timesteps"]))
        if difference:
            raise ValueError(f"{folder} was made with other flags than {variant} has ({difference})")
        if (
            not 0
            <= result["summary"]["global_step"] - flags["total_timesteps"]
            < flags["num_envs"] * flags["num_steps"]
        ):
            raise ValueError(f"{folder} was resumed with another --total-timesteps: no single command makes it")
        if not allow_dirty and run_folder.is_in_no_commit(result["git_commit"]):
            raise ValueError(
                f"{folder} was made from code that is in no commit ({result['git_commit']}); train it again from a "
                "clean commit, or say --allow-dirty"
            )
        found[results_dir / f"{folder.name}.json"] = result
    if not found:
        raise ValueError(f"no finished run in {runs_dir}; train some with: python benchmarks/run.py --suite {suite}")
    results_dir.mkdir(parents=True, exist_ok=True)
    for path, result in found.items():
        path.write_text(dumps(result))
        if result["summary"]["llm"] == "http":
            path.with_suffix(".jsonl.xz").write_bytes(packed_guidance(runs_dir / path.stem))
    return list(found)


def packed_guidance(folder: Path) -> bytes:
    """What --llm replay reads of a run's guidance.jsonl, packed: that training can be repeated without the server."""
    records = run_folder.read_log(folder, "guidance.jsonl")
    read = [{name: record[name] for name in ("messages", "reply", "error", "skipped")} for record in records]
    return lzma.compress("".join(json.dumps(record) + "\n" for record in read).encode(), preset=9)


def dumps(result: Result) -> str:
    """JSON with a line for each entry of the summary and each column of the curve."""
    entries = []
    for key, value in result.items():
        if key == "said":
            entries.append(' "said": [\n  ' + ",\n  ".join(json.dumps(pair) for pair in value) + "\n ]")
        elif key in ("summary", "curve", "advice") or (key in ("habits", "original") and value):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            entries.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            entries.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def read_result(path: Path) -> Result:
    """Raises ValueError if the file is broken."""
    try:
        return json.loads(path.read_text())
    except ValueError as problem:
        raise ValueError(f"{path} can't be read ({problem}); collect it again") from None


def load(folder: Path) -> Results:
    """The results in a folder of result files, or of run folders. Variants in the order of VARIANTS, then others.

    Raises ValueError if there is none, or two of the same variant and seed.
    """
    named = [(path.stem, read_result(path)) for path in sorted(folder.glob("*.json"))]
    named += [(path.parent.name, read_run(path.parent)) for path in sorted(folder.glob("*/summary.json"))]
    if not named:
        raise ValueError(f"no result in {folder}: no <variant>-<seed>.json, no run folder with a summary.json")
    results: Results = {}
    for name, result in named:
        seed = result["summary"]["seed"]
        # folders that rladapter_ppo.py names itself: <env-id>__<exp-name>__<seed>__<time>
        variant = "__".join(name.split("__")[:2]) if name.count("__") == 3 else name.removesuffix(f"-{seed}")
        if seed in results.setdefault(variant, {}):
            raise ValueError(f"{folder}: two results of {variant} with seed {seed}; keep one")
        results[variant][seed] = result
    order = [*[v for v in VARIANTS if v in results], *sorted(results.keys() - VARIANTS.keys())]
    return {variant: dict(sorted(results[variant].items())) for variant in order}


def column(results: dict[int, Result], name: str) -> np.ndarray:
    """(R,) one number of each run's summary, in the order of the seeds; training_NAME: the mean of its learning curve,
    how early things are learned."""
    in_training = name.removeprefix("training_")
    if in_training != name:
        return np.array([np.mean(result["curve"][in_training]) for result in results.values()], np.float64)
    return np.array([result["summary"][name] for result in results.values()], np.float64)
