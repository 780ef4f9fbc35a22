"""Folders in Hugging Face format: finds them, reads and writes their weights, makes tokens of prompts.

    model    config.json  generation_config.json  model.safetensors (or shards)  tokenizer files
    LoRA     adapter_config.json, which names the base model  adapter_model.safetensors (PEFT's format)

All that knows these formats is here, and nothing here knows who runs the model. A config is a dict. Weights are a dict
of arrays under our names, those of the L layers stacked on a leading axis; which ones a file must have is passed in as
`shapes` (our name -> shape). Errors are ValueError with one line that says what is wrong with the folder.
"""

import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from utils.cli import first_line

ROOT = Path(__file__).parents[1]  # of this repository
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
MODEL_TYPES = ("llama", "qwen2", "qwen3")
CONFIG_NAMES = (  # fields of a config that are used as they are
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
MAX_LAYERS = 1000
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# Our name -> Hugging Face's name within a layer
MODULES = {  # matrices
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
LAYER_TENSORS = {name: f"{module}.weight" for name, module in MODULES.items()} | {
    "attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias", "v_bias": "self_attn.v_proj.bias",
}  # fmt: skip
OTHER_TENSORS = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
TRANSPOSED = {*MODULES, "head"}  # torch keeps a dense layer's weight as (out, in); we as (in, out)

# Settings in an adapter_config.json that are read here, and those that change nothing of weights that are trained.
# All others change what LoRA computes, and so may those that PEFT does not have yet.
PEFT_READ = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora")
PEFT_WITHOUT_EFFECT = (
    "target_modules", "exclude_modules", "layers_pattern",  # the tensors' names say it
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",  # of other settings
    "task_type", "inference_mode", "auto_mapping", "peft_version", "megatron_core", "runtime_config",
    "ensure_weight_tying",
)  # fmt: skip
# Other initialisations take away from the base what they put into the factors.
PEFT_HARMLESS = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal"), "revision": ("main",)}


def import_transformers() -> Any:
    """Imports transformers late, as it takes two seconds, without its warning that there is no torch.

    Hides torch from it: transformers loads torch where it finds it, which takes longer than all the rest.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
    try:
        import transformers
    finally:
        importlib.util.find_spec = find
    return transformers


# ------------------------------------------------------------------------------------------------------- which folder


def find_folder(source: str | Path) -> Path:
    """Returns a model folder: a path, a path within this repository, or what a hub id (owner/name) downloads to."""
    try:
        for folder in (Path(source).expanduser(), ROOT / source):
            if folder.is_dir():
                return folder
    except (OSError, RuntimeError):  # a name that is too long; the home of nobody
        pass
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise ValueError(f"there is no folder {source}; give a Hugging Face model folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=DOWNLOADED))
    except Exception as error:  # no network, no such model, no access: the hub has an error class for each
        raise ValueError(f"there is no folder {source}, nor can it be had from the hub: {first_line(error)}") from None


def is_lora(folder: Path) -> bool:
    """Does a folder hold LoRA weights?"""
    return (folder / "adapter_config.json").is_file()


def find_base(source: str | Path, folder: Path) -> tuple[Path, str]:
    """Returns the base model's folder, given what `find_folder` made of a source, and the base model's name.

    The folder itself, unless it holds LoRA weights. The name is what LoRA folders call their base: a path within this
    repository, a path, or a hub id.
    """
    if is_lora(folder):
        name = read_peft(folder).get("base_model_name_or_path")
        if not isinstance(name, str) or not name or not name.isprintable():
            problem = f"must name the base model, a folder or a hub id, not {brief(name)}"
            raise ValueError(f'adapter_config.json: "base_model_name_or_path" {problem}')
        base = find_folder(name)
        if not (base / "config.json").is_file():
            raise ValueError(f"its base model, {name}, has no config.json")
        return base, name
    if folder.resolve().is_relative_to(ROOT):
        return folder, str(folder.resolve().relative_to(ROOT))
    return folder, str(folder.resolve()) if Path(source).expanduser().is_dir() else str(source)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} can't be read: {said(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return value


def said(error: BaseException) -> str:
    """Returns what an exception says in one line, without what a file may have put there for a terminal."""
    return "".join(c for c in first_line(error) if c.isprintable())


def brief(value: Any) -> str:
    """Returns a value of a JSON file as it stands there, in one short line."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ----------------------------------------------------------------------------------------------------- a model folder


def is_plain(name: Any) -> bool:
    """Is this the name of a file, and no path to another folder?"""
    return isinstance(name, str) and name == Path(name).name and name not in ("", "..")


def from_folder(kind: str, folder: Path) -> Any:
    """Returns what one of transformers' Auto classes makes of a folder's files, and of no others.

    Raises ValueError for files that name others elsewhere; transformers would read them.
    """
    for file, names in (("config.json", "configuration_files"), ("tokenizer_config.json", "fast_tokenizer_files")):
        others = read_json(folder / file).get(names) if (folder / file).is_file() else None
        if others and not (isinstance(others, list) and all(map(is_plain, others))):
            raise ValueError(f"{file} must name files of its own folder (in {names})")
    # Without the last flag transformers asks at the terminal whether to run code from the folder.
    settings = {"local_files_only": True, "trust_remote_code": False}
    return getattr(import_transformers(), kind).from_pretrained(str(folder), **settings)


def read_config(folder: Path) -> tuple[dict[str, Any], list[int]]:
    """Returns the model's shape, as `rladapter_adapter.LmConfig(**shape)` takes it, and the model's end tokens.

    Raises ValueError for architectures that `rladapter_adapter.Decoder` is not.
    """
    layers = read_json(folder / "config.json").get("num_hidden_layers")
    if isinstance(layers, int | float) and not 1 <= layers <= MAX_LAYERS:  # transformers would make lists so long
        raise ValueError(f"its num_hidden_layers is {brief(layers)}, and only 1 to {MAX_LAYERS} are supported")
    hf = from_folder("AutoConfig", folder)
    if hf.model_type not in MODEL_TYPES:
        raise ValueError(f"its model_type is {hf.model_type!r}, and only {', '.join(MODEL_TYPES)} are supported")
    if hf.hidden_act != "silu" or getattr(hf, "attention_bias", False) or getattr(hf, "mlp_bias", False):
        raise ValueError("only hidden_act 'silu' without attention_bias and mlp_bias is supported")
    if "sliding_attention" in (getattr(hf, "layer_types", None) or ()):
        raise ValueError("sliding-window attention is not supported")
    rope = hf.rope_parameters
    if rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"its rope_type is {rope['rope_type']!r}, and only 'default' and 'llama3' are supported")
    stretched = rope["rope_type"] == "llama3"
    shape = {name: getattr(hf, name) for name in CONFIG_NAMES} | {
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "attention_bias": hf.model_type == "qwen2",
        "qk_norm": hf.model_type == "qwen3",
        "rope_theta": float(rope["rope_theta"]),
        "rope_llama3": tuple(float(rope[key]) for key in LLAMA3_ROPE) if stretched else None,
    }
    ends = [hf.eos_token_id]
    if (folder / "generation_config.json").is_file():
        ends.append(read_json(folder / "generation_config.json").get("eos_token_id"))
    ends = [end for some in ends for end in (some if isinstance(some, list) else [some])]
    return shape, [end for end in ends if end is not None]


def read_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of transformers."""
    return from_folder("AutoTokenizer", folder)


class Chat:
    """Makes tokens of prompts, with a system prompt ("": none) and the tokenizer's chat template.

    A template that refuses the system role gets the system prompt at the beginning of the user turn. Raises ValueError
    for one that refuses that, too.
    """

    def __init__(self, tokenizer: Any, system_prompt: str, use_template: bool = True) -> None:
        self.tokenizer, self.system_prompt, self.use_template = tokenizer, system_prompt, use_template
        self.num_cut = 0  # prompts that were too long
        self.takes_system = True
        try:
            self.tokens("Hi")
        except Exception:  # a template is a program: most refuse with raise_exception, but it may fail in any way
            self.takes_system = False
            try:
                self.tokens("Hi")
            except Exception as error:
                raise ValueError(f"its chat template does not work: {said(error)}") from None

    def turns(self, prompt: str) -> list[dict[str, str]]:
        """Returns the messages of a chat: the system prompt and a user turn."""
        if self.system_prompt and not self.takes_system:
            prompt = f"{self.system_prompt}\n\n{prompt}"
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt and self.takes_system else []
        return [*system, {"role": "user", "content": prompt}]

    def tokens(self, prompt: str) -> list[int]:
        """Returns the tokens of a user turn up to where the answer starts, the system prompt first."""
        turns = self.turns(prompt)
        if not self.use_template or self.tokenizer.chat_template is None:  # plain text, as base models know it
            return self.tokenizer.encode("\n\n".join(turn["content"] for turn in turns))
        settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        text = self.tokenizer.apply_chat_template(turns, **settings)
        return self.tokenizer.encode(text, add_special_tokens=False)  # the template has added them

    def encode(self, prompt: str, room: int) -> list[int]:
        """Returns at most `room` tokens: a long prompt loses its beginning, never its last line.

        Raises ValueError where not even that line has room.
        """
        tokens = self.tokens(prompt)
        if len(tokens) <= room:
            return tokens
        self.num_cut += 1
        last_line = prompt.rpartition("\n")[2] if "\n" in prompt else ""
        content = self.tokenizer.encode(prompt, add_special_tokens=False)
        while len(tokens) > room:
            content = content[len(tokens) - room :]
            rest = self.tokenizer.decode(content, clean_up_tokenization_spaces=False)
            if not content or not rest.endswith(last_line):
                tokens = self.tokens(last_line)
                if not last_line or len(tokens) > room:
                    found = f"{room} tokens beside the answer's; choose a model with a longer context"
                    raise ValueError(f"no room for the prompt's last line: {found}")
                return tokens
            tokens = self.tokens(rest)
        return tokens


def tensor_names(shapes: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """Returns Hugging Face's name of each tensor -> (our name, its layer or None)."""
    names: dict[str, tuple[str, int | None]] = {}
    for ours, shape in shapes.items():
        if ours in OTHER_TENSORS:
            names[OTHER_TENSORS[ours]] = ours, None
        else:
            names |= {f"model.layers.{i}.{LAYER_TENSORS[ours]}": (ours, i) for i in range(shape[0])}
    return names


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a model folder, one or several (shards)."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        places = read_json(index).get("weight_map")
        names = list(places.values()) if isinstance(places, dict) else []
        if not names or not all(map(is_plain, names)):
            raise ValueError(f"{index.name} must name files of its own folder (in weight_map)")
        names = sorted(set(names))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"it has no {name}; a complete Hugging Face model folder is needed")
    return [folder / name for name in names]


