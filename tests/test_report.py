"""The page about runs: what it says, what it says is missing, and that nothing out of a log runs or loads in it.

In a browser too, where Chromium or Chrome is installed: spoken to by its DevTools protocol over two pipes, which takes
no driver and no package.
"""

import base64
import fcntl
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from utils import report

HOSTILE = '</script><img src=x onerror="alert(1)"><b>{{ 7 * 7 }}</b>'
CONFIG = {
    "flags": {
        "exp_name": "rladapter_ppo", "seed": 1, "env_id": "Toy-v0", "guidance": "full", "llm": "rules", "llm_model": "",
    },
    "argv": ["--seed", "1", "--run-dir", "runs/a b", "--llm-model", "it's"],
    "git_commit": "abc123-dirty",
    "versions": {"python": "3.12"},
    "device": "cpu: cpu",
    "num_cpus": 2,
}  # fmt: skip
RESULT = {
    "eval_episodes": 16, "episodic_return": 3.25, "episodic_length": 90.0, "score": 12.5, "reward_percent": 81.2,
    "achievements": {"open_door": 0.5, "find_key": 1.0, "fly": 0.0},
}  # fmt: skip
SUMMARY = RESULT | {"global_step": 3000, "llm": "rules", "llm_calls": 6, "llm_cost": 0.0, "guidance": "full"}


def caption(number):
    return f"You see: door ({number} north).\nFacing: grass."


def question(phase, number, **more):
    return {
        "phase": phase, "global_step": 1000 * phase, "situation": ["door in view"], "rows": [0],
        "caption": caption(number),
        "adapter_prompt": caption(number) + f"\nPrevious sub-goals: key, open door.\nComprehension score: 0.{number}.",
        "analysis": f"It should open door number {number}.", "messages": [], "model": "rules",
        "reply": '{"sub_goals": {"open door": ["door in view"]}}', "sub_goals": ["open door"],
        "because": [["door in view"]], "error": "", "cached": False, "calls": 1,
    } | more  # fmt: skip


def outcome(phase, with_advice, visits=20, mean=1.0, **more):
    return {
        "phase": phase, "row": 0, "with_advice": with_advice, "visits": visits, "return_mean": mean,
        "return_variance": 2.0, "successes": 5, "sub_goal": "open door", "because": ["door in view"],
    } | more  # fmt: skip


def metrics(phase, **more):
    return {
        "phase": phase, "global_step": 1000 * (phase + 1), "charts/episodic_return": 1.0 + phase, "toy/score": 4.0,
        "losses/entropy": float("nan"), "losses/value_loss": 0.1, "guidance/comprehension": None, "llm/calls": 2,
        "llm/prompt_tokens": 100, "time/train": 2.5, "achievements/open_door": 0.25,
    } | more  # fmt: skip


def write(folder, **files):
    """A run folder. Lists become logs, everything else JSON."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, list):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path):
    questions = [question(phase, number) for phase in range(3) for number in range(1, 11)]
    questions[0]["reply"] = questions[1]["analysis"] = questions[2]["caption"] = questions[3]["error"] = HOSTILE
    questions[4]["sub_goals"] = [HOSTILE]
    return write(
        tmp_path / "guided-1", config=CONFIG, summary=SUMMARY, metrics=[metrics(phase) for phase in range(3)],
        guidance=questions, outcomes=[outcome(0, 1, mean=1.5), outcome(0, 0), outcome(1, 1), outcome(2, 0, visits=3)],
        examples=[],
    )  # fmt: skip


def made(folders, human=None):
    path = folders[0].parent / "report.html"
    report.write_report(path, folders, human)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """The text of a page as a reader gets it, the names of its tags, and its data."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words, self.within, self.data = [], [], [], "", ""
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())
        self.data = json.loads(self.data)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag in ("script", "style"):
            self.within = "data" if ("id", "data") in attributes else tag

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.within = ""

    def handle_data(self, data):
        if self.within == "data":
            self.data += data
        elif not self.within:
            self.words.append(data)


# ---- what it says


