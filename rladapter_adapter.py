"""The adapter: a small language model that reads a situation and how well earlier advice was understood, and writes an
analysis for the LLM. RL's findings come back to it as fine-tuning data.

    caption, last sub-goals, score -> adapter_prompt -> Adapter.analyse -> one line of text for the LLM
    (prompt, analysis) pairs that worked -> Adapter.finetune -> LoRA weights

    python rladapter_adapter.py generate --model Qwen/Qwen3-0.6B --prompt "What is Crafter?"
    python rladapter_adapter.py sft --model assets/adapter-tiny --data runs/NAME/guidance.jsonl --out tuned

Any Llama, Qwen2 or Qwen3 checkpoint in Hugging Face format will do (SmolLM2 and TinyLlama are Llamas). Read it top
down: the prompt, the model, its Hugging Face folder, generation, fine-tuning, the `Adapter` that ties them together,
the command line. Host code except for the jitted functions `read_prefix`, `generate`, `measure_nll`, `sft_step`. Every
weight is stacked over layers and scanned; NNX defines the model, and is split once: all else works on dicts of arrays.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from envs import vocabulary as words

Tree = dict[str, Any]  # a nested dict of arrays

SYSTEM_PROMPT = (
    "You watch a player who learns to survive in an open world. From the situation and from how well the player "
    "understood the last advice, write a short analysis for the guide who advises the player."
)
INSTRUCTION = "Write a short analysis for the guide."
UNKNOWN_SCORE = "Comprehension score: not known yet."

LENGTH_BUCKET = 64  # prompts are padded to a multiple of it, so that few lengths are ever compiled
BATCH_BUCKETS = (8, 16, 32, 64)  # and batches to one of these; more prompts than the last go in several batches
SFT_ROWS = 8  # sequences in a fine-tuning batch, which are padded to a multiple of LENGTH_BUCKET as well
HELD_OUT = 0.1  # share of the fine-tuning examples that only measures
HERE = Path(__file__).parent
MODEL_TYPES = ("llama", "qwen2", "qwen3")
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
    attention_bias: bool = False  # of q, k and v, as in Qwen2
    qk_norm: bool = False  # RMSNorm over each head of q and k, as in Qwen3
    rope_theta: float = 10000.0
    # (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings) of Llama 3's stretched rope
    rope_llama3: tuple[float, float, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not math.isfinite(self.alpha):
            raise ValueError(
                f"LoRA needs a rank of at least 1, a finite alpha and a dropout in [0, 1), not {self.rank}, "
                f"{self.alpha}, {self.dropout}"
            )
        if not self.targets or not set(self.targets) <= set(PROJECTIONS):
            raise ValueError(f"LoRA's targets are some of {', '.join(PROJECTIONS)}, not {' '.join(self.targets)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


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
    if c.attention_bias:
        shapes |= {"q_bias": (num, queries), "k_bias": (num, keys), "v_bias": (num, keys)}
    if c.qk_norm:
        shapes |= {"q_norm": (num, c.head_dim), "k_norm": (num, c.head_dim)}
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


def init_lora(config: LmConfig, lora: LoraConfig, key: jax.Array) -> Tree:
    """LoRA factors, f32: A (L, in, rank) random, B (L, rank, out) zero, so that it starts as the base."""
    shapes, factors = param_shapes(config), {}
    for name in lora.targets:
        num, inputs, outputs = shapes[name]
        key_a = jax.random.fold_in(key, PROJECTIONS.index(name))
        factors[f"{name}_a"] = jax.random.normal(key_a, (num, inputs, lora.rank)) / math.sqrt(inputs)
        factors[f"{name}_b"] = jnp.zeros((num, lora.rank, outputs))
    return factors


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x (..., D) scaled to unit root mean square, times weight (D,); in f32, as in HF."""
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return weight.reshape((1,) * (x.ndim - 1) + (-1,)) * scaled.astype(x.dtype)


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


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q (B, T, H, hd), k and v (B, KV, S, hd), mask (B, T, S) -> (B, T, H, hd). Each head of k serves H / KV of q.

    `jax.nn.dot_product_attention` wants k and v as (B, S, KV, hd), and transposes them for its matmuls: when decoding
    on a CPU it takes six times as long. Where the mask hides all (padding), everything is averaged: finite, and nothing
    reads it.
    """
    (batch, length, heads, size), groups = q.shape, k.shape[1]
    q = q.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, size)
    in_f32 = partial(jnp.einsum, preferred_element_type=jnp.float32)  # bf16 would round scores by a quarter
    scores = in_f32("bgqh,bgsh->bgqs", q, k).reshape(batch, groups, -1, length, k.shape[2]) / math.sqrt(size)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    y = in_f32("bgqs,bgsh->bgqh", weights.astype(v.dtype).reshape(batch, groups, -1, k.shape[2]), v)
    y = (y.reshape(batch, groups, -1, length, size) / weights.sum(-1, keepdims=True)).astype(v.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def project(x: jax.Array, layer: Tree, name: str, lora: LoraConfig, key: jax.Array | None) -> jax.Array:
    """x (B, T, in) -> (B, T, out), with bias and LoRA's correction where the layer has them; a key means dropout."""
    y = x @ layer[name]
    if f"{name}_bias" in layer:
        y = y + layer[f"{name}_bias"][None, None]
    if f"{name}_a" in layer:
        a, b = layer[f"{name}_a"].astype(x.dtype), layer[f"{name}_b"].astype(x.dtype)
        if key is not None and lora.dropout:
            keep = jax.random.bernoulli(jax.random.fold_in(key, PROJECTIONS.index(name)), 1 - lora.dropout, x.shape)
            x = jnp.where(keep, x / (1 - lora.dropout), 0)
        y = y + lora.scale * (x @ a @ b)
    return y


