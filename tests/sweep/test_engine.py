"""The engine on real, tiny training: storing, resuming, grouping, devices, compilations."""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import types
from collections.abc import Sequence
from typing import Any

import forked
import jax
import numpy as np
import pytest
import quick
import stand_in
import tiny_sweep
from jax import random
from tiny_sweep import TINY, contents, run, swept

from purejaxpg import FaultError, InputError, evaluate
from purejaxpg.agents import ppo
from purejaxpg.report import curves
from purejaxpg.sweep import compute, engine, memory
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores


@dataclasses.dataclass(frozen=True)
class Plain:
    """A finished sweep."""

    spec: specs.Spec
    out: pathlib.Path
    printed: str


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Run `swept()`, with a line and a record of its progress after each segment."""
    spec, out = swept(), tmp_path_factory.mktemp("plain") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progresses, "LINE_EVERY_S", 0.0)
        patch.setattr(progresses, "LOG_EVERY_S", 0.0)
        return Plain(spec, out, run(spec, out))


def test_results_are_stored_with_everything_that_made_them(plain: Plain) -> None:
    spec, printed = plain.spec, plain.printed
    assert "4 configurations x 2 seeds = 8 runs, " in printed
    assert "8 runs in 1 compilation." in printed
    with stores.Store.read(plain.out) as store:
        assert store.ledger.finished
        runs, units = store.ledger.runs(), store.ledger.units()
        arrays = store.arrays(units[0]["name"])
        template = jax.eval_shape(jax.vmap(ppo.init), *keys_and_configs(spec.runs[:2]))
        states = store.state(units[0]["name"], template)
    assert [row["run_id"] for row in runs] == [row.run_id for row in spec.runs]
    assert {row["status"] for row in runs} == {"done"}
    assert arrays["loss/policy"].shape == (2, 4)
    assert arrays["evaluation/return"].shape == (2, 4)
    assert runs[0]["score"] == pytest.approx(arrays["evaluation/return"][0].mean())
    assert states.num_updates.tolist() == [4, 4]
    facts = units[0]["facts"]
    assert {"wall_s", "compile_s", "jax", "rows_per_device", "platform"} <= set(facts)
    assert facts["env_steps"] == 64


def test_warm_up_steps_count(tmp_path: pathlib.Path) -> None:
    fields = {
        "env": "Pendulum-v1", "total_timesteps": 100, "learning_starts": 40, "num_envs": 2,
        "num_steps": 5, "num_gradient_steps": 1, "batch_size": 4, "replay_capacity": 60,
        "hidden": [8], "env_params": {"max_steps_in_episode": 20},
    }  # fmt: skip
    plain = {"agent": "ddpg", "seeds": 1, "eval_episodes": 2, "config": fields}
    run(specs.from_dict(plain, "warm"), tmp_path)
    with stores.Store.read(tmp_path) as store:
        (unit,) = store.ledger.units()
        arrays = {unit["name"]: store.arrays(unit["name"], curves.METRICS)}
        (curve,) = curves.of_runs(store, store.ledger.legs(), arrays).values()
    assert unit["facts"]["steps_before"] == 40
    assert unit["facts"]["env_steps"] == 100
    assert curve.steps.tolist() == [45.0, 55.0, 65.0, 75.0, 85.0, 95.0]


def keys_and_configs(runs: Any) -> tuple[jax.Array, Any]:
    seeds, configs = compute.stack(runs, len(runs))
    return compute.run_keys(seeds, 0), configs


def test_an_interrupted_sweep_resumes_to_the_same_bits(
    plain: Plain, tmp_path: pathlib.Path
) -> None:
    spec = plain.spec
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "cut", stop_after=1)
    with stores.Store.read(tmp_path / "cut") as store:
        assert len(store.ledger.pending()) == 3
    run(spec, tmp_path / "cut")
    whole, cut = contents(plain.out), contents(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for unit, arrays in whole.items():
        for name, array in arrays.items():
            assert np.array_equal(array, cut[unit][name]), (unit, name)


def test_traced_values_share_one_compilation_and_static_ones_do_not(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = count_compilations(monkeypatch)
    traced = swept(learning_rate=[1e-3, 1e-2], gamma=[0.9, 0.99])
    run(traced, tmp_path / "traced", share=False)
    assert compiled() == 1
    static = swept(learning_rate=[1e-3, 1e-2], num_epochs=[1, 2])
    run(static, tmp_path / "static", share=False)
    assert compiled() == 2


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Count how often the training program is built by XLA since the last call."""
    seen: list[str] = []
    module = sys.modules["jax._src.compiler"]
    original = module.compile_or_get_cached

    def counting(backend: Any, computation: Any, *rest: Any, **more: Any) -> Any:
        seen.append(str(computation.operation.attributes["sym_name"]))
        return original(backend, computation, *rest, **more)

    monkeypatch.setattr(module, "compile_or_get_cached", counting)

    def count() -> int:
        number = sum("segment_rows" in name for name in seen)
        seen.clear()
        return number

    return count


