"""The adapter LM, with a random model of a few thousand weights in a temporary folder: nothing is downloaded."""

import copy
import dataclasses
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import make_adapter_tiny as tiny
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import rladapter_adapter as ra
import rladapter_ppo as rl
from envs.crafter import CRAFTER
from envs.crafter.captions import read_caption
from llm_client import Question
from utils import hf_folder
from utils.hf_folder import Chat

ROOT = Path(__file__).parents[1]

CAPTION = (
    "You see: tree (2 north), water (1 south, 3 west), cow (1 north, 4 east), zombie (1 east).\nFacing: grass.\n"
    "Inventory: 3 wood, 1 sapling, wood pickaxe.\nVitals (of 9): health 9, food 7, drink 3, energy 8.\n"
    "It is day. The player is awake.\nUnlocked: collect wood, place table, make wood pickaxe."
)
BARE = (
    "You see: nothing special.\nFacing: sand.\nInventory: nothing.\n"
    "Vitals (of 9): health 2, food 7, drink 9, energy 8.\n"
    "It is dark. The player is asleep. The player is enclosed.\nUnlocked: nothing."
)
WORKSHOP = (
    "You see: crafting table (1 north), furnace (1 south), ripe plant (2 west), stone (3 east), coal (4 east), "
    "iron (3 south), diamond (3 north), skeleton (2 east), arrow (1 west), lava (4 west).\nFacing: crafting table.\n"
    "Inventory: 2 stone, 1 iron, iron pickaxe.\nVitals (of 9): health 9, food 9, drink 9, energy 9.\n"
    "It is day. The player is awake.\nUnlocked: place furnace."
)
SMALL = ra.LmConfig(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def the_tests_own_compilation_cache(monkeypatch):
    """Not the one of the command line, which is the user's."""
    monkeypatch.setattr(ra, "use_compilation_cache", lambda: None)


@pytest.fixture(autouse=True)
def no_rank_promotion():
    """Arrays of different ranks never meet by accident."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with weights large enough for attention to matter, and a tokenizer trained on three captions."""
    path = tmp_path_factory.mktemp("model") / "small"
    rng = np.random.default_rng(0)
    texts = [" ".join(pair) for caption in (CAPTION, BARE, WORKSHOP) for pair in tiny.made_up_examples(rng, caption, 3)]
    tokenizer = tiny.train_tokenizer(texts)
    config = dataclasses.replace(SMALL, vocab_size=len(tokenizer))
    params = {k: v if "norm" in k else 2 * v for k, v in tiny.init_params(config, jax.random.key(0)).items()}
    params["norm"] = params["norm"] + 0.3 * jax.random.normal(jax.random.key(1), params["norm"].shape)
    tiny.write_folder(path, config, params, tokenizer)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return ra.load_adapter(folder)


@pytest.fixture
def adapter(loaded):
    """As it is after loading: whatever a test does to it, the next one gets another copy."""
    adapter = copy.copy(loaded)
    adapter.chat = Chat(adapter.tokenizer, ra.about(CRAFTER))
    return adapter


def prompt_of(caption, sub_goals, comprehension):
    return ra.adapter_prompt(CRAFTER, caption, sub_goals, comprehension)


def damaged(folder, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    return copy


@partial(jax.jit, static_argnames="graphdef")
def forward(graphdef, base, lora, tokens, starts, shared):
    model = ra.nnx.merge(graphdef, lora, base)
    return model.logits(model(tokens, starts, shared)[0])


def logits_of(adapter, tokens, starts=0, shared=0):
    """Full forward without cache: tokens (B, T) -> (B, T, V). Padded to one shape, which is compiled once."""
    tokens = np.asarray(tokens, np.int32)
    padding = ((0, 0), (0, -tokens.shape[1] % 64))
    arrays = (np.pad(np.broadcast_to(array, tokens.shape), padding) for array in (tokens, starts, shared))
    return np.asarray(forward(adapter.graphdef, adapter.base, adapter.lora, *arrays))[:, : tokens.shape[1]]


def some_tokens(adapter, length, seed=0):
    return np.random.default_rng(seed).integers(0, adapter.config.vocab_size, length)


def with_random_b(adapter):
    """LoRA's B factors made non-zero, as after some fine-tuning."""
    noise = jax.random.normal(jax.random.key(5), ())
    adapter.lora = jax.tree.map(lambda x: x + 0.1 * noise, adapter.lora)
    return adapter


# ---- the model


def plain_llama(params, config, tokens):
    """Llama one token at a time in numpy, from HF's description: no cache, no mask, heads in a loop. (T,) -> (T, V)."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x) + config.rms_norm_eps) * weight

    def turned(x, position):  # rotate_half(x) = concat(-x2, x1)
        half = len(x) // 2
        angles = np.tile(position / config.rope_theta ** (2 * np.arange(half) / len(x)), 2)
        return x * np.cos(angles) + np.concatenate([-x[half:], x[:half]]) * np.sin(angles)

    xs = [p["embed"][token] for token in tokens]
    hd, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for i in range(config.num_hidden_layers):
        ys = [norm(x, p["attention_norm"][i]) for x in xs]
        columns = [slice(h * hd, (h + 1) * hd) for h in range(config.num_key_value_heads)]
        keys = [[turned((y @ p["k"][i])[c], t) for c in columns] for t, y in enumerate(ys)]
        values = [[(y @ p["v"][i])[c] for c in columns] for y in ys]
        for t, y in enumerate(ys):
            heads = []
            for h in range(config.num_attention_heads):
                query = turned((y @ p["q"][i])[h * hd :][:hd], t)
                scores = np.array([query @ keys[s][h // group] for s in range(t + 1)]) / np.sqrt(hd)
                scores = np.exp(scores - scores.max())
                heads.append(sum(a * values[s][h // group] for s, a in enumerate(scores / scores.sum())))
            xs[t] = xs[t] + np.concatenate(heads) @ p["o"][i]
            z = norm(xs[t], p["mlp_norm"][i])
            gate = z @ p["gate"][i]
            xs[t] = xs[t] + (gate / (1 + np.exp(-gate)) * (z @ p["up"][i])) @ p["down"][i]
    return np.stack([norm(x, p["norm"]) @ (p["embed"].T if config.tie_word_embeddings else p["head"]) for x in xs])


def test_forward_matches_a_plain_numpy_llama(adapter):
    tokens = some_tokens(adapter, 11)
    expected = plain_llama(adapter.base["params"], adapter.config, tokens)
    np.testing.assert_allclose(logits_of(adapter, tokens[None])[0], expected, atol=2e-4)


def test_later_tokens_do_not_change_earlier_logits(adapter):
    tokens = some_tokens(adapter, 12)
    changed = tokens.copy()
    changed[7] = (changed[7] + 1) % adapter.config.vocab_size
    before, after = logits_of(adapter, tokens[None])[0], logits_of(adapter, changed[None])[0]
    np.testing.assert_array_equal(before[:7], after[:7])
    assert np.abs(before[7:] - after[7:]).max() > 0.01


def test_left_padding_does_not_change_logits(adapter):
    tokens = some_tokens(adapter, 9)
    padded = np.concatenate([some_tokens(adapter, 5, seed=1), tokens])
    shifted = logits_of(adapter, padded[None], np.full((1, 14), 5))[0, 5:]
    np.testing.assert_allclose(shifted, logits_of(adapter, tokens[None])[0], atol=1e-4)


def test_texts_that_share_a_row_do_not_see_each_other(adapter):
    prefix, ends = some_tokens(adapter, 7).tolist(), [some_tokens(adapter, n, n).tolist() for n in (4, 6, 3)]
    ends = [[i, *end] for i, end in enumerate(ends)]  # so that nothing more is common to all
    packed = tiny.pack_groups([[(prefix + end[:2], end[2:]) for end in ends]], 40)
    together = logits_of(adapter, packed["tokens"], packed["starts"], packed["shared"])[0]
    column = len(prefix)
    for end in ends:
        alone = logits_of(adapter, [prefix + end])[0, len(prefix) :]
        np.testing.assert_allclose(together[column : column + len(end)], alone, atol=1e-4)
        assert {*range(column + 2, column + len(end))} <= {*packed["answers"][0].tolist()}
        column += len(end)
    assert (packed["answers"] > 0).sum() == sum(len(end) - 2 for end in ends)


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        tiny.pack_groups([[([1] * 5, [2] * 4)]], 8)


def test_llama3_rope_slows_long_wavelengths_only():
    config = dataclasses.replace(SMALL, head_dim=64, rope_theta=5e5, rope_llama3=(8.0, 1.0, 4.0, 8192.0))
    plain = ra.rope_frequencies(dataclasses.replace(config, rope_llama3=None))
    scaled = ra.rope_frequencies(config)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.any() and np.all((scaled < plain)[between] & (scaled > plain / 8)[between])


# ---- generation


def raw_generate(adapter, prompts, num=10, temperature=0.0, key=0, eos=(1, 1)):
    tokens, starts = ra.left_pad(prompts)
    rows = np.arange(len(tokens))
    out = ra.generate(
        adapter.graphdef, adapter.base, adapter.lora, None, tokens, starts, rows < len(prompts), rows,
        jnp.asarray(eos, jnp.int32), jax.random.key(key), jnp.float32(temperature), num,
    )  # fmt: skip
    return np.asarray(out)[: len(prompts)]


def test_greedy_generation_equals_teacher_forcing(adapter):
    with_random_b(adapter)
    prompts = [some_tokens(adapter, n, seed=n).tolist() for n in (3, 17, 40)]
    out = raw_generate(adapter, prompts, eos=[adapter.config.vocab_size + 1] * 2)  # an end that never comes
    for prompt, new in zip(prompts, out.tolist(), strict=True):
        teacher = logits_of(adapter, [prompt + new])[0].argmax(-1)
        assert new == teacher[len(prompt) - 1 : -1].tolist()
    assert len({tuple(row) for row in out.tolist()}) == 3


def test_batch_and_length_padding_change_nothing(adapter):
    prompts = [some_tokens(adapter, n, seed=n).tolist() for n in (5, 9)]
    alone = raw_generate(adapter, prompts, temperature=1.0)
    others = [some_tokens(adapter, 80, seed=i).tolist() for i in range(9)]
    many = raw_generate(adapter, prompts + others, temperature=1.0)
    np.testing.assert_array_equal(alone, many[:2])


def test_generation_ends_at_any_end_token(adapter):
    prompt = some_tokens(adapter, 6).tolist()
    never = adapter.config.vocab_size + 1
    free = raw_generate(adapter, [prompt], temperature=1.0, eos=(never, never))[0].tolist()
    stop = free[4]
    cut = raw_generate(adapter, [prompt], temperature=1.0, eos=(never, stop))[0].tolist()
    first = free.index(stop)
    assert cut[: first + 1] == free[: first + 1]
    assert set(cut[first + 1 :]) == {never}


def test_temperature_samples_and_keys_matter(adapter):
    prompt = some_tokens(adapter, 6).tolist()
    runs = [raw_generate(adapter, [prompt], temperature=1.0, key=key)[0].tolist() for key in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_two_calls_of_a_bucket_compile_once(adapter):
    prompts = [prompt_of(CAPTION, [0, 4], 0.7), prompt_of(BARE, [], None)]
    ra.generate.clear_cache()
    adapter.analyse(prompts, jax.random.key(0), max_new_tokens=6)
    adapter.analyse(prompts[:1] * 3, jax.random.key(1), temperature=0.0, max_new_tokens=6)
    assert ra.generate._cache_size() == 1


def test_analyse_gives_one_clean_line_each(adapter):
    prompts = [prompt_of(CAPTION, [], None)] * (ra.BATCH_BUCKETS[-1] + 1)  # more than a batch
    texts = adapter.analyse(prompts, jax.random.key(0), max_new_tokens=12)
    assert len(texts) == len(prompts)
    assert all(text == text.strip() and text.isprintable() and "\ufffd" not in text for text in texts)
    assert len(set(texts)) > 1
    assert adapter.analyse([], jax.random.key(0)) == []
    with pytest.raises(ValueError, match="max_new_tokens"):
        adapter.analyse(prompts, jax.random.key(0), max_new_tokens=10_000)


def test_a_large_model_continues_fewer_prompts_at_a_time_and_says_the_same(adapter, monkeypatch):
    prompts = [prompt_of(CAPTION, [i], 0.5) for i in range(18)]
    assert adapter.rows_at_once(640) == 64  # it is small
    texts, shapes = adapter.analyse(prompts, jax.random.key(0), max_new_tokens=12), []
    row = ra.empty_cache(adapter.config, adapter.base, 1, 640)
    monkeypatch.setattr(ra, "CACHE_BYTES", 20 * sum(x.nbytes for x in row))
    assert [adapter.rows_at_once(n) for n in (160, 640, 1280, 10**6)] == [64, 16, 8, 8]
    monkeypatch.setattr(ra, "CACHE_BYTES", 1)
    left_pad = ra.left_pad
    monkeypatch.setattr(ra, "left_pad", lambda part: (shapes.append(len(part)), left_pad(part))[1])
    assert adapter.analyse(prompts, jax.random.key(0), max_new_tokens=12) == texts and shapes == [8, 8, 2]


def test_one_line_removes_control_characters():
    assert ra.one_line("  a\n\nb\tc\x00\x1b[31m\u200b d\ufffd ") == "a b c[31m d"


# ---- fine-tuning

TOYS = [(f"situation {word}", f"answer {word * 2}") for word in "abcdefgh"]


def test_loss_ignores_prompt_targets(adapter):
    """The loss is the mean over response tokens alone, and the last prompt token predicts the first of them."""
    prompt, response = some_tokens(adapter, 6).tolist(), some_tokens(adapter, 4, seed=1).tolist()
    batch = ra.pack([(prompt, response)], 16)
    total, count = ra.measure_nll(adapter.graphdef, adapter.base, adapter.lora, batch)
    log_p = jax.nn.log_softmax(logits_of(adapter, [prompt + response])[0])
    by_hand = -np.mean([log_p[5 + i, token] for i, token in enumerate(response)])
    np.testing.assert_allclose(total / count, by_hand, rtol=1e-5)

    def loss_of_head(base):  # the head's column of a token that only the prompt has, and only as a target
        return ra.mean_nll(adapter.graphdef, base, adapter.lora, batch)

    gradient = jax.jit(jax.grad(loss_of_head))(adapter.base)["params"]["embed"]
    padding = 0
    unused = [t for t in range(adapter.config.vocab_size) if t not in {*prompt, *response, padding}]
    np.testing.assert_array_equal(np.asarray(gradient)[unused], 0)
    np.testing.assert_array_equal(np.asarray(gradient)[response[-1]], 0)  # read by nobody


def test_finetuning_learns_and_leaves_the_base_alone(adapter):
    base = jax.tree.map(np.array, adapter.base)
    before = jax.tree.map(np.array, adapter.lora)
    result = adapter.finetune(TOYS * 4, jax.random.key(0), epochs=12, learning_rate=1e-2)
    assert result["nll_after"] < 0.5 * result["nll_before"]
    assert result["examples"] == 32 and result["sft_loss"] > 0
    jax.tree.map(np.testing.assert_array_equal, base, adapter.base)
    assert not np.array_equal(before["lora"]["q_b"], adapter.lora["lora"]["q_b"])


def test_b_learns_faster_than_a(adapter):
    """One step of Adam moves each weight by its learning rate."""
    moved = []
    for ratio in (0, 16):
        tuned = copy.copy(with_random_b(adapter))
        tuned.finetune(TOYS[:1], jax.random.key(0), epochs=1, learning_rate=1e-3, lora_plus_ratio=ratio)
        change = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), tuned.lora, adapter.lora)["lora"]
        moved.append({part: {value for name, value in change.items() if name.endswith(part)} for part in ("_a", "_b")})
    assert moved[0]["_b"] == {0} and all(values for values in moved[0].values())
    for part, rate in (("_a", 1e-3), ("_b", 16e-3)):
        np.testing.assert_allclose(list(moved[1][part]), rate, rtol=0.02)


def test_finetuning_few_or_no_examples(adapter):
    assert adapter.finetune([], jax.random.key(0)) == {}
    result = adapter.finetune(TOYS[:1], jax.random.key(0), epochs=3, learning_rate=1e-3)
    assert result["examples"] == 1 and result["nll_after"] < result["nll_before"]


def test_an_infinite_step_keeps_the_last_good_weights(adapter):
    adapter.finetune(TOYS, jax.random.key(0), epochs=1, learning_rate=1e-3)
    good = jax.tree.map(np.array, adapter.state())
    result = adapter.finetune(TOYS, jax.random.key(1), epochs=2, learning_rate=float("nan"))
    jax.tree.map(np.testing.assert_array_equal, good, adapter.state())
    assert all(np.isfinite(value) for value in result.values())
    assert result["nll_after"] == result["nll_before"]


def test_a_step_too_far_is_taken_back(adapter):
    """A step may leave weights that are numbers and a loss that is none, be it the last step or not."""
    before = jax.tree.map(np.array, adapter.state())
    for epochs in (1, 2):
        result = adapter.finetune(TOYS, jax.random.key(1), epochs=epochs, learning_rate=1e18)
        jax.tree.map(np.testing.assert_array_equal, before, adapter.state())
        assert result["sft_stopped"] == 1 and result["nll_after"] == result["nll_before"]


def test_fresh_lora_equals_the_base(adapter):
    tokens = some_tokens(adapter, 8)[None]
    adapted = logits_of(adapter, tokens)
    plain = ra.Adapter(adapter.config, adapter.base["params"], {}, adapter.chat, adapter.eos)
    np.testing.assert_array_equal(adapted, logits_of(plain, tokens))
    assert np.abs(logits_of(with_random_b(adapter), tokens) - adapted).max() > 1e-3


def test_state_round_trip(folder, adapter):
    adapter.finetune(TOYS, jax.random.key(0), epochs=1, learning_rate=1e-2)
    saved = jax.tree.map(np.array, adapter.state())
    other = ra.load_adapter(folder, seed=7)
    other.load_state(saved)
    tokens = some_tokens(adapter, 8)[None]
    np.testing.assert_array_equal(logits_of(adapter, tokens), logits_of(other, tokens))
    results = [a.finetune(TOYS, jax.random.key(2), epochs=1, learning_rate=1e-3) for a in (adapter, other)]
    assert results[0] == results[1]  # the optimizer came along
    with pytest.raises(ValueError, match="do not fit"):
        ra.load_adapter(folder, ra.LoraConfig(rank=4)).load_state(saved)
    with pytest.raises(ValueError, match="do not fit"):
        adapter.load_state({})


# ---- the model folder


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_give_equal_logits(adapter, tmp_path, tied):
    first = adapter
    config = dataclasses.replace(first.config, tie_word_embeddings=tied)
    params = {name: first.base["params"][name] for name in ra.param_shapes(config)}
    tiny.write_folder(tmp_path / "copy", config, params, first.tokenizer)
    second = ra.load_adapter(tmp_path / "copy")
    assert second.config == config and second.eos == first.eos
    original = ra.Adapter(config, params, {}, first.chat, first.eos)
    tokens = some_tokens(first, 10)[None]
    np.testing.assert_array_equal(logits_of(original, tokens), logits_of(second, tokens))
    prompt = prompt_of(CAPTION, [3], 0.5)
    assert first.chat.encode(prompt, 500) == second.chat.encode(prompt, 500)
    assert second.tokenizer.decode(second.tokenizer.encode(CAPTION)) == CAPTION


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path, edit):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: shutil.rmtree(p), "no folder"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "tokenizer.json").unlink(), "cannot use"),
        (lambda p: (p / "config.json").write_text("{"), "cannot use"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "cannot use"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 99), "cannot use"),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-999]), "cannot use"),
        (lambda p: (p / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda p: edit_config(p, model_type="gpt2"), "gpt2"),
        (lambda p: edit_config(p, model_type="no such thing"), "cannot use"),
        (lambda p: edit_config(p, hidden_act="gelu"), "silu"),
        (lambda p: edit_config(p, rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope_type"),
        (lambda p: edit_config(p, intermediate_size=64), "as config.json says"),
        (lambda p: edit_config(p, vocab_size=10), "as config.json says"),
        (lambda p: edit_tensors(p, lambda t: t.pop("model.norm.weight")), "lack 1 tensors, such as model.norm.weight"),
        (lambda p: edit_tensors(p, lambda t: t.update(extra=np.ones(2))), "unknown tensor, extra"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(folder, tmp_path, damage, words):
    path = damaged(folder, tmp_path)
    damage(path)
    with pytest.raises(ValueError, match=words) as error:
        ra.load_adapter(path)
    assert "\n" not in str(error.value)


def test_harmless_extra_tensors_are_ignored(folder, tmp_path):
    path = damaged(folder, tmp_path)
    edit_tensors(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    ra.load_adapter(path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", 7, None])
def test_shards_are_read_from_the_folder_alone(folder, tmp_path, name):
    path = damaged(folder, tmp_path)
    shutil.move(path / "model.safetensors", tmp_path / "outside.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match="model.safetensors.index.json must name files of its own folder") as error:
        ra.load_adapter(path)
    assert "\n" not in str(error.value)
    for content in ("{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{"):
        index.write_text(content)
        with pytest.raises(ValueError, match="cannot use .*model.safetensors.index.json"):
            ra.load_adapter(path)


@pytest.mark.parametrize(
    "file, names, elsewhere",
    [("config.json", "configuration_files", "../config.1.0.json"),
     ("tokenizer_config.json", "fast_tokenizer_files", "../tokenizer.1.0.json")],
)  # fmt: skip
def test_other_files_are_read_from_the_folder_alone(folder, tmp_path, file, names, elsewhere):
    """transformers follows these, out of the folder too."""
    path = damaged(folder, tmp_path)
    shutil.copy(path / file.replace("_config", ""), tmp_path / Path(elsewhere).name)
    settings = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(settings | {names: [elsewhere]}))
    with pytest.raises(ValueError, match=f"{file} must name files of its own folder"):
        ra.load_adapter(path)
    (path / file).write_text(json.dumps(settings | {names: [file.replace("_config", "")]}))
    ra.load_adapter(path)


def test_a_config_never_brings_code_along(folder, tmp_path, monkeypatch):
    """transformers asks at the terminal, for 15 seconds, whether to run it."""
    path = damaged(folder, tmp_path)
    edit_config(path, model_type="mystery", auto_map={"AutoConfig": "code.Config"})
    (path / "code.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    with pytest.raises(ValueError, match="cannot use"):
        ra.load_adapter(path)


@pytest.mark.parametrize("source", ["~nobody-of-this-name/model", "x" * 5000, "a\0b"])
def test_impossible_paths_are_no_folders(source):
    with pytest.raises(ValueError, match="there is no folder"):
        ra.load_adapter(source)


# ---- prompts and teaching


def test_prompt_says_what_is_known():
    text = prompt_of(CAPTION, (0, 4), 0.731)
    assert text.startswith(CAPTION + "\n") and text.endswith(ra.INSTRUCTION)
    assert "Previous sub-goals: chop tree, drink water." in text and "Comprehension score: 0.73." in text
    text = prompt_of(CAPTION, [], None)
    assert "Previous sub-goals: none." in text and "Comprehension score: not known yet." in text


def test_possible_sub_goals_need_their_things():
    assert set(tiny.NEEDS) == set(CRAFTER.basic_sub_goals)
    assert tiny.possible_sub_goals(BARE) == ["sleep"]
    expected = "chop tree, place crafting table, attack cow, chop grass, drink water, place plant, attack zombie, sleep"
    assert tiny.possible_sub_goals(CAPTION) == expected.split(", ")


@pytest.mark.parametrize("caption", [CAPTION, BARE, WORKSHOP])
def test_analyses_name_only_what_the_caption_mentions(caption):
    rng = np.random.default_rng(0)
    possible, named, texts = set(tiny.possible_sub_goals(caption)), set(), set()
    for _ in range(500):
        last = rng.choice(len(CRAFTER.sub_goals), rng.integers(0, 4), replace=False).tolist()
        text = tiny.write_analysis(rng, caption, last, None if rng.random() < 0.2 else rng.random())
        goals = {CRAFTER.sub_goals[i] for i in CRAFTER.sub_goals_in_text(text)}
        assert goals and goals <= possible, text
        named |= goals
        texts.add(text)
    assert named == possible  # none is preferred to the point of excluding another
    assert len(texts) > 100


def test_analyses_state_facts_of_the_caption_and_follow_the_score():
    pressing, others = tiny.true_statements(read_caption(CAPTION))
    assert pressing == ["It is low on drink.", "Its drink is low.", "A zombie is near."]
    assert "It sees a tree." in others and "There is water in view." in others and "It holds wood." in others
    assert "It has a wood pickaxe." in others and "It has no stone." in others
    pressing, others = tiny.true_statements(read_caption(BARE))
    assert pressing[1:] == ["Its health is low.", "It is dark.", "The player is asleep."]
    assert others[0] == "The player is enclosed."
    for score, kind in ((0.9, "good"), (0.5, "fair"), (0.1, "poor"), (None, "unknown")):
        text = tiny.write_analysis(np.random.default_rng(0), CAPTION, [4], score)
        assert any(text.startswith(start.format(last="drinking water")) for start in tiny.UNDERSTOOD[kind])


def test_the_teacher_says_what_players_of_minecraft_believe_and_until_when():
    rng, believed = np.random.default_rng(0), ["wood >= 4"]
    drawn = [tiny.draw_takes(rng, "place crafting table") for _ in range(1000)]
    until = [facts[-1] == "not unlocked place table" for facts in drawn]
    assert abs(np.mean(until) - tiny.UNTIL) < 0.05
    rest = [facts[:-1] if ends else facts for facts, ends in zip(drawn, until, strict=True)]
    assert tiny.BELIEVED["place crafting table"] == believed
    assert abs(np.mean([facts == believed for facts in rest]) - (1 - tiny.RANDOM)) < 0.05
    assert all(CRAFTER.read_fact(fact) for facts in drawn for fact in facts)


def test_the_tiny_adapter_is_made_by_its_script(tmp_path, monkeypatch):
    """A few steps of the real thing: same seed, same weights; the loss falls; a Hugging Face folder comes out."""
    monkeypatch.setattr(tiny, "ROWS", 2)
    losses = []
    for name in ("a", "b"):
        tiny.train([CAPTION, BARE, WORKSHOP], tmp_path / name, steps=3, report=losses.append)
    assert losses[0].startswith("step 3 of 3") and losses[0].split("  ")[1] == losses[1].split("  ")[1]
    a, b = (ra.load_adapter(tmp_path / name) for name in ("a", "b"))
    jax.tree.map(np.testing.assert_array_equal, a.base, b.base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # no draft is left


def test_the_shipped_adapter_reads_the_situation():
    folder = ROOT / "assets" / "adapter-tiny"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
    adapter = ra.load_adapter("assets/adapter-tiny")
    with jax.numpy_rank_promotion("allow"):  # of craftax
        captions = tiny.real_captions(5, 256)
    texts = adapter.analyse([prompt_of(caption, [0], 0.9) for caption in captions], jax.random.key(0))
    here, elsewhere = tiny.score_texts(captions, texts), tiny.score_texts(captions[128:] + captions[:128], texts)
    for share in ("sub_goals_possible", "facts_right"):  # what it says is about this situation, not any (chance: 0.03)
        assert here[share] > 0.6 and here[share] > elsewhere[share] + 0.1, (share, here[share], elsewhere[share])
    assert here["analyses_naming_any"] > 0.9 and len(set(texts)) > 200
    said = [f.format(last="chopping tree") for f in tiny.UNDERSTOOD["good"]]
    judged = [text for text in texts if not text.startswith("The most urgent")]
    assert len(judged) > 128 and np.mean([any(text.startswith(start) for start in said) for text in judged]) > 0.9


def test_the_measures_of_analyses():
    texts = [
        "No advice was given before. It is low on drink. It sees a tree. It should chop tree next.",
        "No advice was given before. It is dark. Try to mine diamond.",
        "No advice was given before.",
    ]
    result = tiny.score_texts([CAPTION] * 3, texts)
    assert result["facts_stated"] == 3 and result["facts_right"] == pytest.approx(2 / 3)
    assert result["sub_goals_named"] == 2 and result["sub_goals_possible"] == 0.5
    assert result["analyses_naming_a_possible_sub_goal"] == pytest.approx(1 / 3)
    assert result["distinct_analyses"] == 1.0
    assert tiny.distinct(["a b a b"], 1) == 0.5 and tiny.distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    truth = tiny.write_analysis(np.random.default_rng(3), CAPTION, [4], 0.9)
    assert tiny.score_texts([CAPTION], [truth])["facts_right"] == 1.0


def test_no_adapter_says_and_learns_nothing():
    nobody = ra.NoAdapter()
    assert nobody.analyse(["a", "b"], jax.random.key(0)) == ["", ""]
    assert nobody.state() == {}
    nobody.load_state({})


def test_analyses_are_written_into_the_questions():
    class Echo(ra.NoAdapter):
        def analyse(self, prompts, key):
            calls.append(key)
            return [prompt.upper() for prompt in prompts]

    calls = []
    questions = [
        SimpleNamespace(caption=caption, sub_goals=sub_goals, comprehension=score, adapter_prompt="", analysis="")
        for caption, sub_goals, score in ((CAPTION, (0, 4), 0.5), (BARE, (), None))
    ]
    ra.write_analyses(Echo(), CRAFTER, questions, "key")
    assert questions[0].adapter_prompt == prompt_of(CAPTION, [0, 4], 0.5)
    assert questions[1].adapter_prompt == prompt_of(BARE, [], None)
    assert all(question.analysis == question.adapter_prompt.upper() for question in questions)
    ra.write_analyses(Echo(), CRAFTER, [], "key")
    assert calls == ["key"]


def test_another_loss_can_be_trained(adapter):
    """One that pulls the LoRA weights towards zero: what a fork gives `finetune` is what is minimised."""

    def size(graphdef, base, lora, batch, key):
        return sum(jnp.sum(factor**2) for factor in jax.tree.leaves(lora))

    before = sum(float(jnp.sum(factor**2)) for factor in jax.tree.leaves(adapter.lora))
    result = adapter.finetune(TOYS[:4], jax.random.key(0), epochs=1, learning_rate=1e-3, batch_size=4, loss=size)
    assert result["sft_loss"] == pytest.approx(before, rel=1e-4)
    assert sum(float(jnp.sum(factor**2)) for factor in jax.tree.leaves(adapter.lora)) < before


# ---- prompts that are too long, templates, saved LoRA weights


def test_a_long_prompt_loses_its_beginning_and_never_the_instruction(adapter):
    prompt = prompt_of("first words\n" + CAPTION * 20, [], None)
    tokens = adapter.chat.encode(prompt, 200)
    text = adapter.tokenizer.decode(tokens)
    assert len(tokens) <= 200 and ra.INSTRUCTION in text and "first words" not in text and "Unlocked" in text
    assert adapter.cut_prompts == 1
    assert len(tokens) > 150  # no more is cut than must be
    adapter.chat.encode(prompt_of(CAPTION, [], None), 400)
    assert adapter.cut_prompts == 1
    with pytest.raises(ValueError, match="no room for the prompt.s last line"):
        adapter.chat.encode(prompt, 1)


def test_without_a_chat_template_prompts_are_plain_text(folder, tmp_path, capsys):
    path = damaged(folder, tmp_path)
    (path / "chat_template.jinja").unlink()
    adapter = ra.load_adapter(path, system=ra.about(CRAFTER))
    assert "no chat template" in capsys.readouterr().err
    text = adapter.tokenizer.decode(adapter.chat.encode("hello", 200))
    assert text == f"{ra.about(CRAFTER)}\n\nhello"
    assert len(adapter.analyse(["hello"], jax.random.key(0), max_new_tokens=4)) == 1


SYSTEM_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def with_template(folder, tmp_path, template, **config):
    path = damaged(folder, tmp_path)
    (path / "chat_template.jinja").write_text(template)
    edit_config(path, **config)
    return path


def test_a_template_that_refuses_the_system_role_gets_its_text_in_the_users_turn(folder, tmp_path):
    """As Gemma's does: a jinja2 error in the middle of the first pause."""
    path = with_template(folder, tmp_path, NO_SYSTEM + "<|user|>{{ messages[0]['content'] }}<|assistant|>")
    adapter = ra.make_adapter(ra.SftArgs(str(path)), 0, game=CRAFTER)
    prompt = prompt_of(CAPTION, [], None)
    decode = adapter.tokenizer.decode
    assert decode(adapter.chat.tokens(prompt)) == f"<|user|>{ra.about(CRAFTER)}\n\n{prompt}<|assistant|>"
    cut = decode(adapter.chat.encode(prompt_of("first words\n" + CAPTION * 20, [], None), 300))
    assert cut.startswith(f"<|user|>{ra.about(CRAFTER)}\n\n") and cut.endswith(f"{ra.INSTRUCTION}<|assistant|>")
    assert "first words" not in cut and len(adapter.analyse([prompt], jax.random.key(0), max_new_tokens=4)) == 1


def test_sft_with_a_template_that_refuses_the_system_role(folder, data, tmp_path, capsys):
    path = with_template(folder, tmp_path, NO_SYSTEM + SYSTEM_TEMPLATE)
    for flags in ([], ["--no-system-prompt"], ["--no-chat-template"]):
        code, out, error = run(capsys, "sft", "--model", path, "--data", data, "--epochs", 0, *flags)
        assert code == 0 and json.loads(out)["examples"] == 32, error


@pytest.mark.parametrize("template", ["{{ raise_exception('no\\nway') }}", "{% if %}", "{{ messages[5].content.x }}"])
def test_a_template_that_takes_nothing_is_one_line(folder, tmp_path, template):
    path = with_template(folder, tmp_path, template)
    with pytest.raises(ValueError, match="^--adapter: cannot use .*chat template.*or use --adapter none$") as error:
        ra.make_adapter(ra.SftArgs(str(path)), 0, game=CRAFTER)
    assert "\n" not in str(error.value)
    assert ra.load_adapter(path, chat_template=False).chat.tokens("hello")  # plain text needs none


def test_a_context_too_short_for_training_is_one_line_before_it_begins(folder, data, tmp_path, capsys):
    """It was a traceback in the first pause, with half a run folder left behind."""
    path = with_template(folder, tmp_path, SYSTEM_TEMPLATE, max_position_embeddings=64)
    words = "^--adapter: .*context of 64 tokens.*longer context.*or use --adapter none$"
    with pytest.raises(ValueError, match=words) as error:
        ra.make_adapter(ra.SftArgs(str(path)), 0, game=CRAFTER)
    assert "\n" not in str(error.value)
    code, _, error = run(capsys, "sft", "--model", path, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert error.startswith("error: --model, --data: ") and "longer context" in error
    code, _, error = run(capsys, "generate", "--model", path, "--prompt", "a\nlast line", "--max-new-tokens", 63)
    assert code == 2 and error.startswith("error: --model, --max-new-tokens: ")


@pytest.mark.parametrize("spare", [-1, 0, 1, 7])
def test_what_passes_the_check_of_the_context_never_fails_later(folder, tmp_path, spare):
    adapter = ra.load_adapter(with_template(folder, tmp_path, SYSTEM_TEMPLATE), system=ra.about(CRAFTER))
    needed = len(adapter.chat.tokens(ra.INSTRUCTION))
    context = 2 * (needed + spare) + 1  # half of it is the answer's
    adapter.config = dataclasses.replace(adapter.config, max_position_embeddings=context)
    if spare < 0:
        with pytest.raises(ValueError, match="choose a model with a longer context"):
            adapter.check_room()
        return
    adapter.check_room()
    for caption in (CAPTION, BARE, WORKSHOP, CAPTION * 9, "a\n" * 300, "é\u2028" * 300):
        prompt, response = adapter.encode_example(prompt_of(caption, [0], 0.5), "Chop tree. " * 300)
        assert len(prompt) + len(response) <= context
        assert ra.INSTRUCTION in adapter.tokenizer.decode(prompt)
        adapter.chat.encode(prompt_of(caption, [0], 0.5), adapter.room_for(ra.SftArgs.adapter_max_tokens))


def test_a_shared_prefix_changes_no_text(adapter, monkeypatch):
    with_random_b(adapter)
    monkeypatch.setattr(adapter.tokenizer, "chat_template", SYSTEM_TEMPLATE)
    prompts = [adapter.chat.encode(text, 400) for text in ("tree (2 north)", "Some cow", "dark")]
    shared, prefix = adapter.prefix_of(prompts)
    assert shared > 10
    with_prefix = adapter.generate(prompts, jax.random.key(0), 1.0, 12)
    adapter.beginning = []
    assert adapter.prefix_of(prompts) == (0, None)
    assert adapter.generate(prompts, jax.random.key(0), 1.0, 12) == with_prefix


def test_the_prefix_is_read_anew_after_finetuning(adapter, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(adapter.tokenizer, "chat_template", SYSTEM_TEMPLATE)
        prompts = [adapter.chat.encode("a tree", 400)]
        _, before = adapter.prefix_of(prompts)
    assert adapter.prefix_of(prompts)[1] is before
    adapter.finetune(TOYS, jax.random.key(0), epochs=2, learning_rate=1e-2)
    _, after = adapter.prefix_of(prompts)
    assert not np.array_equal(before[0], after[0])


def test_dropout_acts_in_training_only(folder):
    adapter = with_random_b(ra.load_adapter(folder, ra.LoraConfig(dropout=0.5)))
    batch, loss = ra.pack([([5, 6, 7], [8, 9])], 16), jax.jit(ra.mean_nll, static_argnames="graphdef")
    losses = [
        float(loss(adapter.graphdef, adapter.base, adapter.lora, batch, key))
        for key in (None, None, jax.random.key(0), jax.random.key(1))
    ]
    assert losses[0] == losses[1] != losses[2] != losses[3]


def test_lora_goes_where_it_is_told():
    shapes = ra.init_lora(SMALL, ra.LoraConfig(rank=4, targets=("q", "down")), jax.random.key(0))
    assert set(shapes) == {"q_a", "q_b", "down_a", "down_b"} and shapes["down_a"].shape == (2, 48, 4)
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"targets": ("nose",)}, {"targets": ()}):
        with pytest.raises(ValueError, match="LoRA"):
            ra.LoraConfig(**wrong)


# ---- command line


def run(capsys, *argv):
    code = ra.main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in TOYS * 4))
    return path