class Decoder(nnx.Module):
    """Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU. With Qwen2's biases or Qwen3's norms of q and k."""

    def __init__(self, config: LmConfig, params: Tree, lora: LoraConfig, factors: Tree) -> None:
        """factors: {} or what `init_lora` makes"""
        self.config, self.lora_config = config, lora
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})
        self.lora = nnx.Dict({name: Lora(value) for name, value in factors.items()})

    def __call__(
        self, tokens: jax.Array, starts: jax.Array, shared: Any = 0, cache: Any = None, index: Any = 0, key: Any = None
    ) -> Any:
        """tokens (B, T) -> hidden states (B, T, D) and the cache.

        `starts` (B, T) is the column at which each token's own text begins. It sees columns starts..itself, and its
        position is counted from there. It also sees the first `shared` (B, T) columns, as if they came before its own
        text. One mechanism for left-padded prompts that begin alike and for rows of several texts (`pack`).
        `cache`: (keys, values), each (L, B, KV, S, hd), of which columns index..index+T are written; None: no cache.
        `key`: of LoRA's dropout, in training.
        """
        columns = index + jnp.arange(tokens.shape[1])  # (T,)
        # Columns after the tokens need not be looked at, where it is known how many those are.
        seen = jnp.arange(index + tokens.shape[1] if isinstance(index, int) else cache[0].shape[3])  # (S,)
        shared = jnp.broadcast_to(shared, starts.shape)
        mask = (seen[None, None] >= starts[:, :, None]) | (seen[None, None] < shared[:, :, None])
        mask = mask & (seen[None, None] <= columns[None, :, None])  # (B, T, S)
        frequencies = jnp.asarray(rope_frequencies(self.config), jnp.float32)
        angles = (columns[None] - starts + shared)[:, :, None] * frequencies[None, None]  # (B, T, hd/2)

        def body(carry: Any, layer: Tree) -> Any:
            x, cache, depth = carry
            layer_key = None if key is None else jax.random.fold_in(key, depth)
            mixed, cache = self.attend(layer, x, angles, mask, cache, depth, index, layer_key)
            return (self.transform(layer, x + mixed, layer_key), cache, depth + 1), None

        x = self.params["embed"][...][tokens]  # (B, T, D)
        layers = {name: value[...] for name, value in self.params.items() if name not in ("embed", "norm", "head")}
        layers |= {name: value[...] for name, value in self.lora.items()}
        # The cache is carried, not scanned over: as xs and ys each layer's part would be copied twice a token.
        (x, cache, _), _ = jax.lax.scan(body, (x, cache, jnp.int32(0)), layers)
        return rms_norm(x, self.params["norm"][...], self.config.rms_norm_eps), cache

    def attend(
        self, layer: Tree, x: jax.Array, angles: Any, mask: Any, cache: Any, depth: Any, index: Any, key: Any
    ) -> Any:
        """The attention half of a layer: what to add to x (B, T, D), and the cache with this layer's entries."""
        c, (batch, length, _) = self.config, x.shape
        y = rms_norm(x, layer["attention_norm"], c.rms_norm_eps)
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        q, k, v = (
            project(y, layer, name, self.lora_config, key).reshape(batch, length, num, c.head_dim)
            for name, num in heads.items()
        )
        if c.qk_norm:
            q, k = rms_norm(q, layer["q_norm"], c.rms_norm_eps), rms_norm(k, layer["k_norm"], c.rms_norm_eps)
        q, k, v = rotate(q, angles), rotate(k, angles).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        if cache is not None:
            cache = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (depth, 0, 0, index, 0))
                for old, new in zip(cache, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(both, depth, keepdims=False) for both in cache)
        y = attention(q, *(part[:, :, : mask.shape[2]] for part in (k, v)), mask)
        return project(y.reshape(batch, length, -1), layer, "o", self.lora_config, key), cache

    def transform(self, layer: Tree, x: jax.Array, key: Any) -> jax.Array:
        """The SwiGLU half of a layer, residual included."""
        y = rms_norm(x, layer["mlp_norm"], self.config.rms_norm_eps)
        gate, up = (project(y, layer, name, self.lora_config, key) for name in ("gate", "up"))
        return x + project(jax.nn.silu(gate) * up, layer, "down", self.lora_config, key)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., D) -> (..., V), f32."""
        head = self.params["embed"][...].T if self.config.tie_word_embeddings else self.params["head"][...]
        return (hidden @ head).astype(jnp.float32)


def make_decoder(config: LmConfig, params: Tree, lora: LoraConfig, factors: Tree) -> tuple[Any, Tree, Tree]:
    """(graphdef, base, lora): NNX's split, the two states as plain dicts. `nnx.merge(graphdef, lora, base)` merges."""
    graphdef, lora_state, base_state = nnx.split(Decoder(config, params, lora, factors), Lora, ...)
    return graphdef, nnx.to_pure_dict(base_state), nnx.to_pure_dict(lora_state) or {"lora": {}}