def test_padding_is_cut_off(tmp_path: pathlib.Path) -> None:
    spec = specs.from_dict({**TINY, "seeds": 3, "sweep": {"gamma": [0.9]}}, "odd")
    run(spec, tmp_path / "out")
    shapes = [arrays["loss/policy"].shape for arrays in contents(tmp_path / "out").values()]
    assert shapes == [(2, 4), (1, 4)]


def test_a_run_alone_draws_the_stream_of_the_sweep(plain: Plain, tmp_path: pathlib.Path) -> None:
    """At the same unit size even the bits agree: only seed and configuration count."""
    fields = {**TINY["config"], "learning_rate": 1e-2, "gamma": 0.99}
    alone = specs.from_dict({**TINY, "seeds": [1], "config": fields, "sweep": {}}, "alone")
    run(alone, tmp_path / "alone")
    with stores.Store.read(plain.out) as store:
        row = next(r for r in store.ledger.runs() if r["run_id"] == alone.runs[0].run_id)
        among = {k: v[row["row"]] for k, v in store.arrays(row["unit"]).items()}
    (single,) = contents(tmp_path / "alone").values()
    for name, array in among.items():
        assert np.array_equal(array, single[name][0]), name


def test_the_sweep_is_train_and_evaluate(tmp_path: pathlib.Path) -> None:
    """The contract's own `train`, called by hand, agrees with what the engine stored."""
    spec = specs.from_dict({**TINY, "seeds": [5], "rows_per_device": 1, "sweep": {}}, "one")
    run(spec, tmp_path / "out")
    (stored,) = contents(tmp_path / "out").values()
    config, key = spec.runs[0].config, random.key(5)
    state, metrics = jax.jit(ppo.train)(key, config)
    score = jax.jit(lambda *given: evaluate.score(given[0], ppo, *given[1:], 4))
    for name, value in metrics.items():
        np.testing.assert_allclose(stored[name][0], value, rtol=1e-3, atol=1e-4, err_msg=name)
    key_score = random.fold_in(key, 2**31 + config.num_updates)
    for name, value in score(key_score, state, config).items():
        np.testing.assert_allclose(stored[name][0], value, err_msg=name)


def test_a_diverged_run_is_marked_and_stored(tmp_path: pathlib.Path) -> None:
    run(swept(learning_rate=[1e-3, 1e38], max_grad_norm=[float("inf")]), tmp_path / "out")
    with stores.Store.read(tmp_path / "out") as store:
        status = {(r["swept"]["learning_rate"], r["status"]) for r in store.ledger.runs()}
        at = [r["diverged_at"] for r in store.ledger.runs() if r["status"] == "diverged"]
    assert status == {(1e-3, "done"), (1e38, "diverged")}
    assert all(1 <= update <= 4 for update in at)


def on_four_devices(folder: pathlib.Path, call: str, *words: str) -> None:
    """Run `call`, an expression about this module, in a process with four CPU devices."""
    here = pathlib.Path(__file__).resolve()
    path = os.pathsep.join(map(str, (here.parent, here.parents[1])))
    flags = f"--xla_force_host_platform_device_count=4 {quick.FLAGS}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path}
    code = f"import sys, test_engine\n{call}"
    done = forked.run("-c", code, *words, folder=folder, environment=environment)
    assert done.returncode == 0, done.stderr


def on_devices(out: str, devices: int, stop_after: int | None = None) -> None:
    """Run 3 units on `devices` devices, interrupted after `stop_after` commits, then to the end."""
    spec = specs.from_dict({**TINY, "seeds": 3, "rows_per_device": 4}, "tiny")
    assert len(jax.devices()) >= devices
    if stop_after is not None:
        with pytest.raises(KeyboardInterrupt):
            run(spec, pathlib.Path(out), stop_after, devices)
    run(spec, pathlib.Path(out), devices=devices)