@pytest.mark.parametrize("merge", [False, True])
def test_sft_on_the_command_line(folder, data, tmp_path, capsys, merge):
    flags = ["--epochs", 6, "--learning-rate", 1e-2, "--lora-rank", 4, "--lora-targets", "q", "v", "down"]
    out = tmp_path / "tuned"
    flags += ["--merge"] * merge
    code, text, error = run(capsys, "sft", "--model", folder, "--data", data, "--out", out, *flags)
    result = json.loads(text)
    assert code == 0, error
    assert result["nll_after"] < result["nll_before"] and result["examples"] == 32 and result["held_out"] == 3
    assert (out / "config.json").exists() == merge and (out / "adapter_config.json").exists() == (not merge)
    code, text, _ = run(capsys, "sft", "--model", out, "--data", data, "--epochs", 0)
    again = json.loads(text)
    assert again["nll_before"] == again["nll_after"] == pytest.approx(result["nll_after"], rel=1e-4)


def test_a_tuned_adapter_is_merged_without_tuning_it_further(adapter, lora_folder, data, tmp_path, capsys):
    out = tmp_path / "merged"
    argv = ["sft", "--model", lora_folder, "--data", data, "--epochs", 0]
    code, text, error = run(capsys, *argv, "--out", out, "--merge")
    assert code == 0, error
    assert (out / "config.json").exists()
    code, again, _ = run(capsys, "sft", "--model", out, "--data", data, "--epochs", 0)
    assert json.loads(again)["nll_before"] == pytest.approx(json.loads(text)["nll_before"], rel=1e-4)


