"""The hash embedding, and a BERT in JAX against its formulas and against torch."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference

import rladapter_ppo as rl
from advice import AdviceContext
from envs import make_env
from envs.crafter import CRAFTER
from envs.toy import TOY as TOY_GAME
from guidance import HostTable, TableArgs
from utils import runs
from utils.devices import SharedEnv
from utils.embeddings import BertEmbedding, HashEmbedding, make_embedding
from utils.hf_folder import ROOT, import_transformers

# ---- hash


def test_embedding_norms_shapes_and_cache():
    embedding = HashEmbedding(64)
    rows = embedding.encode(["chop tree", "", "?!", "chop tree"])
    assert rows.shape == (4, 64) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 0, 0, 1], atol=1e-6)
    rows[0] = 0  # a caller's array is not the cache
    np.testing.assert_array_equal(embedding.encode(["chop tree"])[0], rows[3])
    assert embedding.encode([]).shape == (0, 64)


def test_embedding_is_the_same_in_another_process():
    code = "from utils import embeddings as e; print(e.HashEmbedding().encode(['mine iron']).tobytes().hex())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == HashEmbedding().encode(["mine iron"]).tobytes().hex()


def test_similar_texts_are_closer_and_no_two_sub_goals_are_the_same():
    tree, trees, water = HashEmbedding().encode(["chop tree", "chop trees", "drink water"])
    assert tree @ trees > 0.5 > 0.3 > abs(tree @ water)
    rows = HashEmbedding().encode(CRAFTER.sub_goals)
    assert np.max(rows @ rows.T - 2 * np.eye(len(rows))) < 0.9


def embed_sub_goals(embedding, names):
    """(D,) of a set of sub-goals as the policy gets it, up to its norm; zeros if empty."""
    advised = np.isin(CRAFTER.sub_goals, names)[None]
    table = SimpleNamespace(sub_goal_embeddings=jnp.asarray(embedding.encode(CRAFTER.sub_goals)))
    seen = {"advised": jnp.asarray(advised), "facts": jnp.zeros((1, 2), bool)}
    weights, basis = AdviceContext.vectors(table, seen)[0]
    return np.asarray(weights @ basis)[0] / np.sqrt(embedding.dim)


def test_embed_sub_goals():
    embedding = HashEmbedding()
    both = embed_sub_goals(embedding, ("chop tree", "drink water"))
    rows = embedding.encode(["chop tree", "drink water"])
    np.testing.assert_allclose(both, rows.sum(0) / np.linalg.norm(rows.sum(0)), atol=1e-6)
    np.testing.assert_array_equal(both, embed_sub_goals(embedding, ("drink water", "chop tree")))
    np.testing.assert_array_equal(embed_sub_goals(embedding, ()), np.zeros(384, np.float32))


# ---- BERT

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for name in CRAFTER.sub_goals for w in name.split()})]
WIDTH, HEADS, LAYERS, EPS = 32, 4, 2, 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random BERT in HF's format, tokenizer included."""
    transformers = import_transformers()
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=48, max_position_embeddings=16, layer_norm_eps=EPS,
    )  # fmt: skip
    config.save_pretrained(folder)
    rng = np.random.default_rng(0)
    shapes = {f"embeddings.{kind}_embeddings.weight": (n, WIDTH)
              for kind, n in (("word", len(WORDS)), ("position", 16), ("token_type", 2))}  # fmt: skip
    square = (WIDTH, WIDTH)
    dense = {"attention.self.query": square, "attention.self.key": square, "attention.self.value": square,
             "attention.output.dense": square, "attention.output.LayerNorm": (WIDTH,), "output.dense": (WIDTH, 48),
             "intermediate.dense": (48, WIDTH), "output.LayerNorm": (WIDTH,)}  # fmt: skip
    dense = {f"encoder.layer.{i}.{name}": shape for i in range(LAYERS) for name, shape in dense.items()}
    for name, shape in (dense | {"embeddings.LayerNorm": (WIDTH,), "pooler.dense": (WIDTH, WIDTH)}).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    save_file({name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()},
              folder / "model.safetensors")  # fmt: skip
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


TEXTS = ["chop tree", "make iron pickaxe", "chop grass with wood pickaxe", "sleep", "Attack ZOMBIE"]