@pytest.mark.fast
def test_neither_devices_nor_interruptions_change_the_bits(tmp_path: pathlib.Path) -> None:
    """Two devices, four, and two with one unit left over after an interruption.

    A single device is compiled without partitions, and its fusions may round differently.
    """
    names = [str(tmp_path / name) for name in ("two", "four", "cut")]
    calls = (
        "test_engine.on_devices(sys.argv[1], 2)\n"
        "test_engine.on_devices(sys.argv[2], 4)\n"
        "test_engine.on_devices(sys.argv[3], 2, stop_after=2)\n"
    )
    on_four_devices(tmp_path, calls, *names)
    two, four, cut = (contents(pathlib.Path(name)) for name in names)
    assert len(two) == 3
    for unit, arrays in two.items():
        for name, array in arrays.items():
            assert np.array_equal(array, four[unit][name]), (unit, name)
            assert np.array_equal(array, cut[unit][name]), (unit, name)


FORK = """
import jax
from flax import struct
from purejaxpg.agents import ppo
from purejaxpg.agents.ppo import *

@struct.dataclass
class State:
    inner: TrainState
    key: jax.Array

    @property
    def params(self):
        return self.inner.params

def init(key, config):
    return State(ppo.init(key, config), jax.random.fold_in(key, 7))

def update(key, state, config):
    inner, metrics = ppo.update(key, state.inner, config)
    return State(inner, state.key), METRICS

def policy(key, state, obs, config, greedy=False):
    return ppo.policy(key, state.inner, obs, config, greedy)
"""


def fork(directory: pathlib.Path, metrics: str) -> specs.Spec:
    (directory / "mine.py").write_text(FORK.replace("METRICS", metrics), encoding="utf-8")
    return specs.from_dict({**TINY, "agent": "./mine.py"}, "forked", directory)


