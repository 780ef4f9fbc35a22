"""The client against a real server: `transformers serve` with a tiny model that knows one answer."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fault_server import quiet_runs

import rladapter_ppo as rl
from envs.toy import TOY, ToyEnv
from llm_client import HttpGuide, Question
from utils.hf_folder import import_transformers

for package in ("torch", "fastapi", "uvicorn"):  # pip install "transformers[serving]" torch
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

REPLY = '{"sub_goals": {"chop tree": ["tree in view"], "drink water": ["water in view"]}}'


def make_model(folder: Path) -> None:
    """A Llama whose layers do nothing: after REPLY (one token) comes the end, after anything else comes REPLY."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers = import_transformers()
    width, tokens = 16, {"<unk>": 0, "<end>": 1, REPLY: 2}
    config = transformers.LlamaConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=None, eos_token_id=1, pad_token_id=1,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    transformers.GenerationConfig(eos_token_id=1, pad_token_id=1, do_sample=False).save_pretrained(folder)
    embed, head = np.zeros((2, len(tokens), width), np.float32)
    embed[[0, 1], 0] = embed[2, 1] = 1.0
    head[2, 0] = head[1, 1] = 10.0
    tensors = {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    tensors |= {f"model.layers.0.self_attn.{name}_proj.weight": np.zeros((width, width), np.float32) for name in "qkvo"}
    tensors |= {f"model.layers.0.mlp.{name}_proj.weight": np.zeros((width, width), np.float32)
                for name in ("gate", "up", "down")}  # fmt: skip
    norms = ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm")
    tensors |= {f"model.{name}.weight": np.ones(width, np.float32) for name in norms}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(base url, model) of a running server."""
    folder = tmp_path_factory.mktemp("llama").resolve()
    make_model(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (folder.parent / "home/hub").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "home")}
    start = "from transformers.cli.transformers import main; main()"  # what the command `transformers` does
    command = [sys.executable, "-c", start, "serve", folder, "--device", "cpu", "--dtype", "float32",
               "--host", "127.0.0.1", "--port", port]  # fmt: skip
    with (folder.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            assert process.poll() is None, (folder.parent / "server.log").read_text()[-2_000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)


def test_replies_of_a_real_server(served):
    """It ignores response_format, so `auto` finds out that it must not count on it."""
    guide = HttpGuide(TOY, *served, structured="auto")
    guide.check()
    assert not guide.chat.sends_schema
    obs, situation = np.zeros(2, np.uint8), np.array([True, False])
    caption = ToyEnv().to_text(obs)
    questions = [Question(obs, situation, [], None, 0, caption, analysis=f"number {i}") for i in range(4)]
    replies = [question.reply for question in guide.ask(questions).wait()]
    assert [(reply.text, reply.error, reply.calls) for reply in replies] == [(REPLY, "", 1)] * 4


def test_a_training_with_a_real_server(served, tmp_path, monkeypatch):
    url, model = served
    quiet_runs(monkeypatch)
    toy = (
        "--env-id Toy-v0 --num-envs 8 --num-steps 16 --num-minibatches 2 --hidden-size 16 --rnn-size 16 "
        "--total-timesteps 400 --no-anneal-lr --lr-warmup 0 --updates-per-phase 2 --guidance-rows 8 "
        "--eval-episodes 16 --adapter none --llm-cache none --llm http"
    ).split()  # the program of test_llm_server.py
    flags = ["--llm-base-url", url, "--llm-model", model, "--run-dir", str(tmp_path / "run")]
    assert rl.cli([*toy, *flags]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["llm_calls"] > 0 == summary["llm_failures"]
