import pathlib
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sweep
from jax import random
from PIL import Image

import purejaxpg.agents
from purejaxpg import FaultError, InputError, contract, evaluate, report, trainers
from purejaxpg.agents import ppo_rnn
from purejaxpg.report import playback
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A sweep of an agent file, and that file, which leaves a mark where it is executed."""
    folder = tmp_path_factory.mktemp("fork")
    file = folder / "mine.py"
    shutil.copyfile(f"{purejaxpg.agents.__path__[0]}/ppo.py", file)
    mark = folder / "executed"
    with file.open("a") as stream:
        stream.write(f"\nimport pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    raw = {**tiny_sweep.TINY, "agent": str(file), "seeds": 1, "sweep": {}}
    tiny_sweep.run(specs.from_dict(raw, "tiny"), folder / "sweep")
    return folder


def play(out, run=playback.BEST, episodes=3, greedy=False, seed=0, gif=None, agent=None):
    said = []
    playback.run(out, run, episodes, greedy, seed, gif, agent, said.append)
    return said


def test_every_checkpoint_is_the_policy_that_was_scored(halved):
    """The engine's key plays the engine's episodes again, run by run, both legs long."""
    with Store.read(halved) as store:
        runs = store.ledger.runs()
        loaded = [playback.load(store, run, None, pytest.fail) for run in runs]
        arrays = {run["unit"]: store.arrays(run["unit"]) for run in runs}
    assert {run["status"] for run in runs} == {"done", "stopped"}

    @jax.jit
    def again(key, state, config):
        return evaluate.score(key, loaded[0].agent, state, config, 4)

    for run, trained in zip(runs, loaded, strict=True):
        key = random.fold_in(random.key(run["seed"]), np.uint32(2**31 + run["stop"]))
        for name, value in again(key, trained.state, trained.config).items():
            stored = arrays[run["unit"]][name][run["row"]]
            np.testing.assert_allclose(value, stored, rtol=1e-5, err_msg=f"{run['run_id']} {name}")
    scores = {tuple(arrays[run["unit"]]["evaluation/return"][run["row"]]) for run in runs}
    assert len(scores) > len(runs) // 2  # they are not all alike


def test_a_policy_is_loaded_in_three_lines(halved):
    """It acts as the agent does, alone, compiled, mapped, and on observations of any shape."""
    with Store.read(halved) as store:
        best, other = playback.find(store, playback.BEST), store.ledger.runs()[0]
        expected = playback.load(store, best, None, pytest.fail)
    trained = report.trained(halved)
    assert trained.run == best and report.trained(halved, other["run_id"]).run == other
    obs, key = random.normal(random.key(3), (6, 4)), random.key(1)
    want = trained.agent.policy(key, expected.state, obs, expected.config)
    act = jax.jit(trained.policy, static_argnames="greedy")
    for policy in (trained.policy, act):
        np.testing.assert_array_equal(policy(key, obs), want)
        np.testing.assert_array_equal(policy(key, np.asarray(obs).reshape(6, 2, 2)), want)
    greedy = act(key, obs, greedy=True)
    assert greedy.shape == (6,)
    for i in range(6):
        assert act(random.key(i), obs[i][None], greedy=True)[0] == greedy[i]
    several = jax.vmap(trained.policy, (0, None))(random.split(key, 50), obs)
    assert several.shape == (50, 6) and len(np.unique(several)) == 2


def test_a_policy_with_a_memory_is_given_it_and_returns_it(halved):
    """The observations of one episode, with the agent's own policy beside it."""
    config = ppo_rnn.Config(env="MemoryChain-bsuite", hidden=(4,), memory_size=3, num_envs=2)
    state = ppo_rnn.init(random.key(0), config)
    trained = playback.Trained({}, ppo_rnn, state, config)
    act = jax.jit(trained.policy)
    # Compiled as well: a compiled program may round differently than its single operations.
    own = jax.jit(lambda key, obs, memory: ppo_rnn.policy(key, state, obs, memory, config))
    memory = trained.initial_memory(5)
    expected = ppo_rnn.initial_memory(state, config, 5)
    for key in random.split(random.key(1), 3):
        obs = random.normal(key, (5, *contract.environment(config).obs_shape))
        action, memory = act(key, obs, memory)
        wanted, expected = own(key, obs, expected)
        np.testing.assert_array_equal(action, wanted)
        jax.tree.map(np.testing.assert_array_equal, memory, expected)
    with pytest.raises(InputError, match=r"start with memory = trained\.initial_memory\(n\)"):
        trained.policy(key, obs)
    with pytest.raises(InputError, match="has no memory, but is given one"):
        report.trained(halved).policy(key, np.zeros((5, 4)), memory)