# ---------------------------------------------------------------------------------------- the Hugging Face model folder


def import_transformers() -> Any:
    """Late, as it takes two seconds; without torch, which it loads where it finds it: that takes longer than all the
    rest; and quiet, as it warns that there is no torch."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
    try:
        import transformers
    finally:
        importlib.util.find_spec = find
    return transformers


def tensor_names(config: LmConfig) -> dict[str, tuple[str, int | None]]:
    """HF tensor name -> (our name, layer or None). The one place that knows a checkpoint's names."""
    names: dict[str, tuple[str, int | None]] = {
        "model.embed_tokens.weight": ("embed", None),
        "model.norm.weight": ("norm", None),
    }
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ("head", None)
    parts = {"input_layernorm.weight": "attention_norm", "post_attention_layernorm.weight": "mlp_norm"}
    parts |= {f"{module_of(name)}.weight": name for name in PROJECTIONS}
    if config.attention_bias:
        parts |= {f"self_attn.{name}_proj.bias": f"{name}_bias" for name in ("q", "k", "v")}
    if config.qk_norm:
        parts |= {f"self_attn.{name}.weight": name for name in ("q_norm", "k_norm")}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{theirs}": (ours, i) for theirs, ours in parts.items()}
    return names


def module_of(name: str) -> str:
    """HF's module of one of PROJECTIONS, within a layer."""
    return f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"


def is_ignored(name: str, config: LmConfig) -> bool:
    """Tensors that some checkpoints carry and that say nothing: rope tables, a copy of tied embeddings."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def is_transposed(name: str) -> bool:
    """torch keeps a dense layer's weight as (out, in); we as (in, out). `name` is ours."""
    return name == "head" or name in PROJECTIONS


def find_folder(source: str | Path) -> Path:
    """A model folder: a path, a path within this repository, or what a hub id (owner/name) downloads to.

    ValueError, one line, where there is none.
    """
    for folder in (Path(source).expanduser(), HERE / source):
        if folder.is_dir():
            return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise ValueError(f"there is no folder {source}; give a Hugging Face model folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(str(source), allow_patterns=kinds))
    except Exception as error:  # no network, no such model, no access: the hub has an error class for each
        raise ValueError(f"there is no folder {source}, nor can it be had from the hub: {first_line(error)}") from None


def base_name(source: str | Path, folder: Path) -> str:
    """How LoRA weights name their base: by a path within this repository, a path, or a hub id."""
    if folder.resolve().is_relative_to(HERE):
        return str(folder.resolve().relative_to(HERE))
    return str(folder.resolve()) if Path(source).expanduser().is_dir() else str(source)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_config(folder: Path) -> tuple[LmConfig, list[int]]:
    """The model's shape and its end tokens, from its config files. ValueError for what this file cannot run."""
    hf = import_transformers().AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if hf.model_type not in MODEL_TYPES:
        raise ValueError(f"its model_type is {hf.model_type!r}, and only {', '.join(MODEL_TYPES)} are supported")
    if hf.hidden_act != "silu" or getattr(hf, "attention_bias", False) or getattr(hf, "mlp_bias", False):
        raise ValueError("only hidden_act 'silu' without attention_bias and mlp_bias is supported")
    if "sliding_attention" in (getattr(hf, "layer_types", None) or ()):
        raise ValueError("sliding-window attention is not supported")
    rope = hf.rope_parameters
    stretch = None
    if rope["rope_type"] == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        stretch = tuple(float(rope[key]) for key in keys)
    elif rope["rope_type"] != "default":
        raise ValueError(f"its rope_type is {rope['rope_type']!r}, and only 'default' and 'llama3' are supported")
    ours = ("head_dim", "attention_bias", "qk_norm", "rope_theta", "rope_llama3")
    fields = {f.name: getattr(hf, f.name) for f in dataclasses.fields(LmConfig) if f.name not in ours}
    config = LmConfig(
        **fields, head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        attention_bias=hf.model_type == "qwen2", qk_norm=hf.model_type == "qwen3",
        rope_theta=float(rope["rope_theta"]), rope_llama3=stretch,
    )  # fmt: skip
    ends = [hf.eos_token_id]
    if (folder / "generation_config.json").is_file():
        ends.append(json.loads((folder / "generation_config.json").read_text()).get("eos_token_id"))
    ends = [end for some in ends for end in (some if isinstance(some, list) else [some])]
    return config, [end for end in ends if end is not None]


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, one or several (shards)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"it has no {name}; a complete Hugging Face model folder is needed")
    return [folder / name for name in names]