def by_formula(folder: Path, tokens: list[int]) -> np.ndarray:
    """BERT of one text without padding, head by head, in f64."""
    from safetensors.numpy import load_file

    w = {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        heads = []
        for h in np.split(np.arange(WIDTH), HEADS):
            scores = np.exp(q[:, h] @ k[:, h].T / math.sqrt(len(h)))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, h])
        mixed = dense(np.concatenate(heads, 1), f"{at}.attention.output.dense")
        x = norm(x + mixed, f"{at}.attention.output.LayerNorm")
        hidden = dense(x, f"{at}.intermediate.dense")
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = norm(x + dense(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x.mean(0) / np.linalg.norm(x.mean(0))


def test_bert_is_its_formula_and_padding_does_not_matter(folder):
    bert = BertEmbedding(folder)
    rows = bert.encode(TEXTS)
    assert rows.shape == (5, WIDTH) == (5, bert.dim) and rows.dtype == np.float32
    for text, row in zip(TEXTS, rows, strict=True):
        tokens = [2, *(WORDS.index(word) for word in text.lower().split()), 3]
        np.testing.assert_allclose(row, by_formula(folder, tokens), atol=1e-5)
        np.testing.assert_allclose(row, BertEmbedding(folder).encode([text])[0], atol=1e-5)


def test_bert_is_what_torch_makes_of_it(folder, by_torch):
    expected = by_torch(torch_reference.mean_pooled_bert, folder, TEXTS)
    np.testing.assert_allclose(BertEmbedding(folder).encode(TEXTS), expected, atol=1e-5)


def test_long_texts_are_cut_and_none_is_embedded_twice(folder, monkeypatch):
    bert, seen = BertEmbedding(folder), []
    assert np.isfinite(bert.encode(["chop tree " * 100])).all()
    original = bert.embed
    monkeypatch.setattr(bert, "embed", lambda texts: (seen.extend(texts), original(texts))[1])
    bert.encode(["sleep", "chop tree", "sleep"])
    bert.encode(["chop tree", "drink water", "sleep"])
    assert seen == ["sleep", "chop tree", "drink water"] and bert.encode([]).shape == (0, WIDTH)


def test_a_bert_with_a_prefix_and_old_names_is_the_same(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    old = {f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for name, t in load_file(folder / "model.safetensors").items()}  # fmt: skip
    save_file(old, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(BertEmbedding(tmp_path).encode(TEXTS), BertEmbedding(folder).encode(TEXTS))


@pytest.mark.parametrize("damage", ["gone", "another model", "fewer tensors", "no tokenizer"])
def test_what_is_no_bert_is_one_line(folder, tmp_path, capsys, damage):
    bad = tmp_path / "bert"
    if damage != "gone":
        bad.mkdir()
        for name in folder.iterdir():
            (bad / name.name).write_bytes(name.read_bytes())
    config = bad / "config.json"
    if damage == "another model":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "roberta"}))
    if damage == "fewer tensors":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    if damage == "no tokenizer":
        (bad / "tokenizer.json").unlink()
    code = rl.cli([*TOY, "--run-dir", str(tmp_path / "run"), "--embed", str(bad)])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: --embed") and said.count("\n") == 1 and not (tmp_path / "run").exists()


TOY = (
    "--env-id Toy-v0 --num-envs 8 --num-steps 16 --num-minibatches 2 --hidden-size 16 --rnn-size 16 "
    "--updates-per-phase 2 --guidance-rows 8 --queries-per-phase 4 --eval-episodes 8 --adapter none "
    "--total-timesteps 400".split()
)


@pytest.mark.parametrize("flags", ["", "--comprehension cosine-actions"])
def test_training_with_a_bert(folder, tmp_path, monkeypatch, flags):
    """The size of the context follows the encoder."""
    monkeypatch.setattr(runs, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(runs.StopRequest, "listen", lambda self, console: None)
    assert rl.cli([*TOY, *flags.split(), "--run-dir", str(tmp_path / "run"), "--embed", str(folder)]) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert str(folder) in json.dumps(config["flags"])
    assert context_sizes(str(folder)) == [WIDTH, len(TOY_GAME.facts)] and context_sizes("hash")[0] == 384
    assert make_embedding(str(folder)) is make_embedding(str(folder))


def context_sizes(embed):
    """Sizes of the vectors that the policy is told, as `rl.make_agent` finds them."""
    table = HostTable(TableArgs(embed=embed), SharedEnv(make_env("Toy-v0", 8))).for_training()
    words = {"advised": TOY_GAME.sub_goals, "facts": TOY_GAME.facts}
    nothing = {name: jnp.zeros((1, len(known)), bool) for name, known in words.items()}
    return [basis.shape[1] for _, basis in AdviceContext.vectors(table, nothing)]
