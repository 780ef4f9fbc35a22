"""Logits and greedy text equal to torch's, on tiny random checkpoints of every supported kind, made here with torch."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference

import rladapter_adapter as ra
from envs.crafter import CRAFTER
from utils import hf_folder

SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
    "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS = {  # name: (config class, changes to SHAPE, largest shard)
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4}, "1GB"),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}, "1GB"),
    "smollm2": ("LlamaConfig", {"tie_word_embeddings": True, "num_attention_heads": 8}, "50KB"),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}, "1GB"),
    "qwen3": ("Qwen3Config", {"head_dim": 24, "rms_norm_eps": 1e-6}, "1GB"),
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer():
    """A tokenizer of single bytes: 256 of them after pad and end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<end>": 1} | {char: i + 2 for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers = hf_folder.import_transformers()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


class Reference:
    """A model folder, read by torch."""

    def __init__(self, by_torch, folder):
        self.by_torch, self.folder = by_torch, folder

    def logits(self, tokens):
        return self.by_torch(torch_reference.logits, self.folder, np.asarray(tokens).tolist())

    def greedy(self, tokens, num):
        return self.by_torch(torch_reference.greedy, self.folder, tokens, num)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory, by_torch):
    """(torch's model, our adapter) of one kind of checkpoint."""
    config, changes, shard = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "model"
    by_torch(torch_reference.make, folder, config, SHAPE | changes, shard)
    byte_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file() == (request.param == "smollm2")
    return Reference(by_torch, folder), ra.load_adapter(folder, system=ra.about(CRAFTER))


def some_tokens(length, seed=0):
    return np.random.default_rng(seed).integers(2, 258, length)


@partial(jax.jit, static_argnames=("graphdef", "index"))
def forward(graphdef, base, lora, tokens, starts, shared=0, cache=None, index=0):
    model = ra.nnx.merge(graphdef, lora, base)
    return model.logits(model(tokens, starts, shared, cache, index)[0])


def logits_of(adapter, *arguments, **more):
    return np.asarray(forward(adapter.graphdef, adapter.base, adapter.lora, *arguments, **more))


def logits_of_row(adapter, tokens):
    """(T,) -> (T, V)"""
    return logits_of(adapter, np.asarray(tokens)[None], np.zeros((1, len(tokens)), np.int32))[0]


@pytest.fixture(autouse=True)
def the_tests_own_compilation_cache(monkeypatch):
    """Not the one of the command line, which is the user's."""
    monkeypatch.setattr(ra, "use_compilation_cache", lambda: None)


def test_logits_of_left_padded_rows(pair):
    model, adapter = pair
    rows = [some_tokens(90), some_tokens(61, seed=1)]
    padded, starts = ra.left_pad([row.tolist() for row in rows])
    ours = logits_of(adapter, padded, np.broadcast_to(starts[:, None], padded.shape))
    for i, row in enumerate(rows):
        theirs = model.logits(row)
        assert np.abs(theirs).max() > 1  # there is something to get wrong
        np.testing.assert_allclose(ours[i, starts[i] :], theirs, atol=1e-4)


def test_logits_after_a_shared_prefix(pair):
    """The prefix is read once, its keys and values are copied to all rows; the rest is left-padded after it."""
    model, adapter = pair
    prefix, rests = some_tokens(40), [some_tokens(50, seed=1), some_tokens(33, seed=2)]
    keys_values = ra.read_prefix(adapter.graphdef, adapter.base, adapter.lora, prefix[None])
    tokens, starts = ra.left_pad([rest.tolist() for rest in rests])
    cache = ra.empty_cache(adapter.config, adapter.base, len(tokens), 40 + tokens.shape[1])
    cache = tuple(c.at[:, :, :, :40].set(p) for c, p in zip(cache, keys_values, strict=True))
    columns = jnp.broadcast_to(40 + starts[:, None], tokens.shape)
    ours = logits_of(adapter, tokens, columns, shared=40, cache=cache, index=40)
    for i, rest in enumerate(rests):
        theirs = model.logits(np.concatenate([prefix, rest]))[40:]
        np.testing.assert_allclose(ours[i, starts[i] :], theirs, atol=1e-4)


