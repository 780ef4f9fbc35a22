"""benchmarks/throughput.py and baseline.py: the arithmetic of rates and ratios, and that the baseline does its work."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import baseline  # noqa: E402
import throughput  # noqa: E402

import rladapter_ppo as rl  # noqa: E402


def player(*seconds):
    made = throughput.Player(None, None)
    made.seconds = list(seconds)
    return made


def test_a_ratio_is_the_median_of_neighbours_in_time():
    # 10 and 20 env steps a turn; beside each other 5/5, 10/10 and 2/8 steps/s
    players = {"unguided": player(2.0, 1.0, 5.0), "guided": player(4.0, 2.0, 2.5)}
    steps = {"unguided": 10, "guided": 20}
    assert throughput.all_ratios(players, steps) == {"guided / unguided": 1.0}
    players["guided"].seconds = [8.0, 4.0, 2.5]
    assert throughput.all_ratios(players, steps) == {"guided / unguided": 0.5}


def test_turns_are_added_up_and_who_began_is_last_next_time():
    order, players = [], {name: player() for name in "ab"}
    for name, made in players.items():
        made.turn = lambda i, name=name, made=made: (order.append(name), made.seconds.append(10.0**i))
    throughput.take_turns(players, turns=2, times=2)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab" + "ba"
    assert players["a"].seconds == players["b"].seconds == [110.0, 11000.0]  # without the one before the first


def test_check_fails_on_a_loss_above_20_percent_only(capsys):
    expected = {"ratios": {"64": {"a": 1.0, "b": 2.0}, "256": {"a": 1.0}}}
    assert throughput.check({"ratios": {"64": {"a": 0.81, "b": 5.0}}}, expected) == 0
    assert throughput.check({"ratios": {"64": {"a": 0.79, "b": 2.0, "new": 0.1}}}, expected) == 1
    assert "a, 64 envs: is 0.79, was 1.00" in capsys.readouterr().err
    assert throughput.check({"ratios": {"128": {"a": 0.1}}}, expected) == 1
    assert "nothing to compare" in capsys.readouterr().err


def test_a_check_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, capsys):
    flat = tmp_path / "flat.json"
    flat.write_text('{"ratios": {"guided / unguided": 0.9}}')
    for words in (["--check", "nowhere.json"], ["--check", str(flat)], ["--scale", "64", "--check", str(flat)]):
        assert throughput.main(words) == 2
        assert capsys.readouterr().err.startswith("error: --check: ")


def test_any_number_of_envs_asks_and_tunes_as_often_per_env_step():
    default = rl.Args()
    for setting in throughput.settings_of(throughput.Options(num_envs=(16, 64, 256, 1024, 4096))):
        args = setting.args
        rl.check_args(args)
        assert {change(args).sft.sft_every for change in throughput.TRAININGS.values()} == {args.sft.sft_every}
        steps = args.updates_per_phase * args.batch_size
        usual = default.updates_per_phase * default.batch_size
        assert args.table.queries_per_phase / steps == default.table.queries_per_phase / usual
        if setting.num_envs < 4096:  # whose phases have more steps than there are to a fine-tuning
            assert args.sft.sft_every * steps == default.sft.sft_every * usual
            assert args.num_updates == args.updates_per_phase * (1 + setting.training_turns * args.sft.sft_every)


def test_the_baseline_has_the_published_network():
    network = baseline.TwoTowers(1345, 17, 512, nnx.Rngs(0))
    count = sum(x.size for x in jax.tree.leaves(nnx.split(network)[1]))
    hidden = 1345 * 512 + 512 + 2 * (512 * 512 + 512)
    assert count == 2 * hidden + 512 * 17 + 17 + 512 + 1
    logits, value = network(jnp.ones((3, 1345)))
    assert logits.shape == (3, 17) and value.shape == (3,)


def test_advantages_and_loss_are_those_of_our_ppo():
    keys, config = jax.random.split(jax.random.key(0), 8), baseline.Config()
    reward, value = (jax.random.normal(key, (5, 4)) for key in keys[:2])
    done, last = jax.random.uniform(keys[2], (5, 4)) < 0.3, jax.random.normal(keys[3], (4,))
    theirs = baseline.advantages_of(config, {"reward": reward, "value": value, "done": done}, last)
    ours = rl.compute_gae(reward, value, done, last, config.gamma, config.gae_lambda)
    np.testing.assert_allclose((theirs["advantage"], theirs["target"]), ours, rtol=1e-5, atol=1e-6)

    logits, new_value = jax.random.normal(keys[4], (4, 3)), jax.random.normal(keys[5], (4,))
    action, log_prob = jnp.array([0, 2, 1, 1]), jax.random.normal(keys[6], (4,)) - 1
    part = {"action": action, "log_prob": log_prob, "advantage": ours[0][0], "target": ours[1][0]}
    coefficients = {"ent_coef": config.ent_coef, "vf_coef": config.vf_coef, "predict_coef": 0.0}
    args = rl.Args(clip_coef=config.clip_eps, **coefficients)
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(rl.Transition))
    batch = rl.Transition(**nothing | {"action": action, "log_prob": log_prob, "memory": jnp.zeros((1, 4, 0))})
    agent = lambda *_: (logits, new_value, None, None)  # noqa: E731
    advantages = (ours[0][0] - ours[0][0].mean()) / (ours[0][0].std() + 1e-8)  # ours are normalised before the loss
    expected, _ = rl.ppo_loss(args, agent, None, None, batch, advantages, ours[1][0])
    unmoved = baseline.ppo_loss(config, logits, new_value, part | {"value": new_value})  # nothing to clip
    np.testing.assert_allclose(unmoved, expected, rtol=1e-5)
    assert baseline.ppo_loss(config, logits, new_value, part | {"value": new_value + 1}) > unmoved


def test_our_update_takes_the_network_of_the_baseline():
    config = baseline.Config(num_envs=8, num_steps=4, num_minibatches=2, update_epochs=1, layer_size=8)
    runner, play = throughput.same_work(config)
    runner, metrics = play(runner, jax.random.key(0))
    assert int(runner.update) == 1 and np.isfinite(float(metrics["losses"]["policy_loss"]))


@pytest.fixture(scope="module")
def small():
    return baseline.Config(num_envs=8, num_steps=4, num_minibatches=2, update_epochs=2, layer_size=8, reset_ratio=4)


def test_envs_that_end_get_one_of_the_fresh_worlds(small):
    reset, step, num_actions = baseline.optimistic_env(small.env_id, small.num_envs, small.reset_ratio)
    _, state = jax.jit(reset)(jax.random.key(0))
    dying = jnp.array([True, False, True, True, False, False, False, False])
    state = state.replace(player_health=jnp.where(dying, 0, state.player_health))
    _, after, _, done = jax.jit(step)(jax.random.key(1), state, jnp.zeros(8, jnp.int32))
    assert num_actions == 17 and done.tolist() == dying.tolist()
    assert (after.timestep == jnp.where(dying, 0, state.timestep + 1)).all() and (after.player_health > 0).all()
    first, second, third = (after.map[i] for i in (0, 2, 3))
    assert (first != second).any() and (first == third).all()  # two worlds for three


def test_an_update_of_the_baseline_trains(small):
    before, update = baseline.make_baseline(small)
    params = jax.tree.map(np.array, before[0])  # the state is donated
    after, loss = update(before, jax.random.key(0))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, after[0])
    assert np.isfinite(loss) and all(jax.tree.leaves(changed))