def read_params(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Returns the weights, under our names. Raises ValueError for missing, left-over and misshapen tensors.

    They are f32 on a CPU, where bf16 is slower, and wherever the file has f32; otherwise bf16.
    """
    from safetensors import safe_open

    names, params = tensor_names(shapes), {}
    missing = set(names)
    for path in checkpoint_files(folder):
        with safe_open(path, framework="np") as file:
            for theirs in file.keys():
                copy_of_tied = theirs == OTHER_TENSORS["head"] and "head" not in shapes
                if copy_of_tied or theirs.endswith("rotary_emb.inv_freq"):  # some checkpoints carry these for nothing
                    continue
                if theirs not in names:
                    raise ValueError(f"{path.name} has an unknown tensor, {theirs}")
                value, (ours, layer) = file.get_tensor(theirs), names[theirs]
                if ours not in params:
                    wide = jax.default_backend() == "cpu" or value.dtype == np.float32
                    params[ours] = np.empty(shapes[ours], np.float32 if wide else jnp.bfloat16)
                target = params[ours] if layer is None else params[ours][layer]
                if ours in TRANSPOSED:
                    value = value.T
                if value.shape != target.shape:
                    raise ValueError(f"{theirs} is {value.shape}, not {target.shape} as config.json says")
                target[...] = value
                missing.discard(theirs)
    if missing:
        raise ValueError(f"its safetensors lack {len(missing)} tensors, such as {min(missing)}")
    return {name: jnp.asarray(value) for name, value in params.items()}


def save_tensors(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. Raises OSError where that fails."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, str(path), metadata)
    except SafetensorError as error:  # of a full disk, too
        raise OSError(f"cannot write {path}: {first_line(error)}") from None


def write_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Writes weights as `read_params` reads them, in one file."""
    tensors = {}
    for theirs, (ours, layer) in tensor_names({name: value.shape for name, value in params.items()}).items():
        value = np.asarray(params[ours] if layer is None else params[ours][layer])
        tensors[theirs] = np.ascontiguousarray(value.T if ours in TRANSPOSED else value)
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})


