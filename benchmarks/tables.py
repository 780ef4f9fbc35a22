"""Markdown tables of README and docs, made from VARIANTS and the committed results.

They stand between <!-- name --> and <!-- /name -->; `python benchmarks/plot.py` writes them, a test fails when they
are not what is generated here.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from collect import Result, Results, column, load
from run import ROOT, VARIANTS
from stats import bootstrap_interval, iqm, paired_difference, probability_of_improvement

from utils.published import PUBLISHED
from utils.report import NO_LLM

FULL = "guided"  # the full method
# The tuned adapters that others of the suites `adapter` and `llm` are compared with, and each one's untuned one.
TUNED = {"experience": "no-sft", "plans": "no-sft", "smollm2-experience": "smollm2-no-sft"}
NO_GUIDE = {"experience": "echo", "plans": "echo-plans"}  # the same adapter, whose analyses are the advice
SAID = ("no-adapter", "no-sft", "experience", "plans", "smollm2-no-sft", "smollm2-experience")  # said is shown
WITHOUT_GUIDE = ("none", "facts")  # suites that differ in the guide share these
COMPARED = {"episodic_return": "return", "score": "score", "training_score": "score in training"}
ADVICE = {  # of `Result`
    "comprehension": "comprehension", "agreement_before": "agreement before", "agreement_after": "and after tuning",
    "agreement_possible": "of any possible sub-goal", "agreement_rules": "of the expert rules",
    "possible": "advice that is possible", "holding": "rules that hold where asked", "usable": "usable replies",
    "heeded": "replies that heed it",
}  # fmt: skip
RESULTS = ROOT / "benchmarks" / "results"


def results_of(suite: str) -> Results:
    """The committed results of a suite; {} if there are none yet."""
    return load(RESULTS / suite) if (RESULTS / suite).exists() else {}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def methods_table() -> str:
    """What each variant is, its name in benchmarks/, its command."""
    rows = [
        [variant.what, f"`{name}`", f"`{f'python rladapter_ppo.py {variant.flags}'.strip()}`"]
        for name, variant in VARIANTS.items()
    ]
    return markdown(["Method", "Name", "Command"], rows)


def results_table(results: Results) -> str:
    """Final evaluations: the mean over the seeds, each seed's return, and how far the full method leads."""
    header = ["Method", "Name", "Guide", "return: mean (each seed)", "reward %", "score %", "LLM calls"]
    header += [f"{key} of `{FULL}` minus this [95 %]" for key in ("return", "score")]
    rows = []
    for name, runs in results.items():
        returns = column(runs, "episodic_return")
        each = ", ".join(f"{r:.2f}" for r in returns)
        reward, score, calls = (column(runs, key).mean() for key in ("reward_percent", "score", "llm_calls"))
        shown = f"**{returns.mean():.2f}** ({each})"
        guide = ", ".join(sorted({guide_of(result["summary"]) for result in runs.values()}))
        row = [what(name), f"`{name}`", guide, shown, f"{reward:.1f}", f"{score:.1f}", f"{calls:.0f}"]
        rows.append([*row, *("" if name == FULL else lead(results, name, key) for key in ("episodic_return", "score"))])
    return markdown(header, rows)


def guide_of(summary: dict[str, Any]) -> str:
    """The guide of a run; of the offline one also what it knows, where that is not the game."""
    if summary["llm"] not in NO_LLM:
        return summary["llm_model"] or summary["llm"]
    knows = summary.get("rules_knowledge", "expert")
    other = f", {knows}" * (summary["llm"] == "rules" and knows != "expert")
    return f"{summary['llm']}{other} (no LLM)"


def lead(results: Results, name: str, key: str, ahead: str = FULL) -> str:
    """The paired difference in return or score between `ahead` and this variant [95 % t-interval]; "" without any."""
    seeds = sorted(results.get(ahead, {}).keys() & results.get(name, {}).keys())
    if not seeds:
        return ""
    difference = paired_difference(
        *[column({seed: results[which][seed] for seed in seeds}, key) for which in (ahead, name)]
    )
    low, high = difference.interval or (None, None)
    return f"{difference.mean:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")


