"""Does an LLM hear what the adapter says? Asks a server about the same situations with and without an analysis.

    python benchmarks/heed.py --llm-base-url http://127.0.0.1:8000/v1 --llm-model NAME --out heed.json

`sensible` suggests what the game's own rules advise first there, `rare` a sub-goal that is possible and that they don't
advise. Of each kind: the share of usable replies, of those that name the suggested sub-goal, that put it first, and
that name it without having been told; of replies that repeat the placeholders of the prompt, and of those that say what
the question gave in the form of a reply and nothing else.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
from random_situations import random_observations  # noqa: E402

import llm_client  # noqa: E402
from advice import possible_sub_goals  # noqa: E402
from envs import make_env  # noqa: E402
from rladapter_adapter import suggestion  # noqa: E402
from utils.cli import exit_code  # noqa: E402
from utils.run_folder import git_commit, write_json  # noqa: E402

KINDS = ("none", "sensible", "rare")
COPIED = ("SUB-GOAL", "FACT")


@dataclass(frozen=True)
class Options:
    llm_model: str
    """name of the model"""
    llm_base_url: str = "http://127.0.0.1:8000/v1"
    """address of the server; the key comes from OPENAI_API_KEY"""
    llm_concurrency: int = 4
    """requests to the server that are under way at a time"""
    situations: int = 20
    """situations that are asked about, each once for each kind of analysis"""
    seed: int = 7
    """seed of the situations"""
    out: Path | None = None
    """file that the measures are written to, with all replies"""


def choose_situations(env: Any, num: int, seed: int) -> list[dict[str, Any]]:
    """Finds situations in which there is something sensible and something rare to suggest."""
    rng, found = np.random.default_rng(seed), []
    observations = np.asarray(random_observations(env, jax.random.key(seed), 4 * num))
    all_facts = np.asarray(env.facts(observations))
    possible = np.asarray(possible_sub_goals(env.game, all_facts))[:, : env.game.num_basic]
    for obs, facts, can in zip(observations, all_facts, possible, strict=True):
        advised = [i for i, _ in env.game.advise(env.game.truths(facts), {}) if i < env.game.num_basic]
        rare = [i for i in np.flatnonzero(can).tolist() if i not in advised]
        if advised and rare:
            found.append({"obs": obs, "facts": facts, "sensible": advised[0], "rare": int(rng.choice(rare))})
    return found[:num]


def ask(guide: llm_client.HttpGuide, env: Any, situations: list[dict[str, Any]], kind: str) -> list[Any]:
    """Returns the answered questions; shows how many were."""
    questions, answers = [], []
    for situation in situations:
        question = llm_client.Question(situation["obs"], situation["facts"], [], None)
        question.caption = env.to_text(question.obs)
        if kind != "none":
            question.analysis = suggestion([env.game.sub_goals[situation[kind]]])
        questions.append(question)
    batches = [questions[i : i + guide.concurrency] for i in range(0, len(questions), guide.concurrency)]
    for batch in track(batches, f"analysis: {kind}", console=Console(stderr=True)):
        answers += guide.ask(batch).wait()
    return answers


def measure(answers: list[Any], named: list[int]) -> dict[str, float]:
    """Returns shares of the replies: usable; naming these sub-goals, putting them first; repeating the placeholders,
    and nothing but what the last line of the question gave."""
    goals = [[goal for goal, _ in question.advice] for question in answers]
    return {
        "usable": float(np.mean([not question.error for question in answers])),
        "named": float(np.mean([goal in given for goal, given in zip(named, goals, strict=True)])),
        "first": float(np.mean([given[:1] == [goal] for goal, given in zip(named, goals, strict=True)])),
        "copied": float(np.mean([any(word in q.reply.text for word in COPIED) for q in answers])),
        "repeated": float(np.mean([repeats(question) for question in answers])),
    }


def repeats(question: Any) -> bool:
    """Is a reply, white space left out, word for word what the question's last line begins?"""
    given = question.messages[-1]["content"].splitlines()[-1].partition("names: ")[2]
    return bool(given) and "".join(question.reply.text.split()) == "".join(given.split())


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    env = make_env("Craftax-Classic-Symbolic-v1", 64)
    guide = llm_client.HttpGuide(
        env.game, options.llm_base_url, options.llm_model, options.llm_concurrency, structured="auto"
    )
    if options.situations < 1:
        raise ValueError(f"--situations: must be 1 or more, not {options.situations}")
    guide.check()
    situations = choose_situations(env, options.situations, options.seed)
    answers = {kind: ask(guide, env, situations, kind) for kind in KINDS}
    result: dict[str, Any] = {"model": options.llm_model, "situations": len(situations), "git_commit": git_commit()}
    for kind in KINDS[1:]:
        named = [situation[kind] for situation in situations]
        untold = measure(answers["none"], named)
        without = {f"{name}_untold": untold[name] for name in ("named", "first")}
        result[kind] = measure(answers[kind], named) | without
    print(json.dumps(result, indent=1))
    replies = {kind: [{"analysis": q.analysis, "reply": q.reply.text, "error": q.error} for q in answers[kind]]
               for kind in KINDS}  # fmt: skip
    if options.out:
        write_json(options.out, result | {"replies": replies})


if __name__ == "__main__":
    sys.exit(exit_code(main))
