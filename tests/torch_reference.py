"""What torch makes of a model folder. These functions run in a process of their own: `by_torch` in conftest.py."""

import functools
from pathlib import Path
from typing import Any

import numpy as np


@functools.cache
def load(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def make(folder: Path, config: str, shape: dict[str, Any], shard: str) -> None:
    """Write a random checkpoint."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**shape))
    with torch.no_grad():  # torch starts biases at 0 and norms at 1, which would hide a mistake
        for key, value in model.named_parameters():
            if "norm" in key or "bias" in key:
                value.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(folder, max_shard_size=shard)


def logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """(T, V) of one row."""
    import torch

    with torch.no_grad():
        return load(folder)(torch.tensor([tokens])).logits[0].numpy()


def greedy(folder: Path, tokens: list[int], num: int, end: int = 1) -> list[int]:
    """At most num tokens, without the end token."""
    import torch

    with torch.no_grad():
        out = load(folder).generate(torch.tensor([tokens]), max_new_tokens=num, do_sample=False)
    new = out[0, len(tokens) :].tolist()
    return new[: new.index(end)] if end in new else new


def mean_pooled_bert(folder: Path, texts: list[str]) -> np.ndarray:
    """(len(texts), D) of norm 1."""
    import torch
    import transformers

    model = transformers.BertModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