def test_greedy_text_equals_hf_generate(pair):
    """Prompts of different lengths in one batch, with a system prompt in common, computed once."""
    model, adapter = pair
    prompts = [adapter.chat.tokens(text) for text in ("You see a tree.", "It is dark", "A cow, 3 north.")]
    shared, prefix = adapter.prefix_of(prompts)
    assert shared > 200 and prefix is not None
    ours = adapter.generate(prompts, jax.random.key(0), temperature=0.0, max_new_tokens=24)
    assert ours == [model.greedy(prompt, 24) for prompt in prompts]


def test_command_line_prints_what_hf_generates(pair, capsys):
    model, adapter = pair
    for flags, tokens in (
        (["--no-chat-template"], adapter.tokenizer.encode("Once upon")),
        ([], adapter.tokenizer.encode("<|user|>Once upon\n<|assistant|>")),
    ):
        argv = ["generate", "--model", str(adapter.folder), "--prompt", "Once upon", "--max-new-tokens", "24", *flags]
        assert ra.main(argv) == 0
        expected = ra.printable(adapter.tokenizer.decode(model.greedy(tokens, 24), skip_special_tokens=True))
        assert capsys.readouterr().out == expected + "\n"


def test_merged_export_is_loaded_by_transformers_with_equal_logits(pair, tmp_path):
    model, adapter = pair
    adapter = ra.load_adapter(adapter.folder)
    if adapter.config.attention_bias or adapter.config.qk_norm:  # Llamas are fine-tuned in test_adapter.py
        adapter.chat.system_prompt = ""  # for short rows
        adapter.finetune([("You see a tree.", "Chop the tree.")] * 3, jax.random.key(0), 5, 1e-2)
    else:
        adapter.lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(0), x.shape), adapter.lora)
    adapter.export(tmp_path / "merged")
    adapter.save(tmp_path / "lora")
    tokens = some_tokens(50)
    ours = logits_of_row(adapter, tokens)
    theirs = Reference(model.by_torch, tmp_path / "merged").logits(tokens)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    np.testing.assert_array_equal(logits_of_row(ra.load_adapter(tmp_path / "lora"), tokens), ours)


def test_negative_log_likelihood_equals_torch(pair, tmp_path, capsys):
    """`sft --epochs 0`: the mean over the response's tokens and the end token."""
    model, adapter = pair
    lines = [("You see a tree.", "Chop it."), ("It is dark and a zombie is near.", "Fight, then sleep.")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in lines))
    argv = ["sft", "--model", str(adapter.folder), "--data", str(data), "--epochs", "0", "--no-system-prompt"]
    assert ra.main(argv) == 0
    ours = json.loads(capsys.readouterr().out)
    total, count = 0.0, 0
    for prompt, response in lines:
        start = adapter.tokenizer.encode(f"<|user|>{prompt}\n<|assistant|>")
        tokens = [*start, *adapter.tokenizer.encode(response), 1]
        log_probs = np.asarray(jax.nn.log_softmax(model.logits(tokens)))
        total -= sum(log_probs[i - 1, tokens[i]] for i in range(len(start), len(tokens)))
        count += len(tokens) - len(start)
    assert ours["nll_before"] == ours["nll_after"] == pytest.approx(total / count, rel=1e-4)


def test_transformers_loads_the_shipped_adapter(by_torch):
    adapter = ra.load_adapter("assets/adapter-tiny")
    model = Reference(by_torch, adapter.folder)
    tokens = adapter.chat.tokens("You see: tree (1 north).")
    np.testing.assert_allclose(logits_of_row(adapter, tokens), model.logits(tokens), atol=1e-4)


def test_training_does_not_load_torch(tmp_path):
    """transformers and tensorboardX would."""
    toy = "--env-id Toy-v0 --num-envs 8 --num-steps 16 --num-minibatches 2 --hidden-size 16 --eval-episodes 8"
    toy += " --rnn-size 16 --total-timesteps 200 --sft-every 0"
    program = "import sys, rladapter_ppo; print(rladapter_ppo.cli(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", program, *toy.split(), "--run-dir", str(tmp_path / "run")]
    environment = os.environ | {"RLADAPTER_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.stdout.splitlines()[-1:] == ["0 False"], done.stderr[-2000:]