def test_the_examples_of_the_documentation_run(halved, capsys):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    short, long = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(short.strip().splitlines()) == 4  # an empty line apart, three
    for source in (short, long):
        assert "results/study" in source
        names = {"key": random.key(0), "obs": np.zeros((3, 4))}
        exec(compile(source.replace("results/study", str(halved)), "results.md", "exec"), names)
        assert names.get("action", np.zeros(3)).shape == (3,)
    assert capsys.readouterr().out == "[1. 1. 1. 1.]\n"


def test_what_is_said_is_what_was_played(halved):
    first, second = play(halved, episodes=5, seed=3)
    with Store.read(halved) as store:
        best = playback.find(store, playback.BEST)
        trained = playback.load(store, best, None, pytest.fail)
    assert first.startswith(f"{best['run_id']}: CartPole-v1, seed {best['seed']}, num_steps")
    key, _ = random.split(random.key(3))
    played = playback.play(key, trained, 5)
    found = [float(word) for word in re.findall(r"-?\d+\.\d+", second)]
    returns = played["return"]
    expected = [
        returns.mean(),
        returns.std(ddof=1) / np.sqrt(5),
        returns.min(),
        returns.max(),
        played["length"].mean(),
    ]
    np.testing.assert_allclose(found, expected, atol=0.006)
    assert second.startswith("5 sampled episodes: return ") and "±" in second
    assert play(halved, episodes=5, seed=4)[1] != second
    assert play(halved, episodes=1, greedy=True)[1].startswith("1 greedy episode: return ")
    assert "±" not in play(halved, episodes=1, greedy=True)[1]


def test_the_best_run_is_one_of_full_length(halved):
    with Store.read(halved) as store:
        best, runs = playback.find(store, playback.BEST), store.ledger.runs()
    whole = [run for run in runs if run["status"] == "done"]
    assert best["run_id"] in {run["run_id"] for run in whole}
    mates = [run["score"] for run in whole if run["swept"] == best["swept"]]
    assert best["score"] == max(mates)


def planned(path, outcomes):
    """Runs of one configuration each that ended so: (status, score, updates of 4); no states."""
    runs = [
        Run(f"run{i}", {"env": "E"}, 0, {"a": i}, stop=stop, total=4)
        for i, (_, _, stop) in enumerate(outcomes)
    ]
    with Store.open(path, {}) as store:
        store.ledger.plan({run.run_id: [run] for run in runs})
        for run, (status, score, _) in zip(runs, outcomes, strict=True):
            if status != "pending":
                store.commit(run.run_id, {}, None, [Outcome(run.run_id, status, score, 0.0, 1)], {})
    return path


def test_neither_a_stopped_nor_a_diverged_nor_a_pending_run_is_best(tmp_path):
    ends = [("done", 90.0, 2), ("done", 10.0, 4), ("done", 20.0, 4), ("diverged", 99.0, 4)]
    with Store.read(planned(tmp_path / "a", [*ends, ("pending", 0, 4)])) as store:
        assert playback.find(store, playback.BEST)["run_id"] == "run2"
        with pytest.raises(InputError, match="run4 is still pending"):
            playback.find(store, "run4")
    with (
        Store.read(planned(tmp_path / "b", ends[:1])) as store,
        pytest.raises(InputError, match="trained to its end yet"),
    ):
        playback.find(store, playback.BEST)


def test_an_unknown_run_gets_near_matches(halved):
    with Store.read(halved) as store:
        known = store.ledger.runs()[0]["run_id"]
    with pytest.raises(InputError, match=f"no run '{known[:6]}' .* did you mean {known}"):
        play(halved, known[:6])
    wrong = known[:-1] + ("0" if known[-1] != "0" else "1")
    with pytest.raises(InputError, match=f"did you mean .*{known}"):
        play(halved, wrong)
    with pytest.raises(InputError, match=r"no run 'zzz' .* lists the ids"):
        play(halved, "zzz")


def test_the_picture_is_of_one_episode(halved, tmp_path):
    path = tmp_path / "episode.gif"
    said = play(halved, gif=path)[-1]
    steps = int(re.search(r"of (\d+) step", said)[1])
    assert f"with return {steps}.00: {path}" in said  # a step of CartPole is worth 1
    with Image.open(path) as image:
        assert image.format == "GIF" and image.n_frames == steps
    assert not list(tmp_path.glob(".*"))