def test_a_fork_may_keep_a_key_in_its_state(tmp_path: pathlib.Path) -> None:
    spec = fork(tmp_path, "metrics")
    run(spec, tmp_path / "out")
    with stores.Store.read(tmp_path / "out") as store:
        assert store.ledger.finished


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ('{"episode/count": metrics["episode/count"]}', "must hold 'episode/return_sum'"),
        ("{**metrics, 'x': state.inner.obs}", "'x' of agent .* must be a scalar"),
    ],
)
def test_a_fork_that_breaks_the_contract_is_refused_before_training(
    tmp_path: pathlib.Path, metrics: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        run(fork(tmp_path, metrics), tmp_path / "out")


def test_plain_progress_lines(plain: Plain) -> None:
    for words in ("steps/s, ", " agents/s, best ", "(learning_rate=", "about", "s left"):
        assert words in plain.printed


def rounds_of(out: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The legs of each run, with their arrays, in order."""
    with stores.Store.read(out) as store:
        arrays = {unit["name"]: store.arrays(unit["name"]) for unit in store.ledger.units()}
        legs: dict[str, list[dict[str, Any]]] = {}
        for leg in store.ledger.legs():
            rows = {name: array[leg["row"]] for name, array in arrays[leg["unit"]].items()}
            legs.setdefault(leg["run_id"], []).append({**leg, "arrays": rows})
    return legs


HALVING = {**TINY, "halving": {"rungs": 2, "eta": 2}, "search": {}}


def test_all_rungs_run_the_programs_of_the_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of the units is recorded with each."""
    rates = [1e-3 * 1.3**i for i in range(8)]
    spec = specs.from_dict(
        {**HALVING, "seeds": 1, "rows_per_device": None, "sweep": {"learning_rate": rates},
         "halving": {"rungs": 3, "eta": 2}}, "tiny",
    )  # fmt: skip
    built: list[int] = []

    def build(spec: specs.Spec, group: plans.Group, used: Sequence[Any]) -> compute.Programs:
        built.append(group.rows)
        return tiny_sweep.build(spec, group, used)

    monkeypatch.setattr(compute, "build", build)
    run(spec, tmp_path / "halved")
    assert built == [2]
    with stores.Store.read(tmp_path / "halved") as store:
        units = store.ledger.units()
    assert {unit["round"] for unit in units} == {0, 1, 2}
    assert [unit["rows"] for unit in units] == [2, 2, 2, 2, 2, 2, 2]
    assert {unit["facts"]["rows_per_device"] for unit in units} == {2}


def test_a_rung_is_a_prefix_of_the_same_run(plain: Plain, tmp_path: pathlib.Path) -> None:
    """Runs that reach the last rung have the metrics and the score of the plain sweep, bitwise."""
    run(specs.from_dict(HALVING, "tiny"), tmp_path / "halved")
    wholes, halved = rounds_of(plain.out), rounds_of(tmp_path / "halved")
    assert wholes.keys() == halved.keys()
    assert sorted(len(legs) for legs in halved.values()) == [1] * 4 + [2] * 4
    for name, legs in halved.items():
        (whole,) = wholes[name]
        assert [(leg["start"], leg["stop"]) for leg in legs] == [(0, 2), (2, 4)][: len(legs)]
        for metric in ("loss/policy", "episode/return_sum"):
            pieces = np.concatenate([leg["arrays"][metric] for leg in legs])
            assert np.array_equal(pieces, whole["arrays"][metric][: len(pieces)])
        if len(legs) == 2:
            assert legs[1]["score"] == whole["score"]
    with stores.Store.read(tmp_path / "halved") as store:
        statuses = sorted(row["status"] for row in store.ledger.runs())
        assert statuses == ["done"] * 4 + ["stopped"] * 4


PBT = {
    **TINY, "seeds": 1, "rows_per_device": 4, "pbt": {"population": 4, "generations": 2},
    "sweep": {"learning_rate": {"log_uniform": [1e-4, 1e-1]}},
}  # fmt: skip


def test_a_population_copies_states_and_resumes_to_the_same_bits(tmp_path: pathlib.Path) -> None:
    spec = specs.from_dict(PBT, "population")
    run(spec, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "cut", stop_after=1)
    run(spec, tmp_path / "cut")
    for out in (tmp_path / "whole", tmp_path / "cut"):
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["round1-group0-unit0"]
    (tmp_path / "cut" / "arrays" / "round1-group0-unit0.npz").unlink()
    printed = run(spec, tmp_path / "cut")
    assert "computing 1 unit of earlier rounds again" in " ".join(printed.split())
    whole, cut = rounds_of(tmp_path / "whole"), rounds_of(tmp_path / "cut")
    assert [len(legs) for legs in whole.values()] == [2] * 4
    second = [legs[1] for legs in whole.values()]
    copies = [leg for leg in second if leg["parent"] != leg["run_id"]]
    assert len(copies) == 1
    first = {name: legs[0] for name, legs in whole.items()}
    scores = [leg["score"] for leg in first.values()]
    assert first[copies[0]["run_id"]]["score"] == min(scores)
    assert first[copies[0]["parent"]]["score"] == max(scores)
    for name, legs in whole.items():
        for leg, other in zip(legs, cut[name], strict=True):
            assert leg["config"] == other["config"] and leg["parent"] == other["parent"]
            for metric, array in leg["arrays"].items():
                assert np.array_equal(array, other["arrays"][metric]), metric


def test_a_unit_too_large_is_made_smaller_with_a_note(
    plain: Plain, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit between the needs of two rows and of three; the results are those of small units."""
    spec = specs.from_dict({**TINY, "rows_per_device": 8}, "tiny")
    needs = []
    original = compute.build

    def noting(*arguments: Any) -> compute.Programs:
        programs = original(*arguments)
        needs.append(programs.bytes_per_device)
        return programs

    monkeypatch.setattr(compute, "build", noting)
    monkeypatch.setattr(compute.memory, "limit", lambda devices: needs[0] * 4 // 10)
    printed = run(spec, tmp_path / "out")
    with stores.Store.read(tmp_path / "out") as store:
        assert store.ledger.finished
        rows = {unit["size"] for unit in store.ledger.units()}
        (note,) = store.ledger.notes()
    assert rows == {plain.spec.rows_per_device} == {2}
    assert "8 rows need" in note and "with 2 rows a device instead" in note
    assert note in printed
    first, second = rounds_of(tmp_path / "out"), rounds_of(plain.out)
    for name, (leg,) in first.items():
        for metric, array in leg["arrays"].items():
            assert np.array_equal(array, second[name][0]["arrays"][metric]), metric


def test_no_memory_for_a_single_row_is_a_sentence(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute.memory, "limit", lambda devices: 1)
    with pytest.raises(FaultError, match=r"Out of memory: .* a unit cannot be smaller"):
        run(swept(), tmp_path / "out")


@pytest.mark.parametrize(
    ("message", "expected"),
    [("RESOURCE_EXHAUSTED: no 9 GB", memory.OutOfMemory), ("INTERNAL: lost", FaultError)],
)
def test_errors_of_jax_are_distinguished(message: str, expected: type[Exception]) -> None:
    with pytest.raises(expected), compute.out_of_memory(8):
        raise jax.errors.JaxRuntimeError(message)


def test_programs_can_follow_the_log(plain: Plain) -> None:
    lines = (plain.out / "progress.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["steps"] for record in records] == sorted(record["steps"] for record in records)
    assert records[-1]["steps"] == records[-1]["steps_to_do"] == 8 * 64
    assert records[-1]["best"][0].startswith("learning_rate=")


def test_only_the_programs_of_the_last_groups_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each takes memory maps, of which a process may have a limited number."""
    spec = swept(num_epochs=[1, 2, 3, 4])
    backend = compute.Backend(spec, jax.devices()[:1])
    built = []

    def build(spec: Any, group: Any, *_: Any) -> Any:
        built.append(group.index)
        return types.SimpleNamespace(bytes_per_device=0)

    monkeypatch.setattr(compute, "build", build)
    monkeypatch.setattr(compute, "MAX_GROUPS", 3)
    groups = backend.groups(0, next(searches.rounds(spec)), {})
    held = []
    for index in (0, 1, 2, 0, 3, 0, 2, 1):
        backend.compile(groups[index])
        held.append(len(backend.compiled))
    assert held == [1, 2, 3, 3, 3, 3, 3, 3]
    assert built == [0, 1, 2, 3, 1]  # 1 was the one not used for longest when 3 came


# ------------------------------------------------------------------- evaluations within training


def evaluated(every: int) -> specs.Spec:
    return specs.from_dict({**TINY, "eval_every": every}, "tiny")


def test_evaluations_within_training_change_nothing_else(
    plain: Plain, tmp_path: pathlib.Path
) -> None:
    """And are those that a search would make after the same update."""
    run(evaluated(2), tmp_path / "out")
    run(specs.from_dict(HALVING, "tiny"), tmp_path / "halved")
    wholes, halved = rounds_of(plain.out), rounds_of(tmp_path / "halved")
    for run_id, (leg,) in rounds_of(tmp_path / "out").items():
        (whole,) = wholes[run_id]
        added = leg["arrays"].keys() - whole["arrays"].keys()
        names = ("return", "greedy_return", "length", "finished")
        assert added == {f"evaluated/{name}" for name in names}
        assert all(np.array_equal(x, leg["arrays"][name]) for name, x in whole["arrays"].items())
        returns = leg["arrays"]["evaluated/return"]
        assert np.isnan(returns).tolist() == [True, False, True, False]
        scores = np.float32([halved[run_id][0]["score"], whole["score"]])
        assert returns[[1, 3]].tolist() == pytest.approx(scores.tolist(), rel=1e-6)


class Evaluating(stand_in.Backend):
    eval_every = 5


class Stopping(stand_in.Silent):
    """Stops a sweep after `left` segments, and notes from which updates it resumed."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.resumed_at: list[int] = []

    def advance(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def resumed(self, batch: Any) -> None:
        self.resumed_at.append(batch.updates)


def evaluate_stand_in(out: pathlib.Path, kind: str, left: int = 0) -> Stopping:
    """Run a search of the stand-in with a snapshot after every segment."""
    progress: Any = Stopping(left)
    with stores.Store.open(out, {"kind": kind}, "") as store:
        rounds: Any = searches.rounds(stand_in.spec(kind))  # type: ignore[arg-type]
        backend: Any = Evaluating()
        with contextlib.suppress(KeyboardInterrupt):
            engine.run(rounds, store, backend, progress, 0.0)
    return progress


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["plain", "halving"])
def test_evaluations_within_training_are_resumed(tmp_path: pathlib.Path, kind: str) -> None:
    """Stopped after each number of segments; 24 updates of which every fifth is evaluated."""
    segments = -evaluate_stand_in(tmp_path / "whole", kind).left
    whole, seen = contents(tmp_path / "whole"), set()
    for left in range(1, segments):
        evaluate_stand_in(tmp_path / str(left), kind, left)
        seen |= set(evaluate_stand_in(tmp_path / str(left), kind).resumed_at)
        again = contents(tmp_path / str(left))
        assert again.keys() == whole.keys()
        for unit, arrays in whole.items():
            assert arrays.keys() == again[unit].keys()
            for name, array in arrays.items():
                assert np.array_equal(array, again[unit][name], equal_nan=True), (left, unit, name)
    first = whole["round0-group0-unit0"]["evaluated/return"]
    last = first.shape[1]
    due = {*range(5, last + 1, 5), last}
    assert set(np.flatnonzero(~np.isnan(first[0])) + 1) == due
    assert seen >= due - {last}  # from snapshots just after an evaluation, too