def read_params(folder: Path, config: LmConfig) -> Tree:
    """Base weights from safetensors files. ValueError for missing, left-over and misshapen tensors.

    f32 on a CPU, where bf16 is slower, and wherever the file has f32; otherwise bf16.
    """
    from safetensors import safe_open

    names, shapes, params = tensor_names(config), param_shapes(config), {}
    missing = set(names)
    for path in checkpoint_files(folder):
        with safe_open(path, framework="np") as file:
            for theirs in file.keys():
                if is_ignored(theirs, config):
                    continue
                if theirs not in names:
                    raise ValueError(f"{path.name} has an unknown tensor, {theirs}")
                value, (ours, layer) = file.get_tensor(theirs), names[theirs]
                if ours not in params:
                    wide = jax.default_backend() == "cpu" or value.dtype == np.float32
                    params[ours] = np.empty(shapes[ours], np.float32 if wide else jnp.bfloat16)
                target = params[ours] if layer is None else params[ours][layer]
                if is_transposed(ours):
                    value = value.T
                if value.shape != target.shape:
                    raise ValueError(f"{theirs} is {value.shape}, not {target.shape} as config.json says")
                target[...] = value
                missing.discard(theirs)
    if missing:
        raise ValueError(f"its safetensors lack {len(missing)} tensors, such as {min(missing)}")
    return {name: jnp.asarray(value) for name, value in params.items()}


def write_params(folder: Path, config: LmConfig, params: Tree) -> None:
    """The inverse of `read_params`: model.safetensors with HF's names and layout."""
    from safetensors.numpy import save_file

    tensors = {}
    for theirs, (ours, layer) in tensor_names(config).items():
        value = np.asarray(params[ours] if layer is None else params[ours][layer])
        tensors[theirs] = np.ascontiguousarray(value.T if is_transposed(ours) else value)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def read_lora(folder: Path, config: LmConfig) -> tuple[LoraConfig, Tree]:
    """LoRA weights in the format of Hugging Face PEFT. ValueError for what does not fit the model."""
    from safetensors.numpy import load_file

    peft = json.loads((folder / "adapter_config.json").read_text())
    modules = {module_of(name).split(".")[1]: name for name in PROJECTIONS}
    if peft.get("peft_type") != "LORA" or not set(peft["target_modules"]) <= set(modules) or peft.get("use_dora"):
        raise ValueError("only plain LoRA on attention and MLP projections is supported")
    lora = LoraConfig(
        peft["r"], peft["lora_alpha"], peft["lora_dropout"],
        tuple(name for module, name in modules.items() if module in peft["target_modules"]),
    )  # fmt: skip
    factors = {name: np.array(value) for name, value in init_lora(config, lora, jax.random.key(0)).items()}
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    names = {
        peft_name(i, name, part): (f"{name}_{part}", i)
        for i in range(config.num_hidden_layers) for name in lora.targets for part in "ab"
    }  # fmt: skip
    if set(names) != set(tensors):
        odd = min(set(names) ^ set(tensors))
        raise ValueError(f"adapter_model.safetensors does not fit the base model: {odd} is missing or unknown")
    for theirs, (ours, layer) in names.items():
        if tensors[theirs].T.shape != factors[ours][layer].shape:
            raise ValueError(f"{theirs} is {tensors[theirs].shape}, which does not fit the base model")
        factors[ours][layer] = tensors[theirs].T
    return lora, {name: jnp.asarray(value) for name, value in factors.items()}


def write_lora(folder: Path, config: LmConfig, lora: LoraConfig, factors: Tree, base_name: str) -> None:
    """The inverse of `read_lora`."""
    from safetensors.numpy import save_file

    tensors = {
        peft_name(i, name, part): np.ascontiguousarray(np.asarray(factors[f"{name}_{part}"][i], np.float32).T)
        for i in range(config.num_hidden_layers) for name in lora.targets for part in "ab"
    }  # fmt: skip
    peft = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "bias": "none",
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
        "target_modules": [module_of(name).split(".")[1] for name in lora.targets],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(peft, indent=1) + "\n")