def write_model(folder: Path, base: Path, params: Mapping[str, Any]) -> None:
    """Writes a whole model folder: these weights, f32, and all other files of the base model."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        for path in base.iterdir():
            if path.suffix in (".json", ".txt", ".model", ".jinja") and "safetensors" not in path.name:
                shutil.copyfile(path, folder / path.name)
        config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_params(folder, {name: np.asarray(value, np.float32) for name, value in params.items()})
    except Exception:  # a full disk: nothing half done stays
        for path in set(folder.iterdir()) - before:
            path.unlink()
        raise


# ------------------------------------------------------------------------------------------------------ a LoRA folder


def lora_names(targets: tuple[str, ...], num_layers: int) -> dict[str, tuple[str, int]]:
    """Returns PEFT's name of each factor -> (our name, its layer). Ours are q_a, q_b and the like."""
    return {
        f"base_model.model.model.layers.{i}.{MODULES[target]}.lora_{part.upper()}.weight": (f"{target}_{part}", i)
        for i in range(num_layers) for target in targets for part in "ab"
    }  # fmt: skip


def read_peft(folder: Path) -> dict[str, Any]:
    """Returns the adapter_config.json. Raises ValueError that names a setting which is not supported."""
    peft = read_json(folder / "adapter_config.json")
    if peft.get("peft_type") != "LORA":
        raise ValueError(f'adapter_config.json: "peft_type" must be "LORA", not {brief(peft.get("peft_type"))}')
    for name, value in peft.items():
        if value and name not in (*PEFT_READ, *PEFT_WITHOUT_EFFECT) and value not in PEFT_HARMLESS.get(name, ()):
            other = name == "init_lora_weights"
            why = "so its weights may belong to a changed base" if other else "which is not supported"
            way = "merge the LoRA into its base with PEFT (merge_and_unload), and give that folder"
            raise ValueError(f"adapter_config.json: {brief(name)} is {brief(value)}, {why}; {way}")
    return peft