def test_the_page_says_what_the_run_reached_and_that_its_guide_is_no_llm(run):
    page = Page(made([run], {"open_door": 90, "find_key": 40}))
    for words in (
        "Return 3.25", "Score 12.5 %", "2 of 3 in at least one episode", "no LLM: a list of rules", "16 fresh episodes",
        "Calls of the guide 6", "find key 100.0 40", "open door 50.0 90", "Commit abc123, with changes",
        "questions 30", "prompt tokens 300", "training 7.50", "python 3.12",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.text.index("find key 100.0") < page.text.index("open door 50.0") < page.text.index("fly 0.0")
    assert """python rladapter_ppo.py --seed 1 --llm-model 'it'"'"'s'""" in page.text  # a folder of its own


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"llm": "shuffled"}, "no LLM: a list of rules"),
        ({"llm": "random"}, "no LLM: advice is drawn at random"),
        ({"llm": "http", "llm_model": "rules"}, "no LLM: a list of rules"),
        ({"llm": "http", "llm_model": "gpt-x"}, "gpt-x (an LLM behind a server)"),
        ({"guidance": "none"}, "no guidance"),
        ({"guidance": "facts"}, "facts, no advice"),
        ({"llm": "replay", "llm_replay": "runs/old"}, "another run said: runs/old"),
    ],
)
def test_the_guide_is_named(tmp_path, flags, says):
    folder = write(tmp_path / "run", config={"flags": {"guidance": "full"} | flags})
    page = Page(made([folder]))
    assert says in page.text
    assert ("no LLM" in page.text) == (says.startswith("no LLM"))


def test_a_question_shows_its_advice_with_what_came_of_it(run):
    shown = Page(made([run])).data["questions"][5]
    assert shown["before"] == "key, open door" and shown["comprehension"] == 0.6
    (advice,) = shown["advice"]
    # Phase 0 alone has enough visits of both arms: 1.5 - 1.0, each mean of 20 visits with variance 2.
    assert advice == ["open door", ["door in view"], 40, 0.25, pytest.approx(0.5), pytest.approx(0.2**0.5)]
    assert (shown["visits"], shown["success"], shown["difference"]) == (40, 0.25, pytest.approx(0.5))


def test_curves_leave_out_what_is_no_number_and_thin_out(run):
    (run / "metrics.jsonl").write_text("".join(json.dumps(metrics(phase)) + "\n" for phase in range(1000)))
    page = Page(made([run]))
    returns, score, value_loss = page.data["panels"]  # neither entropy nor comprehension, which have no number
    assert len(returns["curves"][0]) == report.MAX_POINTS
    assert returns["curves"][0][0] == [1000, 1.0] and returns["curves"][0][-1] == [1_000_000, 1000.0]
    assert page.tags.count("polyline") == 3


@pytest.mark.parametrize("low, high", [(0, 16.9), (0, 0), (-0.02, -0.001), (3, 3), (0, 1e9), (1e-9, 2e-9)])
def test_ticks_are_few_and_enclose(low, high):
    ticks = report.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12


def test_the_adapters_words_are_compared_about_the_same_situation(run):
    triples = report.then_and_now(report.read_run(run, "run").guidance)
    assert len(triples) == 3
    for triple in triples:
        assert [row["phase"] for row in triple] == [0, 1, 2]
        assert len({row["caption"] for row in triple}) == 1 and all(row["same"] for row in triple)


def test_words_are_counted_in_each_third_of_the_run(tmp_path):
    said = ["open door, open door", "nothing", "open door with key"]
    more = {"sub_goals": ["open door with key"], "because": [[]]}
    questions = [question(phase, 1, analysis=text, **(more if phase == 1 else {})) for phase, text in enumerate(said)]
    (first, second) = report.word_table(report.read_run(write(tmp_path / "run", guidance=questions), "run"))
    assert first == {"name": "open door", "written": [100, 0, 0], "replied": [100, 0, 100], "total": 3}
    assert second == {"name": "open door with key", "written": [0, 0, 100], "replied": [0, 100, 0], "total": 2}


def test_habits_and_deaths_of_eval_json(run):
    habits = {"drinks": {"occasions": 8, "sensible": 6, "per_episode": 0.5, "what": "drinks when <thirsty>"}}
    habits |= {"sleeps": {"occasions": 0, "sensible": 0, "per_episode": 0.0, "what": ""}}
    evaluation = RESULT | {"episodic_return": 4.5, "guidance": "none", "habits": habits, "deaths": {"lava": 0.25}}
    (run / "eval.json").write_text(json.dumps(evaluation))
    page = Page(made([run]))
    for words in ("Return 4.50", "eval.json: guidance none", "drinks drinks when <thirsty> 75 % 0.50", "lava 25.0 %"):
        assert words in page.text, words
    assert "sleeps – 0.00" in page.text