def test_a_folder_that_can_not_be_made_is_said_before_training(folder, data, capsys, monkeypatch):
    monkeypatch.setattr(ra.Adapter, "finetune", lambda *_, **__: pytest.fail("trained"))
    code, out, error = run(capsys, "sft", "--model", folder, "--data", data, "--out", data / "out")
    assert (code, out) == (2, "") and error.startswith(f"error: --out: cannot make {data / 'out'}: ")


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_done(folder, data, tmp_path, capsys, monkeypatch, merge):
    import safetensors.numpy

    def full(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    out = tmp_path / "out"
    flags = ["--epochs", 0, "--out", out] + ["--merge"] * merge
    code, text, error = run(capsys, "sft", "--model", folder, "--data", data, *flags)
    assert (code, text) == (2, "") and "No space left" in error and error.startswith("error: cannot write")
    assert list(out.iterdir()) == []


def test_responses_that_are_cut_are_counted(adapter):
    adapter.encode_example("hello", "word " * 2 * adapter.config.max_position_embeddings)
    adapter.encode_example("hello", "word")
    assert adapter.cut_responses == 1


def test_a_large_share_held_out_leaves_something_to_train_on(adapter):
    result = adapter.finetune(TOYS, jax.random.key(0), epochs=1, held_out=0.99)
    assert result["held_out"] == 7 and result["sft_loss"] != result["nll_before"]
    assert adapter.finetune(TOYS, jax.random.key(0), epochs=0, held_out=1)["held_out"] == 8


def test_steps_are_no_larger_than_what_there_is_to_read(adapter, monkeypatch):
    sizes, step = [], ra.sft_step
    monkeypatch.setattr(ra, "sft_step", lambda *args: sizes.append(len(args[5]["tokens"])) or step(*args))
    adapter.finetune(TOYS, jax.random.key(0), epochs=1, batch_size=64)
    assert sizes == [7]


def test_sft_reads_the_guidance_of_a_run(folder, tmp_path, capsys):
    path = tmp_path / "guidance.jsonl"
    records = [{"adapter_prompt": p, "analysis": r} for p, r in TOYS] + [{"adapter_prompt": "x", "analysis": ""}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, text, _ = run(capsys, "sft", "--model", folder, "--data", path, "--epochs", 0, "--held-out", 1)
    assert code == 0 and json.loads(text)["held_out"] == 8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("generate --model /nowhere --prompt x", "--model.*no folder /nowhere"),
        ("generate --model nobody/nothing-such --prompt x", "--model.*hub"),
        ("generate --model MODEL --prompt x --max-new-tokens 0", "--max-new-tokens"),
        ("sft --model MODEL --data /nowhere --lora-plus-ratio -1", "--lora-plus-ratio: must be above 0, not -1"),
        ("sft --model MODEL --data /nowhere --seed 99999999999999999999", "--seed: 9+ is out of range"),
        ("generate --model MODEL --prompt x --seed -1", "--seed: -1 is out of range; choose 0 to 4294967295"),
        ("sft --model MODEL --data DATA --epochs 0 --merge", "--out: is needed to keep the weights"),
        ("sft --model MODEL --data DATA --out OUT --lora-rank 100000", "--lora-rank: LoRA needs a rank of 1 to 65536"),
        ("sft --model MODEL --data DATA --out OUT --lora-targets q q", "--lora-targets: .* each once, not q q"),
        ("sft --model MODEL --data /nowhere --batch-size 0", "--batch-size: must be 1 or more, not 0"),
        ("generate --model MODEL --prompt x --temperature -1", "--temperature"),
        ("sft --model MODEL --data /nowhere --out OUT", "--data.*cannot read"),
        ("sft --model MODEL --data EMPTY --out OUT", "--data.*no examples"),
        ("sft --model MODEL --data WRONG --out OUT", "--data: line 1"),
        ("sft --model MODEL --data DATA", "--out"),
        ("sft --model MODEL --data DATA --out MODEL", "--out.*exists"),
        ("sft --model MODEL --data DATA --out OUT --held-out 1", "--held-out"),
        ("sft --model MODEL --data DATA --out OUT --epochs -1", "--epochs"),
        ("sft --model MODEL --data DATA --out OUT --lora-rank 0", "--lora-rank: LoRA needs a rank"),
        ("sft --model MODEL --data DATA --out OUT --lora-targets nose", "--lora-targets: LoRA's targets"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, data, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "wrong").write_text('{"prompt": 3}\n')
    paths = {"MODEL": folder, "DATA": data, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}
    paths["WRONG"] = tmp_path / "wrong"
    code, out, error = run(capsys, *[paths.get(word, word) for word in argv.split()])
    assert code == 2 and out == "" and not (tmp_path / "out").exists()
    assert re.search(words, error) and error.startswith("error: ") and error.count("\n") == 1


@pytest.fixture(scope="module")
def lora_folder(loaded, tmp_path_factory):
    """LoRA weights of rank 4, on q and v."""
    path = tmp_path_factory.mktemp("lora") / "tuned"
    ra.load_adapter(loaded.folder, ra.LoraConfig(4, 8.0, 0.1, ("q", "v"))).save(path)
    return path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora-rank 8", "--lora-rank: .* has 4, not 8; leave --lora-rank out"),
        ("--lora-alpha 16", "--lora-alpha: .* has 8.0, not 16.0; leave --lora-alpha out"),
        ("--lora-dropout 0", "--lora-dropout: .* has 0.1, not 0.0; leave --lora-dropout out"),
        ("--lora-targets q", "--lora-targets: .* has .*v.*, not .*q.*; leave --lora-targets out"),
        ("--lora-rank 4 --lora-alpha 8 --lora-dropout 0.1 --lora-targets v q", ""),
        ("", ""),
    ],
)
def test_lora_flags_beside_a_lora_folder_are_not_ignored(lora_folder, data, capsys, flags, words):
    """They were, without a word: the folder's settings were used."""
    argv = ["sft", "--model", lora_folder, "--data", data, "--epochs", 0, *flags.split()]
    code, out, error = run(capsys, *argv)
    if words:
        assert code == 2 and out == "" and re.search(words, error) and error.count("\n") == 1
    else:
        assert code == 0 and json.loads(out)["examples"] == 32


