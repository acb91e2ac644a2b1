"""A backend in plain NumPy in place of training: it starts at once and imports no jax.

Its "states" are hashes of seed, configuration and update, so a lost, repeated or exchanged update
changes every number after it. `python tests/stand_in.py DIR` runs a search in rounds into DIR; the
fault tests kill it, fill its disk and flip its bits.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from purejaxpg import FaultError, InputError, checkpoint, contract, disk, signals
from purejaxpg.sweep import engine, search, space
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float
    env: str = "stand-in"
    num_updates: int = 24
    steps_per_update: int = 10
    total_timesteps: int = 240


@dataclasses.dataclass(frozen=True)
class Run:
    run_id: str
    config: Config
    seed: int
    swept: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Spec:
    """The part of a spec that `search` uses."""

    search: specs.Search
    seeds: tuple[int, ...] = (0, 1)
    num_configs: int = 6
    given: contract.Given = contract.NOTHING
    robust: specs.Robust | None = None
    before: tuple["Spec", ...] = ()

    @property
    def axes(self) -> dict[str, space.Axis]:
        values = tuple(range(self.num_configs))
        return {"learning_rate": space.Axis("learning_rate", "list", values)}

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(
            self.make_run({"learning_rate": rate}, seed)
            for rate in range(self.num_configs)
            for seed in self.seeds
        )

    def make_run(self, swept: Mapping[str, Any], seed: int) -> Run:
        return Run(f"rate{swept['learning_rate']}-seed{seed}", Config(**swept), seed, swept)


class Backend:
    """Two units side by side, three rows each, segments of two updates."""

    eval_every = 0

    def groups(self, index: int, round_: plans.Round, stored: Mapping[str, int]) -> Any:
        return plans.groups(index, round_, lambda _: "one", lambda *_: 3, stored)

    def compile(self, group: plans.Group) -> Any:
        return types.SimpleNamespace(rows=group.rows, units=2, segment_length=2, compile_s=0.0)

    def inputs(self, programs: Any, batch: Sequence[plans.Unit]) -> np.ndarray:
        legs = [leg for unit in batch for leg in plans.padded(unit.legs, programs.rows)]
        return np.array([identity(leg) for leg in legs], np.uint64)

    def start(self, programs: Any, inputs: np.ndarray) -> np.ndarray:
        return scrambled(inputs, 0)

    def segment(
        self, programs: Any, inputs: Any, states: Any, diverged_at: Any, first: int, count: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        scores = []
        for u in range(first, first + count):
            states = scrambled(states ^ inputs, u)
            scores.append(as_score(states))
        metric = np.stack(scores, axis=1).astype(np.float32)
        return states, diverged_at, {"episode/return_sum": metric, "episode/count": 0 * metric + 1}

    def score(self, programs: Any, inputs: Any, states: Any, updates: int) -> Any:
        value = as_score(scrambled(states, 1000 + updates))[:, None]
        return {"evaluation/return": value, "evaluation/greedy_return": value}

    def cut(self, states: np.ndarray, rows: slice) -> np.ndarray:
        return states[rows]

    def join(self, programs: Any, trees: Sequence[np.ndarray]) -> np.ndarray:
        return engine.stacked(trees, programs.rows)

    def pick(self, parts: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        return np.array([tree[row] for tree, row in parts])

    def template(self, unit: plans.Unit) -> np.ndarray:
        return np.zeros(len(unit.legs), np.uint64)

    def metric_names(self, unit: plans.Unit, evaluated: bool) -> list[str]:
        scores = ["evaluated/greedy_return", "evaluated/return"] if evaluated else []
        return ["episode/count", "episode/return_sum", *scores]

    def facts(self, programs: Any, group: plans.Group) -> dict[str, Any]:
        return {"compile_s": 0.0, "steps_before": 0}

    def can_save(self, config: Config) -> bool:
        return True

    def versions(self) -> dict[str, str]:
        return {}

    def to_dict(self, config: Config) -> dict[str, Any]:
        return dataclasses.asdict(config)

    def save(self, path: Any, tree: Any) -> str:
        """A checkpoint of one file, by the same steps as the real one: write, sync, rename."""
        target = pathlib.Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        flat = dict(flattened(tree))
        with disk.faults("write the checkpoint", target):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with (temporary / "arrays.npz").open("wb") as file:
                np.savez(file, **flat)
                os.fsync(file.fileno())
            digest = checkpoint._write_manifest(temporary, [])
            checkpoint._swap_in(temporary, target)
        return digest

    def load(self, path: Any, template: Any, sha256: str | None = None) -> Any:
        checkpoint.verify(path, sha256)
        try:
            with np.load(pathlib.Path(path) / "arrays.npz", allow_pickle=False) as file:
                return filled(template, file, "root")
        except (ValueError, KeyError) as error:
            raise FaultError(f"{path} does not fit: {error}.") from error


def flattened(tree: Any, name: str = "root") -> list[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in flattened(tree[key], f"{name}|{key}")]
    return [(name.replace("/", "~"), np.asarray(tree))]


def filled(template: Any, file: Any, name: str) -> Any:
    if isinstance(template, dict):
        return {key: filled(template[key], file, f"{name}|{key}") for key in template}
    array = file[name.replace("/", "~")]
    if array.shape != template.shape:
        raise FaultError(f"{name} has shape {array.shape}, and {template.shape} is expected.")
    return array


def identity(leg: plans.Leg) -> int:
    text = f"{leg.run.config.learning_rate} {leg.run.seed}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def scrambled(x: np.ndarray, update: int) -> np.ndarray:
    """A mixing step of 64 bits (splitmix64's), which loses nothing."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15) * np.uint64(update + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def as_score(x: np.ndarray) -> np.ndarray:
    return (x >> np.uint64(40)).astype(np.float64)


class Silent:
    """A progress that says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def spec(kind: str = "halving") -> Spec:
    if kind == "halving":
        return Spec(specs.Search(halving=specs.Halving(rungs=3, eta=2.0)))
    if kind == "longer":
        return Spec(specs.Search(halving=specs.Halving(rungs=2, eta=2.0)))
    if kind == "pbt":
        return Spec(specs.Search(pbt=specs.Pbt(population=4, generations=4)))
    return Spec(specs.Search())


def run(
    directory: str | os.PathLike[str],
    kind: str = "halving",
    snapshot_every_s: float = 0.0,
    after_commit: Callable[[stores.Store], None] = lambda _: None,
) -> None:
    """Run the search into `directory`, by default with a snapshot after every segment.

    Args:
        directory: the result directory.
        kind: "halving", "longer", "pbt" or "plain".
        snapshot_every_s: least seconds between two snapshots of a unit.
        after_commit: is called with the store after each commit.
    """
    plain = {"kind": kind}
    with stores.Store.open(directory, plain, f"kind = {kind!r}\n") as store:
        rounds = search.rounds(spec(kind))  # type: ignore[arg-type]
        backend, silent = Backend(), Silent()
        then = functools.partial(after_commit, store)
        engine.run(rounds, store, backend, silent, snapshot_every_s, None, then)  # type: ignore[arg-type]


def contents(directory: str | os.PathLike[str]) -> str:
    """Return legs, scores, arrays and states of a finished sweep as one text."""
    lines = []
    with stores.Store.read(directory) as store:
        for leg in store.ledger.legs():
            lines.append(json.dumps(leg, sort_keys=True))
        for unit in store.ledger.units():
            assert unit["done"]
            for name, array in store.arrays(unit["name"]).items():
                lines.append(f"{unit['name']} {name} {array.tobytes().hex()}")
            rows = np.zeros(unit["rows"], np.uint64)
            if unit["has_state"]:
                state = store.state(unit["name"], rows, Backend().load)
                lines.append(f"{unit['name']} {state.tobytes().hex()}")
    return "\n".join(lines)


def committed(directory: pathlib.Path) -> dict[str, Any]:
    """Return the ledger's rows of finished units, after checking that they are consistent."""
    if not (directory / ledgers.LEDGER).is_file():
        return {}
    with stores.Store.read(directory) as store:
        legs = store.ledger.legs()
        assert len({(leg["run_id"], leg["round"]) for leg in legs}) == len(legs)
        assert {leg["status"] for leg in legs} <= {"pending", "done", "diverged"}
        assert store.damaged() == {}
        done = {unit["name"] for unit in store.ledger.units() if unit["done"]}
        assert all((leg["unit"] in done) == (leg["status"] != "pending") for leg in legs)
        return {f"{leg['unit']} {leg['row']}": leg for leg in legs if leg["unit"] in done}


def main(words: Sequence[str]) -> int:
    """Run the search that `words` name and return the exit status."""
    try:
        with signals.as_exceptions():
            print(f"Started {os.getpid()}.", flush=True)  # from here on signals are handled
            run(*words)
    except signals.Terminated:
        return 143
    except (FaultError, InputError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1 if isinstance(error, FaultError) else 2
    return 0


def serve() -> None:
    """Fork a process for each line of words on stdin, and print its exit status when it ends.

    A fork starts in a millisecond; Python and NumPy take half a second.
    """
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(main(line.split()))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        status = main(sys.argv[1:])
        assert "jax" not in sys.modules
        sys.exit(status)
