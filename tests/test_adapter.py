"""The adapter LM, with a random model of a few thousand weights in a temporary folder: nothing is downloaded."""

import copy
import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import make_adapter_tiny as tiny
import numpy as np
import pytest

import rladapter_adapter as ra
from envs.crafter import CRAFTER
from envs.crafter.captions import read_caption
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
    adapter.chat = Chat(adapter.tokenizer, ra.SYSTEM_PROMPT)
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
        np.testing.assert_array_equal(packed["weights"][0, column : column + len(end)], [0, 0] + [1] * (len(end) - 2))
        column += len(end)
    assert packed["weights"].sum() == sum(len(end) - 2 for end in ends)


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


def test_fresh_lora_equals_the_base(adapter):
    tokens = some_tokens(adapter, 8)[None]
    adapted = logits_of(adapter, tokens)
    plain = ra.Adapter(adapter.config, adapter.base["params"], {}, adapter.tokenizer, adapter.eos)
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
    original = ra.Adapter(config, params, {}, first.tokenizer, first.eos)
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
    captions = [CAPTION, BARE, WORKSHOP] * 16
    prompts = [prompt_of(caption, [0], 0.9) for caption in captions]
    texts = adapter.analyse(prompts, jax.random.key(0))
    result = tiny.score_texts(captions, texts)
    # drawn at random, 36 % of them would be possible in these three situations
    assert result["sub_goals_possible"] > 0.6 and result["analyses_naming_any"] > 0.9 and len(set(texts)) > 40
    said = [f.format(last="chopping tree") for f in tiny.UNDERSTOOD["good"]]
    assert np.mean([any(text.startswith(start) for start in said) for text in texts]) > 0.9


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
    assert nobody.finetune(TOYS, jax.random.key(0)) == {} and nobody.state() == {}
    nobody.load_state({})


def test_no_adapter_can_be_tuned_as_an_adapter_is(adapter):
    """Positional arguments were refused by the one that does nothing with them."""
    arguments = (TOYS[:1], jax.random.key(0), 0, 1e-3, 0.5, ra.mean_nll)
    inspect.signature(ra.Adapter.finetune).bind(None, *arguments)
    assert ra.NoAdapter().finetune(*arguments) == {}
    assert ra.NoAdapter().finetune(TOYS, jax.random.key(0), learning_rate=1e-3) == {}


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
    result = adapter.finetune(TOYS[:4], jax.random.key(0), epochs=1, learning_rate=1e-3, loss=size)
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
    with pytest.raises(ValueError, match="no room for the instruction"):
        adapter.chat.encode(prompt, 1)


def test_without_a_chat_template_prompts_are_plain_text(folder, tmp_path, capsys):
    path = damaged(folder, tmp_path)
    (path / "chat_template.jinja").unlink()
    adapter = ra.load_adapter(path)
    assert "no chat template" in capsys.readouterr().err
    text = adapter.tokenizer.decode(adapter.chat.encode("hello", 200))
    assert text == f"{ra.SYSTEM_PROMPT}\n\nhello"
    assert len(adapter.analyse(["hello"], jax.random.key(0), max_new_tokens=4)) == 1


SYSTEM_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


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
    assert isinstance(ra.make_adapter(ra.SftArgs("none"), 0), ra.NoAdapter)
    assert ra.make_adapter(ra.SftArgs(str(folder)), 0).lora_config == ra.LoraConfig(rank=8)
    made = ra.make_adapter(ra.SftArgs(str(folder), lora_rank=2), seed=3)
    expected = ra.load_adapter(folder, ra.LoraConfig(rank=2), seed=3)
    jax.tree.map(np.testing.assert_array_equal, made.lora, expected.lora)
    assert ra.make_adapter(ra.SftArgs(str(lora_folder)), 0).lora_config.rank == 4
    assert ra.make_adapter(ra.SftArgs(str(lora_folder), lora_rank=4), 0).lora_config.targets == ("q", "v")
    for args, words in (
        (ra.SftArgs("/nowhere"), "^--adapter: there is no folder /nowhere.*; or use --adapter none$"),
        (ra.SftArgs(str(folder), lora_rank=0), "^--lora-rank: LoRA needs a rank"),
        (ra.SftArgs(str(lora_folder), lora_rank=8), "^--lora-rank: .* leave --lora-rank out$"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            ra.make_adapter(args, 0)
        assert "\n" not in str(error.value)


def test_examples_of_a_run_may_say_more(tmp_path):
    path = tmp_path / "examples.jsonl"
    lines = ['{"phase": 7, "prompt": "a", "response": "b"}', "", '{"phase": 7, "prompt": "c", "response": "d"}']
    path.write_text("\n".join(lines))
    assert ra.read_examples(path) == [("a", "b"), ("c", "d")]


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
