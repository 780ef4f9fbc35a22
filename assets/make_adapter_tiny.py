"""Makes `assets/adapter-tiny`, the adapter that comes with this repository: a Llama of a million weights with its own
tokenizer, trained from scratch on text that is made up from real Craftax situations.

    python assets/make_adapter_tiny.py        # trains it, writes it, measures it
    python assets/make_adapter_tiny.py --measure-only assets/adapter-tiny   # what it is worth, as JSON
    python assets/make_adapter_tiny.py --measure-only runs/NAME/adapter --samples 20

It learns the language and to read a situation, not the strategy: the teacher (`write_analysis`) says how well the last
advice was understood, states a fact or two of the caption, suggests a sub-goal or two drawn *at random* among those
whose things the caption mentions, and says of some what they take: what anybody believes who has played Minecraft, or
facts drawn at random. Which sub-goals are best, and what they take here, is for RL to find out, and reaches the adapter
by fine-tuning.
Read it top down: the teacher, the tokenizer, the training, the measures.
"""

import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from random_situations import random_observations  # noqa: E402

from envs import make_env  # noqa: E402
from envs.crafter import CRAFTER  # noqa: E402
from envs.crafter import vocabulary as words  # noqa: E402
from envs.crafter.captions import ABOUT, Scene, read_caption  # noqa: E402
from envs.crafter.minecraft import BELIEFS  # noqa: E402
from rladapter_adapter import (  # noqa: E402
    INSTRUCTION,
    PROJECTIONS,
    UNKNOWN_SCORE,
    Adapter,
    LmConfig,
    Text,
    Tree,
    adapter_prompt,
    answer_columns,
    batches,
    load_adapter,
    mean_nll,
    pack,
    param_shapes,
    row_length,
    suggestion,
)  # fmt: skip
from utils import hf_folder  # noqa: E402

# ------------------------------------------------------------------------------------------------------- the teacher

# What a caption must mention before the teacher suggests a sub-goal: the things that the words themselves name. Not
# `CRAFTER.needs`, which is what the game demands: which of the sub-goals can be reached is for RL to find out.
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
SHORT, TAKES = 0.3, 0.6  # shares of the analyses that state nothing, and that say what something takes
BELIEVED = {goal: [fact for fact in facts if not fact.startswith("not ")] for goal, facts in BELIEFS}
RANDOM = 0.3  # share of what is said to be taken that is drawn at random: all facts are words to be known
UNTIL = 0.8  # share of what is said to be taken that ends with its not being done yet: "not unlocked collect wood"
# Statements name things, not how many or where: the LLM has the caption too, and to copy numbers takes a larger model.
STATEMENTS = {
    "see": ("It sees {}.", "There is {} in view."), "hold": ("It holds {}.", "It has {}."), "lack": ("It has no {}.",),
    "low": ("It is low on {}.", "Its {} is low."),
}  # fmt: skip
NEAR_ZOMBIE = "A zombie is near."
PRESSING = ("evening", "dark", "asleep", "plant ripe by now")  # facts that the caption says in whole sentences
ARTICLES = {"iron": "", "water": "", "stone": "", "coal": "", "lava": "", "arrow": "an "}  # all others: "a "
LACKED = ("wood", "stone", "coal", "iron", "sapling", "wood pickaxe", "stone pickaxe", "wood sword")


def possible_sub_goals(caption: str) -> list[str]:
    """Returns the basic sub-goals whose things the caption mentions (NEEDS)."""
    scene = read_caption(caption)
    mentioned = {f"see {name}" for name in scene.sights} | {f"hold {name}" for name in scene.inventory}
    mentioned |= {f"face {scene.facing}"}
    return [goal for goal in CRAFTER.basic_sub_goals if mentioned.issuperset(NEEDS[goal])]


def true_statements(scene: Scene) -> tuple[list[str], list[str]]:
    """Returns sentences that hold in a scene: (the pressing ones, all others)."""
    pressing = [s.format(name) for name, n in scene.vitals.items() if n <= words.LOW for s in STATEMENTS["low"]]
    if "zombie" in scene.sights and sum(map(abs, scene.sights["zombie"])) <= words.NEAR:
        pressing.append(NEAR_ZOMBIE)
    pressing += [ABOUT[fact] for fact in PRESSING if ABOUT[fact] in scene.about]
    others = [text for fact, text in ABOUT.items() if fact not in PRESSING and text in scene.about]
    others += [s.format(ARTICLES.get(name, "a ") + name) for name in scene.sights for s in STATEMENTS["see"]]
    for name in scene.inventory:
        article = ("an " if name.startswith("iron") else "a ") if name.endswith(("pickaxe", "sword")) else ""
        others += [s.format(article + name) for s in STATEMENTS["hold"]]
    lacked = [name for name in LACKED if name not in scene.inventory]
    return pressing, others + [s.format(name) for name in lacked[:2] for s in STATEMENTS["lack"]]


