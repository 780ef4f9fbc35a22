"""Files and replies that are damaged or hostile: whatever is in them, what reads them says so in one line.

Each target reads bytes that hypothesis draws: random ones, random JSON, and above all damaged copies of valid ones.
Nothing but ValueError, in one line, may come of it; within seconds; no file outside of the folder is opened but those
of Python and of this repository, nothing is written outside of it, nothing is unpickled, started or connected to.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runs import TOY

import evaluate
import llm_client
import rladapter_adapter
import rladapter_ppo as rl
from envs import make_env
from guidance import HostTable, TableArgs
from utils import devices, hf_folder, llm_cache, report, run_folder, runs
from utils.cli import first_line

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets/adapter-tiny"
GAME = make_env("Toy-v0", 1).game
LORA_SHAPES = rladapter_adapter.param_shapes(rladapter_adapter.LmConfig(**hf_folder.read_config(TINY)[0]))
SECONDS = 60  # that reading one input may take, on a busy machine

# --------------------------------------------------------------------------------------------------
# What is drawn
# --------------------------------------------------------------------------------------------------

NUMBERS = [0, -1, 2**31, 2**63, 10**30, 1e308, -1e-320, float("nan"), float("inf"), True, None]
TEXTS = ["", "x", "\ud800", "\0", "../x", "/etc/passwd", "a" * 300, "1e6", "auto", "\x1b[2J", "²"]
LEAVES = st.sampled_from([*NUMBERS, *TEXTS, [], {}]) | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=5
)


@st.composite
def other_json(draw, valid):
    """A JSON value in which one to three things are others, gone, or somewhere else."""
    whole = {"": copy.deepcopy(valid)}
    for _ in range(draw(st.integers(1, 3))):
        holder, key = whole, ""
        while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 4)):
            holder = holder[key]
            key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        change = draw(st.sampled_from(["replace", "replace", "wrap", "remove", "rename"]))
        if change == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}, str(holder[key])]))
        elif change == "remove" and holder is not whole:
            del holder[key]
        elif change == "rename" and isinstance(holder, dict) and holder is not whole:
            holder[draw(st.sampled_from(TEXTS) | st.text(max_size=8))] = holder.pop(key)
        else:
            holder[key] = draw(VALUES)
    return whole[""]


@st.composite
def other_bytes(draw, valid):
    """Bytes of which some are others, gone, twice there, or new."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        some = draw(st.binary(max_size=4) | st.sampled_from([b"\0", b"\xff", b"\n", b'"', b"{", b"}", b"]", b"\r"]))
        length = draw(st.integers(0, 8) | st.integers(0, len(data)))
        change = draw(st.sampled_from(["put", "replace", "cut", "end", "twice"]))
        if change == "put":
            data[at:at] = some
        elif change == "replace":
            data[at : at + len(some)] = some
        elif change == "cut":
            del data[at : at + length]
        elif change == "end":
            del data[at:]
        else:
            data[at:at] = data[at : at + min(length, 2000)]
    return bytes(data)


def as_json(value):
    return json.dumps(value).encode()  # NaN and lone surrogates, too, as Python has them


def of_json(valid):
    """Bytes for a file of one JSON value."""
    text = as_json(valid)
    return st.one_of(
        st.binary(max_size=60), VALUES.map(as_json), other_bytes(text), *[other_json(valid).map(as_json)] * 3
    )  # fmt: skip


def of_lines(*valid):
    """Bytes for a file of JSON lines."""
    line = st.one_of(st.sampled_from(valid), *map(other_json, valid), VALUES).map(as_json)
    lines = st.lists(line, min_size=1, max_size=4).map(b"\n".join)
    return st.one_of(st.binary(max_size=60), lines, lines, other_bytes(b"\n".join(map(as_json, valid))))