def test_runs_side_by_side(run, tmp_path):
    other = write(
        tmp_path / "facts-1", config=CONFIG | {"flags": CONFIG["flags"] | {"guidance": "facts"}},
        summary=SUMMARY | {"episodic_return": 2.5, "guidance": "facts", "llm": "none", "achievements": {"fly": 1.0}},
        metrics=[metrics(0)], guidance=[], outcomes=[],
    )  # fmt: skip
    page = Page(made([other, run]))
    for words in ("return 2.50 3.25", "fly 100.0 0.0", "find key – 100.0", "guidance facts full"):
        assert words in page.text, words
    assert "Guidance of guided-1" in page.text and len(page.data["questions"]) == 30  # facts-1 asked nobody
    assert [len(curve) for curve in page.data["panels"][0]["curves"]] == [1, 3]


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write(tmp_path / name / "run", config=CONFIG) for name in "ab"]
    assert report.distinct_names(folders) == ["a/run", "b/run"]
    assert report.distinct_names([folders[0], folders[0]]) == ["run (1)", "run (2)"]


# ---- what is missing, cut off or too much


def test_what_is_missing_is_said_in_place(tmp_path):
    page = Page(made([write(tmp_path / "run", config={})]))
    for words in (
        "summary.json is missing", "metrics.jsonl is missing: it has no curves", "No success rates",
        "Nobody was asked: guidance.jsonl is missing", "The command is not known", "Neither summary.json nor",
        "nothing was measured yet", "No analyses", "evaluate.py --video 1",
    ):  # fmt: skip
        assert words in page.text, words


def test_logs_cut_off_and_files_that_are_none(run):
    with (run / "guidance.jsonl").open("a") as file:
        file.write('{"phase": 3, "caption": "cut o')
    (run / "outcomes.jsonl").write_bytes(b"\xff\xfe\x00")
    (run / "config.json").write_text("{")
    page = Page(made([run]))
    assert len(page.data["questions"]) == 30
    assert "outcomes.jsonl can't be read" in page.text and "config.json can't be read" in page.text


def test_a_run_that_still_trains_shows_its_last_phase(run):
    (run / "summary.json").unlink()
    page = Page(made([run]))
    for words in ("Return 3.00", "episodes of phase 2, no evaluation yet", "open door 25.0", "Calls of the guide 6"):
        assert words in page.text, words


@pytest.mark.parametrize("name", report.FILES)
def test_values_of_other_kinds_break_nothing(run, name):
    odd = {"phase": 1}
    for key in {**question(0, 1), **outcome(0, 1), **metrics(0), **SUMMARY, **CONFIG, "habits": 0, "deaths": 0}:
        odd[key] = 1 if key == "phase" else {"a": [None]}
    lines = [odd, {**odd, **dict.fromkeys(odd, None), "phase": 2}, {"phase": "x"}]
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines[: 1 if name.endswith(".json") else 3]))
    made([run])


def test_a_long_run_is_sampled_evenly_and_says_so(run, monkeypatch):
    monkeypatch.setattr(report, "MAX_QUESTIONS_BYTES", 6000)
    html = made([run])
    page = Page(html)
    shown = page.data["questions"]
    assert 5 < len(shown) < 30 and len(json.dumps(shown, separators=(",", ":"))) < 6000
    assert shown[0]["phase"] == 0 and shown[-1] == Page(html).data["questions"][-1] and shown[-1]["phase"] == 2
    assert f"30 questions were asked; {len(shown)} of them, evenly spaced" in page.text


def test_half_a_surrogate_pair_in_a_reply_is_no_obstacle(run):
    (run / "guidance.jsonl").write_text(json.dumps(question(0, 1, reply="\ud800", sub_goals=["\ud800"])) + "\n")
    assert "questions" in made([run])