def gerund(goal: str) -> str:
    """Returns a basic sub-goal as a noun: "drink water" -> "drinking water"."""
    verb, _, thing = goal.partition(" ")
    return f"{GERUNDS[verb]} {thing}".strip()


def write_analysis(
    rng: np.random.Generator, caption: str, sub_goals: Sequence[int], comprehension: float | None
) -> str:
    """Says how the last advice was understood, a fact or two of the caption, and a sub-goal or two at random.

    This is the teacher. It names literally only sub-goals whose things the caption mentions, and prefers none of them.
    """
    kind = "unknown"
    if comprehension is not None:
        kind = "good" if comprehension >= GOOD else "poor" if comprehension <= POOR else "fair"
    basic = [goal for goal in (CRAFTER.sub_goals[i] for i in sub_goals) if goal in NEEDS]
    last = "the plan"  # composite sub-goals only
    if basic:
        last = gerund(basic[rng.integers(len(basic))])
    sentences = [str(rng.choice(UNDERSTOOD[kind] if sub_goals else NO_ADVICE)).format(last=last)]
    pressing, others = true_statements(read_caption(caption))
    facts = [str(rng.choice(pressing))] if pressing else []
    if others and (not facts or rng.random() < 0.5):
        facts.append(str(rng.choice(others)))
    goals = rng.permutation(possible_sub_goals(caption))[: rng.integers(1, 3)]
    sentences = [*sentences, *facts] * (rng.random() > SHORT) + [suggestion(goals)]
    if rng.random() < TAKES:
        others = rng.permutation(CRAFTER.basic_sub_goals)[: rng.integers(0, 3)]
        sentences += [CRAFTER.experience_text(draw_takes(rng, goals[-1]))]
        sentences += [CRAFTER.experience_text(draw_takes(rng, goal), goal) for goal in others]
    return " ".join(sentences)


def draw_takes(rng: np.random.Generator, goal: str) -> list[str]:
    """Returns facts that a sub-goal is said to take; last often that it was not done yet in this life."""
    if BELIEVED.get(goal) and rng.random() > RANDOM:
        facts = BELIEVED[goal]
    else:
        facts = rng.permutation(words.FACTS)[: rng.integers(1, 5)].tolist()
    achievement = words.ACHIEVEMENTS[words.BASIC_SUB_GOALS.index(goal)].replace("_", " ")
    return [*facts, *[f"not unlocked {achievement}"] * bool(rng.random() < UNTIL)]


# ------------------------------------------------------------------------------------------- the model and its tokens

