"""The adapter: a small language model that reads a situation and how well earlier advice was understood, and writes an
analysis for the LLM. RL's findings come back to it as fine-tuning data.

    caption, last sub-goals, score -> adapter_prompt -> Adapter.analyse -> one line of text for the LLM
    (prompt, analysis) pairs that worked -> Adapter.finetune -> LoRA weights

Read it top down: the prompt, the model (a Llama-shaped decoder), its Hugging Face folder, generation, fine-tuning, the
`Adapter` that ties them together, and the default model: small enough to be trained from scratch within a minute, on
text that `write_analysis` makes up from captions. Host code except for the three jitted functions `generate`,
`measure`, `sft_step` (and `pretrain_step`). Every weight is stacked over layers and scanned; NNX defines the
model, and is split once: everything else works on plain dicts of arrays.
"""

import dataclasses
import math
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from envs import vocabulary as words
from envs.vocabulary import BASIC_SUB_GOALS, SUB_GOALS

Tree = dict[str, Any]  # a nested dict of arrays

SYSTEM_PROMPT = (
    "You watch a player who learns to survive in an open world. From the situation and from how well the player "
    "understood the last advice, write a short analysis for the guide who advises the player."
)
INSTRUCTION = "Write a short analysis for the guide."
UNKNOWN_SCORE = "Comprehension score: not known yet."

LENGTH_BUCKET = 64  # prompts are padded to a multiple of it, so that few lengths are ever compiled
BATCH_BUCKETS = (8, 16, 32, 64)  # and batches to one of these; more prompts than the last go in several batches
SFT_ROWS = 8  # sequences in a fine-tuning batch
HELD_OUT = 0.1  # share of the fine-tuning examples that only measures
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # what LoRA adapts

# Adam's share of a step; the learning rate is multiplied in by `sft_step`, where it is an argument.
SFT_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, weight_decay=0.0))


def adapter_prompt(caption: str, sub_goals: Sequence[int], comprehension: float | None) -> str:
    """The user turn: a caption (envs.captions), the last sub-goals (indices into SUB_GOALS), the score in [0, 1]."""
    score = UNKNOWN_SCORE if comprehension is None else f"Comprehension score: {comprehension:.2f}."
    return f"{caption}\nPrevious sub-goals: {words.sub_goals_text(tuple(sub_goals))}.\n{score}\n{INSTRUCTION}"


# ----------------------------------------------------------------------------------------------------------- the model


@dataclasses.dataclass(frozen=True)
class LmConfig:
    """Shape of a decoder. Frozen and hashable: part of jit's cache key. The names are HF's."""

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
    rope_theta: float = 10000.0
    # (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings) of Llama 3's stretched rope
    rope_llama3: tuple[float, float, float, float] | None = None


class Lora(nnx.Variable):
    """A trainable low-rank factor. Not flax's LoRAParam: that is a Param, so a filter on Param would catch both."""


def param_shapes(config: LmConfig) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of the base weights: matrices (in, out), those of the layers stacked on a leading axis."""
    c, num = config, config.num_hidden_layers
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {
        "embed": (c.vocab_size, c.hidden_size),
        "norm": (c.hidden_size,),
        "attention_norm": (num, c.hidden_size),
        "mlp_norm": (num, c.hidden_size),
        "q": (num, c.hidden_size, queries),
        "k": (num, c.hidden_size, keys),
        "v": (num, c.hidden_size, keys),
        "o": (num, queries, c.hidden_size),
        "gate": (num, c.hidden_size, c.intermediate_size),
        "up": (num, c.hidden_size, c.intermediate_size),
        "down": (num, c.intermediate_size, c.hidden_size),
    }
    return shapes if c.tie_word_embeddings else shapes | {"head": (c.hidden_size, c.vocab_size)}


def init_params(config: LmConfig, key: jax.Array) -> Tree:
    """Random base weights, f32: variance 1 / inputs, embeddings smaller. Larger than the usual 0.02 of large models,
    with which a model this small takes far longer to learn to copy from its prompt."""
    shapes = param_shapes(config)
    params = {}
    for key_param, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        std = 0.05 if name == "embed" else 1 / math.sqrt(shape[-2]) if "norm" not in name else 0.0
        params[name] = jnp.ones(shape) if "norm" in name else std * jax.random.normal(key_param, shape)
    return params


def init_lora(config: LmConfig, rank: int, key: jax.Array) -> Tree:
    """LoRA factors, f32: A (L, in, rank) random, B (L, rank, out) zero, so that it starts as the base."""
    shapes, lora = param_shapes(config), {}
    for key_a, name in zip(jax.random.split(key, len(PROJECTIONS)), PROJECTIONS, strict=True):
        num, inputs, outputs = shapes[name]
        lora[f"{name}_a"] = jax.random.normal(key_a, (num, inputs, rank)) / math.sqrt(inputs)
        lora[f"{name}_b"] = jnp.zeros((num, rank, outputs))
    return lora


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x (B, T, D) scaled to unit root mean square, times weight (D,); in f32, as in HF."""
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return weight[None, None] * scaled.astype(x.dtype)