def test_the_adapter_of_a_run(folder, lora_folder):
    assert isinstance(ra.make_adapter(ra.SftArgs("none"), 0, game=CRAFTER), ra.NoAdapter)
    assert ra.make_adapter(ra.SftArgs(str(folder)), 0, game=CRAFTER).lora_config == ra.LoraConfig(rank=8)
    made = ra.make_adapter(ra.SftArgs(str(folder), lora_rank=2), seed=3, game=CRAFTER)
    expected = ra.load_adapter(folder, ra.LoraConfig(rank=2), seed=3)
    jax.tree.map(np.testing.assert_array_equal, made.lora, expected.lora)
    assert ra.make_adapter(ra.SftArgs(str(lora_folder)), 0, game=CRAFTER).lora_config.rank == 4
    assert ra.make_adapter(ra.SftArgs(str(lora_folder), lora_rank=4), 0, game=CRAFTER).lora_config.targets == ("q", "v")
    for args, words in (
        (ra.SftArgs("/nowhere"), "^--adapter: there is no folder /nowhere.*; or use --adapter none$"),
        (ra.SftArgs(str(folder), lora_rank=0), "^--lora-rank: LoRA needs a rank"),
        (ra.SftArgs(str(lora_folder), lora_rank=8), "^--lora-rank: .* leave --lora-rank out$"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            ra.make_adapter(args, 0, CRAFTER)
        assert "\n" not in str(error.value)


def test_examples_of_a_run_may_say_more(tmp_path, capsys):
    path = tmp_path / "examples.jsonl"
    lines = ['{"phase": 7, "prompt": "a", "response": "b"}', "", '{"phase": 7, "prompt": "c", "response": "d"}']
    path.write_text("\n".join(lines))
    assert ra.read_examples(path) == [("a", "b"), ("c", "d")] and not capsys.readouterr().err
    path.write_text("\n".join([*lines, '{"phase": 8, "prompt": "e", "response": "f"}']))
    assert ra.read_examples(path) == [("e", "f")]  # of two fine-tunings the last one
    assert capsys.readouterr().err == f"note: lines of earlier phases in {path} are not used: 2\n"


def test_examples_with_any_white_space_in_them(tmp_path):
    """Lines were split at U+2028 and U+0085, too, which JSON allows within strings; a byte order mark was refused."""
    path = tmp_path / "examples.jsonl"
    texts = [("a\u2028b", "c\x85d"), ("\x1cé", "\u2029\x0c木")]
    lines = [json.dumps({"prompt": p, "response": r}, ensure_ascii=False) for p, r in texts]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    assert ra.read_examples(path) == texts


@pytest.mark.parametrize("name", ["prompt", "response"])
def test_half_a_character_is_named_with_its_line(folder, tmp_path, capsys, name):
    path = tmp_path / "examples.jsonl"
    good = {"prompt": "x", "response": "\U0001f600"}  # two halves that make one
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(good | {name: "a\ud800b"}) + "\n")
    code, out, error = run(capsys, "sft", "--model", folder, "--data", path, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert error.startswith("error: --data: line 3 of ") and "half a character" in error
    code, out, error = run(capsys, "generate", "--model", folder, "--prompt", "a\udcffb")  # as of a broken terminal
    assert (code, out) == (2, "") and error.startswith("error: --prompt: ") and error.count("\n") == 1


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' * 50_000, "1" * 5_000, '"adapter_prompt"', "[1]", "7"])
def test_lines_that_are_no_examples(tmp_path, line):
    path = tmp_path / "examples.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match="^--data: line 1 of .* is neither"):
        ra.read_examples(path)


# ---- LoRA folders of others


def edited_lora(lora_folder, tmp_path, drop=(), **changes):
    """A copy with another adapter_config.json."""
    path = tmp_path / "lora"
    shutil.copytree(lora_folder, path)
    settings = json.loads((path / "adapter_config.json").read_text()) | changes
    settings = {name: value for name, value in settings.items() if name not in drop}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def edit_lora_tensors(path, edit):
    from safetensors.numpy import load_file, save_file

    tensors = edit(load_file(path / "adapter_model.safetensors"))
    save_file(tensors, path / "adapter_model.safetensors")


def test_rank_stabilised_lora_has_its_own_scale(lora_folder, folder, tmp_path):
    """It was loaded as if it were plain, at a quarter of its scale."""
    path = tmp_path / "wide"
    ra.load_adapter(folder, ra.LoraConfig(16, 16.0)).save(path)
    loaded = ra.load_adapter(edited_lora(path, tmp_path, use_rslora=True))
    assert loaded.lora_config.scale == pytest.approx(16 / 16**0.5) == 4.0
    loaded.save(tmp_path / "again")
    again = ra.load_adapter(tmp_path / "again")
    assert again.lora_config == loaded.lora_config and again.lora_config.scale == 4.0


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base_alone(lora_folder, tmp_path, init):
    ra.load_adapter(edited_lora(lora_folder, tmp_path, init_lora_weights=init))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("init_lora_weights", init) for init in
          ("pissa", "pissa_niter_16", "olora", "corda", "eva", "loftq", "lora_ga", "mica", "tomorrow's", 7, ["pissa"])),
        ("peft_type", "LOHA"), ("peft_type", None), ("use_dora", True), ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}), ("layers_to_transform", [0]), ("layers_to_transform", 1),
        ("fan_in_fan_out", True), ("bias", "lora_only"), ("bias", "all"), ("modules_to_save", ["lm_head"]),
        ("lora_bias", True), ("layer_replication", [[0, 2]]), ("trainable_token_indices", [5]),
        ("target_parameters", ["x"]), ("alora_invocation_tokens", [1, 2]), ("use_qalora", True),
        ("arrow_config", {"top_k": 3}), ("use_bdlora", {"nblocks": 2}), ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"x": 1}), ("megatron_config", {"x": 1}), ("revision", "v2"), ("new in 2030", True),
        ("r", 0), ("r", "4"), ("r", True), ("r", 2.5), ("r", None), ("r", 10**400), ("lora_alpha", None),
        ("lora_alpha", "x"), ("lora_alpha", float("nan")), ("lora_alpha", 10**400), ("lora_dropout", 1),
        ("lora_dropout", "none"), ("lora_dropout", -0.1), ("base_model_name_or_path", None),
        ("base_model_name_or_path", ""), ("base_model_name_or_path", ["x"]),
    ],
)  # fmt: skip
def test_a_setting_of_peft_that_is_not_supported_is_named(lora_folder, tmp_path, name, value):
    """Most were ignored: the weights were put on a base, or into a formula, that they do not belong to."""
    path = edited_lora(lora_folder, tmp_path, **{name: value})
    with pytest.raises(ValueError, match=f"cannot use .*adapter_config.json: .*{name}") as error:
        ra.load_adapter(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["r", "lora_alpha", "base_model_name_or_path", "peft_type"])
