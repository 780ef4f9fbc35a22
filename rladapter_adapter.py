"""The adapter: a small language model that reads a situation and writes an analysis for the LLM.

    caption, last sub-goals, score       -> adapter_prompt -> Adapter.analyse -> a line of text
    (prompt, analysis) pairs that worked -> Adapter.finetune -> LoRA weights

    python rladapter_adapter.py generate --model Qwen/Qwen3-0.6B --prompt "What is Crafter?"
    python rladapter_adapter.py sft --model assets/adapter-tiny --data runs/NAME/examples.jsonl --out tuned

Any Llama, Qwen2 or Qwen3 checkpoint in Hugging Face format will do (SmolLM2 is a Llama). Read it
top down: prompt, model, generation, LoRA fine-tuning, `Adapter`, command line. All is host code but
for four jitted functions: `read_prefix`, `generate`, `measure_nll`, `sft_step`. NNX defines the
model and splits it once: then weights are dicts of arrays, those of the layers stacked and scanned.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import Progress

from envs import make_env
from envs.game import Game
from utils import hf_folder
from utils.cli import BigInt, check_ranges, exit_code, first_line
from utils.compilation import use_compilation_cache

Tree = dict[str, Any]  # a nested dict of arrays
Text = tuple[list[int], list[int]]  # the tokens of a prompt and of its response
Folder = Annotated[str, tyro.conf.arg(metavar="FOLDER|HUB-ID")]

LENGTH_BUCKET = 64  # prompts are padded to a multiple of it, so that few lengths are ever compiled (`padded`)
ANSWER_BUCKET = 32  # and the answers in a fine-tuning batch to a multiple of this
BATCH_BUCKETS = (8, 16, 32, 64)  # batches are padded to one of these; more prompts: several batches
CACHE_BYTES = 2**28  # that the keys and values of a batch may take on a CPU; 8 times as many on a GPU or TPU
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # what LoRA adapts

SFT_EPOCHS = 2  # passes over the examples
SFT_BATCH_SIZE = 2  # examples in a step: many small steps teach more in the same time (docs/log.md)
SFT_ROWS = 8  # examples that are measured at a time; of fewer a fine-tuning is not made, whatever its budget
LORA_PLUS_RATIO = 50.0  # B learns so many times as fast as A
SFT_COMPUTE = 1e12  # floating-point operations of a fine-tuning by default: some 15 seconds of a CPU core
HELD_OUT = 0.1  # share of the fine-tuning examples that only measures
# Adam's share of a step; `sft_step` multiplies it by the learning rate, an argument there
SFT_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, weight_decay=0.0))


@dataclass(frozen=True)
class SftArgs:
    """Flags of a training run that concern the adapter."""

    adapter: str = "assets/adapter-tiny"
    """the adapter: a Llama, Qwen2 or Qwen3 folder in Hugging Face format, a hub id, or a folder of
    LoRA weights; none: no adapter"""
    analyses: Literal["own", "exchanged", "random", "retrieved"] = "own"
    """what the guide is given of the adapter, and --sft-data best and all choose from. own: its analysis; controls:
    exchanged: that of another situation of the same pause; random: a sentence that names random sub-goals; retrieved:
    no language model's, but word for word that of the pair of --sft-data whose situation is most alike"""
    adapter_temperature: float = 1.0
    """temperature at which the adapter's analyses are sampled; 0: the likeliest token each time"""
    adapter_max_tokens: int = 48
    """tokens of an analysis, at most; one that is cut off there ends with its last whole sentence"""
    sft_every: int = 4
    """phases between two fine-tunings of the adapter; 0: never"""
    sft_data: Literal["best", "all", "hindsight", "experience", "plans"] = "best"
    """what the adapter is fine-tuned on, 512 pairs at most. best: analyses that (1) name a sub-goal (2) that the guide
    then advised, (3) in advice that won its trial; all: all analyses, as in the paper; hindsight: what the player did
    next in situations where that paid; experience: the same, and what sub-goals were found to take; plans: the same,
    and what to make on the spot for these, and guesses about the rest. The three say nothing before the first tuning"""
    sft_max_tokens: BigInt | None = None
    """tokens that a fine-tuning may read, the most telling examples first; default: what takes about 1e12
    floating-point operations, 150,000 for the tiny adapter, 930 (and no fewer than 8 pairs) for one of 135M"""
    sft_learning_rate: float = 2e-4
    """learning rate of Adam for LoRA's matrices A at the start of each fine-tuning; it falls to nothing within it"""
    sft_epochs: int = SFT_EPOCHS
    """passes of a fine-tuning over its examples"""
    sft_batch_size: int = SFT_BATCH_SIZE
    """examples in a step of a fine-tuning; small steps teach more in the same time"""
    lora_rank: int | None = None
    """rank of the LoRA matrices; default 8, or that of the LoRA folder given as --adapter"""
    lora_plus_ratio: float = LORA_PLUS_RATIO
    """how many times the learning rate of LoRA's matrices B is that of its matrices A (LoRA+); 1: plain LoRA, of which
    a model of 135M weights needed three times as many examples"""

    @property
    def has_model(self) -> bool:
        """Is there a language model? What is retrieved is told in its place."""
        return self.adapter != "none" and self.analyses != "retrieved"


LIMITS = {
    "sft_every": (0, 10**9), "sft_learning_rate": (1e-12, 10), "adapter_temperature": (0, 100),
    "adapter_max_tokens": (1, 4096), "sft_max_tokens": (1, 10**12), "sft_epochs": (1, 10**6),
    "sft_batch_size": (1, 1024), "lora_plus_ratio": (1e-6, 10**6),
}  # fmt: skip


FROM_PLAY = "hindsight", "experience", "plans"  # --sft-data that need no analyses


# --------------------------------------------------------------------------------------- the prompt

SYSTEM_PROMPT = """You watch a player who learns to survive in an open world. From the situation and from how well the
player understood the last advice, write a short analysis for the guide who advises the player. End it with the sub-goal
that is most urgent now, one of these: {sub_goals}."""
INSTRUCTION = "Write a short analysis for the guide."
UNKNOWN_SCORE = "Comprehension score: not known yet."


@functools.cache
def about(game: Game) -> str:
    """Returns the system prompt of a game."""
    return SYSTEM_PROMPT.format(sub_goals=", ".join(game.basic_sub_goals))


def suggestion(names: Sequence[str]) -> str:
    """Returns the sentence that suggests one or two sub-goals. Guides follow this one more than milder ones (docs)."""
    return f"The most urgent sub-goal{' now is' if len(names) == 1 else 's now are'} {' and '.join(names)}."