def rope_frequencies(config: LmConfig) -> np.ndarray:
    """(head_dim / 2,) radians per position. Llama 3 slows the long wavelengths down by `factor`."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_llama3 is None:
        return frequencies
    factor, low, high, original = config.rope_llama3
    turns = original * frequencies / (2 * np.pi)  # within the context of the original training
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """RoPE on x (B, T, H, hd) by angles (B, T, hd/2), pairing i with i + hd/2: HF's layout, not the paper's."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def project(x: jax.Array, layer: Tree, name: str, lora_scale: float) -> jax.Array:
    """x (B, T, in) -> (B, T, out), with LoRA's correction where the layer has one."""
    y = x @ layer[name]
    if f"{name}_a" in layer:
        a, b = layer[f"{name}_a"].astype(x.dtype), layer[f"{name}_b"].astype(x.dtype)
        y = y + lora_scale * (x @ a @ b)
    return y


class Decoder(nnx.Module):
    """Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU. `lora` is {} or what `init_lora` makes."""

    def __init__(self, config: LmConfig, params: Tree, lora: Tree, lora_scale: float = 1.0) -> None:
        self.config, self.lora_scale = config, lora_scale
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})
        self.lora = nnx.Dict({name: Lora(value) for name, value in lora.items()})

    def __call__(self, tokens: jax.Array, starts: jax.Array, shared: Any = 0, cache: Any = None, index: Any = 0) -> Any:
        """tokens (B, T) -> hidden states (B, T, D) and the cache.

        `starts` (B, T) is the column at which each token's own text begins. It sees columns starts..itself, and its
        position is counted from there. It also sees the first `shared` (B, T) columns, as if they came before its own
        text. One mechanism for left-padded prompts and for rows of several texts that begin alike (`pack`).
        `cache`: (keys, values), each (L, B, S, KV, hd), of which columns index..index+T are written; None: no cache.
        """
        columns = index + jnp.arange(tokens.shape[1])  # (T,)
        seen = jnp.arange(tokens.shape[1] if cache is None else cache[0].shape[2])  # (S,)
        shared = jnp.broadcast_to(shared, starts.shape)
        mask = (seen[None, None] >= starts[:, :, None]) | (seen[None, None] < shared[:, :, None])
        mask = mask & (seen[None, None] <= columns[None, :, None])  # (B, T, S)
        frequencies = jnp.asarray(rope_frequencies(self.config), jnp.float32)
        angles = (columns[None] - starts + shared)[:, :, None] * frequencies[None, None]  # (B, T, hd/2)

        def body(carry: Any, layer: Tree) -> Any:
            x, cache, depth = carry
            mixed, cache = self.attend(layer, x, angles, mask, cache, depth, index)
            return (self.transform(layer, x + mixed), cache, depth + 1), None

        x = self.params["embed"][...][tokens]  # (B, T, D)
        layers = {name: value[...] for name, value in self.params.items() if name not in ("embed", "norm", "head")}
        layers |= {name: value[...] for name, value in self.lora.items()}
        # The cache is carried, not scanned over: as xs and ys each layer's part would be copied twice a token.
        (x, cache, _), _ = jax.lax.scan(body, (x, cache, jnp.int32(0)), layers)
        return rms_norm(x, self.params["norm"][...], self.config.rms_norm_eps), cache

    def attend(self, layer: Tree, x: jax.Array, angles: Any, mask: Any, cache: Any, depth: Any, index: Any) -> Any:
        """The attention half of a layer: what to add to x (B, T, D), and the cache with this layer's entries."""
        c, (batch, length, _) = self.config, x.shape
        y = rms_norm(x, layer["attention_norm"], c.rms_norm_eps)
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        q, k, v = (
            project(y, layer, name, self.lora_scale).reshape(batch, length, num, c.head_dim)
            for name, num in heads.items()
        )
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            cache = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (depth, 0, index, 0, 0))
                for old, new in zip(cache, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(both, depth, keepdims=False) for both in cache)
        # Where the mask hides all (padding), this averages everything: finite, and nothing reads it.
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        return project(y.reshape(batch, length, -1), layer, "o", self.lora_scale), cache

    def transform(self, layer: Tree, x: jax.Array) -> jax.Array:
        """The SwiGLU half of a layer, residual included."""
        y = rms_norm(x, layer["mlp_norm"], self.config.rms_norm_eps)
        gate, up = (project(y, layer, name, self.lora_scale) for name in ("gate", "up"))
        return x + project(jax.nn.silu(gate) * up, layer, "down", self.lora_scale)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., D) -> (..., V), f32."""
        head = self.params["embed"][...].T if self.config.tie_word_embeddings else self.params["head"][...]
        return (hidden @ head).astype(jnp.float32)


def make_decoder(config: LmConfig, params: Tree, lora: Tree, lora_scale: float = 1.0) -> tuple[Any, Tree, Tree]:
    """(graphdef, base, lora): NNX's split, the two states as plain dicts. `nnx.merge(*these)` is the model again."""
    graphdef, lora_state, base_state = nnx.split(Decoder(config, params, lora, lora_scale), Lora, ...)
    return graphdef, nnx.to_pure_dict(base_state), nnx.to_pure_dict(lora_state)


# ---------------------------------------------------------------------------------------- the Hugging Face model folder


def import_transformers() -> Any:
    """Late, as it takes two seconds, and quiet, as it warns that there is no torch."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def tensor_names(config: LmConfig) -> dict[str, tuple[str, int | None]]:
    """HF tensor name -> (our name, layer or None). The one place that knows a checkpoint's names."""
    names: dict[str, tuple[str, int | None]] = {
        "model.embed_tokens.weight": ("embed", None),
        "model.norm.weight": ("norm", None),
    }
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ("head", None)
    parts = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    parts |= {f"self_attn.{name}_proj": name for name in ("q", "k", "v", "o")}
    parts |= {f"mlp.{name}_proj": name for name in ("gate", "up", "down")}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{theirs}.weight": (ours, i) for theirs, ours in parts.items()}
    return names


