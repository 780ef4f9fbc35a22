"""How fast the adapter generates, beside torch: the same random checkpoint, the same prompts, one run.

    python benchmarks/adapter_speed.py                 # SmolLM2-135M's shape, batch 16, prompt 256, 64 new tokens
    python benchmarks/adapter_speed.py --json benchmarks/results/adapter_speed.json

Children take turns, ours and torch's `generate`, so that a machine that slows down slows both. Greedy, no end token,
f32 on a CPU, bf16 on a GPU. Times are medians, without compilation and after `block_until_ready`; memory is the peak of
the child's process. Needs torch (requirements-dev.txt).
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    batch: int = 16
    """prompts at a time"""
    prompt: int = 256
    """tokens of each prompt"""
    shared: int = 192
    """tokens that all prompts begin with, for the row with a shared prefix"""
    new: int = 64
    """new tokens for each prompt"""
    layers: int = SHAPE["num_hidden_layers"]
    """layers of the model"""
    repeats: int = 3
    """timed runs of a child"""
    rounds: int = 2
    """children of each kind"""
    json: Path | None = None
    """also write the result here"""
    child: Literal["", "ours", "torch"] = ""
    """internal: be one of the children"""
    folder: Path = Path()
    """internal: the checkpoint"""


def make_checkpoint(options: Options, folder: Path) -> None:
    """Writes a random model, and a tokenizer that nobody uses."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": options.layers})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1}, "<pad>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def prompts_of(options: Options) -> np.ndarray:
    """Returns (batch, prompt) random tokens; the first `shared` of all rows are the same."""
    tokens = np.random.default_rng(0).integers(2, SHAPE["vocab_size"], (options.batch, options.prompt))
    tokens[:, : options.shared] = tokens[0, : options.shared]
    return tokens


def median_seconds(run: Any, repeats: int) -> tuple[float, float]:
    """Returns the median seconds of a call, and those of the first one, which compiles."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:])), seconds[0]


def time_ours(options: Options) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    import rladapter_adapter as ra

    adapter = ra.load_adapter(options.folder)
    prompts = prompts_of(options)
    rows, live = np.arange(options.batch), np.ones(options.batch, bool)
    never, key, greedy = jnp.array([-1]), jax.random.key(0), jnp.float32(0)

    def run(new: int, shared: int) -> None:
        prefix = None
        if shared:
            prefix = ra.read_prefix(adapter.graphdef, adapter.base, adapter.lora, prompts[:1, :shared])
        tokens, starts = ra.left_pad([prompt.tolist() for prompt in prompts[:, shared:]])
        ra.generate(
            adapter.graphdef, adapter.base, adapter.lora, prefix, tokens, starts, live, rows, never, key, greedy, new
        ).block_until_ready()

    result = {"device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}"}
    prefill, compile_prefill = median_seconds(lambda: run(1, 0), options.repeats)
    total, compile_total = median_seconds(lambda: run(options.new, 0), options.repeats)
    shared, _ = median_seconds(lambda: run(1, options.shared), options.repeats)
    return result | {
        "prefill": prefill, "total": total, "prefill_shared": shared, "compile": compile_prefill + compile_total
    }  # fmt: skip


def time_torch(options: Options) -> dict[str, float]:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype).eval().to(device)
    prompts = torch.tensor(prompts_of(options), device=device)

    def run(new: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, eos_token_id=None, pad_token_id=1,
            )  # fmt: skip
        assert out.cpu().shape[1] == options.prompt + new

    prefill, _ = median_seconds(lambda: run(1), options.repeats)
    total, _ = median_seconds(lambda: run(options.new), options.repeats)
    return {"device": device, "prefill": prefill, "total": total}


def summarise(options: Options, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns rates, from the medians over a kind's children."""
    prefill, total = (float(np.median([run[name] for run in runs])) for name in ("prefill", "total"))
    result = {
        "device": runs[0]["device"], "total_seconds": total,
        "prefill_tokens_per_second": options.batch * options.prompt / prefill,
        "decode_tokens_per_second": options.batch * (options.new - 1) / (total - prefill),
        "peak_memory_gb": max(run["peak_memory_gb"] for run in runs),
    }  # fmt: skip
    if "prefill_shared" in runs[0]:
        shared = float(np.median([run["prefill_shared"] for run in runs]))
        result |= {"shared_prefill_speedup": prefill / shared, "compile_seconds": runs[0]["compile"]}
    return result


def main(options: Options) -> None:
    if options.child:
        result = (time_ours if options.child == "ours" else time_torch)(options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result | {"peak_memory_gb": peak}))
        return
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(options, Path(folder))
        words = [f"--{name}={getattr(options, name)}" for name in ("batch", "prompt", "shared", "new", "repeats")]
        for _ in range(options.rounds):
            for kind, found in runs.items():
                argv = [sys.executable, __file__, *words, "--child", kind, "--folder", folder]
                done = subprocess.run(argv, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"error: the child for {kind} failed: {done.stderr.strip()[-500:]}")
                found.append(json.loads(done.stdout.splitlines()[-1]))
    result = {kind: summarise(options, found) for kind, found in runs.items()}
    result["speedup"] = result["torch"]["total_seconds"] / result["ours"]["total_seconds"]
    hidden = ("json", "child", "folder")
    result["options"] = {name: value for name, value in asdict(options).items() if name not in hidden}
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