def aggregate_table(results: Results) -> str:
    """IQM with intervals, and how often the full method's return is the higher one."""
    header = ["Name", "seeds", "IQM return [95 %]", "IQM score % [95 %]", f"P({FULL} better)"]
    rows = []
    for name, runs in results.items():
        returns, scores = column(runs, "episodic_return")[:, None], column(runs, "score")[:, None]
        row = [f"`{name}`", str(len(runs)), with_interval(returns, 2), with_interval(scores, 1), ""]
        if name != FULL and FULL in results:
            full = column(results[FULL], "episodic_return")[:, None]
            row[-1] = f"{probability_of_improvement(full, returns):.2f}"
        rows.append(row)
    return markdown(header, rows)


def with_interval(scores: np.ndarray, digits: int) -> str:
    """IQM [95 % bootstrap interval] of (R, M)"""
    if len(scores) < 2:
        return f"{iqm(scores):.{digits}f}"
    low, high = bootstrap_interval(iqm, scores)
    return f"{iqm(scores):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def shares(runs: dict[int, Result], habit: str) -> np.ndarray:
    """(R,) % of the occasions of a habit that were handled sensibly, of the runs that had any"""
    counts = [result["habits"]["counts"][habit] for result in watched(runs).values()]
    return np.array([100 * sensible / occasions for occasions, sensible in counts if occasions])


def watched(runs: dict[int, Result]) -> dict[int, Result]:
    """The runs whose habits were counted."""
    return {seed: result for seed, result in runs.items() if result.get("habits")}


def habits_table(results: Results) -> str:
    """Shares of occasions handled sensibly, and what ended the lives, of the variants whose runs were watched."""
    shown = {name: watched(runs) for name, runs in results.items() if watched(runs)}
    if not shown:
        return "not measured"
    header = ["% of the occasions [95 %] (occasions a life)"]
    header += [f"`{name}`, {len(runs)} runs" for name, runs in shown.items()]
    first = next(iter(next(iter(shown.values())).values()))["habits"]
    rows = [[habit, *(habit_cell(runs, habit) for runs in shown.values())] for habit in first["counts"]]
    for cause in first["deaths"]:
        ends = [np.array([100 * r["habits"]["deaths"][cause] for r in runs.values()]) for runs in shown.values()]
        rows.append([f"*ended by {cause}, % of the lives*", *(f"{x.mean():.0f}{mean_interval(x)}" for x in ends)])
    return markdown(header, rows)


def habit_cell(runs: dict[int, Result], habit: str) -> str:
    """Mean share over the runs with its interval, and how many occasions a life has."""
    found = shares(runs, habit)
    often = np.mean([r["habits"]["counts"][habit][0] / r["habits"]["eval_episodes"] for r in runs.values()])
    return f"{found.mean():.0f}{mean_interval(found)} ({often:.1f})" if len(found) else "-"


def original_table(results: Results) -> str:
    """Final policies in the original game, beside their own env, of the runs that played there."""
    played = {name: [r for r in runs.values() if r.get("original")] for name, runs in results.items()}
    rows = []
    for name, runs in played.items():
        if runs:
            numbers = [(r["original"][key], r["summary"][key]) for key in ("episodic_return", "score") for r in runs]
            there, here = np.array(numbers).reshape(2, -1, 2).mean(1).T
            row = [f"`{name}`", str(len(runs)), str(sum(r["original"]["eval_episodes"] for r in runs))]
            rows.append([*row, f"{there[0]:.1f}", f"{here[0]:.1f}", f"{there[1]:.1f}", f"{here[1]:.1f}"])
    header = ["Name", "runs", "episodes", "return there", "here", "score % there", "here"]
    return markdown(header, rows) if rows else "not measured"


