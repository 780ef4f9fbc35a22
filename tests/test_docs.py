"""What README and docs show comes from committed results and from VARIANTS, and what they tell you to run works."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import run  # noqa: E402
from collect import load  # noqa: E402
from tables import between_markers, generated  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "main"
TABLES = generated(load(RESULTS))
COMMAND = r"python benchmarks/(\w+)\.py([^`|#\n>']*)"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("place", TABLES, ids=lambda place: place[1])
def test_tables_are_the_ones_generated(place):
    assert between_markers(*place) == TABLES[place], "python benchmarks/plot.py writes them anew"


SUITES = ("main", "adapter", "adapter-1m", "llm")
OF_SUITES = [path for suite in SUITES for path in sorted((RESULTS.parent / suite).glob("*.json"))]
# Constants before they became flags: commands of older results lack them.
ONCE_CONSTANT = {"sft_batch_size": 8, "lora_plus_ratio": 1.0}


@pytest.mark.parametrize("path", OF_SUITES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_result_says_where_it_came_from(path):
    result = json.loads(path.read_text())
    summary, suite = result["summary"], path.parent.name
    assert result["git_commit"] and not result["git_commit"].endswith("-dirty")
    assert result["device"] and result["versions"]["jax"]
    assert summary["global_step"] >= (300_000 if suite in ("adapter", "llm") else 1_000_000)
    assert summary["eval_episodes"] >= 256
    variant, seed = path.stem.rsplit("-", 1)
    assert summary["seed"] == int(seed)
    expected = run.flags_of(suite, variant, int(seed))
    found = flags(result["command"])
    if "--lora-plus-ratio" in expected and "--lora-plus-ratio" not in result["command"]:
        found |= ONCE_CONSTANT
    assert run.differing_flag(found, expected) is None


def flags(command):
    words = shlex.split(command)
    assert words[:2] == ["python", "rladapter_ppo.py"]
    return run.runs.flags(tyro.cli(run.rl.Args, args=words[2:]))


def test_every_link_to_a_file_leads_somewhere():
    links = [
        (path, link)
        for path in DOCS
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", path.read_text())
    ]  # fmt: skip
    assert len(links) > 10
    for path, link in links:
        assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_every_documented_command_of_the_benchmarks_parses():
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if "tyro.cli" in path.read_text()]
    texts = [path.read_text() for path in (*DOCS, *scripts)]
    commands = [c for text in texts for c in re.findall(COMMAND, text)]
    assert len(commands) > 10 and {script for script, _ in commands} == {path.stem for path in scripts}
    for script, words in commands:
        if words.strip() != "A B":
            tyro.cli(importlib.import_module(script).Options, args=shlex.split(words))


def test_the_pandas_snippet_loads_many_runs(tmp_path, monkeypatch, capsys):
    for name, value in (("guided-1", 2.0), ("guided-2", 4.0), ("none-bonus-1", 1.0)):
        folder = tmp_path / "runs" / "main" / name
        folder.mkdir(parents=True)
        lines = [
            {"phase": 0, "global_step": 10, "charts/episodic_return": value},
            {"phase": 1, "global_step": 20, "charts/episodic_return": value + 1, "llm/calls": 3},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "benchmarks.md").read_text(), re.DOTALL).group(1)
    names = {}
    exec(snippet, names)
    metrics = names["metrics"]
    assert (
        len(metrics) == 6 and set(metrics["variant"]) == {"guided", "none-bonus"} and set(metrics["seed"]) == {"1", "2"}
    )
    shown = capsys.readouterr().out.split("\n")
    assert [line.split() for line in shown[2:4]] == [["10", "3.0", "1.0"], ["20", "4.0", "2.0"]]