def adapter_prompt(game: Game, caption: str, sub_goals: Sequence[int], comprehension: float | None) -> str:
    """Returns the user turn: caption (`env.to_text`), sub-goals advised last, score in [0, 1]."""
    score = UNKNOWN_SCORE if comprehension is None else f"Comprehension score: {comprehension:.2f}."
    return f"{caption}\nPrevious sub-goals: {game.sub_goals_text(sub_goals)}.\n{score}\n{INSTRUCTION}"


def write_analyses(
    adapter: Any,
    game: Game,
    questions: Sequence[Any],
    key: jax.Array,
    control: str = "own",
    retrieved: Sequence[str] = (),
) -> None:
    """Sets `adapter_prompt` and `analysis` of `llm_client.Question`s, all in one batch.

    Args:
        control: as --analyses
        retrieved: what is said in the adapter's place, one text for each question; () where it speaks itself
    """
    if not questions:
        return
    prompts = [adapter_prompt(game, q.caption, q.sub_goals, q.comprehension) for q in questions]
    silent = adapter.waits
    analyses = list(retrieved) or ([""] * len(prompts) if silent else adapter.analyse(prompts, key))
    if control == "exchanged":
        analyses = analyses[1:] + analyses[:1] if len(analyses) > 1 else [""]
    elif control == "random" and not silent:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        named = [rng.permutation(game.basic_sub_goals)[: rng.integers(1, 3)] for _ in analyses]
        analyses = [suggestion(names) for names in named]
    for question, prompt, analysis in zip(questions, prompts, analyses, strict=True):
        question.adapter_prompt, question.analysis = prompt, analysis
    if isinstance(adapter, Adapter) and not (silent or any(map(game.sub_goals_in_text, analyses))):
        adapter.warn_that_it_names_nothing()


# ---------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class LmConfig:
    """Shape of a decoder, in Hugging Face's names. Hashable, as it is part of jit's cache key."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False  # of q, k and v, as in Qwen2
    qk_norm: bool = False  # RMSNorm over each head of q and k, as in Qwen3
    rope_theta: float = 10000.0
    rope_llama3: tuple[float, float, float, float] | None = None  # `hf_folder.LLAMA3_ROPE`


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if not (1 <= self.rank <= 65536 and 0 <= self.dropout < 1 and abs(self.alpha) < 1e9):
            given = f"{self.rank}, {self.alpha}, {self.dropout}"
            raise ValueError(f"LoRA needs a rank of 1 to 65536, an alpha below 1e9, a dropout in [0, 1), not {given}")
        if not self.targets or not set(self.targets) <= set(PROJECTIONS) or len(set(self.targets)) < len(self.targets):
            given = " ".join(self.targets)
            raise ValueError(f"LoRA's targets are some of {' '.join(PROJECTIONS)}, each once, not {given}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Lora(nnx.Variable):
    """A trainable low-rank factor. Not flax's LoRAParam: a filter on Param would catch that too."""