def is_ignored(name: str, config: LmConfig) -> bool:
    """Tensors that some checkpoints carry and that say nothing: rope tables, a copy of tied embeddings."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def is_transposed(name: str) -> bool:
    """torch keeps a dense layer's weight as (out, in); we as (in, out). `name` is ours."""
    return name == "head" or name in PROJECTIONS


def read_config(folder: Path) -> tuple[LmConfig, tuple[int, ...]]:
    """The model's shape and its end tokens, from config.json. ValueError for what this file cannot run."""
    hf = import_transformers().AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if hf.model_type != "llama":
        raise ValueError(f"its model_type is {hf.model_type!r}, and only 'llama' is supported")
    if hf.hidden_act != "silu" or hf.attention_bias or hf.mlp_bias:
        raise ValueError("only hidden_act 'silu' without biases is supported")
    rope = hf.rope_parameters
    stretch = None
    if rope["rope_type"] == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        stretch = tuple(float(rope[key]) for key in keys)
    elif rope["rope_type"] != "default":
        raise ValueError(f"its rope_type is {rope['rope_type']!r}, and only 'default' and 'llama3' are supported")
    fields = {f.name: getattr(hf, f.name) for f in dataclasses.fields(LmConfig) if not f.name.startswith("rope")}
    fields["head_dim"] = hf.head_dim or hf.hidden_size // hf.num_attention_heads
    config = LmConfig(**fields, rope_theta=float(rope["rope_theta"]), rope_llama3=stretch)
    ends = hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id]
    return config, tuple(end for end in ends if end is not None)


def read_params(folder: Path, config: LmConfig) -> Tree:
    """Base weights from model.safetensors. ValueError for missing, left-over and misshapen tensors.

    f32 on a CPU, where bf16 is slower, and wherever the file has f32; otherwise bf16.
    """
    from safetensors.numpy import load_file

    tensors = load_file(str(folder / "model.safetensors"))
    tensors = {name: value for name, value in tensors.items() if not is_ignored(name, config)}
    names = tensor_names(config)
    for problem, difference in (("lacks", names.keys() - tensors), ("has unknown", tensors.keys() - names)):
        if difference:
            raise ValueError(f"model.safetensors {problem} {len(difference)} tensors, such as {min(difference)}")
    wide = jax.default_backend() == "cpu" or all(value.dtype == np.float32 for value in tensors.values())
    shapes = param_shapes(config)
    params = {name: np.empty(shape, np.float32 if wide else jnp.bfloat16) for name, shape in shapes.items()}
    for theirs, (ours, layer) in names.items():
        value = tensors[theirs].T if is_transposed(ours) else tensors[theirs]
        target = params[ours] if layer is None else params[ours][layer]
        if value.shape != target.shape:
            raise ValueError(f"{theirs} is {tensors[theirs].shape}, which does not fit config.json")
        target[...] = value
    return {name: jnp.asarray(value) for name, value in params.items()}


def write_params(folder: Path, config: LmConfig, params: Tree) -> None:
    """The inverse of `read_params`: model.safetensors with HF's names and layout."""
    from safetensors.numpy import save_file

    tensors = {}
    for theirs, (ours, layer) in tensor_names(config).items():
        value = np.asarray(params[ours] if layer is None else params[ours][layer])
        tensors[theirs] = np.ascontiguousarray(value.T if is_transposed(ours) else value)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_config(folder: Path, config: LmConfig, eos_token_id: int) -> None:
    """config.json of model_type llama. Of rope, only the default kind."""
    shape = {name: value for name, value in dataclasses.asdict(config).items() if not name.startswith("rope")}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    ends = {"bos_token_id": None, "eos_token_id": eos_token_id}
    hf = import_transformers().LlamaConfig(**shape, **ends, rope_parameters=rope, dtype="float32")
    hf.architectures = ["LlamaForCausalLM"]
    hf.save_pretrained(str(folder))


# ---------------------------------------------------------------------------------------------------------- generation