def mean_interval(values: np.ndarray) -> str:
    """The 95 % t-interval of a mean, as text; of one number there is none."""
    interval = paired_difference(values, np.zeros_like(values)).interval
    return "" if interval is None else " [{:.0f}, {:.0f}]".format(*np.clip(interval, 0, 100))


def published_table(results: Results) -> str:
    """Ours, then what others published; "-" where a number is not given."""
    header = ["Method", "Observation", "LLM", "env steps", "score % (all episodes)", "return", "reward %"]
    rows = []
    for name, runs in results.items():
        steps = f"{column(runs, 'global_step').mean() / 1e6:.3g}M"
        guides = ", ".join(sorted({r["summary"]["llm_model"] or r["summary"]["llm"] for r in runs.values()}))
        llm = ({"none": ""} | {name: f"none: `{name}`" for name in NO_LLM}).get(guides, guides)
        score, all_episodes = column(runs, "score").mean(), column(runs, "score_all_episodes").mean()
        mean_return, reward = column(runs, "episodic_return").mean(), column(runs, "reward_percent").mean()
        scores = f"{score:.1f} ({all_episodes:.1f})"
        label = VARIANTS[name].label if name in VARIANTS else name
        rows.append([f"**ours: {label}**", "symbols", llm, steps, scores, f"{mean_return:.1f}", f"{reward:.1f}"])
    for method, observation, llm, steps, *numbers in PUBLISHED:
        rows.append([method, observation, llm, steps, *["-" if n is None else f"{n:.1f}" for n in numbers]])
    return markdown(header, rows)


def what(name: str) -> str:
    return VARIANTS[name].what if name in VARIANTS else name


def adapter_speed_table() -> str:
    """The adapter beside torch."""
    result = json.loads((RESULTS / "adapter_speed.json").read_text())
    header = ["", "whole batch, s", "prefill, tokens/s", "decoding, tokens/s", "peak memory, GB"]
    names = ("total_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_gb")
    rows = [
        [label, *(f"{result[kind][name]:.{digits}f}" for name, digits in zip(names, (1, 0, 0, 2), strict=True))]
        for kind, label in (("ours", "ours"), ("torch", "torch, `generate`"))
    ]
    return markdown(header, rows)


def throughput() -> dict[str, Any]:
    """What benchmarks/throughput.py measured. The default number of envs was measured once more, more finely:
    throughput_64.json replaces what both have."""
    older, newer = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("throughput", "throughput_64"))
    result = older | newer
    for part in ("steps_per_second", "ratios"):
        result[part] = {n: column | newer[part].get(n, {}) for n, column in older[part].items()}
    return result


def throughput_table() -> str:
    """Steps per second and the ratios that count for each number of envs, then what was measured once."""
    result = throughput()
    by_envs = {
        "env steps/s": (result["steps_per_second"], "{:,.0f}"),
        "ratio of the rates": (result["ratios"], "{:.2f}"),
    }
    parts = []
    for title, (columns, number) in by_envs.items():
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        rows = [[name, *(number.format(c[name]) if name in c else "" for c in columns.values())] for name in names]
        parts.append(markdown([title, *(f"{int(n):,} envs" for n in columns)], rows))
    once = [
        [f"first update after a {name} start (compilation)", f"{s['first_update']:.0f} s ({s['compile']:.0f} s)"]
        for name, s in result["start_up_seconds"].items()
    ]
    once += [[f"{name}, per million env steps", f"{n:,.0f}"] for name, n in result["per_million_steps"].items()]
    return "\n\n".join([*parts, markdown(["with the defaults", ""], once)])


def scale_table() -> str:
    """How a guided training's speed and memory change with the number of envs."""
    result = json.loads((RESULTS / "scale.json").read_text())
    rows = [
        [f"{row['num_envs']:,}", f"{row['steps_per_second']:,.0f}", f"{row['peak_memory_gb']:.2f}"]
        for row in result["scale"]
    ]
    return markdown(["envs", "env steps/s, guided", "peak memory, GB"], rows)