def param_shapes(config: LmConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each base weight: matrices (in, out), those of the layers stacked."""
    c, num, width, hidden = config, config.num_hidden_layers, config.hidden_size, config.intermediate_size
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {
        "embed": (c.vocab_size, width), "norm": (width,), "attention_norm": (num, width), "mlp_norm": (num, width),
        "q": (num, width, queries), "k": (num, width, keys), "v": (num, width, keys), "o": (num, queries, width),
        "gate": (num, width, hidden), "up": (num, width, hidden), "down": (num, hidden, width),
    }  # fmt: skip
    if c.attention_bias:
        shapes |= {"q_bias": (num, queries), "k_bias": (num, keys), "v_bias": (num, keys)}
    if c.qk_norm:
        shapes |= {"q_norm": (num, c.head_dim), "k_norm": (num, c.head_dim)}
    return shapes if c.tie_word_embeddings else shapes | {"head": (width, c.vocab_size)}


def init_lora(config: LmConfig, lora: LoraConfig, key: jax.Array) -> Tree:
    """Returns LoRA factors, f32: A (L, in, rank) random, B (L, rank, out) zero."""
    shapes, factors = param_shapes(config), {}
    for name in lora.targets:
        num, inputs, outputs = shapes[name]
        key_a = jax.random.fold_in(key, PROJECTIONS.index(name))
        factors[f"{name}_a"] = jax.random.normal(key_a, (num, inputs, lora.rank)) / math.sqrt(inputs)
        factors[f"{name}_b"] = jnp.zeros((num, lora.rank, outputs))
    return factors


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Scales x (..., D) to unit root mean square, times weight (D,), in f32 as HF does."""
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return weight.reshape((1,) * (x.ndim - 1) + (-1,)) * scaled.astype(x.dtype)


def rope_frequencies(config: LmConfig) -> np.ndarray:
    """Returns radians per position, (head_dim / 2,). Llama 3 slows long wavelengths by `factor`."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_llama3 is None:
        return frequencies
    factor, low, high, original = config.rope_llama3
    turns = original * frequencies / (2 * np.pi)  # within the context of the original training
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns x (B, T, H, hd) by angles (B, T, hd/2): RoPE, pairing i with i + hd/2 as HF does."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attends: q (B, T, H, hd), k and v (B, KV, S, hd), mask (B, T, S) -> (B, T, H, hd).

    Each head of k serves H / KV heads of q. Fully masked rows return the mean of v; they are padding and
    unused. Not `jax.nn.dot_product_attention`: it transposes k and v for its matmuls, and decoding on a
    CPU takes six times as long.
    """
    (batch, length, heads, size), (groups, seen) = q.shape, k.shape[1:3]
    in_f32 = partial(jnp.einsum, preferred_element_type=jnp.float32)  # bf16 would round scores by a quarter
    q = q.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, size)
    scores = in_f32("bgqh,bgsh->bgqs", q, k).reshape(batch, groups, -1, length, seen) / math.sqrt(size)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    y = in_f32("bgqs,bgsh->bgqh", weights.astype(v.dtype).reshape(batch, groups, -1, seen), v)
    y = y.reshape(batch, groups, -1, length, size) / weights.sum(-1, keepdims=True)
    return y.astype(v.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def project(x: jax.Array, layer: Tree, name: str, lora: LoraConfig, key: jax.Array | None) -> jax.Array:
    """Maps x (B, T, in) to (B, T, out), with bias and LoRA if there are any; a key: with dropout."""
    y = x @ layer[name]
    if f"{name}_bias" in layer:
        y = y + layer[f"{name}_bias"][None, None]
    if f"{name}_a" in layer:
        a, b = layer[f"{name}_a"].astype(x.dtype), layer[f"{name}_b"].astype(x.dtype)
        if key is not None and lora.dropout:
            key_keep = jax.random.fold_in(key, PROJECTIONS.index(name))
            keep = jax.random.bernoulli(key_keep, 1 - lora.dropout, x.shape)
            x = jnp.where(keep, x / (1 - lora.dropout), 0)
        y = y + lora.scale * (x @ a @ b)
    return y


class Decoder(nnx.Module):
    """Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU; and Qwen2's biases, Qwen3's norms."""

    def __init__(self, config: LmConfig, params: Tree, lora: LoraConfig, factors: Tree) -> None:
        """Takes {} for `factors` (no LoRA), or what `init_lora` returns."""
        self.config, self.lora_config = config, lora
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})
        self.lora = nnx.Dict({name: Lora(value) for name, value in factors.items()})

    def __call__(
        self, tokens: jax.Array, starts: jax.Array, shared: Any = 0, cache: Any = None, index: Any = 0,
        key: jax.Array | None = None, remat: bool = False, prefix: Any = None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Maps tokens (B, T) to hidden states (B, T, D), and returns the cache, or without one the keys and values.

        A token sees the columns from `starts` (B, T), where its own text begins, to itself; its
        position counts from there. It also sees the first `shared` (B, T) columns, as if they came
        before its text. One mechanism for left-padded prompts that begin alike and for rows of several
        texts (assets/make_adapter_tiny.py). `cache` is None or (keys, values), each (L, B, KV, S, hd),
        of which columns index..index+T are written. `key` is for LoRA's dropout, in training.
        `remat`: a gradient computes each layer anew instead of keeping all that it made. `prefix`, in
        place of a cache: keys and values (L, 1, KV, index, hd) of the columns before the tokens, the same
        for all rows.
        """
        columns = index + jnp.arange(tokens.shape[1])  # (T,)
        # Columns after the tokens need not be looked at, where it is known how many those are.
        num_seen = index + tokens.shape[1] if isinstance(index, int) else cache[0].shape[3]
        seen = jnp.arange(num_seen)  # (S,)
        shared = jnp.broadcast_to(shared, starts.shape)
        mask = (seen[None, None] >= starts[:, :, None]) | (seen[None, None] < shared[:, :, None])
        mask = mask & (seen[None, None] <= columns[None, :, None])  # (B, T, S)
        frequencies = jnp.asarray(rope_frequencies(self.config), jnp.float32)
        angles = (columns[None] - starts + shared)[:, :, None] * frequencies[None, None]  # (B, T, hd/2)

        def body(carry: Any, layer: Tree) -> Any:
            x, cache, depth = carry
            layer_key = None if key is None else jax.random.fold_in(key, depth)
            mixed, kept = self.attend(layer, x, angles, mask, cache, depth, index, layer_key)
            cache, new = (None, kept) if cache is None else (kept, None)
            return (self.transform(layer, x + mixed, layer_key), cache, depth + 1), new

        x = self.params["embed"][...][tokens]  # (B, T, D)
        weights = {**self.params, **self.lora}
        layers = {name: weights[name][...] for name in weights if name not in ("embed", "norm", "head")}
        layers |= {} if prefix is None else {"prefix": prefix}
        # The cache is carried, not scanned over: each layer's part would be copied twice a token.
        (x, cache, _), new = jax.lax.scan(jax.checkpoint(body) if remat else body, (x, cache, jnp.int32(0)), layers)
        return rms_norm(x, self.params["norm"][...], self.config.rms_norm_eps), new if cache is None else cache

    def attend(
        self, layer: Tree, x: jax.Array, angles: Any, mask: Any, cache: Any, depth: Any, index: Any, key: Any
    ) -> Any:
        """Returns what attention adds to x (B, T, D), and keys and values: the cache with this layer's, or these."""
        c, (batch, length, _) = self.config, x.shape
        y = rms_norm(x, layer["attention_norm"], c.rms_norm_eps)
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        q, k, v = (
            project(y, layer, name, self.lora_config, key).reshape(batch, length, num, c.head_dim)
            for name, num in heads.items()
        )
        if c.qk_norm:
            q = rms_norm(q, layer["q_norm"], c.rms_norm_eps)
            k = rms_norm(k, layer["k_norm"], c.rms_norm_eps)
        q, k, v = rotate(q, angles), rotate(k, angles).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        kept = k, v
        if cache is not None:
            kept = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (depth, 0, 0, index, 0))
                for old, new in zip(cache, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(both, depth, keepdims=False) for both in kept)
        elif "prefix" in layer:
            before = (jnp.broadcast_to(part, (batch, *part.shape[1:])) for part in layer["prefix"])
            k, v = (jnp.concatenate(both, 2) for both in zip(before, (k, v), strict=True))
        y = attention(q, *(part[:, :, : mask.shape[2]] for part in (k, v)), mask)
        return project(y.reshape(batch, length, -1), layer, "o", self.lora_config, key), kept

    def transform(self, layer: Tree, x: jax.Array, key: Any) -> jax.Array:
        """Applies a layer's SwiGLU, residual included."""
        y = rms_norm(x, layer["mlp_norm"], self.config.rms_norm_eps)
        gate, up = (project(y, layer, name, self.lora_config, key) for name in ("gate", "up"))
        return x + project(jax.nn.silu(gate) * up, layer, "down", self.lora_config, key)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states (..., D) to logits (..., V), f32."""
        head = self.params["embed"][...].T if self.config.tie_word_embeddings else self.params["head"][...]
        return (hidden @ head).astype(jnp.float32)


# --------------------------------------------------------------------------------------- generation


def padded(length: int, bucket: int) -> int:
    """Rounds up, so that few shapes are compiled: to the bucket, or four of it on a GPU or TPU.

    There compilation is slower, and what is padded costs less.
    """
    bucket *= 1 if jax.default_backend() == "cpu" else 4
    return bucket * math.ceil(length / bucket)


def left_pad(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens (B, T), starts (B,), padded to buckets. Empty rows start at the end."""
    length = padded(max(len(text) for text in texts), LENGTH_BUCKET)
    batch = next(size for size in BATCH_BUCKETS if size >= len(texts))
    tokens = np.zeros((batch, length), np.int32)
    starts = np.full(batch, length - 1, np.int32)
    for i, text in enumerate(texts):
        tokens[i, length - len(text) :] = text
        starts[i] = length - len(text)
    return tokens, starts