@pytest.mark.parametrize("folders", [[], ["nowhere"], ["empty"]])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="report: ") as error:
        report.write_report(tmp_path / "report.html", [tmp_path / name for name in folders])
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_a_failure_leaves_the_old_page_and_no_half_one(run, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    write_text = Path.write_text

    def disk_full(self, content, **more):
        write_text(self, content[:100], **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space"):
        report.write_report(path, [run])
    assert path.read_text() == "old" and [p.name for p in tmp_path.glob("report*")] == ["report.html"]


# ---- films


def test_films_are_in_the_page_as_far_as_there_is_room(run, monkeypatch):
    for name in ("film-1.mp4", "film-1.gif", "film-2.gif", "film-10.mp4"):
        (run / name).write_bytes(b"12345")
    monkeypatch.setattr(report, "MAX_FILM_BYTES", 10)
    page = Page(made([run]))
    sources = [value for name, value in page.attributes if name == "src"]
    assert sources == ["data:video/mp4;base64,MTIzNDU=", "data:image/gif;base64,MTIzNDU="]
    assert ("href", "guided-1/film-10.mp4") in page.attributes  # not of the MP4's twin


# ---- what comes from a log is text


def test_hostile_text_is_escaped(run):
    html = made([run])
    page = Page(html)
    assert "img" not in page.tags and "b>{{" not in html and "49" not in re.findall(r"<b>(\d+)", html)
    assert HOSTILE in [page.data["questions"][0]["reply"], page.data["questions"][1]["analysis"]]
    assert not any(name.startswith("on") or name == "style" for name, _ in page.attributes)
    assert page.tags.count("script") == 2


def test_the_page_allows_itself_nothing_but_its_own_style_and_script(run):
    html = made([run])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
    for tag, kind in (("style", "style-src"), ("script", "script-src")):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL).group(1)
        assert f"{kind} '{report.csp_hash(content)}'" in policy
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert links and all(link.startswith(("#", "data:")) for link in links)


# ---- in a browser

# A child can be given descriptors, not their numbers: this gives them theirs.
START = "import os, sys; r, w, *c = sys.argv[1:]; os.dup2(int(r), 3); os.dup2(int(w), 4); os.execv(c[0], c)"


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    installed = [path for name in names if (path := shutil.which(name))]
    places = (Path.home() / ".cache/ms-playwright", Path.home() / "Library/Caches/ms-playwright")
    found = [path for place in places for path in place.glob("chromium*/*/*")]
    of_playwright = [str(path) for path in found if path.name in ("chrome", "headless_shell", "chrome-headless-shell")]
    return next(iter([*installed, *of_playwright]), None)


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, binary, profile):
        (theirs_in, self.to), (self.of, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)]  # clear of 3 and 4
        command = [
            sys.executable, "-c", START, *map(str, high), binary, "--headless", "--remote-debugging-pipe",
            "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, pass_fds=high, stderr=subprocess.DEVNULL)
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self.numbers, self.received, self.events, self.session = itertools.count(1), b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        answer = self.wait(lambda message: message.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, wanted, seconds=60):
        """The next message that is wanted; the events that come before it are kept."""
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self.received:
                line, _, self.received = self.received.partition(b"\0")
                message = json.loads(line)
                self.events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self.of], [], [], max(end - time.monotonic(), 0))
            chunk = os.read(self.of, 1 << 20) if ready else b""
            assert chunk, "the browser says nothing"
            self.received += chunk

    def open(self, path, width=1200, height=900, scheme="light"):
        """Loads a page anew."""
        self.events.clear()
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        if not self.saw("Page.loadEventFired"):
            self.wait(lambda message: message.get("method") == "Page.loadEventFired")

    def run(self, script):
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def saw(self, *methods):
        return [event["params"] for event in self.events if event.get("method") in methods]

    def errors(self):
        logged = [p for p in self.saw("Log.entryAdded") if p["entry"]["level"] == "error"]
        said = [p for p in self.saw("Runtime.consoleAPICalled") if p["type"] in ("error", "assert")]
        return logged + said + self.saw("Runtime.exceptionThrown", "Page.javascriptDialogOpening")

    def type(self, selector, text):
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)
        self.run("new Promise((done) => setTimeout(done, 200))")

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = find_chromium()
    if binary is None:
        pytest.skip("neither Chromium nor Chrome is installed")
    found = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


ROWS = "[...document.querySelectorAll('#questions tbody tr')]"
CELLS = f"{ROWS}.map((row) => row.cells[%d].textContent)"


@pytest.fixture
def opened(browser, run, tmp_path):
    """Opens the page of the run at a width."""

    def open_at(width=1200, **more):
        report.write_report(tmp_path / "report.html", [run], {"open_door": 90, "find_key": 40})
        browser.open(tmp_path / "report.html", width, **more)
        return browser

    return open_at


