"""README's numbers come from committed results."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import first_results  # noqa: E402


def test_the_table_in_the_readme_is_the_one_generated():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->", readme, re.DOTALL)
    assert shown and shown.group(1) == first_results.table()


@pytest.mark.parametrize("path", sorted(first_results.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_says_where_it_came_from(path):
    result = json.loads(path.read_text())
    summary = result["summary"]
    assert result["git_commit"] and not result["git_commit"].endswith("-dirty")
    assert result["command"].startswith("python rladapter_ppo.py") and result["device"] and result["versions"]["jax"]
    assert summary["global_step"] >= 1_000_000 and summary["eval_episodes"] >= 256
    assert f"--seed {summary['seed']}" in result["command"]