def gpu_table() -> str:
    """Trainings on a GPU, and the memory of the GPU that a guided one takes."""
    by_envs: dict[int, dict] = {}
    for row in json.loads((RESULTS / "gpu" / "scale.json").read_text())["scale"]:
        by_envs.setdefault(row["num_envs"], {})[row["guidance"]] = row
    rows = []
    for num_envs, row in by_envs.items():
        guided, unguided = (row[name]["steps_per_second"] for name in ("full", "none"))
        memory = row["full"]["peak_device_memory_gb"]
        rates = [f"{guided:,.0f}", f"{unguided:,.0f}", f"{guided / unguided:.2f}"]
        rows.append([f"{num_envs:,}", *rates, f"{memory:.1f}"])
    return markdown(["envs", "env steps/s, guided", "unguided", "ratio", "memory of the GPU, guided, GB"], rows)


def claim_table(suites: dict[str, Results]) -> str:
    """Return and score with each tuned adapter, beside the same adapter untuned and none, and without the guide, of
    suites with a guide that does not know the game; how far the tuned one's return leads. Means over all seeds of each.
    """
    rows = []
    for results in suites.values():
        for tuned, untuned in ((t, u) for t, u in TUNED.items() if t in results):
            summary = next(iter(results[tuned].values()))["summary"]
            row = [guide_of(summary), summary["adapter"].rpartition("/")[2], f"`{tuned.rpartition('-')[2]}`"]
            row.append(f"{summary['global_step'] / 1e6:.1g}M")
            alone = NO_GUIDE.get(tuned, "")
            row += [shown(results[name]) if name in results else "" for name in ("no-adapter", untuned, tuned, alone)]
            leads = [(lead(results, name, "episodic_return", tuned), name) for name in (untuned, "no-adapter", alone)]
            rows.append([*row, *(f"{text} ({seeds(results, tuned, name)})" if text else "" for text, name in leads)])
    header = ["Guide", "Adapter", "tuned on", "env steps", "return / score: no adapter", "untuned", "tuned"]
    header += ["tuned, nobody asked", "return: tuned minus untuned [95 %] (seeds)", "minus no adapter",
               "minus nobody asked"]  # fmt: skip
    return markdown(header, rows) if rows else "not measured"


def shown(runs: dict[int, Result]) -> str:
    """Mean return and score."""
    return f"{column(runs, 'episodic_return').mean():.1f} / {column(runs, 'score').mean():.0f} %"


def seeds(results: Results, *names: str) -> int:
    """How many seeds all of these have."""
    return len(set.intersection(*(set(results[name]) for name in names)))


def adapter_table(results: Results) -> str:
    """What analyses are worth to a guide that does not know the game, of results of the suite `adapter` or `llm`; and
    what the adapters tuned on experience are worth beside each of the others."""
    if not results:
        return "not measured"
    header = ["The guide hears", "Name", "return: mean (each seed)", "score % [95 %]", "score % in training [95 %]"]
    rows = []
    for name, runs in results.items():
        returns = column(runs, "episodic_return")
        row = [what(name), f"`{name}`", f"**{returns.mean():.2f}** ({', '.join(f'{r:.2f}' for r in returns)})"]
        scores = [column(runs, key) for key in ("score", "training_score")]
        rows.append([*row, *(f"{values.mean():.1f}{mean_interval(values)}" for values in scores)])
    ahead = [ahead_table(results, name) for name in TUNED if name in results]
    return "\n\n".join([markdown(header, rows), *filter(None, [*ahead, advice_table(results)])])