def test_browser_shows_questions_without_errors_or_requests(opened):
    page = opened()
    assert page.run(f"{ROWS}.length") == 20
    assert page.run("document.getElementById('found').textContent") == "30 of 30 questions, page 1 of 2"
    page.run("document.getElementById('next').click()")
    assert page.run(f"{ROWS}.length") == 10
    requests = [p["request"]["url"] for p in page.saw("Network.requestWillBeSent")]
    assert requests and all(url.startswith(("file:", "data:")) for url in requests)
    assert page.errors() == []


def test_browser_searches(opened):
    page = opened()
    page.type("#search", "NUMBER 7. grass")
    assert page.run(CELLS % 4) == ["It should open door number 7."] * 3
    page.type("#search", " nonsense")
    assert page.run(f"{ROWS}.length") == 0
    assert page.run("document.getElementById('found').textContent") == "0 of 30 questions, page 1 of 1"


def test_browser_sorts(opened):
    page = opened()
    click = "document.querySelectorAll('#questions thead button')[%d].click()"
    state = "[...document.querySelectorAll('#questions th')].map((head) => head.getAttribute('aria-sort'))"
    assert page.run(state) == ["ascending", *[None] * 8]
    page.run(click % 3)  # numbers begin with the highest
    assert page.run(CELLS % 3)[:4] == ["0.90", "0.90", "0.90", "0.80"]
    assert page.run(state)[3] == "descending"
    page.run(click % 3)
    assert page.run(CELLS % 3)[:4] == ["0.10"] * 4 and page.run(state) == [None] * 3 + ["ascending"] + [None] * 5
    first = "document.querySelector('#achievements tbody th').textContent.trim()"
    assert page.run(first) == "find key"
    page.run("document.querySelectorAll('#achievements thead button')[2].click()")  # human experts
    assert page.run(first) == "open door"
    page.run("document.querySelectorAll('#achievements thead button')[2].click()")
    assert page.run(first) == "find key"  # what is not known stays last


def test_browser_shows_hostile_text_and_runs_none_of_it(opened):
    page = opened()
    page.run(f"{ROWS}.slice(0, 6).forEach((row) => row.querySelector('button').click())")
    shown = page.run("document.getElementById('questions').textContent")
    assert shown.count(HOSTILE) >= 5
    assert page.run("document.images.length") == 0
    assert page.errors() == []
    # And if some text did get in as HTML, the policy would stop it.
    page.run(f"document.body.insertAdjacentHTML('beforeend', {json.dumps('<img src=data:, onerror=window.hit=1>')})")
    page.run("new Promise((done) => setTimeout(done, 200))")
    assert page.run("window.hit === undefined")


@pytest.mark.parametrize("width", [320, 375, 800, 1200])
def test_browser_has_no_overflow(opened, width):
    page = opened(width)
    page.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.run(f"{ROWS}.slice(0, 6).forEach((row) => row.querySelector('button').click())")
    assert page.run("document.documentElement.scrollWidth") <= width


def test_browser_shows_a_film_that_is_in_the_page(opened, run):
    gif = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    (run / "film-1.gif").write_bytes(base64.b64decode(gif))
    page = opened()
    decoded = "document.querySelector('.film').decode().then(() => document.querySelector('.film').naturalWidth)"
    assert page.run(decoded) == 1
    assert page.errors() == []


def test_browser_without_javascript_has_all_but_the_questions(opened):
    page = opened()
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page = opened()
        shown = page.run("document.body.innerText")
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "needs JavaScript" in shown and "find key" in shown and "Search" not in shown


def test_browser_tells_the_values_below_the_pointer(opened):
    page = opened()
    value = "document.querySelector('[data-panel=\"0\"] .legend').textContent.trim().replace(/\\s+/g, ' ')"
    assert page.run(value) == "3.00 at the end"
    left, top, width, height = page.run(
        "(() => { const c = document.querySelector('.chart'); c.scrollIntoView({block: 'center'});"
        " const b = c.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + width * 0.7, y=top + height / 2)
    assert page.run(value) == "2.00 at 2,000 steps"
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert page.run(value) == "3.00 at the end"


def test_browser_is_dark_where_the_reader_is(opened):
    colour = "getComputedStyle(document.body).backgroundColor"
    assert opened().run(colour) == "rgb(255, 255, 255)"
    assert opened(scheme="dark").run(colour) == "rgb(20, 23, 26)"