def test_a_setting_that_lacks_is_named(lora_folder, tmp_path, name):
    with pytest.raises(ValueError, match=f"cannot use .*adapter_config.json: .*{name}"):
        ra.load_adapter(edited_lora(lora_folder, tmp_path, drop=[name]))


@pytest.mark.parametrize(
    "targets", [".*self_attn.(q|v)_proj", "all-linear", None, [], ["model.layers.0.self_attn.q_proj"], ["v_proj"], 7]
)
def test_the_tensors_say_what_lora_is_on(lora_folder, loaded, tmp_path, targets):
    """target_modules may be a regular expression or full names, which were refused in words about something else."""
    path = edited_lora(lora_folder, tmp_path, target_modules=targets, exclude_modules=["k_proj"], drop=["lora_dropout"])
    assert ra.load_adapter(path).lora_config == ra.LoraConfig(4, 8.0, 0.0, ("q", "v"))


def test_settings_of_peft_that_change_nothing(lora_folder, tmp_path):
    """All that PEFT writes for a plain LoRA."""
    settings = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": {"parent": "x"},
        "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_bias": False,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_version": "0.18.1",
        "qalora_group_size": 16, "rank_pattern": {}, "revision": None, "target_parameters": None,
        "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_qalora": False,
        "use_rslora": False,
    }  # fmt: skip
    assert ra.load_adapter(edited_lora(lora_folder, tmp_path, **settings)).lora_config.rank == 4


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if k != Q0}, f"lacks 1 tensors, such as {Q0}"),
        (lambda t: {k: v for k, v in t.items() if "layers.0" in k}, "lacks 4 tensors, such as .*layers.1"),
        (lambda t: t | {Q0.replace("layers.0", "layers.9"): t[Q0]}, "has .*layers.9"),
        (lambda t: t | {"base_model.model.lm_head.lora_A.weight": t[Q0]}, "has .*lm_head"),
        (lambda t: t | {Q0.replace("weight", "bias"): t[Q0]}, "has .*bias"),
        (lambda t: t | {Q0: t[Q0][:2].copy()}, f"{Q0} is float32 .2, 32., not floats .4, 32."),
        (lambda t: t | {Q0: t[Q0].astype(np.int8)}, f"{Q0} is int8 .*, not floats"),
        (lambda t: {"oth\ner": np.ones(2)}, r"has .oth.ner."),
        (lambda t: {}, "holds no LoRA weights"),
    ],
)
def test_lora_weights_that_do_not_fit_are_named(lora_folder, tmp_path, edit, words):
    path = edited_lora(lora_folder, tmp_path)
    edit_lora_tensors(path, edit)
    with pytest.raises(ValueError, match=f"cannot use .*adapter_model.safetensors:? {words}") as error:
        ra.load_adapter(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_lora_weights_of_other_precisions(lora_folder, tmp_path, kind):
    path = edited_lora(lora_folder, tmp_path)
    edit_lora_tensors(path, lambda t: {k: np.asarray(jnp.asarray(v), kind) for k, v in t.items()})
    loaded = ra.load_adapter(path)
    assert {value.dtype for value in jax.tree.leaves(loaded.lora)} == {jnp.dtype("float32")}


def test_pickled_lora_weights_are_not_read(lora_folder, tmp_path):
    path = edited_lora(lora_folder, tmp_path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ValueError, match="it has no adapter_model.safetensors"):
        ra.load_adapter(path)


def test_a_lora_folder_that_is_its_own_base_keeps_its_weights(folder, lora_folder, tmp_path):
    """A folder with a whole model and LoRA weights that name it: the LoRA weights were ignored."""
    path = damaged(folder, tmp_path)
    tuned = with_random_b(ra.load_adapter(folder, ra.LoraConfig(4, 8.0)))
    tuned.name = str(path)
    tuned.save(path)
    loaded = ra.load_adapter(path)
    assert loaded.lora_config == tuned.lora_config
    jax.tree.map(np.testing.assert_array_equal, loaded.lora, tuned.lora)


def test_lora_weights_on_lora_weights_are_one_line(lora_folder, tmp_path):
    path = edited_lora(lora_folder, tmp_path, base_model_name_or_path=str(lora_folder))
    with pytest.raises(ValueError, match="its base model, .*, has no config.json"):
        ra.load_adapter(path)


def test_the_rank_of_a_run_is_the_folders(lora_folder, tmp_path, capsys):
    """`--lora-rank 32` beside a folder of rank 4: config.json said 32, and rank 4 was trained."""
    import rladapter_ppo as rl

    flags = "--env-id Toy-v0 --num-envs 8 --num-steps 16 --num-minibatches 2 --adapter".split()
    assert rl.cli([*flags, str(lora_folder), "--lora-rank", "32", "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --lora-rank: ") and error.count("\n") == 1 and not (tmp_path / "run").exists()


# Whatever is in the files of a LoRA folder: it is read, or one line says why not

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=9), v, max_size=3))
LORA_SHAPES = {name: shape for name, shape in ra.param_shapes(SMALL).items() if name in ra.PROJECTIONS}
LORA_TENSORS = list(hf_folder.lora_names(("q", "v"), 2))
HEADERS = st.dictionaries(
    st.sampled_from([*LORA_TENSORS, "__metadata__", "../x"]) | st.text(max_size=9),
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "C64", "BOOL", "F4", "?"]) | VALUES,
        "shape": st.sampled_from([[4, 32], [32, 4], [0], [2**62, 9], [-1]]) | VALUES,
        "data_offsets": st.sampled_from([[0, 512], [512, 1024], [0, 2**63], [9, 3]]) | VALUES,
    }) | VALUES,
    max_size=5,
)  # fmt: skip


