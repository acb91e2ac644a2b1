"""The comparison with peers: its arithmetic by hand, its memory, and our own side of it.

No peer is needed: samples are made up, or taken of our own driver on a tiny size.
"""

import dataclasses
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
import time
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg import FaultError, InputError, envs
from purejaxpg.agents import ppo
from purejaxpg.rlhf import tasks, tokens
from purejaxpg.sweep import spec as specs

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {
    "total_timesteps": 64,
    "num_envs": 2,
    "num_steps": 8,
    "num_epochs": 1,
    "num_minibatches": 1,
    "hidden": [8],
    "env_params": {"max_steps_in_episode": 5},
}


@pytest.fixture(scope="module")
def load():
    """Import a file of benchmarks/ by its name, as it is imported there."""
    folders = [str(BENCHMARKS), str(BENCHMARKS / "peer_drivers")]
    sys.path += folders
    yield importlib.import_module
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def peers(load):
    return load("peers")


# --- statistics ---------------------------------------------------------------------------------


def test_a_row_is_the_median_of_paired_ratios(peers):
    # Ratios 2, 4, 3. A resample of three has median 2 with probability 7/27, and 4 likewise.
    assert peers.paired([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == (3.0, 2.0, 4.0)
    # Both sides drift by a factor of ten, the pairs agree: the interval has no width.
    assert peers.paired([3.0, 30.0, 0.3], [1.0, 10.0, 0.1]) == pytest.approx((3.0, 3.0, 3.0))


def test_a_sample_is_its_median_repetition(peers):
    assert peers.steady({"env_steps": 100, "seconds": [1.0, 50.0, 2.0]}) == 50.0


def test_sides_take_turns(peers):
    assert [peers.order(pair)[0] for pair in range(4)] == ["ours", "peer", "ours", "peer"]


def test_learning_is_of_the_episodes_that_ended(peers):
    sums, counts = np.zeros((2, 40)), np.zeros((2, 40))
    sums[0, 20], counts[0, 20] = 60.0, 3  # a stretch of two updates, mean 20
    sums[0, 37], counts[0, 37] = 30.0, 3  # the last tenth is updates 36 to 39
    sums[0, 38], counts[0, 38] = 50.0, 1
    found = peers.learning([sums.tolist(), counts.tolist()])
    assert found["final"][0] == 20.0  # (30 + 50) / 4
    assert found["area"][0] == pytest.approx((20.0 + 10.0 + 50.0) / 3)
    assert math.isnan(found["final"][1]) and math.isnan(found["area"][1])


def test_the_gate_wants_the_whole_interval_within_the_margin(peers):
    # Means 2 and 1, variances 2 and 2 of 2 seeds: standard error sqrt(2), 2 degrees of freedom.
    wide = 4.302653 * math.sqrt(2.0)
    found = peers.verdict([1.0, 3.0], [0.0, 2.0], margin=7.1)
    assert (found.ours, found.theirs) == (2.0, 1.0)
    assert (found.low, found.high) == pytest.approx((1.0 - wide, 1.0 + wide))
    assert found.passed  # 7.085 at most
    assert not peers.verdict([1.0, 3.0], [0.0, 2.0], margin=7.0).passed
    assert not peers.verdict([0.0, 2.0], [1.0, 3.0], margin=7.0).passed
    assert not peers.verdict([math.nan, 3.0], [0.0, 2.0], margin=7.0).passed


@pytest.mark.parametrize(("max_return", "margin"), [(500.0, 10.0), (None, 8.0)])
def test_the_margin_is_a_share_of_the_best_there_is(peers, max_return, margin):
    work = peers.Work("ppo", 1, 1, {}, {}, max_return=max_return, margin=0.02)
    ours = {"final": [100.0, 300.0], "area": [1.0, 2.0]}
    theirs = {"final": [100.0, 400.0], "area": [1.0, 2.0]}
    assert peers.gate(work, ours, theirs)["area"].margin == pytest.approx(margin)


# --- samples are kept ---------------------------------------------------------------------------


ROW = ("ppo-cartpole-1", "purejaxrl")


def sample(job, device="cpu"):
    """Stand-in for what a driver measures."""
    sums = [[8.0 + seed] * 40 for seed in range(job["agents"])]
    return {
        "seconds": [1.0],
        "cpu_s": [2.0],
        "env_steps": {"ours": 300.0, "purejaxrl": 100.0}[job["peer"]],
        "others_busy": 0.0,
        "episodes": [sums, [[2.0] * 40] * job["agents"]],
        "compile_s": 1.0,
        "peak_bytes": 1,
        "cores": [0],
        "versions": {},
        "device": device,
        "work": {},
    }


@pytest.fixture
def no_processes(peers, monkeypatch):
    monkeypatch.setattr(peers, "refuse_busy", lambda anyway: None)
    monkeypatch.setattr(peers, "missing", lambda row, envs, checkout: None)


@pytest.fixture
def taken(peers, monkeypatch, no_processes):
    """Stand-in for processes: the sides of the samples taken; the third one is interrupted."""
    sides, left = [], [2]

    def take(job, python, cores, deadline):
        if left[0] == 0:
            left[0] = 1000
            raise KeyboardInterrupt
        left[0] -= 1
        sides.append(job["peer"])
        return sample(job)

    monkeypatch.setattr(peers, "take", take)
    return sides


def command(tmp_path, *more):
    out = ["--out", str(tmp_path / "peers.json"), "--json"]
    return ["--work", ROW[0], "--pairs", "3", *out, *more]


def test_the_same_command_continues_where_it_was_stopped(peers, taken, tmp_path, capsys):
    assert peers.main(command(tmp_path)) == 130
    assert taken == ["ours", "purejaxrl"]
    assert len(json.loads((tmp_path / "peers.json").read_text())["samples"]) == 2
    capsys.readouterr()
    assert peers.main(command(tmp_path)) == 0
    assert taken[2:] == ["purejaxrl", "ours", "ours", "purejaxrl"]
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["ratio"], row["pairs"], row["mean_return"]["ours"]) == (3.0, 3, 4.0)
    assert peers.main(command(tmp_path)) == 0
    assert len(taken) == 6


def test_rows_take_turns_until_time_is_up(peers, no_processes, tmp_path, capsys, monkeypatch):
    agents = []

    def take(job, python, cores, deadline):
        assert deadline < math.inf
        if len(agents) == 9:
            raise peers.TimeIsUp
        agents.append(job["agents"])
        return sample(job)

    monkeypatch.setattr(peers, "take", take)
    words = ["--accelerator", "--out", str(tmp_path / "peers.json")]
    assert peers.main(words) == 0
    assert agents == [2048, 2048, 64, 64, 1, 1, 256, 256, 2048]
    found = capsys.readouterr()
    assert "Time is up" in found.err and found.out.count("| - | - | 1 |") == 4
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert [(row["pairs"], row["device"]) for row in rows] == [(1, "cpu")] * 4  # whole pairs only


def test_sides_on_different_devices_are_not_compared(peers, no_processes, tmp_path, monkeypatch):
    kinds = {"ours": "H200", "purejaxrl": "cpu"}
    monkeypatch.setattr(peers, "take", lambda job, *_: sample(job, kinds[job["peer"]]))
    with pytest.raises(FaultError, match="ours ran on 'H200' and the peer on 'cpu'"):
        peers.run(peers.make_parser().parse_args(command(tmp_path)))
    assert json.loads((tmp_path / "peers.json").read_text())["rows"] == []


def test_cpu_time_is_compared_where_sides_are_one_process(peers):
    row, taken = peers.Row("grpo-d16", "trl"), {}
    for side, cpu_s in (("ours", [3.0, 1.0, 2.0]), ("peer", [9.0, 8.0, 10.0])):
        job = {"peer": "ours", "agents": 1}
        own = {"cpu_s": cpu_s, "work": {"trained": 5}, "mean_return": None, "machine": ""}
        taken[side] = [sample(job) | own]
    assert peers.summary(row, taken)["cpu_ratio"] == 9.0 / 2.0
    assert "| 4.50 |" in list(peers.table([peers.summary(row, taken)]))[2]


def test_sides_that_did_other_work_are_not_compared(peers, no_processes, tmp_path, monkeypatch):
    work = {"ours": {"generated": 10, "trained": 10}, "purejaxrl": {"generated": 9, "trained": 10}}
    monkeypatch.setattr(peers, "take", lambda job, *_: sample(job) | {"work": work[job["peer"]]})
    with pytest.raises(FaultError, match=r"ours did .*'generated': 10.* peer .*'generated': 9"):
        peers.run(peers.make_parser().parse_args(command(tmp_path)))


def test_large_works_are_only_done_when_asked_for(peers):
    assert {row.work for row in peers.rows([], gate=False)}.isdisjoint({"ppo-cartpole-2048"})
    found = peers.rows(peers.ACCELERATOR, gate=False)
    assert {row.work for row in found} == set(peers.ACCELERATOR)
    assert sorted(peers.WORKS[row.work].agents for row in found) == [1, 64, 256, 2048]


def test_samples_of_other_settings_do_not_count(peers, taken, tmp_path, monkeypatch):
    peers.main(command(tmp_path))
    peers.main(command(tmp_path))
    assert peers.main(command(tmp_path, "--steps", "1024")) == 0
    assert len(taken) == 12
    monkeypatch.setattr(peers, "source_hash", lambda: "of other code")
    assert peers.main(command(tmp_path)) == 0
    assert len(taken) == 18


def test_the_gate_is_kept_as_two_numbers_a_seed(peers, taken, tmp_path, capsys):
    arguments = ["--gate", "--work", "ppo-cartpole-64", "--peer", "purejaxrl", "--seeds", "4"]
    out = ["--out", str(tmp_path / "peers.json")]
    assert peers.main([*arguments, *out]) == 0
    assert taken == ["ours", "purejaxrl"]
    assert capsys.readouterr().out.count("| passed |") == 2
    for sample in json.loads((tmp_path / "peers.json").read_text())["samples"]:
        assert sample["learning"]["final"] == sample["learning"]["area"] == [4.0, 4.5, 5.0, 5.5]


def test_the_gate_may_take_limits_for_ends(peers, taken, tmp_path, monkeypatch):
    jobs = []
    take = peers.take
    monkeypatch.setattr(peers, "take", lambda job, *rest: jobs.append(job) or take(job, *rest))
    out = ["--work", "ppo-cartpole-64", "--seeds", "4", "--out", str(tmp_path / "peers.json")]
    assert peers.main(["--gate", "--limits-end", *out]) == 0
    assert [job.get("limits_end") for job in jobs] == [True, None]  # ours only
    assert peers.main(["--limits-end", *out]) == 2


def test_limits_are_taken_for_ends(load, monkeypatch):
    monkeypatch.setattr(envs, "step", envs.step)  # put back afterwards
    config = ppo.Config(num_envs=2, env_params={"max_steps_in_episode": 1.0})
    env, params = envs.setup(config)
    state, action, key = envs.reset(jax.random.key(0), env, params, 2)[1], jnp.zeros(2, int), 1

    def terminated():
        return envs.step(jax.random.key(key), env, state, action, params)[2].terminated.tolist()

    assert terminated() == [False, False]
    load("drive_ours").take_limits_for_ends()
    assert terminated() == [True, True]


def test_a_gate_has_the_seeds_that_were_asked_for(peers):
    jobs = peers.Row("ppo-cartpole-64", "purejaxrl").gate_jobs(pathlib.Path(), 64)
    for job in jobs.values():
        assert job["agents"] * (job["repetitions"] + 1) == 64
        assert job["settings"]["total_timesteps"] == 500_000


def test_no_measurement_beside_other_work(peers, monkeypatch):
    clock = iter([0.0, 1.0, 0.0, 1.0])
    monkeypatch.setattr(peers, "busy_s", lambda: next(clock))
    monkeypatch.setattr(peers.time, "sleep", lambda seconds: None)
    with pytest.raises(FaultError, match="cores busy"):
        peers.refuse_busy(anyway=False)
    peers.refuse_busy(anyway=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--work", "chess"], "chess"),
        (["--pairs", "1"], "--pairs must be 2 or more"),
        (["--cores", "0"], "--cores must be from 1"),
        (["--gate", "--work", "sac-pendulum-1"], "--gate has no settings"),
        (["--gate", "--work", "ppo-cartpole-64", "--steps", "10239"], "must be 10240 or more"),
        (["--envs", "nowhere"], "no row left"),
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--accelerator", "--work", "ppo-cartpole-1"], "--accelerator and --work"),
    ],
)
def test_bad_input_is_one_sentence(peers, arguments, message, capsys, monkeypatch, tmp_path):
    if "nowhere" not in arguments:
        monkeypatch.setattr(peers, "missing", lambda row, envs, checkout: None)
    assert peers.main(["--out", str(tmp_path / "out.json"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(peers, tmp_path):
    (tmp_path / "other.json").write_text('{"name": "value"}')
    with pytest.raises(InputError, match="does not hold"):
        peers.Samples(tmp_path / "other.json")


def test_a_sample_is_a_process_on_its_cores(peers):
    core = min(os.sched_getaffinity(0))
    code = f"import os, sys; sys.exit(os.sched_getaffinity(0) != {{{core}}})"
    peers.finish([sys.executable, "-c", code], {}, [core])
    with pytest.raises(FaultError, match="failed: OSError: of old age"):
        peers.finish([sys.executable, "-c", "raise OSError('of old age')"], {}, [core])


def test_a_sample_ends_at_the_deadline(peers):
    began = time.monotonic()
    for left in (-1.0, 0.2):
        with pytest.raises(peers.TimeIsUp):
            code = "import time; time.sleep(60)"
            peers.finish([sys.executable, "-c", code], {}, [0], began + left)
    assert time.monotonic() - began < 30


def test_both_sides_find_the_device_that_the_user_chose(peers, monkeypatch):
    seen = {}

    def finish(command, env, cores, deadline):
        seen[pathlib.Path(command[1]).stem] = env
        pathlib.Path(command[-1]).write_text("{}")

    monkeypatch.setattr(peers, "finish", finish)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_ours_alone")
    monkeypatch.setenv("PYTHONPATH", "packages")
    for side in ("ours", "purejaxrl"):
        peers.take({"peer": side}, pathlib.Path(sys.executable), [0])
        assert seen[f"drive_{side}"]["JAX_PLATFORMS"] == "cuda"
        assert "XLA_FLAGS" not in seen[f"drive_{side}"]
    assert seen["drive_ours"]["PYTHONPATH"] == os.pathsep.join([str(BENCHMARKS.parent), "packages"])
    assert "PYTHONPATH" not in seen["drive_purejaxrl"]


def test_an_environment_is_made_of_wheels_alone(peers, tmp_path):
    wheels, envs = tmp_path / "wheels", tmp_path / "envs"
    (wheels / "purejaxrl").mkdir(parents=True)
    with zipfile.ZipFile(wheels / "purejaxrl" / "peer-1-py3-none-any.whl", "w") as wheel:
        about = "peer-1.dist-info"
        wheel.writestr("peer.py", "")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: peer\nVersion: 1\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    words = ["--make-envs", "--wheels", str(wheels), "--envs", str(envs)]
    assert peers.main(words) == 0
    assert sorted(path.name for path in envs.iterdir()) == ["purejaxrl"]
    python = peers.python_of("purejaxrl", envs)
    subprocess.run([python, "-c", "import peer, numpy"], check=True)
    assert subprocess.run([sys.executable, "-c", "import peer"], capture_output=True).returncode


def test_every_row_lists_its_inequalities(peers):
    for row in peers.rows([], gate=False):
        assert peers.INEQUALITIES[row.driver] and peers.PINS[row.driver]


def test_limits_end_removes_its_inequality(peers):
    gated = peers.rows(["ppo-cartpole-64"], gate=True)
    assert peers.LIMITS_END in "\n".join(peers.remaining(gated))
    assert peers.LIMITS_END not in "\n".join(peers.remaining(gated, limits_end=True))


# --- drivers ------------------------------------------------------------------------------------


def test_our_driver_trains_what_the_agent_trains(load, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")  # it sets its own
    common, ours = load("common"), load("drive_ours")
    job = {"algorithm": "ppo", "agents": 2, "settings": TINY, "repetitions": 1, "first_seed": 3}
    result = common.measure(job, ours.prepare)
    assert result["env_steps"] == 2 * 64 and len(result["seconds"]) == 1
    json.dumps(result)

    config = specs.from_dict({"agent": "ppo", "config": TINY}, "tiny").runs[0].config
    keys = jax.vmap(jax.random.key)(jnp.arange(3, 7))  # fresh seeds in the second repetition
    _, expected = jax.jit(jax.vmap(ppo.train, in_axes=(0, None)))(keys, config)
    sums, counts = result["episodes"]
    np.testing.assert_array_equal(counts, expected["episode/count"])
    np.testing.assert_array_equal(sums, expected["episode/return_sum"])
    assert np.sum(counts) > 0


def tiny(peers, name):
    """The job of ours for a language model, one update of 4 completions or pairs."""
    small = {"width": 8, "mlp_width": 8, "context": 20, "num_layers": 1, "num_heads": 2}
    work = peers.WORKS[name]
    settings = {**work.settings, "num_updates": 1, "batch_size": 4}
    settings |= {"group_size": 2} if "group_size" in settings else {}
    peers.WORKS["tiny"] = dataclasses.replace(work, model=small, settings=settings)
    try:
        return peers.Row("tiny", "trl").jobs(pathlib.Path())["ours"] | {"repetitions": 1}
    finally:
        del peers.WORKS["tiny"]


def test_our_driver_trains_a_language_model_and_counts_its_tokens(peers, load, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    job = tiny(peers, "dpo-d16") | {"first_seed": 0}
    result = load("common").measure(job, load("drive_ours").prepare)
    # Norms and biases included: 33 words, positions, two norms, attention, MLP, the last norm.
    block = 2 * 2 * 8 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 8 + 8) * 2
    parameters = 33 * 8 + 20 * 8 + block + 2 * 8
    assert result["env_steps"] == 2 * 4 * 16
    assert result["work"] == {"generated": 0, "trained": 128, "parameters": parameters}
    json.dumps(result)


def test_our_side_counts_what_it_generates(peers, load):
    ours, job = load("drive_ours"), tiny(peers, "grpo-d16")
    spec = ours.sweep(job, 0)
    group = types.SimpleNamespace(config=spec.runs[0].config)
    found = ours.work_of(job, spec, group)
    assert (found["generated"], found["trained"]) == (64, 64)


def test_both_sides_of_a_language_model_read_the_same_texts(peers, load):
    ours, job = load("drive_ours"), tiny(peers, "dpo-d16")
    task = tasks.make("sentiment")
    pairs = ours.pairs(job["texts"], task.prompt_length)
    first = job["texts"]["pairs"][0]
    for name in ("prompt", "chosen", "rejected"):
        ids = [i for i in getattr(pairs, f"{name}_ids")[0] if i != task.pad_id]
        assert [task.words[i] for i in ids] == first[name].split()
    assert len(job["texts"]["pairs"]) == 4
    assert (pairs.chosen_ids[:, -1] == task.eos_id).all()
    assert (pairs.chosen_ids[:, :-1] > task.eos_id).all()  # no earlier end, so none is shorter


def test_the_reward_of_the_peer_is_that_of_the_task(peers, load):
    job, task = tiny(peers, "grpo-d16"), tasks.make("sentiment")
    prompts = [row["prompt"] for row in job["texts"]["prompts"]][:4]
    ids = jax.random.randint(jax.random.key(0), (4, task.completion_length), 3, len(task.words))
    ids = ids.at[:2, 5].set(task.eos_id)
    mask = tokens.completion_mask(ids, task.eos_id)
    last = [[task.words.index(prompt.split()[-1])] for prompt in prompts]
    expected = task.reward(jnp.array(last), jnp.where(mask, ids, task.pad_id), mask)
    own = [row[keep].tolist() for row, keep in zip(np.array(ids), np.array(mask), strict=True)]
    found = load("drive_trl").reward_of(job["texts"])(prompts, own)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[0] != found[2] == found[3]


def test_a_shorter_run_of_a_language_model_has_fewer_updates(peers):
    row = peers.Row("grpo-d16", "trl")
    assert row.jobs(pathlib.Path(), 4096)["peer"]["settings"]["num_updates"] == 4
    assert row.jobs(pathlib.Path(), 1)["peer"]["settings"]["num_updates"] == 1


def test_settings_of_a_language_model_are_translated_or_refused(peers, load):
    translated = load("drive_trl").config_of
    found = translated("rlhf.grpo", peers.GRPO)
    assert (found["max_steps"], found["num_generations"], found["loss_type"]) == (40, 8, "grpo")
    assert translated("rlhf.dpo", peers.DPO)["per_device_train_batch_size"] == 64
    for change in ({"kl_placement": "reward"}, {"kl_times_ratio": False}):
        with pytest.raises(AssertionError):
            translated("rlhf.grpo", {**peers.GRPO, **change})
    with pytest.raises(KeyError):
        translated("rlhf.dpo", {**peers.DPO, "label_noise": 0.1})


def test_settings_that_a_peer_does_not_have_are_refused(peers, load):
    purejaxrl, rejax = load("drive_purejaxrl"), load("drive_rejax")
    assert purejaxrl.config_of(peers.PPO)["UPDATE_EPOCHS"] == 4
    assert rejax.config_of("sac", peers.SAC)["polyak"] == 0.995
    for change in ({"hidden": [32]}, {"vf_clip_eps": math.inf}):
        with pytest.raises(AssertionError):
            purejaxrl.config_of({**peers.PPO, **change})
    with pytest.raises(KeyError):
        rejax.config_of("sac", {**peers.SAC, "normalize_obs": True})