def lora_settings(peft: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rank, alpha and dropout of an adapter_config.json."""
    rank, alpha, dropout = peft.get("r"), peft.get("lora_alpha"), peft.get("lora_dropout", 0.0)
    fits = {
        "r": type(rank) is int and 1 <= rank <= 2**16,
        "lora_alpha": type(alpha) in (int, float) and abs(alpha) < 1e9,
        "lora_dropout": type(dropout) in (int, float) and 0 <= dropout < 1,
    }
    for name in (name for name, fit in fits.items() if not fit):
        raise ValueError(f'adapter_config.json: "{name}" is {brief(peft.get(name))}, which LoRA can\'t have')
    if peft.get("use_rslora"):  # its scale is alpha / sqrt(rank) (arXiv 2312.03732), ours alpha / rank
        alpha *= math.sqrt(rank)
    return {"rank": rank, "alpha": alpha, "dropout": dropout}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns all that is in a safetensors file. Raises ValueError that names the file."""
    from safetensors.numpy import load_file

    if not path.is_file():
        raise ValueError(f"it has no {path.name}; weights in other formats are not read")
    try:
        return load_file(str(path))
    except Exception as error:  # safetensors' own for damage, others for types that numpy does not have
        raise ValueError(f"{path.name} can't be read: {said(error)}") from None


def read_lora(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Returns settings, as `rladapter_adapter.LoraConfig(**settings)` takes them, and factors A (L, in, rank) and B
    (L, rank, out). The tensors' names say which matrices have factors: `target_modules` may be a pattern.

    Raises ValueError for what does not fit the base model, whose `shapes` are given.
    """
    settings, tensors = lora_settings(read_peft(folder)), read_tensors(folder / "adapter_model.safetensors")
    places, rank = lora_names(tuple(MODULES), shapes["q"][0]), settings["rank"]
    if odd := sorted(set(tensors) - set(places)):
        raise ValueError(f"adapter_model.safetensors has {brief(odd[0])}, which has no place in its base model")
    present = {places[theirs][0].removesuffix("_a").removesuffix("_b") for theirs in tensors}
    targets = tuple(target for target in MODULES if target in present)
    names = lora_names(targets, shapes["q"][0])
    if missing := sorted(set(names) - set(tensors)):
        raise ValueError(f"adapter_model.safetensors lacks {len(missing)} tensors, such as {missing[0]}")
    if not targets:
        raise ValueError("adapter_model.safetensors holds no LoRA weights")
    factors: dict[str, list[np.ndarray]] = {}
    for theirs, (ours, _) in names.items():  # layer by layer
        value, (_, inputs, outputs) = tensors[theirs], shapes[ours[:-2]]
        shape = (rank, inputs) if ours.endswith("_a") else (outputs, rank)
        if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.floating):
            found = f"{value.dtype} {value.shape}"
            raise ValueError(f"adapter_model.safetensors: {theirs} is {found}, not floats {shape}")
        factors.setdefault(ours, []).append(np.asarray(value, np.float32).T)
    return settings | {"targets": targets}, {name: jnp.asarray(np.stack(layers)) for name, layers in factors.items()}


def write_lora(folder: Path, settings: Mapping[str, Any], factors: Mapping[str, Any], base_name: str) -> None:
    """Writes LoRA weights as `read_lora` reads them."""
    targets = settings["targets"]
    names = lora_names(targets, len(factors[f"{targets[0]}_a"]))
    tensors = {
        theirs: np.ascontiguousarray(np.asarray(factors[ours][layer], np.float32).T)
        for theirs, (ours, layer) in names.items()
    }
    peft = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "bias": "none",
        "r": settings["rank"], "lora_alpha": settings["alpha"], "lora_dropout": settings["dropout"],
        "target_modules": [MODULES[target].split(".")[1] for target in targets],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    halves = [path.with_name(path.name + ".tmp") for path in paths]
    try:  # a kill or a full disk leaves what was there before
        save_tensors(tensors, halves[0])
        halves[1].write_text(json.dumps(peft, indent=1) + "\n")
        for half, path in zip(halves, paths, strict=True):
            half.replace(path)
    except Exception:
        for half in halves:
            half.unlink(missing_ok=True)
        raise