def peft_name(layer: int, name: str, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module_of(name)}.lora_{part.upper()}.weight"


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

    def draw(logits: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        return jax.vmap(jax.random.categorical)(keys, logits / temperature)

    # A branch, not a choice: random numbers for a large vocabulary cost a fifth of a token on a CPU.
    return jax.lax.cond(temperature > 0, draw, lambda x: jnp.argmax(x, -1), logits).astype(jnp.int32)


@partial(jax.jit, static_argnames="graphdef")
def read_prefix(graphdef: Any, base: Tree, lora: Tree, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What all prompts begin with, tokens (1, P): its keys and values, each (L, 1, KV, P, hd)."""
    model = nnx.merge(graphdef, lora, base)
    return model(tokens, jnp.zeros_like(tokens), 0, empty_cache(model.config, base, 1, tokens.shape[1]))[1]


def empty_cache(config: LmConfig, base: Tree, batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
    return jnp.zeros(shape, base["params"]["embed"].dtype), jnp.zeros(shape, base["params"]["embed"].dtype)


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"))
def generate(
    graphdef: Any, base: Tree, lora: Tree, prefix: Any, tokens: jax.Array, starts: jax.Array, live: jax.Array,
    rows: jax.Array, eos: jax.Array, key: jax.Array, temperature: jax.Array, max_new_tokens: int,
) -> jax.Array:  # fmt: skip
    """Left-padded prompts tokens (B, T), starts (B,) -> new tokens (B, max_new_tokens), eos[0] after the end.

    All prompts continue `prefix` (`read_prefix`; None: there is none). Stops when every row has met one of `eos` (E,).
    Rows that are not `live` (B,) have ended from the start; `rows` (B,) numbers them for their random keys.
    """
    model = nnx.merge(graphdef, lora, base)
    (batch, length), shared = tokens.shape, 0 if prefix is None else prefix[0].shape[3]
    cache = empty_cache(model.config, base, batch, shared + length + max_new_tokens)
    if prefix is not None:
        cache = tuple(c.at[:, :, :, :shared].set(p) for c, p in zip(cache, prefix, strict=True))
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    starts = starts[:, None] + shared
    hidden, cache = model(tokens, jnp.broadcast_to(starts, tokens.shape), shared, cache, shared)

    def unfinished(carry: Any) -> jax.Array:
        return (carry[0] < max_new_tokens) & ~jnp.all(carry[1])

    def body(carry: Any) -> Any:
        step, done, logits, cache, out = carry
        token = jnp.where(done, eos[0], sample_token(logits, row_keys, step, temperature))
        done = done | jnp.any(token[:, None] == eos[None], -1)
        hidden, cache = model(token[:, None], starts, shared, cache, shared + length + step)
        return step + 1, done, model.logits(hidden[:, 0]), cache, out.at[:, step].set(token)

    out = jnp.full((batch, max_new_tokens), eos[0], jnp.int32)
    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), ~live, model.logits(hidden[:, -1]), cache, out))[-1]


def printable(text: str) -> str:
    """Without control characters (terminal escapes among them) and halves of characters; new lines stay."""
    return "".join(c for c in text if c == "\n" or (unicodedata.category(c)[0] != "C" and c != "\ufffd"))


def one_line(text: str) -> str:
    """Printable, white space collapsed."""
    return " ".join(printable(" ".join(text.split())).split())


# --------------------------------------------------------------------------------------------------------- fine-tuning


def row_length(texts: Sequence[tuple[list[int], list[int]]]) -> int:
    """Columns that the longest (prompt tokens, response tokens) takes, rounded up to a bucket."""
    return LENGTH_BUCKET * math.ceil(max(len(prompt) + len(response) for prompt, response in texts) / LENGTH_BUCKET)


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


def response_nll(graphdef: Any, base: Tree, lora: Tree, batch: Tree, key: Any = None) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p over the tokens that count (nats), and how many they are."""
    model = nnx.merge(graphdef, lora, base)
    hidden, _ = model(batch["tokens"][:, :-1], batch["starts"][:, :-1], batch["shared"][:, :-1], key=key)
    logits, targets, weights = model.logits(hidden), batch["tokens"][:, 1:], batch["weights"][:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)  # (B, T - 1)
    return jnp.sum(nll * weights), jnp.sum(weights)


def mean_nll(graphdef: Any, base: Tree, lora: Tree, batch: Tree, key: Any = None) -> jax.Array:
    """Nats per token that counts; 0 where none does."""
    total, count = response_nll(graphdef, base, lora, batch, key)
    return total / jnp.maximum(count, 1.0)


measure_nll = jax.jit(response_nll, static_argnames="graphdef")


@partial(jax.jit, static_argnames="graphdef")
def sft_step(
    graphdef: Any, base: Tree, lora: Tree, optimizer: Any, batch: Tree, learning_rate: jax.Array, key: jax.Array
) -> Any:
    """One step on the LoRA weights. Returns lora, optimizer, the loss before the step, and whether all is finite."""
    loss, gradient = jax.value_and_grad(mean_nll, argnums=2)(graphdef, base, lora, batch, key)
    updates, optimizer = SFT_OPTIMIZER.update(gradient, optimizer, lora)
    lora = jax.tree.map(lambda weight, update: weight + learning_rate * update, lora, updates)
    return lora, optimizer, loss, jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(lora))


# --------------------------------------------------------------------------------------------------------- the adapter


class NoAdapter:
    """`--adapter none`: says nothing, learns nothing."""

    cut_prompts = 0

    def analyse(self, prompts: Sequence[str], key: jax.Array) -> list[str]:
        return [""] * len(prompts)

    def finetune(self, examples: Sequence[tuple[str, str]], key: jax.Array, **settings: float) -> dict[str, float]:
        return {}

    def warm_up(self, prompts: Sequence[str], fine_tuning: bool) -> None:
        pass

    def save(self, folder: Path) -> None:
        pass

    def state(self) -> Tree:
        return {}

    def load_state(self, tree: Tree) -> None:
        pass


class Adapter:
    """A decoder with its tokenizer and LoRA weights. Made by `load_adapter`."""

    def __init__(
        self, config: LmConfig, params: Tree, factors: Tree, tokenizer: Any, eos: Sequence[int],
        lora: LoraConfig = LoraConfig(), folder: Path | None = None, name: str = "",
    ) -> None:  # fmt: skip
        """folder: where the base model came from; name: what others call it"""
        self.config, self.lora_config, self.tokenizer, self.eos = config, lora, tokenizer, tuple(eos)
        self.graphdef, self.base, self.lora = make_decoder(config, params, lora, factors)
        self.optimizer = SFT_OPTIMIZER.init(self.lora)
        self.folder, self.name = folder, name
        self.cut_prompts = 0  # how many were too long for the context
        self.beginnings: dict[bool, list[int]] = {}  # what all prompts begin with; by: with the system prompt?
        self.prefixes: dict[bool, Any] = {}  # its keys and values; gone when the weights change

    def chat_tokens(self, prompt: str, system: bool, chat_template: bool = True) -> list[int]:
        """Tokens of a user turn, after the system prompt or alone, up to where the answer starts."""
        turns = [{"role": "system", "content": SYSTEM_PROMPT}] * system + [{"role": "user", "content": prompt}]
        if not chat_template or self.tokenizer.chat_template is None:  # plain text, as base models know it
            return self.tokenizer.encode("".join(f"{turn['content']}\n\n" for turn in turns)[:-2])
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return self.tokenizer.encode(text, add_special_tokens=False)  # the template has added them

    def encode_prompt(self, prompt: str, room: int, system: bool = True, chat_template: bool = True) -> list[int]:
        """`chat_tokens` of the prompt, at most `room` of them: a long one loses its beginning, never its last line."""
        tokens = self.chat_tokens(prompt, system, chat_template)
        if len(tokens) <= room:
            return tokens
        self.cut_prompts += 1
        content = self.tokenizer.encode(prompt, add_special_tokens=False)
        last_line = prompt.rpartition("\n")[2] if "\n" in prompt else ""
        drop = len(tokens) - room
        while drop < len(content):
            rest = self.tokenizer.decode(content[drop:], clean_up_tokenization_spaces=False)
            tokens = self.chat_tokens(rest, system, chat_template)
            if not rest.endswith(last_line):
                break
            if len(tokens) <= room:
                return tokens
            drop += max(1, len(tokens) - room)
        most = self.config.max_position_embeddings
        raise ValueError(f"the context of {most} tokens has no room for the instruction and {most - room} new tokens")

    def encode_example(
        self, prompt: str, response: str, system: bool = True, chat_template: bool = True
    ) -> tuple[list[int], list[int]]:
        """Prompt and response tokens, an end token last, that fit the model's context together."""
        limit = self.config.max_position_embeddings
        reply = self.tokenizer.encode(response, add_special_tokens=False)[: limit // 2] + [self.eos[0]]
        return self.encode_prompt(prompt, limit - len(reply), system, chat_template), reply

    def prefix_of(self, prompts: Sequence[list[int]], system: bool) -> tuple[int, Any]:
        """How many tokens all prompts begin with, and their keys and values, computed once per set of weights."""
        if system not in self.beginnings:
            self.beginnings[system] = os.path.commonprefix([self.chat_tokens(text, system) for text in ("You", "1")])
        beginning = self.beginnings[system]
        shortest = min(len(prompt) for prompt in prompts)
        if not beginning or shortest <= len(beginning) or os.path.commonprefix([beginning, *prompts]) != beginning:
            return 0, None
        if system not in self.prefixes:
            tokens = np.asarray([beginning], np.int32)
            self.prefixes[system] = read_prefix(self.graphdef, self.base, self.lora, tokens)
        return len(beginning), self.prefixes[system]

    def generate(
        self, prompts: Sequence[list[int]], key: jax.Array, temperature: float, max_new_tokens: int, system: bool = True
    ) -> list[list[int]]:
        """New tokens for each tokenized prompt, up to and without the first end token.

        Compiles once per bucket of lengths and batch sizes.
        """
        eos = jnp.asarray(self.eos, jnp.int32)
        rows: list[list[int]] = []
        for first in range(0, len(prompts), BATCH_BUCKETS[-1]):
            part = prompts[first : first + BATCH_BUCKETS[-1]]
            shared, prefix = self.prefix_of(part, system)
            tokens, starts = left_pad([prompt[shared:] for prompt in part])
            numbers = np.arange(len(tokens))
            out = generate(
                self.graphdef, self.base, self.lora, prefix, tokens, starts, numbers < len(part), first + numbers, eos,
                key, jnp.float32(temperature), max_new_tokens,
            )  # fmt: skip
            rows += np.asarray(out)[: len(part)].tolist()
        return [row[: next((i for i, token in enumerate(row) if token in self.eos), len(row))] for row in rows]

    def analyse(
        self, prompts: Sequence[str], key: jax.Array, temperature: float = 1.0, max_new_tokens: int = 48
    ) -> list[str]:
        """An analysis for each prompt (`adapter_prompt`): stripped, one line, possibly empty. Temperature 0 is greedy.

        ValueError if max_new_tokens is not within the context.
        """
        room = self.config.max_position_embeddings - max_new_tokens
        if max_new_tokens < 1 or room < 1:
            most = self.config.max_position_embeddings - 1
            raise ValueError(f"max_new_tokens must be 1 to {most}, not {max_new_tokens}")
        encoded = [self.encode_prompt(prompt, room) for prompt in prompts]
        return [one_line(self.decode(row)) for row in self.generate(encoded, key, temperature, max_new_tokens)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def finetune(
        self, examples: Sequence[tuple[str, str]], key: jax.Array, epochs: int = 2, learning_rate: float = 2e-4,
        held_out: float = HELD_OUT, **encoding: bool,
    ) -> dict[str, float]:  # fmt: skip
        """Fine-tunes the LoRA weights on (prompt, response) pairs; the base stays as it is. {} without examples.

        The share `held_out` of the examples (at least one) only measures `nll_before` and `nll_after`, nats per
        response token, the end token among them; with fewer than four examples those two are measured on all, which
        are trained on too. `sft_loss` is the mean training loss. What is not finite ends the fine-tuning
        (`sft_stopped`); the weights before that step stay. `encoding`: of `encode_example`.
        """
        if not examples:
            return {}
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        texts = [self.encode_example(*examples[i], **encoding) for i in rng.permutation(len(examples))]
        num_held = min(max(1, round(held_out * len(texts))), len(texts)) if len(texts) >= 4 else 0
        length = row_length(texts)
        training = pack([[text] for text in texts[num_held:]], length)
        measured = pack([[text] for text in texts[:num_held]], length) if num_held else training
        before, losses, finite = self.nll(measured), [], True
        for epoch in range(epochs):
            for i, batch in enumerate(batches(training, SFT_ROWS, rng.permutation(len(training["tokens"])))):
                lora, optimizer, loss, finite = sft_step(
                    self.graphdef, self.base, self.lora, self.optimizer, batch, jnp.float32(learning_rate),
                    jax.random.fold_in(jax.random.fold_in(key, epoch), i),
                )  # fmt: skip
                if not finite:
                    break
                self.lora, self.optimizer = lora, optimizer
                losses.append(float(loss))
            if not finite:
                break
        self.prefixes = {}
        return {
            "sft_loss": float(np.mean(losses)) if losses else before, "nll_before": before,
            "nll_after": self.nll(measured) if losses else before, "examples": len(examples),
            "held_out": num_held, "sft_stopped": int(not finite),
        }  # fmt: skip

    def measure(self, examples: Sequence[tuple[str, str]]) -> float:
        """Nats per response token of (prompt, response) pairs."""
        texts = [self.encode_example(*example) for example in examples]
        length = row_length(texts)
        return self.nll(pack([[text] for text in texts], length))

    def nll(self, packed: dict[str, np.ndarray]) -> float:
        """Nats per response token over packed rows."""
        parts = batches(packed, SFT_ROWS, np.arange(len(packed["tokens"])))
        sums = [measure_nll(self.graphdef, self.base, self.lora, batch) for batch in parts]
        return float(sum(total for total, _ in sums) / sum(count for _, count in sums))

    def warm_up(self, prompts: Sequence[str], fine_tuning: bool) -> None:
        """Compiles what prompts like these will need, so that it counts as compilation and not as training."""
        if not prompts:
            return
        analyses = self.analyse(prompts, jax.random.key(0))
        if fine_tuning:
            learned = self.lora, self.optimizer
            self.finetune([(prompts[0], analyses[0])], jax.random.key(0), epochs=1, learning_rate=0.0)
            self.lora, self.optimizer = learned
        self.cut_prompts = 0

    def save(self, folder: Path) -> None:
        """Writes the LoRA weights, in PEFT's format: `load_adapter(folder)` finds the base by its name in there."""
        write_lora(folder, self.config, self.lora_config, self.lora["lora"], self.name)

    def export(self, folder: Path) -> None:
        """Writes a whole Hugging Face folder, LoRA merged into the weights, f32, and the base's own other files."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.suffix in (".json", ".txt", ".model", ".jinja") and "safetensors" not in path.name:
                shutil.copyfile(path, folder / path.name)
        config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        params = {name: np.asarray(value, np.float32) for name, value in self.base["params"].items()}
        for name in self.lora_config.targets:
            a, b = (np.asarray(self.lora["lora"][f"{name}_{part}"], np.float32) for part in "ab")
            params[name] = params[name] + self.lora_config.scale * a @ b
        write_params(folder, self.config, params)

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
            raise ValueError("the checkpoint's LoRA weights do not fit; give the run's own model")
        tree = jax.tree.map(lambda mine, new: jnp.asarray(new, mine.dtype), own, tree)
        self.lora, self.prefixes = {"lora": tree["lora"]}, {}
        leaves = [tree["optimizer"][name] for name in sorted(tree["optimizer"])]
        self.optimizer = jax.tree.unflatten(jax.tree.structure(self.optimizer), leaves)


def load_adapter(source: str | Path, lora: LoraConfig = LoraConfig(), seed: int = 0) -> Adapter:
    """The adapter of a Hugging Face model folder or hub id, with fresh LoRA weights; or of a folder that `save` wrote
    (or PEFT), with the LoRA weights and settings in there.

    ValueError, one line, for what is missing, damaged or of an unsupported kind.
    """
    folder = find_folder(source)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} has no config.json; give a Hugging Face model folder")
    try:
        base, name = folder, base_name(source, folder)
        if (folder / "adapter_config.json").is_file():
            name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
            base = find_folder(name)
        config, ends = read_config(base)
        params = read_params(base, config)
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(str(base), local_files_only=True)
        ends = list(dict.fromkeys(end for end in (tokenizer.eos_token_id, *ends) if end is not None))
        if not ends:
            raise ValueError("neither its config nor its tokenizer names an end token")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its model {config.vocab_size}")
        if base == folder:
            factors = init_lora(config, lora, jax.random.key(seed))
        else:
            lora, factors = read_lora(folder, config)
    except Exception as error:  # three libraries parse these files, each with its own errors
        raise ValueError(f"cannot use {folder}: {first_line(error)}") from error
    if tokenizer.chat_template is None:
        print(f"note: {base} has no chat template; it is given plain text", file=sys.stderr)
    return Adapter(config, params, factors, tokenizer, ends, lora, base, name)


# ----------------------------------------------------------------------------------------------------- the command line


def read_examples(path: Path) -> list[tuple[str, str]]:
    """(prompt, response) pairs of a JSON-lines file: {"prompt", "response"} or records of a run's guidance.jsonl."""
    examples = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data: cannot read {path}: {first_line(error)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            pair = (
                (record["adapter_prompt"], record["analysis"])
                if "adapter_prompt" in record
                else (record["prompt"], record["response"])
            )
            if not all(isinstance(text, str) for text in pair):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'--data: line {number} of {path} is neither {{"prompt": ..., "response": ...}} nor a record of a '
                "guidance.jsonl"
            ) from None
        if pair[1]:  # `--adapter none` says nothing
            examples.append(pair)
    if not examples:
        raise ValueError(f"--data: {path} holds no examples")
    return examples


Folder = Annotated[str, tyro.conf.arg(metavar="FOLDER|HUB-ID")]


def generate_command(
    model: Folder, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0,
    chat_template: bool = True,
) -> None:  # fmt: skip
    """Print what a model answers.

    Args:
        model: a Llama, Qwen2 or Qwen3 folder in Hugging Face format, a hub id, or a folder of LoRA weights
        prompt: the user's turn; plain text to go on from with --no-chat-template
        max_new_tokens: at most so many
        temperature: of sampling; 0 is greedy
        seed: of sampling
        chat_template: put the prompt through the tokenizer's chat template, once
    """
    adapter = open_model(model)
    room = adapter.config.max_position_embeddings - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        most = adapter.config.max_position_embeddings - 1
        raise ValueError(f"--max-new-tokens: must be 1 to {most} with this model, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature: must be 0 or more, not {temperature}")
    tokens = adapter.encode_prompt(prompt, room, system=False, chat_template=chat_template)
    if not tokens:
        raise ValueError("--prompt: is empty")
    if adapter.cut_prompts:
        print("note: the prompt is longer than the context; its beginning was cut off", file=sys.stderr)
    key = jax.random.key(seed)
    print(printable(adapter.decode(adapter.generate([tokens], key, temperature, max_new_tokens, system=False)[0])))


def sft_command(
    model: Folder, data: Path, out: Path | None = None, epochs: int = 2, learning_rate: float = 2e-4,
    held_out: float = HELD_OUT, lora_rank: int = 8, lora_alpha: float = 16.0, lora_dropout: float = 0.0,
    lora_targets: tuple[str, ...] = PROJECTIONS, merge: bool = False, seed: int = 0, system_prompt: bool = True,
    chat_template: bool = True,
) -> None:  # fmt: skip
    """Fine-tune a model with LoRA, loss on the response only, and print the held-out loss before and after as JSON.

    Args:
        model: a Llama, Qwen2 or Qwen3 folder in Hugging Face format, a hub id, or a folder of LoRA weights
        data: JSON lines, {"prompt": ..., "response": ...} or the guidance.jsonl of a run
        out: folder to write; not needed with --epochs 0, which only measures
        epochs: passes over the training lines
        learning_rate: of Adam
        held_out: share of the lines that only measures; 1 measures on all, with --epochs 0
        lora_rank: rank of the LoRA matrices
        lora_alpha: their scale, times rank
        lora_dropout: dropout before them, in training
        lora_targets: projections that get them
        merge: write a whole Hugging Face folder, LoRA merged in, instead of the LoRA weights alone
        seed: of the split, the order and the LoRA weights
        system_prompt: put the adapter's system prompt first, as in training with RL
        chat_template: put prompts through the tokenizer's chat template, once
    """
    if epochs < 0 or not 0 < held_out <= 1 or not 0 < learning_rate < math.inf:
        raise ValueError("--epochs, --held-out, --learning-rate: must be 0 or more, in (0, 1], and above 0")
    if epochs and held_out == 1:
        raise ValueError("--held-out: 1 leaves nothing to train on; use --epochs 0 to measure only")
    if epochs and out is None:
        raise ValueError("--out: is needed to keep what is trained; use --epochs 0 to measure only")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists; give a folder that does not")
    examples = read_examples(data)
    adapter = open_model(model, LoraConfig(lora_rank, lora_alpha, lora_dropout, lora_targets), seed)
    tuned = adapter.finetune(
        examples, jax.random.key(seed), epochs, learning_rate, held_out, system=system_prompt,
        chat_template=chat_template,
    )  # fmt: skip
    if epochs:
        (adapter.export if merge else adapter.save)(out)
    print(json.dumps(tuned | {"cut_prompts": adapter.cut_prompts}))


def open_model(model: str, lora: LoraConfig = LoraConfig(), seed: int = 0) -> Adapter:
    try:
        return load_adapter(model, lora, seed)
    except ValueError as error:
        raise ValueError(f"--model: {error}") from None


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for input that can't work."""
    try:
        tyro.extras.subcommand_cli_from_dict({"generate": generate_command, "sft": sft_command}, args=argv)
    except (ValueError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