def advice_table(results: Results) -> str:
    """What is measured of analyses, replies and advice, in per cent with 95 % t-intervals; "" where nothing is."""
    rows = []
    for name, runs in results.items():
        heard = "--analyses" not in VARIANTS[name].flags  # agreement is of the adapter, whoever hears it
        keys = [key for key in ADVICE if heard or not key.startswith("agreement")]
        found = {key: [r["advice"][key] for r in runs.values() if key in r.get("advice", {})] for key in keys}
        if any(found.values()):
            shares = [100 * np.array(found.get(key, [])) for key in ADVICE]
            cells = [f"{values.mean():.0f}{mean_interval(values)}" if len(values) else "" for values in shares]
            rows.append([f"`{name}`", *cells])
    return markdown(["Name", *(f"{title}, %" for title in ADVICE.values())], rows) if rows else ""


def ahead_table(results: Results, tuned: str) -> str:
    """What a tuned adapter's results are ahead of all others, adapters of another kind left out; "": of none."""
    others = {name for pair in TUNED.items() if pair[1] != TUNED[tuned] for name in pair}
    rows = []
    for name in results:
        if name not in others | {tuned} and (both := seeds(results, tuned, name)):
            rows.append([f"`{name}`", str(both), *[lead(results, name, key, tuned) for key in COMPARED]])
    header = [f"`{tuned}` minus", "seeds", *[f"{name} [95 %]" for name in COMPARED.values()]]
    return markdown(header, rows) if rows else ""


def with_unguided(suite: str) -> Results:
    """The results of a suite with a guide, those that ask nobody also from where else they were made: flags of a guide
    change nothing there."""
    found = results_of(suite)
    elsewhere = results_of({"adapter": "llm", "llm": "adapter", "adapter-1m": "main"}[suite]) if found else {}
    found = {name: elsewhere[name] for name in WITHOUT_GUIDE if name in elsewhere} | found
    return {name: found[name] for name in VARIANTS if name in found}


def said_table(results: Results) -> str:
    """What adapter and guide said in the last pause of the first seed, with an untuned adapter and with a tuned one."""
    parts = []
    for name in (name for name in SAID if name in results):
        seed, result = next(iter(results[name].items()))
        lines = [f"    {analysis or '(nothing)'}\n    -> {reply}" for analysis, reply in result.get("said", [])]
        parts.append("\n\n".join([f"{what(name)}, seed {seed}:", *lines]))
    return "\n\n".join(parts) or "not measured"


def of_a_suite(results: Results) -> dict[tuple[Path, str], str]:
    """The tables of these results: (file, name of its markers) -> text"""
    readme, docs = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    return {
        (readme, "methods"): methods_table(),
        (readme, "results"): results_table(results),
        (readme, "habits"): habits_table(results),
        (ROOT / "docs" / "evaluate.md", "original"): original_table(results),
        (docs, "aggregate"): aggregate_table(results),
        (docs, "published"): published_table(results),
    }


def generated(results: Results) -> dict[tuple[Path, str], str]:
    """Every generated table, those of other committed results among them."""
    suites = {name: with_unguided(name) for name in ("llm", "adapter", "adapter-1m")}
    readme, adapter, speed = ROOT / "README.md", ROOT / "docs" / "adapter.md", ROOT / "docs" / "speed.md"
    return of_a_suite(results) | {
        **{(adapter, name): adapter_table(found) for name, found in suites.items()},
        **{(path, "claim"): claim_table(suites) for path in (readme, adapter)},
        (ROOT / "docs" / "adapter_samples.md", "said"): said_table(suites["llm"]),
        (adapter, "speed"): adapter_speed_table(),
        (speed, "throughput"): throughput_table(),
        (speed, "scale"): scale_table(),
        (speed, "gpu"): gpu_table(),
    }


def between_markers(path: Path, name: str, text: str | None = None) -> str:
    """What stands between the markers; with `text`, that is put there first. Raises ValueError without markers."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    before, found, rest = path.read_text().partition(begin)
    inside, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path.name}: the lines {begin.strip()} and {end.strip()} are missing")
    if text is None:
        return inside
    path.write_text(before + begin + text + end + after)
    return text