def left_pad(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> tokens (B, T), starts (B,), both padded to a bucket. Empty rows start at the last column."""
    length = LENGTH_BUCKET * math.ceil(max(len(text) for text in texts) / LENGTH_BUCKET)
    batch = next(size for size in BATCH_BUCKETS if size >= len(texts))
    tokens = np.zeros((batch, length), np.int32)
    starts = np.full(batch, length - 1, np.int32)
    for i, text in enumerate(texts):
        tokens[i, length - len(text) :] = text
        starts[i] = length - len(text)
    return tokens, starts


def sample_token(logits: jax.Array, row_keys: jax.Array, step: jax.Array, temperature: jax.Array) -> jax.Array:
    """logits (B, V) -> tokens (B,): greedy at temperature 0. A key per row: its text ignores the batch."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
    drawn = jax.vmap(jax.random.categorical)(keys, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"))
def generate(
    graphdef: Any, base: Tree, lora: Tree, tokens: jax.Array, starts: jax.Array, live: jax.Array, rows: jax.Array,
    eos: jax.Array, key: jax.Array, temperature: jax.Array, max_new_tokens: int,
) -> jax.Array:  # fmt: skip
    """Left-padded prompts tokens (B, P), starts (B,) -> new tokens (B, max_new_tokens), eos[0] after the end.

    Stops when every row has met one of `eos` (E,). Rows that are not `live` (B,) have ended from the start; `rows`
    (B,) numbers them for their random keys.
    """
    model = nnx.merge(graphdef, lora, base)
    config, (batch, length) = model.config, tokens.shape
    shape = (config.num_hidden_layers, batch, length + max_new_tokens, config.num_key_value_heads, config.head_dim)
    dtype = base["params"]["embed"].dtype
    empty = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    hidden, cache = model(tokens, jnp.broadcast_to(starts[:, None], tokens.shape), 0, empty)

    def unfinished(carry: Any) -> jax.Array:
        return (carry[0] < max_new_tokens) & ~jnp.all(carry[1])

    def body(carry: Any) -> Any:
        step, done, logits, cache, out = carry
        token = jnp.where(done, eos[0], sample_token(logits, row_keys, step, temperature))
        done = done | jnp.any(token[:, None] == eos[None], -1)
        hidden, cache = model(token[:, None], starts[:, None], 0, cache, length + step)
        return step + 1, done, model.logits(hidden[:, 0]), cache, out.at[:, step].set(token)

    out = jnp.full((batch, max_new_tokens), eos[0], jnp.int32)
    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), ~live, model.logits(hidden[:, -1]), cache, out))[-1]


def one_line(text: str) -> str:
    """White space collapsed; control characters and halves of characters removed."""
    text = " ".join(text.split())
    return "".join(c for c in text if unicodedata.category(c)[0] != "C" and c != "\ufffd").strip()


# --------------------------------------------------------------------------------------------------------- fine-tuning


def pack(groups: Sequence[Sequence[tuple[list[int], list[int]]]], length: int) -> dict[str, np.ndarray]:
    """Groups of (prompt tokens, response tokens) -> one row of `length` columns a group.

    What all prompts of a group begin with is stored once, and its texts go on from there unseen by each other.
    tokens, starts, shared (R, length) int32 as in `Decoder`; weights (R, length) f32: 1 for the tokens of responses.
    What does not fit is left out, down to whole texts; ValueError if not even the first one fits.
    """
    packed = {name: np.zeros((len(groups), length), np.int32) for name in ("tokens", "starts", "shared")}
    packed["weights"] = np.zeros((len(groups), length), np.float32)
    for row, group in enumerate(groups):
        prefix = os.path.commonprefix([prompt for prompt, _ in group]) if len(group) > 1 else []
        end = len(prefix)
        packed["tokens"][row, :end] = prefix[:length]
        for i, (prompt, response) in enumerate(group):
            text = [*prompt[len(prefix) :], *response]
            if end + len(text) > length:
                if i == 0:
                    raise ValueError(f"a text of {end + len(text)} tokens does not fit a row of {length}")
                break
            columns = slice(end, end + len(text))
            packed["tokens"][row, columns] = text
            packed["starts"][row, columns] = end
            packed["shared"][row, columns] = len(prefix)
            end += len(text)
            packed["weights"][row, end - len(response) : end] = 1
    return packed


def batches(packed: dict[str, np.ndarray], size: int, order: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The rows in this order, `size` at a time; the last batch is filled up with rows of weight 0."""
    parts = []
    for i in range(0, len(order), size):
        rows = order[i : i + size]
        parts.append({k: np.pad(v[rows], ((0, size - len(rows)), (0, 0))) for k, v in packed.items()})
    return parts


def response_nll(graphdef: Any, base: Tree, lora: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p over the tokens that count (nats), and how many they are."""
    model = nnx.merge(graphdef, lora, base)
    hidden, _ = model(batch["tokens"][:, :-1], batch["starts"][:, :-1], batch["shared"][:, :-1])
    logits, targets, weights = model.logits(hidden), batch["tokens"][:, 1:], batch["weights"][:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)  # (B, T - 1)
    return jnp.sum(nll * weights), jnp.sum(weights)


def mean_nll(graphdef: Any, base: Tree, lora: Tree, batch: Tree) -> jax.Array:
    """Nats per token that counts; 0 where none does."""
    total, count = response_nll(graphdef, base, lora, batch)
    return total / jnp.maximum(count, 1.0)


measure = jax.jit(response_nll, static_argnames="graphdef")


@partial(jax.jit, static_argnames="graphdef")
def sft_step(graphdef: Any, base: Tree, lora: Tree, optimizer: Any, batch: Tree, learning_rate: jax.Array) -> Any:
    """One step on the LoRA weights. Returns lora, optimizer, the loss before the step, and whether all is finite."""
    loss, gradient = jax.value_and_grad(mean_nll, argnums=2)(graphdef, base, lora, batch)
    updates, optimizer = SFT_OPTIMIZER.update(gradient, optimizer, lora)
    lora = jax.tree.map(lambda weight, update: weight + learning_rate * update, lora, updates)
    return lora, optimizer, loss, jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(lora))


# --------------------------------------------------------------------------------------------------------- the adapter


class NoAdapter:
    """`--adapter none`: says nothing, learns nothing."""

    def analyse(
        self, prompts: Sequence[str], key: jax.Array, temperature: float = 1.0, max_new_tokens: int = 48
    ) -> list[str]:
        return [""] * len(prompts)

    def finetune(self, examples: Sequence[tuple[str, str]], key: jax.Array, **settings: float) -> dict[str, float]:
        return {}

    def warm_up(self, prompts: Sequence[str], fine_tuning: bool) -> None:
        pass

    def state(self) -> Tree:
        return {}

    def load_state(self, tree: Tree) -> None:
        pass