TINY = LmConfig(
    vocab_size=896, hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
# The system prompt is left out: this model knows but one task, and would only pay for reading it.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}" + USER + "{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}" + ASSISTANT + "{{ m['content'] }}" + END + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)  # fmt: skip


def phrases() -> list[str]:
    """Returns texts that are a token each, with the space in front: prompts are short, a name is one thing to look up.
    """
    fixed = [
        "You see:", ".\nRemembered:", ".\nFacing:", ".\nInventory:", ".\nVitals (of 9):",
        ".\nIt is day. The player is awake.", ".\nIt is dark. The player is awake.", "\nUnlocked:",
        "The most urgent sub-goal now is", "The most urgent sub-goals now are", " takes", "\nPrevious sub-goals:",
        ".\nComprehension score: 0.", *(f" {text}" for text in ABOUT.values()),
        f".\n{UNKNOWN_SCORE}", f"\n{INSTRUCTION}",
    ]  # fmt: skip
    names = [*CRAFTER.sub_goals, *(name.replace("_", " ") for name in CRAFTER.achievements)]
    names += map(gerund, CRAFTER.basic_sub_goals)
    names += CRAFTER.facts
    names += [f"{sight} (" for sight in words.SIGHTS] + [*words.VITALS, *words.INVENTORY, *words.SIGHTS]
    return list(dict.fromkeys(fixed + [f" {name}" for name in names]))


def train_tokenizer(texts: Sequence[str]) -> Any:
    """Returns a byte-level BPE tokenizer of TINY's vocabulary at most, with its chat template, as of transformers."""
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
    transformers = hf_folder.import_transformers()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = TINY.max_position_embeddings
    return fast


# ------------------------------------------------------------------------------------------------------------ training

ROWS, LENGTH = 4, 320  # of a batch
BRANCHES = 8  # made-up analyses of one caption, which is read but once for all of them
MUON_RATE, ADAM_RATE = 0.02, 4e-3


def init_params(config: LmConfig, key: jax.Array) -> Tree:
    """Returns random base weights, f32, of variance 1 / inputs, embeddings smaller.

    Larger than the usual 0.02 of large models, with which a model this small takes far longer to learn to copy from
    its prompt.
    """
    shapes = param_shapes(config)
    params = {}
    for key_param, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        std = 0.05 if name == "embed" else 1 / math.sqrt(shape[-2]) if "norm" not in name else 0.0
        params[name] = jnp.ones(shape) if "norm" in name else std * jax.random.normal(key_param, shape)
    return params


def real_captions(seed: int, num: int) -> list[str]:
    """Returns captions of Craftax situations from every stage of the game."""
    env = make_env("Craftax-Classic-Symbolic-v1", 64)
    return [env.to_text(obs) for obs in np.asarray(random_observations(env, jax.random.key(seed), num))]


def made_up_examples(rng: np.random.Generator, caption: str, num: int) -> list[tuple[str, str]]:
    """Returns `num` pairs of prompt and analysis for a caption, with random previous sub-goals and scores."""
    examples = []
    for _ in range(num):
        last = rng.choice(len(CRAFTER.sub_goals), rng.integers(0, 4), replace=False).tolist()
        score = None if rng.random() < 0.2 else float(rng.random())
        prompt = adapter_prompt(CRAFTER, caption, last, score)
        examples.append((prompt, write_analysis(rng, caption, last, score)))
    return examples


def muon_dimensions(tree: Tree) -> Tree:
    """Says which base weights Muon takes, (in, out) being their last two dimensions; None leaves the rest to Adam."""
    matrix = optax.contrib.MuonDimensionNumbers((1,), (2,))
    return {"params": {name: matrix if name in PROJECTIONS else None for name in tree["params"]}}


def pretrain_optimizer(steps: int) -> Any:
    """Returns Muon, which learns to copy in fewer steps than Adam does, with warm-up and cosine decay."""
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
    """Does one step on the base weights, of `steps` in all. Returns base, optimizer, and the loss before the step."""
    loss, gradient = jax.value_and_grad(mean_nll, argnums=1)(graphdef, base, {"lora": {}}, batch, remat=False)
    updates, optimizer = pretrain_optimizer(steps).update(gradient, optimizer, base)
    return optax.apply_updates(base, updates), optimizer, loss


def pack_groups(groups: Sequence[Sequence[Text]], length: int) -> dict[str, np.ndarray]:
    """Puts each group of texts into a row of `length` columns, in the form of `rladapter_adapter.pack`.

    Stores what all prompts of a group begin with once; the texts go on from there, and do not see each other. Leaves
    out what does not fit, down to whole texts. Raises ValueError if not even the first one fits.
    """
    packed = {name: np.zeros((len(groups), length), np.int32) for name in ("tokens", "starts", "shared")}
    is_answer = np.zeros((len(groups), length), bool)
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
            is_answer[row, end - len(response) : end] = True
    return packed | {"answers": answer_columns(is_answer)}


def packed_batches(rng: np.random.Generator, adapter: Adapter, captions: Sequence[str], num: int) -> list[Tree]:
    """Returns `num` batches of ROWS captions, each with BRANCHES analyses (fewer where a row is full)."""
    some = [captions[i] for i in rng.integers(len(captions), size=num * ROWS)]
    groups = [[adapter.encode_example(*pair) for pair in made_up_examples(rng, c, BRANCHES)] for c in some]
    return batches(pack_groups(groups, LENGTH), ROWS, np.arange(len(groups)))


def train(captions: Sequence[str], folder: Path, steps: int, seed: int = 0, report: Any = print) -> None:
    """Trains on made-up analyses of these captions and writes `folder`.

    The same captions, seed and machine give the same model. `report` gets a line every 100 steps.
    """
    rng = np.random.default_rng(seed)
    some = rng.permutation(len(captions))[:2000]
    tokenizer = train_tokenizer([" ".join(made_up_examples(rng, captions[i], 1)[0]) for i in some])
    config = LmConfig(**{**TINY.__dict__, "vocab_size": len(tokenizer)})
    params, chat = init_params(config, jax.random.key(seed)), hf_folder.Chat(tokenizer, "")
    adapter = Adapter(config, params, {}, chat, [tokenizer.eos_token_id])
    base, optimizer = adapter.base, pretrain_optimizer(steps).init(adapter.base)
    queue, losses, start = [], [], time.perf_counter()
    for step in range(1, steps + 1):
        queue = queue or packed_batches(rng, adapter, captions, 32)
        base, optimizer, loss = pretrain_step(adapter.graphdef, base, optimizer, queue.pop(), steps)
        losses.append(loss)
        if step % 100 == 0 or step == steps:
            report(f"step {step} of {steps}  loss {np.mean(losses):.3f}  {time.perf_counter() - start:.0f} s")
            losses = []
    write_folder(folder, config, base["params"], tokenizer)


def write_folder(folder: Path, config: LmConfig, params: Tree, tokenizer: Any) -> None:
    """Writes a Hugging Face model folder of model_type llama, beside its place, and moves it there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        shape = {name: getattr(config, name) for name in f"{names} head_dim max_position_embeddings".split()}
        hf = hf_folder.import_transformers().LlamaConfig(
            **shape, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, dtype="float32",
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        hf.architectures = ["LlamaForCausalLM"]
        hf.save_pretrained(str(draft))
        tokenizer.save_pretrained(str(draft))
        hf_folder.write_params(draft, {name: params[name] for name in param_shapes(config)})
        draft.chmod(0o755)  # mkdtemp's are private
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ measures

STATEMENT = re.compile("|".join(
    [re.escape(s).replace(r"\{\}", ".+") for forms in STATEMENTS.values() for s in forms]
    + [NEAR_ZOMBIE, *ABOUT.values()]
))  # fmt: skip


def all_true_statements(caption: str) -> set[str]:
    scene = read_caption(caption)
    lacked = {s.format(name) for name in LACKED if name not in scene.inventory for s in STATEMENTS["lack"]}
    return {*sum(true_statements(scene), []), *lacked}


def score_texts(captions: Sequence[str], analyses: Sequence[str]) -> dict[str, float]:
    """Measures analyses of these captions: shares of true statements, of sub-goals that are possible, variety."""
    stated = true = named = possible = named_any = possible_any = 0
    for caption, analysis in zip(captions, analyses, strict=True):
        statements = [sentence for sentence in re.findall(r"[^. ][^.]*\.", analysis) if STATEMENT.fullmatch(sentence)]
        truths, can = all_true_statements(caption), set(possible_sub_goals(caption))
        goals = [CRAFTER.sub_goals[i] for i in CRAFTER.sub_goals_in_text(analysis)]
        stated, true = stated + len(statements), true + sum(s in truths for s in statements)
        named, possible = named + len(goals), possible + sum(goal in can for goal in goals)
        named_any, possible_any = named_any + bool(goals), possible_any + any(goal in can for goal in goals)
    num = len(analyses)
    return {
        "analyses": num, "facts_stated": stated, "facts_right": true / max(stated, 1),
        "sub_goals_named": named, "sub_goals_possible": possible / max(named, 1),
        "analyses_naming_a_possible_sub_goal": possible_any / num, "analyses_naming_any": named_any / num,
        "distinct_1": distinct(analyses, 1), "distinct_2": distinct(analyses, 2),
        "distinct_analyses": len(set(analyses)) / num,
    }  # fmt: skip


def distinct(texts: Sequence[str], n: int) -> float:
    """Returns distinct-n: different n-grams of words by all n-grams (Li et al. 2016, arXiv 1510.03055)."""
    grams = [tuple(w[i : i + n]) for w in (text.split() for text in texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def measure(adapter: Adapter, seed: int, num: int = 256) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Returns measures and the analyses behind them, sampled for `num` situations that no training saw."""
    rng = np.random.default_rng(seed)
    captions = real_captions(seed, num)
    pairs = [made_up_examples(rng, caption, 1)[0] for caption in captions]
    analyses = adapter.analyse([prompt for prompt, _ in pairs], jax.random.key(seed))
    texts = [adapter.encode_example(*pair) for pair in pairs]
    nll = adapter.nll(pack(texts, row_length(texts)))  # of the teacher's analyses
    result = score_texts(captions, analyses) | {"held_out_perplexity": math.exp(nll)}
    return result, [(prompt, analysis) for (prompt, _), analysis in zip(pairs, analyses, strict=True)]


def main(
    out: Path = ROOT / "assets" / "adapter-tiny", steps: int = 3000, seed: int = 0, captions: int = 10_000,
    measure_only: Path | None = None, samples: int = 0,
) -> None:  # fmt: skip
    """Train and measure the tiny adapter.

    Args:
        out: folder that is written
        steps: steps of training
        seed: seed of weights, situations and made-up analyses
        captions: number of situations to train on
        measure_only: measure this model or LoRA folder instead of training one
        samples: print so many analyses of held-out situations too
    """
    start = time.perf_counter()
    if measure_only is None:
        train(real_captions(seed, captions), out, steps, seed)
        print(f"written to {out} after {time.perf_counter() - start:.0f} s in all")
    result, texts = measure(load_adapter(measure_only or out), seed=seed + 1)
    for prompt, analysis in texts[:samples]:
        print(f"{prompt}\n-> {analysis}\n")
    print(json.dumps({name: round(value, 4) for name, value in result.items()}, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