def test_the_recorded_episode_is_one_of_the_environment(halved):
    with Store.read(halved) as store:
        run = playback.find(store, playback.BEST)
        trained = playback.load(store, run, None, pytest.fail)
    states, obs, rewards = playback.record(random.key(1), trained)
    assert len(obs) == len(rewards) + 1 == len(states.time) + 1 <= 21
    assert states.time.tolist() == list(range(len(rewards)))
    # Positions follow from velocities, also over the last step, before the reset.
    np.testing.assert_allclose(obs[1:, 0], obs[:-1, 0] + 0.02 * obs[:-1, 1], atol=1e-6)


def recalling():
    """An agent that takes the action which MemoryChain showed at the start of an episode."""
    agent = types.ModuleType("recalling")
    agent.initial_memory = lambda state, config, n: jnp.zeros(n)

    def policy(key, state, obs, memory, config, greedy=False):
        memory = jnp.where(obs[:, 2] == 0.0, memory, obs[:, 2])
        return (memory > 0).astype(jnp.int32), memory

    agent.policy = policy
    return agent


@pytest.mark.parametrize("greedy", [False, True])
def test_a_memory_goes_through_what_is_played_and_recorded(greedy):
    """Whoever forgets is right in half of the episodes."""
    config = ppo_rnn.Config(env="MemoryChain-bsuite")
    trained = playback.Trained({}, recalling(), {}, config)
    assert (playback.play(random.key(0), trained, 16, greedy)["return"] == 1.0).all()
    states, _, rewards = playback.record(random.key(1), trained, greedy)
    assert rewards.tolist() == [0, 0, 0, 0, 0, 1] and len(states.time) == 6


def test_bad_pictures_are_refused_before_anything_is_computed(halved, tmp_path):
    with pytest.raises(InputError, match=r"must end in \.gif or \.mp4"):
        play(halved, gif=tmp_path / "a.png")
    (tmp_path / "file").touch()
    with pytest.raises(FaultError, match=r"Cannot write .*a\.gif"):
        play(halved, gif=tmp_path / "file" / "a.gif")
    with pytest.raises(InputError, match="E cannot be drawn by gymnax; these can: CartPole-v1"):
        play(planned(tmp_path / "s", [("done", 1.0, 4)]), gif=tmp_path / "a.gif")


def test_a_file_is_executed_only_if_the_caller_names_it(fork, monkeypatch):
    monkeypatch.setattr(trainers, "_executed", {})  # as in a process that has not trained it
    mark, file = fork / "executed", fork / "mine.py"
    mark.unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"mine\.py.* executed only if you name it"):
        play(fork / "sweep")
    assert not mark.exists()
    other = fork / "other.py"
    other.write_text(file.read_text() + "\nx = 1\n")
    with pytest.raises(InputError, match="is not the agent that was trained"):
        play(fork / "sweep", agent=other)
    assert not mark.exists()
    with pytest.raises(InputError, match="is not a file"):
        play(fork / "sweep", agent=fork / "nowhere.py")
    said = play(fork / "sweep", agent=file)
    assert mark.exists() and len(said) == 2


def test_the_policy_of_a_fork_needs_its_file(fork):
    with pytest.raises(InputError, match="executed only if you name it"):
        report.trained(fork / "sweep")
    trained = report.trained(fork / "sweep", agent=fork / "mine.py")
    assert trained.policy(random.key(0), np.zeros((2, 4))).shape == (2,)


def test_a_changed_built_in_agent_is_noted(halved):
    with Store.read(halved) as store:
        identity = {**store.ledger.identity, "agent_source": "0" * 16}
    said = []
    module = playback.load_agent(halved, identity, None, said.append)
    assert module.__name__ == "purejaxpg.agents.ppo"
    (note,) = said
    assert note.startswith("Note: ppo has changed since it was trained; what is played may differ")


def test_a_path_to_a_built_in_agent_in_the_directory_is_no_name(halved):
    identity = {"agent": "./ppo.py", "agent_source": "0" * 16}
    with pytest.raises(InputError, match="only if you name it"):
        playback.load_agent(halved, identity, None, pytest.fail)
    with pytest.raises(InputError, match="does not say which agent"):
        playback.load_agent(halved, {}, None, pytest.fail)


@pytest.mark.parametrize(("name", "value"), [("episodes", 0), ("seed", -1)])
def test_bad_numbers_are_refused(halved, name, value):
    with pytest.raises(InputError, match=f"{name} must be"):
        play(halved, **{name: value})