class Adapter:
    """A decoder with its tokenizer and LoRA weights. Made by `load_adapter`."""

    def __init__(
        self, config: LmConfig, params: Tree, lora: Tree, lora_scale: float, tokenizer: Any, eos: Sequence[int]
    ) -> None:
        self.config, self.tokenizer, self.eos = config, tokenizer, tuple(eos)
        self.graphdef, self.base, self.lora = make_decoder(config, params, lora, lora_scale)
        self.optimizer = SFT_OPTIMIZER.init(self.lora)

    def encode_prompt(self, prompt: str, room: int) -> list[int]:
        """Tokens of system prompt and user turn, up to where the answer starts; of the last `room` only."""
        turns = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
        if self.tokenizer.chat_template is None:
            text = "".join(f"{turn['content']}\n\n" for turn in turns)  # a base model: plain text
        else:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)[-room:]

    def encode_example(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Prompt and response tokens, an end token last, that fit the model's context together."""
        limit = self.config.max_position_embeddings
        reply = self.tokenizer.encode(response, add_special_tokens=False)[: limit // 2] + [self.eos[0]]
        return self.encode_prompt(prompt, limit - len(reply)), reply

    def analyse(
        self, prompts: Sequence[str], key: jax.Array, temperature: float = 1.0, max_new_tokens: int = 48
    ) -> list[str]:
        """An analysis for each prompt (`adapter_prompt`): stripped, one line, possibly empty. Temperature 0 is greedy.

        Compiles once per bucket of lengths and batch sizes. ValueError if max_new_tokens is not within the context.
        """
        room = self.config.max_position_embeddings - max_new_tokens
        if max_new_tokens < 1 or room < 1:
            most = self.config.max_position_embeddings - 1
            raise ValueError(f"--adapter: max_new_tokens must be 1 to {most}, not {max_new_tokens}")
        eos = jnp.asarray(self.eos, jnp.int32)
        encoded = [self.encode_prompt(prompt, room) for prompt in prompts]
        texts: list[str] = []
        for first in range(0, len(encoded), BATCH_BUCKETS[-1]):
            part = encoded[first : first + BATCH_BUCKETS[-1]]
            tokens, starts = left_pad(part)
            rows = np.arange(len(tokens))
            out = generate(
                self.graphdef, self.base, self.lora, tokens, starts, rows < len(part), first + rows, eos, key,
                jnp.float32(temperature), max_new_tokens,
            )  # fmt: skip
            texts += [self.decode(row) for row in np.asarray(out)[: len(part)].tolist()]
        return texts

    def decode(self, tokens: Sequence[int]) -> str:
        """Text up to the first end token."""
        end = next((i for i, token in enumerate(tokens) if token in self.eos), len(tokens))
        return one_line(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))

    def finetune(
        self, examples: Sequence[tuple[str, str]], key: jax.Array, epochs: int = 2, learning_rate: float = 2e-4
    ) -> dict[str, float]:
        """Fine-tunes the LoRA weights on (prompt, response) pairs; the base stays as it is. {} without examples.

        A tenth of the examples (at least one) is held out to measure `nll_before` and `nll_after`, nats per response
        token; with fewer than four examples those two are measured on the training examples. `sft_loss` is the mean
        training loss. What is not finite ends the fine-tuning; the weights before that step stay.
        """
        if not examples:
            return {}
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        texts = [self.encode_example(*examples[i]) for i in rng.permutation(len(examples))]
        num_held = max(1, round(HELD_OUT * len(texts))) if len(texts) >= 4 else 0
        length = LENGTH_BUCKET * math.ceil(max(len(a) + len(b) for a, b in texts) / LENGTH_BUCKET)
        training = pack([[text] for text in texts[num_held:]], length)
        held_out = pack([[text] for text in texts[:num_held]], length) if num_held else training
        before, losses, finite = self.nll(held_out), [], True
        for _ in range(epochs):
            for batch in batches(training, SFT_ROWS, rng.permutation(len(training["tokens"]))) if finite else ():
                lora, optimizer, loss, finite = sft_step(
                    self.graphdef, self.base, self.lora, self.optimizer, batch, jnp.float32(learning_rate)
                )
                if not finite:
                    break
                self.lora, self.optimizer = lora, optimizer
                losses.append(float(loss))
        after = self.nll(held_out)
        loss = float(np.mean(losses)) if losses else before
        return {"sft_loss": loss, "nll_before": before, "nll_after": after, "examples": len(examples)}

    def warm_up(self, prompts: Sequence[str], fine_tuning: bool) -> None:
        """Compiles what prompts like these will need, so that it counts as compilation and not as training."""
        if not prompts:
            return
        analyses = self.analyse(prompts, jax.random.key(0))
        if fine_tuning:
            learned = self.lora, self.optimizer
            self.finetune([(prompts[0], analyses[0])], jax.random.key(0), epochs=1, learning_rate=0.0)
            self.lora, self.optimizer = learned

    def nll(self, packed: dict[str, np.ndarray]) -> float:
        """Nats per response token over packed rows."""
        parts = batches(packed, SFT_ROWS, np.arange(len(packed["tokens"])))
        sums = [measure(self.graphdef, self.base, self.lora, batch) for batch in parts]
        return float(sum(total for total, _ in sums) / sum(count for _, count in sums))

    def state(self) -> Tree:
        """What fine-tuning changes: LoRA weights and the optimizer's numbered leaves, for any checkpointer."""
        leaves = jax.tree.leaves(self.optimizer)
        return {"lora": dict(self.lora["lora"]), "optimizer": {f"{i:03d}": leaf for i, leaf in enumerate(leaves)}}

    def load_state(self, tree: Tree) -> None:
        """Takes what `state` gave. ValueError if it comes from another model or LoRA rank."""
        own = self.state()
        if jax.tree.structure(own) != jax.tree.structure(tree) or (
            list(map(jnp.shape, jax.tree.leaves(own))) != list(map(jnp.shape, jax.tree.leaves(tree)))
        ):
            raise ValueError("--adapter: the checkpoint's LoRA weights do not fit; give the run's own model")
        tree = jax.tree.map(lambda mine, new: jnp.asarray(new, mine.dtype), own, tree)
        self.lora = {"lora": tree["lora"]}
        leaves = [tree["optimizer"][name] for name in sorted(tree["optimizer"])]
        self.optimizer = jax.tree.unflatten(jax.tree.structure(self.optimizer), leaves)


def load_adapter(folder: str | Path, lora_rank: int = 8, lora_alpha: float = 16, seed: int = 0) -> Adapter:
    """The adapter in a Hugging Face model folder (config.json, model.safetensors, tokenizer), with fresh LoRA weights.

    ValueError, one line that names --adapter, for a folder that is missing, damaged or of an unsupported kind.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--adapter: there is no folder {folder}; give a Hugging Face model folder, or none")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"--adapter: {folder} has no {name}; give a complete Hugging Face model folder")
    if lora_rank < 1:
        raise ValueError(f"--adapter: the LoRA rank must be at least 1, not {lora_rank}")
    try:
        config, ends = read_config(folder)
        params = read_params(folder, config)
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        ends = tuple(dict.fromkeys(end for end in (tokenizer.eos_token_id, *ends) if end is not None))
        if not ends:
            raise ValueError("neither its config nor its tokenizer names an end token")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its model {config.vocab_size}")
    except Exception as error:  # three libraries parse these files, each with its own errors
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--adapter: cannot use {folder}: {line}") from error
    lora = init_lora(config, lora_rank, jax.random.key(seed))
    return Adapter(config, params, lora, lora_alpha / lora_rank, tokenizer, ends)


# ------------------------------------------------------------------------------------------ the default model's teacher

# What a caption must mention before a sub-goal is suggested. Only what the words themselves name: which of the possible
# sub-goals is best is for RL to find out, so the teacher draws among them blindly.
NEEDS = {
    "chop tree": ("see tree",), "place crafting table": ("hold wood",), "attack cow": ("see cow",),
    "chop grass": ("face grass",), "drink water": ("see water",), "make wood pickaxe": ("see crafting table",),
    "make wood sword": ("see crafting table",), "place plant": ("hold sapling",), "attack zombie": ("see zombie",),
    "mine stone": ("see stone",), "place stone": ("hold stone",), "eat plant": ("see ripe plant",),
    "attack skeleton": ("see skeleton",), "make stone pickaxe": ("see crafting table", "hold stone"),
    "make stone sword": ("see crafting table", "hold stone"), "sleep": (), "place furnace": ("hold stone",),
    "mine coal": ("see coal",), "mine iron": ("see iron",), "mine diamond": ("see diamond",),
    "make iron pickaxe": ("see furnace", "hold iron"), "make iron sword": ("see furnace", "hold iron"),
}  # fmt: skip
GERUNDS = {
    "chop": "chopping", "place": "placing", "attack": "attacking", "drink": "drinking", "make": "making",
    "mine": "mining", "eat": "eating", "sleep": "sleeping",
}  # fmt: skip
GOOD, POOR = 0.6, 0.35  # comprehension scores from which advice counts as understood, and up to which as not

# Sentences. {last}: a sub-goal advised last, in a form that is not the sub-goal's own name, lest it read as advice.
UNDERSTOOD = {
    "good": ("Advice on {last} was followed well.", "The player understood {last} well.", "It did well at {last}."),
    "fair": ("Advice on {last} was partly followed.", "The player half understood {last}.", "It did fairly at {last}."),
    "poor": ("Advice on {last} was not followed.", "The player did not understand {last}.", "It did badly at {last}."),
    "unknown": ("How well {last} went is unknown.", "Advice on {last} has no score yet.", "No score for {last} yet."),
}
NO_ADVICE = ("There was no advice before.", "No advice was given before.")
SUGGESTIONS = (
    "It should {goals} next.", "The player should {goals} now.", "Next it could {goals}.", "A good plan is to {goals}.",
    "Try to {goals}.",
)  # fmt: skip
ARTICLES = {"iron": "", "water": "", "stone": "", "coal": "", "lava": "", "arrow": "an "}  # all others: "a "
LACKED = ("wood", "stone", "coal", "iron", "sapling", "wood pickaxe", "stone pickaxe", "wood sword")


def read_caption(caption: str) -> dict[str, Any]:
    """What a caption says: sights {name: where}, held {item: count, 1 for tools}, vitals {name: n}, ..."""
    parts = dict(re.findall(r"^(You see|Facing|Inventory|Vitals|Unlocked)[^:]*: (.*)\.$", caption, re.M))
    held = {}
    for item in parts.get("Inventory", "nothing").split(", "):
        count, _, name = item.partition(" ")
        held |= {name: int(count)} if count.isdigit() else {item: 1}
    held.pop("nothing", None)
    return {
        "sights": dict(re.findall(r"([a-z][a-z ]*) \(([^)]*)\)", parts.get("You see", ""))),
        "facing": parts.get("Facing", ""),
        "held": held,
        "vitals": {name: int(n) for name, n in re.findall(r"([a-z]+) (\d+)", parts.get("Vitals", ""))},
        "dark": "It is dark." in caption,
        "asleep": "The player is asleep." in caption,
        "enclosed": "The player is enclosed." in caption,
    }


def possible_sub_goals(caption: str) -> list[str]:
    """Basic sub-goals whose things the caption mentions (NEEDS)."""
    scene = read_caption(caption)
    mentioned = {f"see {name}" for name in scene["sights"]} | {f"hold {name}" for name in scene["held"]}
    mentioned |= {f"face {scene['facing']}"}
    return [goal for goal in BASIC_SUB_GOALS if mentioned.issuperset(NEEDS[goal])]


def true_statements(caption: str) -> tuple[list[str], list[str]]:
    """Sentences that hold according to the caption: (the pressing ones, all others)."""
    scene = read_caption(caption)
    pressing = [f"It is down to {name} {n}." for name, n in scene["vitals"].items() if n <= words.LOW]
    where = scene["sights"].get("zombie")
    if where and sum(int(n) for n in re.findall(r"\d+", where)) <= words.NEAR:
        pressing.append(f"A zombie is near ({where}).")
    pressing += [text for text, holds in (("It is dark.", scene["dark"]), ("It is asleep.", scene["asleep"])) if holds]
    others = ["It is enclosed."] if scene["enclosed"] else []
    for name, where in scene["sights"].items():
        others += [f"It sees {ARTICLES.get(name, 'a ')}{name} ({where})."]
    for name, n in scene["held"].items():
        tool = name.endswith(("pickaxe", "sword"))
        article = "an" if name.startswith("iron") else "a"
        others += [f"It has {article} {name}." if tool else f"It holds {n} {name}."]
    lacked = [name for name in LACKED if name not in scene["held"]]
    return pressing, others + [f"It has no {name}." for name in lacked[:2]]


def gerund(goal: str) -> str:
    """A basic sub-goal as a noun: "drink water" -> "drinking water"."""
    verb, _, thing = goal.partition(" ")
    return f"{GERUNDS[verb]} {thing}".strip()


def write_analysis(
    rng: np.random.Generator, caption: str, sub_goals: Sequence[int], comprehension: float | None
) -> str:
    """The teacher: how the last advice was understood, a fact or two of the caption, a sub-goal or two at random.

    Names literally only sub-goals whose things the caption mentions, and prefers none of them.
    """
    kind = "unknown"
    if comprehension is not None:
        kind = "good" if comprehension >= GOOD else "poor" if comprehension <= POOR else "fair"
    basic = [goal for goal in (SUB_GOALS[i] for i in sub_goals) if goal in NEEDS]
    last = "the plan"  # composite sub-goals only
    if basic:
        last = gerund(basic[rng.integers(len(basic))])
    sentences = [str(rng.choice(UNDERSTOOD[kind] if sub_goals else NO_ADVICE)).format(last=last)]
    pressing, others = true_statements(caption)
    facts = [str(rng.choice(pressing))] if pressing else []
    if others and (not facts or rng.random() < 0.5):
        facts.append(str(rng.choice(others)))
    goals = rng.permutation(possible_sub_goals(caption))[: rng.integers(1, 3)]
    sentences += [*facts, str(rng.choice(SUGGESTIONS)).format(goals=" and ".join(goals))]
    return " ".join(sentences)


# ---------------------------------------------------------------------------------------------------- the default model

DEFAULT_NAME = "adapter-tiny-v1"  # a change of the model, its text or its training must change this name
TINY = LmConfig(
    vocab_size=768, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
# The system prompt is left out: this model knows but one task, and would only pay for reading it.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}" + USER + "{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}" + ASSISTANT + "{{ m['content'] }}" + END + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)  # fmt: skip
PRETRAIN_STEPS = 420
PRETRAIN_ROWS, PRETRAIN_LENGTH = 4, 256
BRANCHES = 6  # made-up analyses of one caption, which is read but once for all of them
MUON_RATE, ADAM_RATE = 0.02, 4e-3


def default_adapter_folder() -> Path:
    """Where the default model is kept: in $RLADAPTER_CACHE, or ~/.cache/rladapter."""
    return Path(os.environ.get("RLADAPTER_CACHE") or "~/.cache/rladapter").expanduser() / DEFAULT_NAME


def phrases() -> list[str]:
    """What always reads the same is a token each, so that prompts are short, and a name is one thing to look up.

    With the space in front of it. "tree (" and "drink" are followed at once by what the model has to copy.
    """
    fixed = [
        "You see:", ".\nFacing:", ".\nInventory:", ".\nVitals (of 9):", ".\nIt is day. The player is awake.",
        ".\nIt is dark. The player is awake.", "\nUnlocked:", "\nPrevious sub-goals:", ".\nComprehension score: 0.",
        f".\n{UNKNOWN_SCORE}", f"\n{INSTRUCTION}",
    ]  # fmt: skip
    names = [*SUB_GOALS, *(name.replace("_", " ") for name in words.ACHIEVEMENTS), *map(gerund, BASIC_SUB_GOALS)]
    names += [f"{sight} (" for sight in words.SIGHTS] + [*words.VITALS, *words.INVENTORY]
    return list(dict.fromkeys(fixed + [f" {name}" for name in names]))


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of TINY's vocabulary at most, with its chat template, as transformers loads it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Words, single digits and punctuation, each with the space before it: "9" is the same token in 9 and 0.93.
    pieces = Regex(r" ?[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    literal = phrases()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY.vocab_size - len(literal),
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in literal])
    fast = import_transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = TINY.max_position_embeddings
    return fast


def made_up_examples(rng: np.random.Generator, caption: str, num: int) -> list[tuple[str, str]]:
    """`num` pairs of prompt and analysis for a caption, with random previous sub-goals and scores."""
    examples = []
    for _ in range(num):
        last = rng.choice(len(SUB_GOALS), rng.integers(0, 4), replace=False).tolist()
        score = None if rng.random() < 0.2 else float(rng.random())
        examples.append((adapter_prompt(caption, last, score), write_analysis(rng, caption, last, score)))
    return examples


def muon_dimensions(tree: Tree) -> Tree:
    """Which base weights Muon takes, (in, out) being their last two dimensions; None leaves the rest to Adam."""
    matrix = optax.contrib.MuonDimensionNumbers((1,), (2,))
    return {"params": {name: matrix if name in PROJECTIONS else None for name in tree["params"]}}


def pretrain_optimizer(steps: int) -> Any:
    """Muon, which learns to copy in fewer steps than Adam does, with warm-up and cosine decay."""
    warmup = min(30, steps // 2)
    muon, adam = (
        optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps, rate / 20) for rate in (MUON_RATE, ADAM_RATE)
    )
    optimizer = optax.contrib.muon(
        muon, adam_learning_rate=adam, adam_b2=0.98, muon_weight_dimension_numbers=muon_dimensions
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


@partial(jax.jit, static_argnames=("graphdef", "steps"), donate_argnames=("base", "optimizer"))
def pretrain_step(graphdef: Any, base: Tree, optimizer: Any, batch: Tree, steps: int) -> tuple[Tree, Any, jax.Array]:
    """One step on the base weights, of `steps` in all. Returns base, optimizer, and the loss before the step."""
    loss, gradient = jax.value_and_grad(mean_nll, argnums=1)(graphdef, base, {"lora": {}}, batch)
    updates, optimizer = pretrain_optimizer(steps).update(gradient, optimizer, base)
    return optax.apply_updates(base, updates), optimizer, loss


def train_default_adapter(
    captions: Sequence[str], folder: Path, seed: int = 0, progress: Callable[[int, int, float], None] | None = None,
    steps: int = PRETRAIN_STEPS,
) -> None:  # fmt: skip
    """Trains the default model on made-up analyses of these captions and writes `folder`, all of it or nothing.

    A minute is enough for the form of an analysis, and for what the score says, but not for copying: most facts and
    sub-goals it names are not the caption's. `steps` buys more, at 0.1 to 0.2 s each. The same captions and
    seed give the same model on the same machine. `progress` gets (step, steps, loss) every few steps. A folder that is
    there already is kept: whoever wrote it first, won. ValueError for no captions.
    """
    if not captions:
        raise ValueError("--adapter: the default model cannot be trained without captions")
    folder = Path(folder)
    if folder.exists():
        return
    rng = np.random.default_rng(seed)
    some = rng.permutation(len(captions))[:2000]
    tokenizer = train_tokenizer([" ".join(made_up_examples(rng, captions[i], 1)[0]) for i in some])
    config = dataclasses.replace(TINY, vocab_size=max(TINY.vocab_size, len(tokenizer)))
    params = init_params(config, jax.random.key(seed))
    adapter = Adapter(config, params, {}, 1.0, tokenizer, [tokenizer.eos_token_id])
    base, graphdef = adapter.base, adapter.graphdef
    optimizer = pretrain_optimizer(steps).init(base)
    queue: list[dict[str, np.ndarray]] = []
    for step in range(steps):
        if not queue:
            some = [captions[i] for i in rng.integers(len(captions), size=32 * PRETRAIN_ROWS)]
            groups = [[adapter.encode_example(*pair) for pair in made_up_examples(rng, c, BRANCHES)] for c in some]
            packed = pack(groups, PRETRAIN_LENGTH)
            queue = batches(packed, PRETRAIN_ROWS, np.arange(len(groups)))
        base, optimizer, loss = pretrain_step(graphdef, base, optimizer, queue.pop(), steps)
        if progress is not None and (step % 20 == 0 or step == steps - 1):
            progress(step + 1, steps, float(loss))
    write_folder(folder, config, base["params"], tokenizer)


def write_folder(folder: Path, config: LmConfig, params: Tree, tokenizer: Any) -> None:
    """A Hugging Face model folder, written beside its place, then renamed. If another process was first, its stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        write_config(draft, config, tokenizer.eos_token_id)
        tokenizer.save_pretrained(str(draft))
        write_params(draft, config, params)
        draft.chmod(0o755)  # mkdtemp's are private, and a cache may be shared
        draft.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