def of_safetensors(valid):
    """Bytes for a file of safetensors: length of the header, the header, data."""
    size = int.from_bytes(valid[:8], "little")
    header, data = json.loads(valid[8 : 8 + size]), valid[8 + size :]

    def whole(value):
        text = as_json(value)
        return len(text).to_bytes(8, "little") + text + data

    return st.one_of(st.binary(max_size=60), other_bytes(valid), other_json(header).map(whole), VALUES.map(whole))


# --------------------------------------------------------------------------------------------------
# What must not happen
# --------------------------------------------------------------------------------------------------

OPENED: list[Path] = []  # the folder that may be written to, while an input is read
CAUGHT: list[str] = []
READABLE = tuple(map(str, (ROOT, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev/null", "/dev/urandom", "/usr")))
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")


def listen(event, words):
    """An audit hook (PEP 578). It can't be taken away, but only listens while an input is read."""
    if not OPENED:
        return
    if event in FORBIDDEN:
        CAUGHT.append(f"{event} {words}")
    elif event in ("open", *WRITES) and words and isinstance(words[0], str | bytes):
        path = os.path.realpath(os.fsdecode(words[0]))
        writes = event != "open" or isinstance(words[1], str) and set(words[1]) & set("wax+")
        inside = path.startswith(str(OPENED[0]))
        cached = path.startswith(os.environ["JAX_COMPILATION_CACHE_DIR"])
        if not (inside or cached or (not writes and path.startswith(READABLE))):
            CAUGHT.append(f"{event} {words}")


sys.addaudithook(listen)


@contextlib.contextmanager
def watched(folder):
    """Fails where reading does what it must not, or takes too long."""

    def too_long(*_):
        raise AssertionError(f"it took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    OPENED.append(folder.resolve())
    CAUGHT.clear()
    try:
        yield
    finally:
        OPENED.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not CAUGHT


def survives(folder, read):
    """Reads. A ValueError says what is wrong in one line; nothing else may be raised."""
    with watched(folder):
        try:
            read()
        except ValueError as error:
            said = str(error)
            assert said and len(said.splitlines()) == 1 and said.isprintable(), said


# --------------------------------------------------------------------------------------------------
# Targets
# --------------------------------------------------------------------------------------------------

REPLIES = [
    llm_client.format_reply(GAME, [(0, ["near tree"]), (1, [])]),
    json.dumps({"sub_goals": [{"name": GAME.sub_goals[0], "because": [GAME.facts[0], f"not {GAME.facts[-1]}"]}]}),
    f"<think>hm</think>```json\n{json.dumps({'sub_goals': list(GAME.sub_goals)})}\n```",
    f"1. {GAME.sub_goals[0]}\n2. {GAME.sub_goals[1]} because: {GAME.facts[0]}",
]


def questions():
    situations = np.eye(len(GAME.facts), dtype=bool)[:2]
    return [llm_client.Question(np.zeros(1, np.uint8), s, [0], None, caption="You see: tree.") for s in situations]


def guidance_lines():
    """Lines of a guidance.jsonl."""
    asked = llm_client.RulesGuide(GAME).ask(questions()).wait()
    return [{"phase": i, "global_step": 0} | question.log_line(GAME, "rules") for i, question in enumerate(asked)]


def read_reply(folder, data):
    text = data.decode("utf-8", "surrogateescape")
    survives(folder, lambda: llm_client.parse_reply(GAME, text))
    with watched(folder):
        assert llm_client.follows_schema(GAME, text) in (True, False)


def read_replay(folder, data):
    """What --llm replay reads, and what resuming does to a log."""
    (folder / "guidance.jsonl").write_bytes(data)

    def replay():
        pause = llm_client.ReplayGuide(GAME, folder).ask(questions())
        pause.wait()
        json.dumps([pause.metrics(), *(q.log_line(GAME, "replay") for q in pause.questions)])

    survives(folder, replay)
    with watched(folder):
        run_folder.cut_logs(folder, 1)
        kept = run_folder.read_log(folder, "guidance.jsonl")
        assert all(record["phase"] < 1 for record in kept)
        runs.spent(kept)


def read_examples(folder, data):
    (folder / "data.jsonl").write_bytes(data)
    survives(folder, lambda: rladapter_adapter.read_examples(folder / "data.jsonl"))


def read_cache(folder, data):
    """A cache of replies; what is damaged is set aside, and never stops a training."""
    path = folder / "llm.sqlite"
    for old in folder.glob("llm.sqlite*"):
        old.unlink()
    path.write_bytes(data)

    def use():
        cache = llm_cache.Cache(path, lambda text: bool(text))
        try:
            assert isinstance(cache.read("key"), str | None)
            cache.keep("other", "reply")
        finally:
            cache.close()

    survives(folder, use)


def read_table(folder, data):
    """What a checkpoint's JSON says of the guidance table: taken as it is or not at all."""
    env = devices.SharedEnv(make_env("Toy-v0", 1))
    table = HostTable(TableArgs(), env)
    arrays, _ = table.state()
    with watched(folder):
        try:
            table.load_state(arrays, json.loads(data)["table"])
        except Exception:  # those who read checkpoints make one line of any
            return
        table.store(llm_client.RulesGuide(GAME).ask(questions()).wait())
        json.dumps([table.metrics(), table.examples(env, "all"), table.examples(env, "best"), table.state()[1]])


@contextlib.contextmanager
def replaced(path, data):
    """Has other contents in a file for a while, which need not exist before."""
    original = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        yield
    finally:
        path.unlink() if original is None else path.write_bytes(original)


def read_config(folder, data):
    """What --resume reads first."""

    def resume():
        argv = ["--resume", str(folder / "run")]
        args = runs.resumed_args(rl.Args, tyro.cli(rl.Args, args=argv), argv)
        rl.check_args(args)

    with replaced(folder / "run/config.json", data), contextlib.redirect_stderr(io.StringIO()):
        survives(folder, resume)


def in_lora(name):
    """A file of a folder of LoRA weights."""

    def read(folder, data):
        with replaced(folder / "lora" / name, data):
            survives(folder, lambda: hf_folder.read_lora(folder / "lora", LORA_SHAPES))

    return read


def in_model(name):
    """A file of a model's folder."""

    def read(folder, data):
        with replaced(folder / "tiny" / name, data):
            survives(folder, lambda: rladapter_adapter.load_adapter(folder / "tiny"))

    return read


def in_checkpoint(name):
    """A file of a run's newest checkpoint, for evaluate.py."""

    def read(folder, data):
        given = evaluate.EvalArgs((folder / "run",), num_envs=8)
        with replaced(newest(folder) / name, data), contextlib.redirect_stderr(io.StringIO()):
            survives(folder, lambda: evaluate.load(folder / "run", given))

    return read


def in_report(name):
    """A file of a run's folder, for a report."""

    def read(folder, data):
        with replaced(folder / "run" / name, data):
            survives(folder, lambda: report.write_report(folder / "report.html", [folder / "run"]))

    return read


def newest(folder):
    """The folder of the newest checkpoint."""
    return max((folder / "run/checkpoints").iterdir(), key=lambda path: int(path.name))


def of_file(path):
    """Bytes for a file in the place of this one."""
    valid = path.read_bytes()
    if path.suffix == ".jsonl":
        return of_lines(*map(json.loads, valid.splitlines()))
    if path.suffix == ".safetensors":
        return of_safetensors(valid)
    try:
        return of_json(json.loads(valid))
    except ValueError:
        return other_bytes(valid)


def sqlite_file():
    """The bytes of a cache that holds one reply."""
    with tempfile.TemporaryDirectory() as folder:
        cache = llm_cache.Cache(Path(folder) / "x", lambda text: True)
        cache.keep("key", REPLIES[0])
        cache.close()
        return (Path(folder) / "x").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, a copy of the tiny adapter, and LoRA weights on it."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLADAPTER_CACHE", str(folder / "cache"))
        patch.setattr(runs, "use_compilation_cache", lambda: None)
        assert rl.cli([*TOY, "--total-timesteps", "600", "--run-dir", str(folder / "run")]) == 0
    shutil.copytree(TINY, folder / "tiny")
    rladapter_adapter.load_adapter(TINY).save(folder / "lora")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


EXAMPLE, INDEX = {"prompt": "a", "response": "b", "phase": 1}, {"weight_map": {"a": "model.safetensors", "b": "../x"}}
ANALYSIS = {"prompt": "a", "text": "chop tree", "advice": [[0, 0, 1]]}
TABLE = {"num_asked": 3, "analyses": [ANALYSIS, ANALYSIS], "rules": [1, 1]}
# Name -> how many of 100,000 inputs, what draws them (given the folder), what reads them
TARGETS = {
    "reply": (30_000, lambda folder: replies(), read_reply),
    "guidance.jsonl": (20_000, lambda folder: of_lines(*guidance_lines()), read_replay),
    "examples.jsonl": (19_000, lambda folder: of_lines(EXAMPLE, guidance_lines()[0]), read_examples),
    "llm.sqlite": (3_000, lambda folder: st.binary(max_size=60) | other_bytes(sqlite_file()), read_cache),
    "config.json": (1_000, lambda folder: of_file(folder / "run/config.json"), read_config),
    "table": (1_000, lambda folder: of_json({"table": TABLE}), read_table),
    "index": (500, lambda folder: of_json(INDEX), in_model("model.safetensors.index.json")),
    "generation config": (500, lambda folder: of_json({"eos_token_id": [1, 2]}), in_model("generation_config.json")),
}
TARGETS |= {
    f"lora: {name}": (11_000, lambda folder, name=name: of_file(folder / "lora" / name), in_lora(name))
    for name in ("adapter_config.json", "adapter_model.safetensors")
}
TARGETS |= {
    f"model: {name}": (400, lambda folder, name=name: of_file(TINY / name), in_model(name))
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
}
TARGETS |= {
    f"checkpoint: {name}": (200, lambda folder, name=name: of_file(newest(folder) / name), in_checkpoint(name))
    for name in ("_CHECKPOINT_METADATA", "extra/metadata", "arrays/_METADATA", "arrays/manifest.ocdbt")
}
TARGETS |= {
    f"report: {name}": (40, lambda folder, name=name: of_file(folder / "run" / name), in_report(name))
    for name in ("config.json", "summary.json", "metrics.jsonl", "guidance.jsonl", "outcomes.jsonl")
}


def replies():
    texts = [text.encode() for text in REPLIES]
    values = [json.loads(text) for text in REPLIES[:2]]
    return st.one_of(
        st.binary(max_size=80), st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
        *map(other_bytes, texts), *map(of_json, values),
    )  # fmt: skip


def fuzz(name, number, folder):
    _, draws, read = TARGETS[name]

    @settings(
        max_examples=number, deadline=None, database=None, derandomize=True, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(draws(folder))
    def run(data):
        read(folder, data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_some_inputs(name, folder):
    fuzz(name, 100 if TARGETS[name][0] >= 10_000 else 10, folder)


USUAL = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf{}", b"null", b"[]", b"{}", b'"x"', b"NaN", b"1e999", b"9" * 5000,
         b"[" * 100_000, b'{"a":' * 100_000, b'{"phase": 0, "error": "", "reply": [], "messages": []}']  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_the_usual_suspects(name, folder):
    for data in USUAL:
        TARGETS[name][2](folder, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_100_000_inputs(name, folder):
    assert sum(number for number, _, _ in TARGETS.values()) == 100_000
    fuzz(name, TARGETS[name][0], folder)


# --------------------------------------------------------------------------------------------------
# What was found
# --------------------------------------------------------------------------------------------------

FLAGS = {"num_envs": "8", "seed": None, "env_id": ["x"], "gamma": True, "guidance": "\ud800", "llm_timeout": 10**400,
         "hidden_size": -1, "total_timesteps": 1.5, "llm_cache": 7, "a\nb\x1b[2J": 1}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_a_config_that_no_run_has(name, folder, capsys):
    config = json.loads((folder / "run/config.json").read_text())
    config["flags"][name] = FLAGS[name]
    with replaced(folder / "run/config.json", as_json(config)):
        for command, words in ((rl.cli, ["--resume"]), (evaluate.cli, [])):
            assert command([*words, str(folder / "run")]) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert line.startswith("error: ") and line.isprintable()


@pytest.mark.parametrize("change", [
    {"totals": {"global_step": "x"}}, {"totals": []}, {"table": {"num_asked": 0, "analyses": 5}},
    {"table": {"num_asked": 0, "analyses": [{"prompt": 1, "text": 2, "advice": []}]}},
])  # fmt: skip
def test_a_checkpoint_with_a_damaged_end_is_not_resumed(change, folder, capsys):
    path = newest(folder) / "extra/metadata"
    with replaced(path, as_json(json.loads(path.read_text()) | change)):
        assert rl.cli(["--resume", str(folder / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --resume: checkpoint ") and line.isprintable()


@pytest.mark.parametrize("end", [[[], 2], "x", [-1], 10**9, {"a": 1}, 1.5])
def test_end_tokens_that_no_model_has(end, folder):
    with replaced(folder / "tiny/generation_config.json", as_json({"eos_token_id": end})):
        with pytest.raises(ValueError, match="its end tokens are "):
            rladapter_adapter.load_adapter(folder / "tiny")


@pytest.mark.parametrize("layers", [2**31, 10**30, 0, -1, float("nan")])
def test_layers_that_no_machine_has_room_for(layers, folder):
    config = json.loads((TINY / "config.json").read_text()) | {"model_type": "qwen3", "num_hidden_layers": layers}
    with replaced(folder / "tiny/config.json", as_json(config)):
        with pytest.raises(ValueError, match="num_hidden_layers"):
            rladapter_adapter.load_adapter(folder / "tiny")


def test_logs_keep_what_is_a_record_of_a_phase(tmp_path):
    others = b'{"phase": "0"}', b'{"phase": null}', b"\xff", b"[" * 100_000
    lines = b'{"phase": 0}', *others, b'{"phase": 1, "calls": "x"}'
    (tmp_path / "guidance.jsonl").write_bytes(b"\n".join(lines))
    kept = run_folder.read_log(tmp_path, "guidance.jsonl")
    assert [record["phase"] for record in kept] == [0, 1] and runs.spent(kept)["llm_calls"] == 0


def test_a_cache_that_another_program_made(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "llm.sqlite")) as other:
        other.execute("CREATE TABLE replies (key, text)")
        other.executemany("INSERT INTO replies VALUES (?, ?)", [("a", 5), ("b", b"\xff"), ("c", "[" * 100_000)])
        other.commit()
    cache = llm_cache.Cache(tmp_path / "llm.sqlite", lambda text: True)
    assert [cache.read(key) for key in "abc"] == [None] * 3
    cache.close()


def test_what_an_error_quotes_can_be_printed(folder):
    """Half a character in a name, as an index of weights had it: the error could not be written to a terminal."""
    in_model("model.safetensors.index.json")(folder, b'{"weight_map":{"":"\\ud800"}}')
    assert first_line(ValueError("no \ud800 \x1b[2J é\nmore")) == "no \\ud800 \\x1b[2J é"


def test_an_error_whose_first_line_only_announces_the_reason_gives_that_as_well():
    assert first_line(ValueError("Field 'x':\n\n  must be a number\nand more")) == "Field 'x': must be a number"
    assert first_line(ValueError("Field 'x':")) == "Field 'x':"


def test_a_checkpoint_without_totals_is_one_line(folder):
    """A KeyError, where a run is evaluated."""
    in_checkpoint("extra/metadata")(folder, b'{"table": {"num_asked": 4, "analyses": [], "rules": [1, 1]}, "": 0}')