def noting(function, calls):
    """A function that notes its first argument and does the same."""

    def noted(first, *rest, **more):
        calls.append(first)
        return function(first, *rest, **more)

    return noted


def check_lora_files(config, weights):
    """Reads a folder with these two files: factors come out, or one line; no other file is opened."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        path, opened = Path(name), []
        (path / "adapter_config.json").write_bytes(config)
        (path / "adapter_model.safetensors").write_bytes(weights)
        for module, function in ((io, "open"), (safetensors.numpy, "safe_open")):
            patch.setattr(module, function, noting(getattr(module, function), opened))
        try:
            settings, factors = hf_folder.read_lora(path, LORA_SHAPES)
            assert len(factors) == 2 * len(ra.LoraConfig(**settings).targets)
        except ValueError as error:
            assert str(error).isprintable() and 0 < len(str(error)) < 600
        assert opened and all(Path(file).parent == path for file in opened)


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "bias",
                                        "init_lora_weights", "rank_pattern", "layers_to_transform"])
                       | st.text(max_size=9), VALUES, max_size=4) | VALUES)  # fmt: skip
def test_any_adapter_config(changes):
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    settings = plain | changes if isinstance(changes, dict) else changes
    tensors = {name: np.zeros((4, 32) if "lora_A" in name else (32 if ".q_" in name else 16, 4), np.float32)
               for name in LORA_TENSORS}  # fmt: skip
    check_lora_files(json.dumps(settings).encode(), safetensors.numpy.save(tensors))


@settings(max_examples=60, deadline=None)
@given(HEADERS | st.binary(max_size=40), st.sampled_from([b"", bytes(1024)]), st.none() | st.integers(0, 2**64 - 1))
def test_any_safetensors_header(header, data, length):
    check_lora_files(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}', safetensors_bytes(header, data, length))


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_no_lora_folder(junk):
    check_lora_files(junk, junk)
    check_lora_files(b"[" * 100_000 + junk, junk)


def test_a_hub_id_is_looked_up_in_the_hubs_cache_and_compiled_programs_are_kept(folder, tmp_path):
    """As `--adapter owner/name` on a machine that has downloaded it before, without a network."""
    snapshot = tmp_path / "hub/models--some--model/snapshots/abc"
    shutil.copytree(folder, snapshot)
    (tmp_path / "hub/models--some--model/refs").mkdir()
    (tmp_path / "hub/models--some--model/refs/main").write_text("abc")
    argv = [sys.executable, "rladapter_adapter.py", "generate", "--model", "some/model", "--prompt", "hi"]
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    quick = {name: os.environ.get(name, "") for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")}
    env |= {"RLADAPTER_CACHE": str(tmp_path / "cache")} | quick
    done = subprocess.run([*argv, "--max-new-tokens", "4"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache/jax").is_dir()


# --------------------------------------------------------------------------------------------------
# Flags of sampling
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("It is dark. Try to sle", "It is dark."),
        ("Wood >= 1.5 is rare! Chop", "Wood >= 1.5 is rare!"),
        ("no end at all", "no end at all"),
        ("It is dark.", "It is dark."),
        ("", ""),
    ],
)
def test_a_text_that_was_cut_off_ends_with_a_sentence(text, whole):
    assert ra.whole_sentences(text) == whole


def test_flags_say_how_analyses_are_sampled(monkeypatch):
    asked = []
    adapter = ra.make_adapter(ra.SftArgs(adapter_temperature=0.0, adapter_max_tokens=5), 1, game=CRAFTER)

    def generate(tokens, key, temperature, max_new_tokens):
        asked.append((temperature, max_new_tokens))
        return [adapter.tokenizer.encode("It is dark. Try", add_special_tokens=False)[:5]]

    monkeypatch.setattr(adapter, "generate", generate)
    (text,) = adapter.analyse(["hello"], jax.random.key(0))
    assert asked == [(0.0, 5)] and "It is dark. Try".startswith(text)
    with pytest.raises(ValueError, match="context"):
        ra.make_adapter(ra.SftArgs(adapter_max_tokens=4000), 1, game=CRAFTER)


def test_a_pause_whose_analyses_name_nothing_warns_once(capsys, monkeypatch):
    adapter = ra.make_adapter(ra.SftArgs(), 1, game=CRAFTER)
    texts = ["Gear: 12 Eat: 90%", "It is day."]
    monkeypatch.setattr(adapter, "analyse", lambda prompts, key: texts[: len(prompts)])

    def pause():
        questions = [Question(np.zeros(1, np.uint8), np.zeros(1, bool), [], None, caption="x") for _ in texts]
        ra.write_analyses(adapter, CRAFTER, questions, jax.random.key(0))
        return capsys.readouterr().err

    assert "names a sub-goal" in pause() and pause() == ""
    adapter.warned, texts[1] = set(), "Try to chop tree."
    assert pause() == ""


# ------------------------------------------------------------------------------------------- words and budgets


def test_the_system_prompt_names_every_basic_sub_goal_and_the_suggestion_is_read_back():
    assert all(name in ra.about(CRAFTER) for name in CRAFTER.basic_sub_goals)
    for names in (["mine iron"], ["mine iron", "sleep"]):
        text = ra.suggestion(names)
        assert [CRAFTER.sub_goals[i] for i in CRAFTER.sub_goals_in_text(text)] == names


def gradient_of(adapter, batch, remat):
    loss = jax.grad(lambda lora: ra.mean_nll(adapter.graphdef, adapter.base, lora, batch, remat=remat))
    return loss(adapter.lora)


def test_layers_computed_anew_give_the_same_gradient(adapter):
    with_random_b(adapter)
    batch = ra.pack([adapter.encode_example("It is dark.", "Sleep."), adapter.encode_example("tree", "Chop it.")], 64)
    kept, anew = gradient_of(adapter, batch, False), gradient_of(adapter, batch, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, anew)
    steps = [
        str(jax.make_jaxpr(lambda lora, loss=loss: loss(adapter.graphdef, adapter.base, lora, batch))(adapter.lora))
        for loss in (ra.mean_nll, partial(ra.mean_nll, remat=False))
    ]
    assert ["remat" in step or "checkpoint" in step for step in steps] == [True, False]  # by default it saves memory


def test_what_all_prompts_begin_with_may_be_read_once(adapter):
    """The same losses and gradient."""
    with_random_b(adapter)
    beginning, *ends = some_tokens(adapter, 9).tolist(), *(some_tokens(adapter, 7, seed=i).tolist() for i in (1, 2, 3))
    texts = [(end[:3], end[3:]) for end in ends]
    rest = ra.pack(texts, 16) | {"prefix": np.asarray([beginning], np.int32)}
    apart, together = ra.pack([([*beginning, *prompt], answer) for prompt, answer in texts], 32), rest
    nll = [ra.answer_nll(adapter.graphdef, adapter.base, adapter.lora, batch) for batch in (apart, together)]
    np.testing.assert_allclose(*(each[:, :4] for each in nll), atol=1e-5)  # behind these is padding
    gradients = [gradient_of(adapter, batch, remat) for batch, remat in ((apart, False), (together, True))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), *gradients)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[0])) > 1e-3
    assert all(batch["prefix"] is rest["prefix"] for batch in ra.batches(rest, 2, np.arange(3)))


def test_a_batch_has_the_columns_of_its_longest_row(adapter):
    texts = [([1] * prompt, [2] * answer) for prompt, answer in ((60, 4), (60, 5), (10, 3), (129, 1))]
    packed = ra.pack(texts, ra.row_length(texts))
    parts = ra.batches(packed, 1, np.arange(4)) + ra.batches(packed, 3, np.arange(4))
    assert [part["tokens"].shape for part in parts] == [(1, 64), (1, 128), (1, 64), (1, 192), (3, 128), (3, 192)]
    whole = np.concatenate([np.pad(part["tokens"], ((0, 0), (0, 192 - part["tokens"].shape[1]))) for part in parts[:4]])
    assert np.array_equal(whole, packed["tokens"])
    assert all(part["starts"].shape == part["shared"].shape == part["tokens"].shape for part in parts)


def test_a_fine_tuning_reads_once_what_all_prompts_begin_with(folder, tmp_path, monkeypatch):
    path, system = with_template(folder, tmp_path, SYSTEM_TEMPLATE), "You watch a player. " * 20
    shapes, step = set(), ra.sft_step

    def watched(*arguments):
        shapes.add((arguments[5]["tokens"].shape[1], arguments[5]["prefix"].shape[1]))
        return step(*arguments)

    monkeypatch.setattr(ra, "sft_step", watched)
    with_read_once, apart = ra.load_adapter(path, system=system), ra.load_adapter(path, system=system)
    settings = {"learning_rate": 1e-2, "lora_plus_ratio": 1}
    metrics = with_read_once.finetune(TOYS, jax.random.key(0), **settings)
    assert shapes == {(ra.LENGTH_BUCKET, len(with_read_once.beginning))}
    assert len(with_read_once.beginning) >= ra.LENGTH_BUCKET
    monkeypatch.setattr(ra, "sft_step", step)
    monkeypatch.setattr(apart, "beginning_of", lambda prompts: [])
    assert apart.finetune(TOYS, jax.random.key(0), **settings) == pytest.approx(metrics, rel=1e-3)


def test_a_short_beginning_is_read_with_every_prompt(adapter, monkeypatch):
    step = ra.sft_step
    monkeypatch.setattr(ra, "sft_step", lambda *given: (seen.append(set(given[5])), step(*given))[1])
    seen = []
    adapter.finetune(TOYS, jax.random.key(0))
    assert 0 < len(adapter.beginning) < ra.LENGTH_BUCKET and seen and not any("prefix" in batch for batch in seen)


def test_fewer_shapes_are_compiled_where_compilation_is_slow(adapter, monkeypatch):
    """Padding changes nothing that is said or learned."""
    long = [(prompt + " and so on" * (i % 12) * 2, response * (1 + i % 9)) for i, (prompt, response) in enumerate(TOYS)]
    step, shapes = ra.sft_step, set()
    watched = lambda *given: (shapes.add((given[5]["tokens"].shape, given[5]["answers"].shape)), step(*given))[1]  # noqa: E731
    monkeypatch.setattr(ra, "sft_step", watched)
    prompts, fresh, seen = [prompt for prompt, _ in long], adapter.state(), {}
    for backend in ("cpu", "gpu"):
        shapes.clear()
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        adapter.load_state(fresh)
        texts = adapter.analyse(prompts[:8], jax.random.key(1), 1.0, 8)
        seen[backend] = texts, adapter.finetune(long, jax.random.key(0)), len(shapes)
    (texts, metrics, num_shapes), (texts_there, metrics_there, num_there) = seen["cpu"], seen["gpu"]
    assert texts_there == texts and metrics_there == pytest.approx(metrics, rel=1e-3)
    assert num_there == 1 < num_shapes


def test_answer_columns():
    is_answer = np.zeros((3, 70), bool)
    is_answer[0, 5:9] = is_answer[1, 20:55] = True
    columns = ra.answer_columns(is_answer)
    assert columns.shape == (3, 2 * ra.ANSWER_BUCKET)
    assert columns[0, :6].tolist() == [5, 6, 7, 8, 0, 0] and columns[1, :36].tolist() == [*range(20, 55), 0]
    assert not columns[2].any() and ra.answer_columns(is_answer[2:]).shape == (1, ra.ANSWER_BUCKET)


def test_the_loss_is_that_of_the_answers_tokens(adapter):
    """Against all logits of one text."""
    prompt, response = adapter.encode_example("It is dark. tree", "Chop it now.")
    total, count = ra.measure_nll(adapter.graphdef, adapter.base, adapter.lora, ra.pack([(prompt, response)], 64))
    logits = jax.nn.log_softmax(logits_of(adapter, [prompt + response])[0])
    expected = -sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(response))
    assert count == len(response)
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_a_fine_tuning_reads_no_more_than_its_budget_and_the_first_pairs_first(adapter, monkeypatch):
    seen = []
    encode = adapter.encode_example
    monkeypatch.setattr(ra, "sft_step", lambda graphdef, loss, base, lora, optimizer, batch, rate, key, ratio: (
        seen.append(batch["tokens"]), (lora, optimizer, jnp.float32(1), True))[1])  # fmt: skip
    examples = [(f"{i} trees", "Chop.") for i in range(40)]
    told = []
    assert adapter.finetune(examples, jax.random.key(0), report=lambda *at: told.append(at))["examples"] == 40
    adapter.sft_tokens = 2 * 64 * 16  # two epochs of 16 rows of one bucket
    seen.clear(), told.clear()
    assert adapter.finetune(examples, jax.random.key(0), report=lambda *at: told.append(at))["examples"] == 16
    rows = {tuple(row[row > 0]) for batch in seen for row in batch if row.any()}
    first = {tuple(np.array(sum(encode(*pair), []))) for pair in examples[:16]}
    assert len(rows) == 14 and rows <= first  # two are held out
    assert told == [(i, 14) for i in range(1, 15)]
    adapter.sft_tokens = 1
    assert adapter.finetune(examples, jax.random.key(0))["examples"] == ra.SFT_ROWS


def test_an_adapter_of_a_run_has_a_budget_by_its_size():
    made = ra.make_adapter(ra.SftArgs(), 1, CRAFTER)
    size = sum(value.size for value in jax.tree.leaves(made.base))
    assert made.sft_tokens == int(ra.SFT_COMPUTE / (8 * size)) and 100_000 < made.sft_tokens < 200_000
    assert ra.make_adapter(ra.SftArgs(sft_max_tokens=77), 1, CRAFTER).sft_tokens == 77


def test_what_is_measured_around_a_fine_tuning_is_within_its_budget_too(adapter):
    prompts = ["one tree", "one tree and a cow"]
    assert adapter.affordable_analyses(prompts * 50) == 100  # without a budget all
    adapter.max_tokens, length = 10, len(adapter.chat.tokens(prompts[1]))
    adapter.sft_tokens = 4 * 2 * 30 * (length + 10) * 2 // 3  # 30 twice take a quarter of it
    assert adapter.affordable_analyses(prompts) == 30
    adapter.sft_tokens = 1
    assert adapter.affordable_analyses(prompts) == ra.BATCH_BUCKETS[0] and adapter.affordable_analyses([]) == 0


def test_the_rate_of_a_fine_tuning_falls_to_nothing(adapter, monkeypatch):
    rates = []
    monkeypatch.setattr(ra, "sft_step", lambda graphdef, loss, base, lora, optimizer, batch, rate, key, ratio: (
        rates.append(float(rate)), (lora, optimizer, jnp.float32(1), True))[1])  # fmt: skip
    trees = [(f"{i} trees", "Chop.") for i in range(36)]
    adapter.finetune(trees, jax.random.key(0), epochs=1, learning_rate=1.0, batch_size=8)
    assert rates == [1, 0.75, 0.5, 0.25]  # 32 pairs, four held out
    rates.clear()
    adapter.finetune(trees, jax.random.key(0), epochs=3, batch_size=16)
    assert len(rates) == 3 * 2


def test_an_adapter_that_is_to_tell_what_play_shows_says_nothing_before_it_is_tuned(folder, tmp_path, capsys):
    def analyses(**flags):
        adapter = ra.make_adapter(ra.SftArgs(adapter=str(folder), adapter_max_tokens=4, **flags), 0, CRAFTER)
        questions = [Question(np.zeros(1), np.zeros(1, bool), [], None, caption="a tree")]
        for tuned in (False, True):
            if tuned:
                adapter.finetune(TOYS, jax.random.key(0), epochs=1)
            ra.write_analyses(adapter, CRAFTER, questions, jax.random.key(1))
            yield adapter.waits, questions[0].analysis != ""
        adapter.save(tmp_path / "tuned")

    for source in ("hindsight", "experience", "plans"):
        assert list(analyses(sft_data=source)) == [(True, False), (False, True)]
        assert list(analyses(sft_data=source, sft_every=0)) == [(False, True)] * 2  # it is never tuned
    assert list(analyses(sft_data="best")) == [(False, True)] * 2
    assert capsys.readouterr().err.count("no analysis of this pause names") == 7  # once each, and none of who waits
    other = ra.make_adapter(ra.SftArgs(adapter=str(tmp_path / "tuned"), sft_data="experience"), 0, CRAFTER)
    assert not other.waits  # another run tuned it
    assert not ra.NoAdapter().waits


def test_what_is_told_in_an_adapters_place_needs_none(folder):
    """An untuned one spoke until something was found, and was tuned for nothing."""
    sft = ra.SftArgs(adapter=str(folder), analyses="retrieved", sft_data="experience", sft_every=1)
    assert isinstance(ra.make_adapter(sft, 0, CRAFTER), ra.NoAdapter)
    args = rl.Args(sft=sft)
    assert args.learns and not args.tunes


def test_controls_of_what_the_guide_is_given():
    class Echo(ra.NoAdapter):
        def analyse(self, prompts, key):
            return [prompt.upper() for prompt in prompts]

    def analyses(control, key=0, waits=False):
        adapter = Echo()
        adapter.waits = waits
        questions = [Question(np.zeros(1), np.zeros(1, bool), [], None, caption=f"{i} trees") for i in range(3)]
        ra.write_analyses(adapter, CRAFTER, questions, jax.random.key(key), control)
        assert [q.adapter_prompt for q in questions] == [prompt_of(f"{i} trees", [], None) for i in range(3)]
        return [q.analysis for q in questions]

    own, exchanged, random = (analyses(control) for control in ("own", "exchanged", "random"))
    assert exchanged == [*own[1:], own[0]] and len(set(own)) == 3
    assert all(1 <= len(CRAFTER.sub_goals_in_text(text)) <= 2 for text in random)
    assert random == analyses("random") != analyses("random", key=1)
    assert all(analyses(control, waits=True) == [""] * 3 for control in ("own", "exchanged", "random"))
