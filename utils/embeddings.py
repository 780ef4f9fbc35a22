"""Text embeddings: vectors of the sub-goals' names, for the policy and the comprehension score.

    hash     no model and no download: sees shared words, not meaning
    a BERT   folder or Hugging Face hub id of a sentence-transformers model, such as
             sentence-transformers/paraphrase-MiniLM-L6-v2, the reference's encoder, run in JAX

Encoders have `dim` and `encode(texts) -> (n, dim) float32`, rows of norm 1, and embed each text once.
"""

import functools
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utils import hf_folder

Tree = dict[str, Any]


def _unit(vector: np.ndarray) -> np.ndarray:
    """Scales to norm 1, (D,) float32; zeros stay zeros."""
    return (vector / (float(np.linalg.norm(vector)) or 1.0)).astype(np.float32)


class Embedding:
    """What encoders share. Subclasses have `dim` and `embed(texts) -> (n, dim)`."""

    dim: int

    def __init__(self) -> None:
        self._known: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (n, D) float32, rows of norm 1; a zero row for a text without words."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known |= {text: _unit(row) for text, row in zip(new, self.embed(new) if new else (), strict=True)}
        return np.array([self._known[text] for text in texts], np.float32).reshape(len(texts), self.dim)


class HashEmbedding(Embedding):
    """Without a model: word 1-2-grams and character 3-5-grams in signed buckets. Sees shared words, not meaning, so it
    is for names from the closed vocabulary. The same in every process (crc32, not `hash`)."""

    def __init__(self, dim: int = 384) -> None:
        super().__init__()
        self.dim = dim

    def embed(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._embed(text) for text in texts]

    def _embed(self, text: str) -> np.ndarray:
        words = re.findall(r"\w+", text.lower())
        grams = [*words, *map(" ".join, zip(words, words[1:], strict=False))]
        for word in (f"<{word}>" for word in words):
            grams += [word[i : i + n] for n in (3, 4, 5) for i in range(len(word) - n + 1)]
        hashes = np.array([zlib.crc32(gram.encode("utf-8", "replace")) for gram in grams], np.int64)
        return np.bincount((hashes >> 1) % self.dim, weights=2.0 * (hashes & 1) - 1, minlength=self.dim)


class BertEmbedding(Embedding):
    """The mean of a BERT's last hidden states over a text's tokens, as sentence-transformers pools them.

    Reads config.json, model.safetensors and the tokenizer of a folder. Raises ValueError for what it cannot run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.config = hf_folder.from_folder("AutoConfig", folder)
        if self.config.model_type != "bert" or self.config.hidden_act != "gelu":
            raise ValueError(
                f"only BERT with gelu is supported, not {self.config.model_type}, {self.config.hidden_act}"
            )
        if getattr(self.config, "position_embedding_type", None) not in (None, "absolute"):
            raise ValueError("only absolute positions are supported")
        self.tokenizer = hf_folder.read_tokenizer(folder)
        self.params = read_bert(folder, self.config.num_hidden_layers)
        self.dim = self.config.hidden_size
        self._forward = jax.jit(functools.partial(bert, self.config.num_attention_heads, self.config.layer_norm_eps))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        limits = {"truncation": True, "max_length": self.config.max_position_embeddings}
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="np", **limits)
        mask = jnp.asarray(tokens["attention_mask"], jnp.float32)
        return np.asarray(self._forward(self.params, jnp.asarray(tokens["input_ids"]), mask))


def read_bert(folder: Path, num_layers: int) -> Tree:
    """Returns the weights of model.safetensors, f32, under HF's names, those of the layers in a list.

    Raises ValueError if some are missing.
    """
    from safetensors.numpy import load_file

    tensors = {
        name.removeprefix("bert."): t.astype(np.float32) for name, t in load_file(folder / "model.safetensors").items()
    }
    tensors = {name.replace("gamma", "weight").replace("beta", "bias"): t for name, t in tensors.items()}  # old names
    dense = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
             "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")  # fmt: skip
    tables = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    try:
        params: Tree = {name: tensors[name] for name in tables}
        params["embeddings.LayerNorm"] = _pair(tensors, "embeddings.LayerNorm")
        params["layers"] = [
            {name: _pair(tensors, f"encoder.layer.{i}.{name}") for name in dense} for i in range(num_layers)
        ]
    except KeyError as error:
        raise ValueError(f"model.safetensors lacks {error}") from None
    return jax.tree.map(jnp.asarray, params)


def _pair(tensors: Tree, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (weight, bias); torch keeps a dense layer's weight as (out, in), we as (in, out)."""
    return tensors[f"{name}.weight"].T, tensors[f"{name}.bias"]


def bert(num_heads: int, eps: float, params: Tree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean of the last hidden states, (B, D), not normalised. A post-norm encoder (arXiv 1810.04805).

    Args:
        tokens: (B, T) int, all of token type 0
        mask: (B, T) f32, 0 for padding
    """
    batch, length = tokens.shape

    def norm(x: jax.Array, layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * layer[0][None, None] + layer[1][None, None]

    def dense(x: jax.Array, layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        return x @ layer[0] + layer[1][None, None]

    x = params["embeddings.word_embeddings.weight"][tokens]  # (B, T, D)
    x = x + params["embeddings.position_embeddings.weight"][None, :length]
    x = norm(x + params["embeddings.token_type_embeddings.weight"][None, :1], params["embeddings.LayerNorm"])
    for layer in params["layers"]:
        heads = [dense(x, layer[f"attention.self.{name}"]) for name in ("query", "key", "value")]
        q, k, v = (head.reshape(batch, length, num_heads, -1) for head in heads)
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :] > 0).reshape(x.shape)
        x = norm(x + dense(attended, layer["attention.output.dense"]), layer["attention.output.LayerNorm"])
        hidden = jax.nn.gelu(dense(x, layer["intermediate.dense"]), approximate=False)
        x = norm(x + dense(hidden, layer["output.dense"]), layer["output.LayerNorm"])
    return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)


@functools.lru_cache(maxsize=2)
def make_embedding(name: str) -> Embedding:
    """Returns the encoder that --embed names: hash, or a BERT's folder or hub id. Raises ValueError, one line."""
    if name == "hash":
        return HashEmbedding()
    try:
        return BertEmbedding(hf_folder.find_folder(name))
    except Exception as error:  # of the file system, the hub, safetensors, transformers: each has its own
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"--embed: can't use {name!r}, use hash, or a BERT's folder or hub id ({said})") from None