def sample_token(logits: jax.Array, row_keys: jax.Array, step: jax.Array, temperature: jax.Array) -> jax.Array:
    """Draws tokens (B,) from logits (B, V). A key per row: what is drawn ignores the batch."""

    def draw(logits: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        return jax.vmap(jax.random.categorical)(keys, logits / temperature)

    # A branch, not a choice: random numbers for a large vocabulary cost a fifth of a token on CPUs
    return jax.lax.cond(temperature > 0, draw, lambda x: jnp.argmax(x, -1), logits).astype(jnp.int32)


@partial(jax.jit, static_argnames="graphdef")
def read_prefix(graphdef: Any, base: Tree, lora: Tree, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values, each (L, 1, KV, P, hd), of what all prompts begin with, (1, P)."""
    return nnx.merge(graphdef, lora, base)(tokens, jnp.zeros_like(tokens))[1]


def empty_cache(config: LmConfig, base: Tree, batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns room for keys and values, zeros (L, B, KV, length, hd) each."""
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
    dtype = base["params"]["embed"].dtype
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"))
def generate(
    graphdef: Any, base: Tree, lora: Tree, prefix: Any, tokens: jax.Array, starts: jax.Array, live: jax.Array,
    rows: jax.Array, eos: jax.Array, key: jax.Array, temperature: jax.Array, max_new_tokens: int,
) -> jax.Array:  # fmt: skip
    """Continues left-padded prompts tokens (B, T), starts (B,). Returns (B, max_new_tokens).

    All continue `prefix`, as `read_prefix` returns it, or None. Rows end at one of `eos` (E,), eos[0]
    after it; those that are not `live` (B,) have ended from the start. `rows` (B,) numbers them, for
    their random keys.
    """
    model = nnx.merge(graphdef, lora, base)
    (batch, length), shared = tokens.shape, 0 if prefix is None else prefix[0].shape[3]
    cache = empty_cache(model.config, base, batch, shared + length + max_new_tokens)
    if prefix is not None:
        cache = tuple(c.at[:, :, :, :shared].set(p) for c, p in zip(cache, prefix, strict=True))
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    starts = starts[:, None] + shared
    hidden, cache = model(tokens, jnp.broadcast_to(starts, tokens.shape), shared, cache, shared)

    def body(carry: Any) -> Any:
        step, done, logits, cache, out = carry
        token = jnp.where(done, eos[0], sample_token(logits, row_keys, step, temperature))
        done = done | jnp.any(token[:, None] == eos[None], -1)
        hidden, cache = model(token[:, None], starts, shared, cache, shared + length + step)
        return step + 1, done, model.logits(hidden[:, 0]), cache, out.at[:, step].set(token)

    out = jnp.full((batch, max_new_tokens), eos[0], jnp.int32)
    carry = jnp.int32(0), ~live, model.logits(hidden[:, -1]), cache, out
    return jax.lax.while_loop(lambda c: (c[0] < max_new_tokens) & ~jnp.all(c[1]), body, carry)[-1]


def printable(text: str) -> str:
    """Removes control characters (terminal escapes too) and halves of characters, not new lines."""
    return "".join(c for c in text if c == "\n" or (unicodedata.category(c)[0] != "C" and c != "\ufffd"))


def whole_sentences(text: str) -> str:
    """Returns a text up to the end of its last sentence; all of it if it has no end."""
    ended = re.match(r".*[.!?](?=\s|$)", text)
    return ended.group() if ended else text


def one_line(text: str) -> str:
    """Removes what is not printable, and collapses white space."""
    return " ".join(printable(" ".join(text.split())).split())


# -------------------------------------------------------------------------------------- fine-tuning


def row_length(texts: Sequence[Text]) -> int:
    """Returns the columns that the longest text takes, rounded up to a bucket."""
    return LENGTH_BUCKET * math.ceil(max(len(prompt + response) for prompt, response in texts) / LENGTH_BUCKET)


def pack(texts: Sequence[Text], length: int) -> dict[str, np.ndarray]:
    """Puts each text into a row of `length` columns.

    Returns int32: tokens, starts, shared (R, length), as in `Decoder`; answers (R, M), see `answer_columns`.
    """
    packed = {name: np.zeros((len(texts), length), np.int32) for name in ("tokens", "starts", "shared")}
    is_answer = np.zeros((len(texts), length), bool)
    for row, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        packed["tokens"][row, :end] = [*prompt, *response]
        is_answer[row, len(prompt) : end] = True
    return packed | {"answers": answer_columns(is_answer)}


def answer_columns(is_answer: np.ndarray) -> np.ndarray:
    """Returns the columns (R, M) where is_answer (R, T) is true, 0 after the last one of a row.

    Only there logits are needed, and those of a large vocabulary are most of what training keeps. A text begins with
    its prompt, so column 0 is never one of them. M is a multiple of ANSWER_BUCKET.
    """
    counts = is_answer.sum(1)
    columns = np.argsort(~is_answer, axis=1, kind="stable")
    most = padded(max(1, counts.max(initial=0)), ANSWER_BUCKET)
    columns = np.pad(columns, ((0, 0), (0, most)))[:, :most]
    return np.where(np.arange(most) < counts[:, None], columns, 0).astype(np.int32)


def batches(packed: Tree, size: int, order: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Returns the rows in this order, `size` at a time, the last batch filled up with rows without an answer.

    Each has as many columns as its longest row, rounded up to a bucket. All have the `prefix`, (1, P), if there is
    one: tokens that stand before every row.
    """
    prefix, parts = {"prefix": packed["prefix"]} if "prefix" in packed else {}, []
    for i in range(0, len(order), size):
        rows = order[i : i + size]
        batch = {name: value[rows] for name, value in packed.items() if name not in prefix}
        length = padded(batch["answers"].max() + 1, LENGTH_BUCKET)  # answers are last
        batch |= {name: batch[name][:, :length] for name in ("tokens", "starts", "shared")}
        parts.append({k: np.pad(v, ((0, size - len(rows)), (0, 0))) for k, v in batch.items()} | prefix)
    return parts


def answer_nll(
    graphdef: Any, base: Tree, lora: Tree, batch: Tree, key: Any = None, remat: bool = True
) -> jax.Array:  # fmt: skip
    """Returns -log p of the tokens at `answers` (nats): (B, M). What all rows begin with is read once."""
    model, answers = nnx.merge(graphdef, lora, base), batch["answers"]
    tokens, starts, shared = (batch[name][:, :-1] for name in ("tokens", "starts", "shared"))
    prefix, length = None, 0
    if "prefix" in batch:
        first = batch["prefix"]
        _, prefix = model(first, jnp.zeros_like(first), key=key, remat=remat)
        shared = length = first.shape[1]
    hidden, _ = model(tokens, starts + length, shared, index=length, key=key, remat=remat, prefix=prefix)
    before = jnp.take_along_axis(hidden, jnp.maximum(answers - 1, 0)[..., None], 1)  # (B, M, D)
    targets = jnp.take_along_axis(batch["tokens"], answers, 1)
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(before), targets)


def response_nll(
    graphdef: Any, base: Tree, lora: Tree, batch: Tree, key: Any = None, remat: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of -log p over the tokens of responses (nats), and how many these are."""
    nll, counted = answer_nll(graphdef, base, lora, batch, key, remat), batch["answers"] > 0
    return jnp.sum(nll * counted), jnp.sum(counted, dtype=jnp.float32)


def mean_nll(graphdef: Any, base: Tree, lora: Tree, batch: Tree, key: Any = None, remat: bool = True) -> jax.Array:
    """Returns the nats per response token; 0 for a batch without any. The loss of fine-tuning."""
    total, count = response_nll(graphdef, base, lora, batch, key, remat)
    return total / jnp.maximum(count, 1.0)


Loss = Callable[..., jax.Array]  # as `mean_nll`: (graphdef, base, lora, batch, key) -> ()
measure_nll = jax.jit(response_nll, static_argnames="graphdef")


@partial(jax.jit, static_argnames=("graphdef", "loss"))
def sft_step(
    graphdef: Any, loss: Loss, base: Tree, lora: Tree, optimizer: Any, batch: Tree, learning_rate: jax.Array, key: Any,
    lora_plus_ratio: Any = 1.0,
) -> tuple[Tree, Any, jax.Array, jax.Array]:  # fmt: skip
    """Returns lora, optimizer, the loss before the step, and whether all is finite.

    The learning rate is that of the matrices A; that of B is `lora_plus_ratio` times as high. While B is small A's
    gradient is mostly noise, which Adam makes as large as any (LoRA+, arXiv 2402.12354).
    """
    value, gradient = jax.value_and_grad(loss, argnums=2)(graphdef, base, lora, batch, key)
    updates, optimizer = SFT_OPTIMIZER.update(gradient, optimizer, lora)
    rates = {name: learning_rate * (lora_plus_ratio if name.endswith("_b") else 1.0) for name in lora["lora"]}
    lora = jax.tree.map(lambda weight, update, rate: weight + rate * update, lora, updates, {"lora": rates})
    return lora, optimizer, value, jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(lora))


# -------------------------------------------------------------------------------------- the adapter


class NoAdapter:
    """Stands in for an adapter with `--adapter none`: says nothing, and is never tuned."""

    cut_prompts, waits = 0, False

    def analyse(self, prompts: Sequence[str], key: jax.Array) -> list[str]:
        return [""] * len(prompts)

    def save(self, folder: Path) -> None:
        pass

    def state(self) -> Tree:
        return {}

    def load_state(self, tree: Tree) -> None:
        pass


class Adapter:
    """A decoder with its tokenizer and LoRA weights. Made by `load_adapter`."""

    def __init__(
        self, config: LmConfig, params: Tree, factors: Tree, chat: hf_folder.Chat, eos: Sequence[int],
        lora: LoraConfig = LoraConfig(), folder: Path | None = None, name: str = "",
    ) -> None:  # fmt: skip
        """Takes the base's weights, folder and name (as LoRA folders say it), LoRA's factors, what makes prompts."""
        self.config, self.lora_config, self.eos = config, lora, tuple(eos)
        self.chat, self.tokenizer = chat, chat.tokenizer
        self.graphdef, lora_state, base = nnx.split(Decoder(config, params, lora, factors), Lora, ...)
        self.base, self.lora = nnx.to_pure_dict(base), nnx.to_pure_dict(lora_state) or {"lora": {}}
        self.optimizer = SFT_OPTIMIZER.init(self.lora)
        self.folder, self.name = folder, name
        self.beginning: list[int] | None = None  # the tokens all prompts begin with, once known
        self.prefix: Any = None  # the keys and values of these; None again when the weights change
        self.temperature, self.max_tokens = SftArgs.adapter_temperature, SftArgs.adapter_max_tokens
        self.sft_tokens: int | None = None  # that a fine-tuning may read
        self.cut_responses = 0  # of examples, that were longer than half the context
        self.tells_what_play_shows = False  # and nothing before it was tuned on that
        self.warned: set[str] = set()  # kinds of warnings that were printed

    def encode_example(self, prompt: str, response: str) -> Text:
        """Returns the tokens of both, an end token last, that fit the context together."""
        limit = self.config.max_position_embeddings
        reply = self.tokenizer.encode(response, add_special_tokens=False)
        self.cut_responses += len(reply) > limit // 2
        reply = reply[: limit // 2] + [self.eos[0]]
        return self.chat.encode(prompt, limit - len(reply)), reply

    @property
    def waits(self) -> bool:
        """Is it to tell what play shows, and was not tuned yet? What it believes before would be believed by the guide.

        Untuned LoRA weights have a B of zeros.
        """
        tuned = any(np.any(value) for name, value in self.lora["lora"].items() if name.endswith("_b"))
        return self.tells_what_play_shows and not tuned

    @property
    def cut_prompts(self) -> int:
        """Counts the prompts so far that were too long for the context."""
        return self.chat.num_cut

    def beginning_of(self, prompts: Sequence[list[int]]) -> list[int]:
        """Returns the tokens that all prompts begin with as far as that is the chat's doing, none of them all of it."""
        if self.beginning is None:
            self.beginning = os.path.commonprefix([self.chat.tokens(text) for text in ("You", "1")])
        shared = len(self.beginning)
        return [] if any(len(p) <= shared or p[:shared] != self.beginning for p in prompts) else self.beginning

    def prefix_of(self, prompts: Sequence[list[int]]) -> tuple[int, Any]:
        """Returns how many tokens all prompts begin with, and their keys and values; or 0, None."""
        beginning = self.beginning_of(prompts)
        if not beginning:
            return 0, None
        if self.prefix is None:
            self.prefix = read_prefix(self.graphdef, self.base, self.lora, np.asarray([beginning], np.int32))
        return len(beginning), self.prefix

    def generate(
        self, prompts: Sequence[list[int]], key: jax.Array, temperature: float, max_new_tokens: int
    ) -> list[list[int]]:
        """Returns new tokens for each tokenized prompt. Compiles once per bucket of shapes."""
        eos = jnp.asarray(self.eos, jnp.int32)
        rows: list[list[int]] = []
        most = self.rows_at_once(max(map(len, prompts), default=0) + max_new_tokens)
        for first in range(0, len(prompts), most):
            part = prompts[first : first + most]
            shared, prefix = self.prefix_of(part)
            tokens, starts = left_pad([prompt[shared:] for prompt in part])
            numbers = np.arange(len(tokens))
            out = generate(
                self.graphdef, self.base, self.lora, prefix, tokens, starts, numbers < len(part),
                first + numbers, eos, key, jnp.float32(temperature), max_new_tokens,
            )  # fmt: skip
            rows += np.asarray(out)[: len(part)].tolist()
        ends = [next((i for i, token in enumerate(row) if token in self.eos), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def rows_at_once(self, columns: int) -> int:
        """Returns how many rows of so many tokens are continued at once: what their keys and values take bounds it."""
        keys, values = jax.eval_shape(partial(empty_cache, self.config, self.base, 1, columns))
        bytes_of_row = (keys.size + values.size) * keys.dtype.itemsize
        room = CACHE_BYTES * (1 if jax.default_backend() == "cpu" else 8)
        return max((n for n in BATCH_BUCKETS if n * bytes_of_row <= room), default=BATCH_BUCKETS[0])

    def analyse(
        self, prompts: Sequence[str], key: jax.Array, temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:  # fmt: skip
        """Returns an analysis for each prompt (`adapter_prompt`): one line, possibly empty.

        Sampled as --adapter-temperature (0: greedy) and --adapter-max-tokens say, unless told otherwise. Raises
        ValueError if max_new_tokens is not within the context.
        """
        temperature = self.temperature if temperature is None else temperature
        most = self.max_tokens if max_new_tokens is None else max_new_tokens
        room = self.room_for(most)
        tokens = [self.chat.encode(prompt, room) for prompt in prompts]
        rows = self.generate(tokens, key, temperature, most)
        texts = [one_line(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        cut = [len(row) == most for row in rows]
        return [whole_sentences(text) if was_cut else text for text, was_cut in zip(texts, cut, strict=True)]

    def warn_that_it_names_nothing(self) -> None:
        """Says once that all analyses of a pause were in vain."""
        self.warn(
            "names nothing",
            "no analysis of this pause names a sub-goal, so a guide can't follow any, and --sft-data best finds no "
            "example; try --sft-data experience, a lower --adapter-temperature, or another --adapter",
        )

    def warn_that_nothing_won(self) -> None:
        """Says once that a fine-tuning with --sft-data best had nothing to read."""
        self.warn(
            "nothing won",
            "the adapter was not tuned: --sft-data best takes analyses whose advice won its trial, none has yet; "
            "try --sft-data experience, which waits for no trial",
        )

    def warn(self, kind: str, message: str) -> None:
        """Prints a warning, unless there was one of its kind before."""
        if kind not in self.warned:
            print(f"warning: {message}", file=sys.stderr)
        self.warned.add(kind)

    def affordable_tokens(self) -> int:
        """Returns how many tokens take SFT_COMPUTE: forward, again for rematerialised layers, and twice that back."""
        return int(SFT_COMPUTE / (8 * sum(value.size for value in jax.tree.leaves(self.base))))

    def affordable_analyses(self, prompts: Sequence[str]) -> int:
        """Returns how many of these can be analysed before and after a fine-tuning for a quarter of what it may take.

        A token that is read or written takes two thirds of one that is trained on (SmolLM2-135M on a CPU: writing waits
        for memory). At least the smallest batch.
        """
        if self.sft_tokens is None or not prompts:
            return len(prompts)
        longest = max(len(self.chat.tokens(prompt)) for prompt in prompts) + self.max_tokens
        return max(BATCH_BUCKETS[0], self.sft_tokens // 4 * 3 // (4 * longest))

    def room_for(self, max_new_tokens: int) -> int:
        """Returns how many tokens of a prompt the context has room for beside the new ones."""
        most = self.config.max_position_embeddings - 1
        if not 1 <= max_new_tokens <= most:
            raise ValueError(f"--max-new-tokens, max_new_tokens: must be 1 to {most}, not {max_new_tokens}")
        return self.config.max_position_embeddings - max_new_tokens

    def check_room(self) -> None:
        """Raises ValueError if the context has no room for what training asks, or learns by `encode_example`."""
        context, instruction = self.config.max_position_embeddings, len(self.chat.tokens(INSTRUCTION))
        answer = max(self.max_tokens, context // 2 + 1)
        if instruction + answer > context:
            needs = f"{answer} are the answer's, system prompt and instruction take {instruction}"
            way = "choose a model with a longer context"
            raise ValueError(f"its context of {context} tokens is too short: {needs}; {way}")

    def finetune(
        self, examples: Sequence[tuple[str, str]], key: jax.Array, epochs: int = SFT_EPOCHS,
        learning_rate: float = 2e-4, held_out: float = HELD_OUT, batch_size: int = SFT_BATCH_SIZE,
        lora_plus_ratio: float = LORA_PLUS_RATIO, loss: Loss = mean_nll,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, float]:  # fmt: skip
        """Fine-tunes LoRA on (prompt, response) pairs. Returns metrics, {} if there are no pairs.

        Of more pairs than --sft-max-tokens allows the first ones are taken. `report` is told how many steps are done.
        The learning rate falls to nothing; that of LoRA's matrices B is `lora_plus_ratio` times as high.

        The share `held_out` of the examples, at least one, only measures `nll_before` and `nll_after`:
        nats per response token, end token included. Fewer than four examples all measure and train.
        `sft_loss` is the mean training loss. A loss or a step that is not finite ends the fine-tuning
        (`sft_stopped`); the last weights with which the loss was finite stay.
        """
        if not examples:
            return {}
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        texts = [self.encode_example(*example) for example in examples]
        if self.sft_tokens is not None:
            texts = texts[: max(SFT_ROWS, self.sft_tokens // (max(1, epochs) * row_length(texts)))]
        texts = [texts[i] for i in rng.permutation(len(texts))]
        beginning = self.beginning_of([prompt for prompt, *_ in texts])  # an example of a fork may have two responses
        beginning = beginning if len(beginning) >= LENGTH_BUCKET else []  # a shorter one costs more than it saves
        texts = [(prompt[len(beginning) :], *rest) for prompt, *rest in texts]
        most_held = len(texts) - (epochs > 0)  # one at least is trained on
        num_held = min(max(1, round(held_out * len(texts))), most_held) if len(texts) >= 4 else 0
        length = padded(row_length(texts), LENGTH_BUCKET)
        prefix = {"prefix": np.asarray([beginning], np.int32)} if beginning else {}
        training = pack(texts[num_held:], length) | prefix
        measured = pack(texts[:num_held], length) | prefix if num_held else training
        before = self.nll(measured)
        batch_size = max(1, min(batch_size, len(training["tokens"])))
        total = epochs * math.ceil(len(training["tokens"]) / batch_size)
        steps = (
            (jax.random.fold_in(jax.random.fold_in(key, epoch), i), batch)
            for epoch in range(epochs)
            for i, batch in enumerate(batches(training, batch_size, rng.permutation(len(training["tokens"]))))
        )
        losses, finite, self.prefix = [], True, None
        good = self.lora, self.optimizer
        for key_step, batch in steps:
            rate = jnp.float32(learning_rate * (1 - len(losses) / total))
            lora, optimizer, value, finite = sft_step(
                self.graphdef, loss, self.base, self.lora, self.optimizer, batch, rate, key_step, lora_plus_ratio
            )
            if not finite:
                break
            good = self.lora, self.optimizer
            self.lora, self.optimizer = lora, optimizer
            losses.append(float(value))
            report(len(losses), total)
        after = self.nll(measured) if losses else before
        if losses and not (math.isfinite(value) and math.isfinite(after)):  # it is the last step that was too much
            (self.lora, self.optimizer), finite = good, False
            after = self.nll(measured)
        return {
            "sft_loss": float(np.mean(losses)) if losses else before, "nll_before": before, "nll_after": after,
            "examples": len(texts), "held_out": num_held, "sft_stopped": int(not finite),
        }  # fmt: skip

    def nll(self, packed: dict[str, np.ndarray]) -> float:
        """Returns the nats per response token over packed rows."""
        parts = batches(packed, SFT_ROWS, np.arange(len(packed["tokens"])))
        sums = [measure_nll(self.graphdef, self.base, self.lora, batch) for batch in parts]
        return float(sum(total for total, _ in sums) / sum(count for _, count in sums))

    def save(self, folder: Path) -> None:
        """Writes the LoRA weights in PEFT's format, for `load_adapter`. They name their base."""
        settings = dataclasses.asdict(self.lora_config)
        hf_folder.write_lora(folder, settings, self.lora["lora"], self.name)

    def export(self, folder: Path) -> None:
        """Writes a whole Hugging Face folder: f32, LoRA merged in, the base's other files."""
        params = {name: np.asarray(value, np.float32) for name, value in self.base["params"].items()}
        for name in self.lora_config.targets:
            a, b = (np.asarray(self.lora["lora"][f"{name}_{part}"], np.float32) for part in "ab")
            params[name] = params[name] + self.lora_config.scale * a @ b
        hf_folder.write_model(folder, self.folder, params)

    def state(self) -> Tree:
        """Returns what fine-tuning changes: LoRA weights and the optimizer's numbered leaves."""
        leaves = jax.tree.leaves(self.optimizer)
        return {"lora": dict(self.lora["lora"]), "optimizer": {f"{i:03d}": leaf for i, leaf in enumerate(leaves)}}

    def load_state(self, tree: Tree) -> None:
        """Takes what `state` returned. Raises ValueError if it does not fit this model."""
        own = self.state()
        if jax.tree.map(jnp.shape, own) != jax.tree.map(jnp.shape, tree):
            raise ValueError("the checkpoint's LoRA weights do not fit; give the run's own model")
        tree = jax.tree.map(lambda mine, new: jnp.asarray(new, mine.dtype), own, tree)
        self.lora, self.prefix = {"lora": tree["lora"]}, None
        leaves = [tree["optimizer"][name] for name in sorted(tree["optimizer"])]
        self.optimizer = jax.tree.unflatten(jax.tree.structure(self.optimizer), leaves)


def load_adapter(
    source: str | Path, lora: LoraConfig = LoraConfig(), seed: int = 0, system: str = "", chat_template: bool = True
) -> Adapter:  # fmt: skip
    """Returns the adapter of a Hugging Face model folder or hub id, with fresh LoRA weights and that system prompt.

    Or of a folder that `save` (or PEFT) wrote, with the weights and settings in there, not `lora`. Without its chat
    template prompts are plain text. Raises ValueError, one line, for what is missing, damaged or of an unsupported
    kind.
    """
    folder = hf_folder.find_folder(source)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} has no config.json; give a Hugging Face model folder")
    try:
        base, name = hf_folder.find_base(source, folder)
        shape, ends = hf_folder.read_config(base)
        config = LmConfig(**shape)
        params = hf_folder.read_params(base, param_shapes(config))
        tokenizer = hf_folder.read_tokenizer(base)
        ends = [end for end in (tokenizer.eos_token_id, *ends) if end is not None]
        if not ends:
            raise ValueError("neither its config nor its tokenizer names an end token")
        if not all(type(end) is int and 0 <= end < config.vocab_size for end in ends):
            raise ValueError(f"its end tokens are {hf_folder.brief(ends)}, which are none of its {config.vocab_size}")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its model {config.vocab_size}")
        chat = hf_folder.Chat(tokenizer, system, chat_template)  # here, where the folder is named: it may fail
        if not hf_folder.is_lora(folder):
            # The first four keys that come of this seed are those of the run (`rladapter_ppo.run_keys`).
            factors = init_lora(config, lora, jax.random.fold_in(jax.random.key(seed), 4))
        else:
            settings, factors = hf_folder.read_lora(folder, param_shapes(config))
            lora = LoraConfig(**settings)
    except Exception as error:  # three libraries parse these files, each with its own errors
        raise ValueError(f"cannot use {folder}: {first_line(error)}") from error
    if chat_template and tokenizer.chat_template is None:
        print(f"note: {base} has no chat template; it is given plain text", file=sys.stderr)
    return Adapter(config, params, factors, chat, list(dict.fromkeys(ends)), lora, base, name)


def make_adapter(args: SftArgs, seed: int, game: Game) -> Adapter | NoAdapter:
    """Returns the adapter of --adapter. Raises ValueError, one line that names the flag."""
    if not args.has_model:
        return NoAdapter()
    hint = "; or use --adapter none"
    adapter = open_adapter("--adapter", args.adapter, seed, hint, about(game), rank=args.lora_rank)
    adapter.temperature, adapter.max_tokens = args.adapter_temperature, args.adapter_max_tokens
    adapter.sft_tokens = args.sft_max_tokens or adapter.affordable_tokens()
    adapter.tells_what_play_shows = args.sft_data in FROM_PLAY and args.sft_every > 0
    with naming(f"--adapter: cannot use {args.adapter}", hint):
        adapter.check_room()
    return adapter


@contextlib.contextmanager
def naming(flag: str, hint: str = "") -> Iterator[None]:
    """Puts a flag in front of what a ValueError says, and a hint behind it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}{hint}") from None


def open_adapter(
    flag: str, source: str, seed: int = 0, hint: str = "", system: str = "", chat_template: bool = True, **lora: Any
) -> Adapter:  # fmt: skip
    """Returns the adapter that a flag names. The --lora-* flags (None: not given) must fit it."""
    given = {name: value for name, value in lora.items() if value is not None}
    with naming(", ".join(f"--lora-{name}" for name in given)):
        config = LoraConfig(**given)
    with naming(flag, hint):
        adapter = load_adapter(source, config, seed, system, chat_template)
    for name, value in given.items():  # what `load_adapter` made anew is as given
        own = getattr(adapter.lora_config, name)
        if set(value) != set(own) if name == "targets" else value != own:
            raise ValueError(f"--lora-{name}: {source} has {own}, not {value}; leave --lora-{name} out")
    return adapter


# --------------------------------------------------------------------------------- the command line

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate: JSON can have it, a tokenizer takes none


def read_examples(path: Path) -> list[tuple[str, str]]:
    """Returns the (prompt, response) pairs of a guidance.jsonl, or of the last phase of an examples.jsonl."""
    try:
        # Not splitlines, which also splits at the line ends that JSON allows within a string. A mark may come first.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data: cannot read {path}: {first_line(error)}") from None
    examples, phase, earlier = [], None, 0
    for number, line in ((i, line) for i, line in enumerate(lines, 1) if line.strip()):
        try:
            record = json.loads(line)
            names = ("adapter_prompt", "analysis") if "adapter_prompt" in record else ("prompt", "response")
            prompt, response = (record[name] for name in names)
            if not isinstance(prompt, str) or not isinstance(response, str):
                raise TypeError
            if "response" in record and record.get("phase") != phase:  # each fine-tuning has all its examples
                examples, phase, earlier = [], record.get("phase"), earlier + len(examples)
        except (ValueError, KeyError, TypeError, RecursionError):
            kinds = 'neither {"prompt": ..., "response": ...} nor a record of a guidance.jsonl'
            raise ValueError(f"--data: line {number} of {path} is {kinds}") from None
        if HALF_A_CHARACTER.search(prompt + "\n" + response):
            raise ValueError(f"--data: line {number} of {path} holds half a character (such as \\ud800); leave it out")
        if response:  # `--adapter none` says nothing
            examples.append((prompt, response))
    if not examples:
        raise ValueError(f"--data: {path} holds no examples")
    if earlier:
        print(f"note: lines of earlier phases in {path} are not used: {earlier}", file=sys.stderr)
    return examples


def check_seed(seed: int) -> None:
    check_ranges(SimpleNamespace(seed=seed), {"seed": (0, 2**32 - 1)})


def generate_command(
    model: Folder, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0,
    chat_template: bool = True,
) -> None:  # fmt: skip
    """Print what a model answers.

    Args:
        model: a Llama, Qwen2 or Qwen3 folder in Hugging Face format, a hub id, or a LoRA folder
        prompt: the user's turn; plain text to go on from with --no-chat-template
        max_new_tokens: largest number of tokens in the answer
        temperature: temperature of sampling; 0: greedy
        seed: seed of sampling
        chat_template: put the prompt through the tokenizer's chat template, once
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature: must be 0 or more, not {temperature}")
    check_seed(seed)
    if HALF_A_CHARACTER.search(prompt):
        raise ValueError("--prompt: is no UTF-8 text")
    adapter = open_adapter("--model", model, chat_template=chat_template)
    room = adapter.room_for(max_new_tokens)
    with naming("--model, --max-new-tokens"):
        tokens = adapter.chat.encode(prompt, room)
    if not tokens:
        raise ValueError("--prompt: is empty")
    if adapter.cut_prompts:
        print("note: the prompt was too long; its beginning was cut off", file=sys.stderr)
    answer = adapter.generate([tokens], jax.random.key(seed), temperature, max_new_tokens)[0]
    print(printable(adapter.tokenizer.decode(answer, skip_special_tokens=True)))


def sft_command(
    model: Folder, data: Path, out: Path | None = None, epochs: int = SFT_EPOCHS, learning_rate: float = 2e-4,
    held_out: float = HELD_OUT, batch_size: int = SFT_BATCH_SIZE, lora_rank: int | None = None,
    lora_alpha: float | None = None, lora_dropout: float | None = None, lora_targets: tuple[str, ...] | None = None,
    lora_plus_ratio: float = LORA_PLUS_RATIO, merge: bool = False, seed: int = 0, system_prompt: bool = True,
    chat_template: bool = True, env_id: str = "Craftax-Classic-Symbolic-v1",
) -> None:  # fmt: skip
    """Fine-tune a model with LoRA, loss on responses; print held-out loss before and after as JSON.

    Args:
        model: a Llama, Qwen2 or Qwen3 folder in Hugging Face format, a hub id, or a LoRA folder
        data: JSON lines, {"prompt": ..., "response": ...}, as in a run's examples.jsonl; with a "phase" in them, as
            there, only the lines after its last change are used: those of the last fine-tuning
        out: folder to write; not needed with --epochs 0, which only measures (and, with --merge, merges)
        epochs: passes over the training lines
        learning_rate: learning rate of Adam for the matrices A at the start; it falls to nothing
        held_out: share of the lines that only measures; 1 measures on all, with --epochs 0
        batch_size: lines in a step
        lora_rank: rank of new LoRA matrices; default 8, or as in the LoRA folder
        lora_alpha: LoRA's alpha, for a scale of alpha / rank; default 16, or as in the LoRA folder
        lora_dropout: dropout before LoRA matrices, in training; default 0, or as in the LoRA folder
        lora_targets: projections with LoRA matrices; default all seven, or as in the LoRA folder
        lora_plus_ratio: how many times the learning rate of the matrices B is that of A (LoRA+)
        merge: write a whole Hugging Face folder, LoRA merged in, instead of the LoRA weights alone
        seed: seed of the split, the order and the LoRA weights
        system_prompt: put the adapter's system prompt first, as in training with RL
        chat_template: put prompts through the tokenizer's chat template, once
        env_id: the environment that the system prompt is about
    """
    check_seed(seed)
    if not 0 < lora_plus_ratio < math.inf:
        raise ValueError(f"--lora-plus-ratio: must be above 0, not {lora_plus_ratio}")
    if batch_size < 1:
        raise ValueError(f"--batch-size: must be 1 or more, not {batch_size}")
    if epochs < 0 or not 0 < held_out <= 1 or not 0 < learning_rate < math.inf:
        raise ValueError("--epochs, --held-out, --learning-rate: must be 0 or more, in (0, 1], and above 0")
    if epochs and held_out == 1:
        raise ValueError("--held-out: 1 leaves nothing to train on; use --epochs 0 to measure only")
    if out is None and (epochs or merge):
        raise ValueError("--out: is needed to keep the weights; use --epochs 0 without --merge to measure only")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists; give a folder that does not")
    examples = read_examples(data)
    told = about(make_env(env_id, 1).game) if system_prompt else ""
    adapter = open_adapter(
        "--model", model, seed, system=told, chat_template=chat_template,
        rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=lora_targets,
    )  # fmt: skip
    if out is not None and not out.exists():
        try:
            out.mkdir(parents=True)  # can it be made? Later all that is trained would be lost
            out.rmdir()
        except OSError as error:
            raise ValueError(f"--out: cannot make {out}: {first_line(error)}") from None
    console = Console(stderr=True)
    shown = Progress(console=console, transient=True, disable=not console.is_terminal)
    with naming("--model, --data"), shown as progress:
        task = progress.add_task("fine-tuning", total=None)
        report = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        tuned = adapter.finetune(
            examples, jax.random.key(seed), epochs, learning_rate, held_out, batch_size, lora_plus_ratio, report=report
        )
    if out is not None:
        (adapter.export if merge else adapter.save)(out)
    print(json.dumps(tuned | {"cut_prompts": adapter.cut_prompts, "cut_responses": adapter.cut_responses}))


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0, or 2 for input that can't work."""
    use_compilation_cache()
    commands = {"generate": generate_command, "sft": sft_command}
    return exit_code(lambda: tyro.extras.subcommand_cli_from_dict(commands, args=argv))


if __name__ == "__main__":
    sys.exit(main())
