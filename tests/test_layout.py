"""Where arrays lie on a mesh, and that a run spread over several devices ends as on one."""

import json
import os
import pathlib
import time
from typing import Any

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import spread
from jax.sharding import Mesh, PartitionSpec

from purejaxpg import InputError, cli, layout
from purejaxpg.rlhf import ppo
from purejaxpg.sweep import compute, session
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

FOUR = "--xla_force_host_platform_device_count=4"
ENVIRONMENT = {**os.environ, "XLA_FLAGS": f"{FOUR} {quick.FLAGS}"}
SPREAD = [name for name in spread.MESHES if name != "1x1"]


# ------------------------------------------------------------------------------------ the layout


@pytest.mark.fast
def test_every_matrix_of_a_transformer_is_split_by_its_role() -> None:
    shapes = jax.eval_shape(spread.reference)
    leaves = jax.tree_util.tree_leaves_with_path(shapes.params["layer_0"])
    names = {(path[0].key, path[1].key): leaf.shape for path, leaf in leaves}
    found = {name: layout.axis(("params", "layer_0", *name), s, 2) for name, s in names.items()}
    columns = {(layer, "kernel"): 1 for layer in ("qkv", "gate", "up")}
    rows = {(layer, "kernel"): 0 for layer in ("out", "down")}
    norms = {(layer, "scale"): None for layer in ("attention_norm", "mlp_norm")}
    assert found == {**columns, **rows, **norms}
    named = set(shapes.params) - {"layer_0", "final_norm"}
    assert named == {"embed", "head"} and named <= {*layout.BY_COLUMNS, *layout.BY_ROWS}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("path", "shape", "parts", "axis"),
    [
        (("embed", "embedding"), (64, 128), 2, 0),  # by words, though the other side is larger
        (("head", "kernel"), (128, 64), 2, 1),
        (("up", "kernel"), (128, 66), 4, 0),  # 4 does not divide the outputs
        (("up", "kernel"), (129, 66), 4, None),
        (("up", "kernel"), (31, 33), 1, None),  # 1,023 numbers
        (("up", "kernel"), (32, 32), 2, 1),
        (("past", "up", "kernel"), (3, 64, 32), 2, 2),
        (("up", "a"), (512, 4), 2, 0),  # of adapters
        (("up", "b"), (4, 512), 2, 1),
        (("out", "a"), (512, 4), 2, 0),
        (("out", "b"), (4, 512), 2, 1),
        (("elsewhere",), (16, 128), 2, 1),
        (("elsewhere",), (2048,), 2, 0),
        ((), (2048,), 2, 0),
    ],
)
def test_an_axis_is_that_of_the_role_else_the_largest(
    path: tuple[str, ...], shape: tuple[int, ...], parts: int, axis: int | None
) -> None:
    assert layout.axis(path, shape, parts) == axis


@pytest.mark.fast
def test_tokens_are_whole_and_without_a_mesh_nothing_is_split() -> None:
    arrays = {"ids": np.zeros((2, 64, 64), np.int32), "w": np.zeros((2, 64, 64), np.float32)}
    abstract: Any = jax.sharding.AbstractMesh((2, 1, 2), ("rows", "data", "model"))
    over: Any = layout.shardings(arrays, abstract, "rows")
    assert over["ids"].spec == PartitionSpec("rows")
    assert over["w"].spec == PartitionSpec("rows", "model") and layout.split(over)
    one = {name: array[0] for name, array in arrays.items()}
    where = layout.shardings(one, abstract)
    assert layout.bytes_on_device(one, where) == (64 * 64 * 6, 64 * 64 * 8)
    alone = Mesh(np.array(jax.devices()[:1]), ("rows",))
    assert not layout.split(layout.shardings(arrays, alone, "rows"))
    assert layout.over_batch(jnp.ones((4, 2))).shape == (4, 2)


# ---------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `spread.py` wrote: arrays, and facts by trainer and mesh."""
    folder = tmp_path_factory.mktemp("spread")
    done = forked.run(spread.__file__, "out.npz", folder=folder, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "rematerialization" not in done.stderr  # XLA's word for a split that it cannot keep
    with np.load(folder / "out.npz") as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("facts")))


@pytest.mark.parametrize("mesh", SPREAD)
@pytest.mark.parametrize("trainer", spread.CASES)
def test_a_spread_run_has_the_losses_and_parameters_of_one_device(
    results: Any, trainer: str, mesh: str
) -> None:
    arrays, _ = results
    prefix = f"{trainer} 1x1 "
    names = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
    assert {f"loss/{'preference' if trainer == 'dpo' else 'policy'} 3", "evaluation/return"} <= {
        *names
    }
    assert any(name.startswith("params") for name in names)
    # The first log-ratios of adapters are 0, so rounding decides which one is the larger.
    for name in [name for name in names if name != "reward/accuracy 1"]:
        one, several = arrays[prefix + name], arrays[f"{trainer} {mesh} {name}"]
        np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_host_is_called_once_for_all_devices(results: Any) -> None:
    called = results[1]["called"]
    assert called["calls"] == [[2, 4, 3]]
    assert called["sums"] == np.arange(24.0).reshape(2, 4, 3).sum(-1).tolist()


@pytest.mark.parametrize("mesh", SPREAD)
@pytest.mark.parametrize("trainer", spread.CASES)
def test_matrices_are_stored_split_and_never_gathered(
    results: Any, trainer: str, mesh: str
) -> None:
    """33 words are odd, so the embedding and the head are split along the width."""
    facts, parts = results[1][f"{trainer} {mesh}"], spread.MESHES[mesh][1]
    assert set(facts["given"].values()) == (set() if trainer == "sft" else {1 / parts})
    assert trainer == "dpo" or set(facts["state"].values()) == {1 / parts}
    assert trainer == "dpo" or any("mu" in name for name in facts["state"])
    layer = jax.eval_shape(spread.reference).params["layer_0"]
    whole = [list(leaf.shape) for leaf in jax.tree.leaves(layer) if leaf.ndim == 2]
    kept = [shape for shape in facts["gathered"] if shape[-2:] in whole]
    assert kept == []
    assert facts["mesh"] == {"data": spread.MESHES[mesh][0], "model": parts}


@pytest.mark.parametrize("trainer", spread.CASES)
def test_more_devices_need_less_memory_each(results: Any, trainer: str) -> None:
    facts = {mesh: results[1][f"{trainer} {mesh}"] for mesh in spread.MESHES}
    one = facts["1x1"]
    for mesh, saved in (("1x2", 1 / 2), ("1x4", 3 / 4)):
        less = one["arguments"] - facts[mesh]["arguments"]
        assert less == pytest.approx(saved * one["large"], rel=0.01)
    assert facts["2x2"]["temporary"] < facts["1x2"]["temporary"]  # activations


# Two groups of two devices, with a unit each; a segment is an update.
STUDY = f"""
agent = "rlhf.sft"
seeds = 2
rows_per_device = 1
eval_episodes = 4
mesh = {{ data = 1, model = 2 }}
[config]
{"".join(f"{name} = {size}" + chr(10) for name, size in spread.SIZES.items())}
batch_size = 4
num_updates = 12
"""


def sweep(folder: pathlib.Path, out: str, *options: str) -> forked.Process:
    words = ["sweep", "study.toml", "--out", out, "--devices", "4", "--snapshot-every", "0"]
    flags = {**os.environ, "XLA_FLAGS": quick.FLAGS}
    words = ["-m", "purejaxpg.cli", *words, "--quiet", *options]
    return forked.Process(*words, folder=folder, environment=flags)


def arrays_of(out: pathlib.Path) -> dict[str, np.ndarray]:
    with stores.Store.read(out) as store:
        units = {unit["name"]: store.arrays(unit["name"]) for unit in store.ledger.units()}
        assert {json.dumps(unit["facts"].get("mesh")) for unit in store.ledger.units()} != {"null"}
    return {f"{unit} {name}": x for unit, own in units.items() for name, x in own.items()}


def test_a_killed_sweep_resumes_on_its_mesh_and_on_no_other(tmp_path: pathlib.Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    running, seen = sweep(tmp_path, "cut"), set[pathlib.Path]()
    while running.poll() is None and len(seen) < 3:
        seen |= set((tmp_path / "cut" / "progress").glob("round0*"))
        time.sleep(0.002)
    assert running.poll() is None
    running.kill()
    running.wait()
    other = sweep(tmp_path, "cut", "--mesh", "data=2,model=2")
    assert other.wait(300) == 2
    assert "its mesh.data is 1 and this one's is 2" in other.communicate()[1]
    both = [sweep(tmp_path, out) for out in ("cut", "whole")]
    assert [each.wait(600) for each in both] == [0, 0], [each.communicate() for each in both]
    cut, whole = (arrays_of(tmp_path / out) for out in ("cut", "whole"))
    assert cut.keys() == whole.keys() and len(cut) > 4
    assert all(np.array_equal(cut[name], whole[name]) for name in whole)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.fast
@pytest.mark.parametrize(
    ("mesh", "config", "words"),
    [
        (4, {}, "mesh must be a table, but is 4."),
        ({"rows": 2}, {}, "There is no axis of mesh named 'rows'; there are: data, model."),
        ({"modle": 2}, {}, "There is no axis of mesh named 'modle'; did you mean 'model'?"),
        ({"data": 0}, {}, "mesh data must be a whole number, 1 or more, but is 0."),
        ({"model": -2}, {}, "mesh model must be a whole number, 1 or more, but is -2."),
        ({"model": 2.0}, {}, "mesh model must be a whole number, 1 or more, but is 2.0."),
        ({"model": True}, {}, "mesh model must be a whole number, 1 or more, but is True."),
        (
            {"data": 3},
            {"batch_size": 8},
            "mesh data must divide the 8 sequences of a gradient step, but is 3.",
        ),
    ],
)
def test_a_wrong_mesh_is_refused(mesh: Any, config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        specs.from_dict({"agent": "rlhf.sft", "config": config, "mesh": mesh}, "study")
    assert str(caught.value) == words


@pytest.mark.fast
def test_agents_with_an_environment_and_minibatches_that_are_too_small_are_refused() -> None:
    with pytest.raises(InputError, match="mesh must be absent for agent 'ppo', which plays"):
        specs.from_dict({"agent": "ppo", "mesh": {"model": 2}}, "study")
    assert specs.from_dict({"agent": "ppo", "mesh": {"model": 1}}, "study").mesh == specs.Mesh()
    raw = {"agent": "rlhf.ppo", "config": {"batch_size": 8, "num_minibatches": 4}}
    given = ppo.Given(spread.alone(spread.reference()))
    specs.from_dict({**raw, "mesh": {"data": 2}}, "study", given=given)
    with pytest.raises(InputError, match="divide the 2 sequences of a gradient step, but is 4"):
        specs.from_dict({**raw, "mesh": {"data": 4}}, "study", given=given)


@pytest.mark.fast
def test_a_mesh_that_splits_nothing_is_refused() -> None:
    inputs = compute.Inputs(np.zeros(2, np.uint32), (), None, {"w": np.zeros((31, 35))})
    mesh: Any = jax.sharding.AbstractMesh((1, 1, 2), (compute.ROWS, "data", "model"))
    with pytest.raises(InputError, match=r"mesh model must divide a side of a matrix .* but is 2"):
        compute.shardings(inputs, {"w": np.zeros((2, 35, 31), np.float32)}, mesh)
    compute.shardings(inputs, {"w": np.zeros((2, 36, 31), np.float32)}, mesh)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mesh model=2", "mesh must divide the 1 device in use, but { data = 1, model = 2 } has"),
        ("--mesh model", "must look like data=1,model=2, but is 'model'"),
        ("--mesh model=two", "mesh model must be a whole number, 1 or more, but is 'two'."),
        ("--mesh pipe=2", "There is no axis of mesh named 'pipe'"),
    ],
)
def test_the_command_line_refuses_a_mesh_before_it_writes(
    words: str, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.toml").write_text('agent = "rlhf.sft"')
    study, out = str(tmp_path / "study.toml"), tmp_path / "out"
    for command in ("sweep", "plan"):
        call = [command, study, "--out", str(out), "--devices", "1", *words.split()]
        assert cli.main(call) == session.EXIT_INPUT
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.fast
def test_a_run_takes_the_devices_of_its_mesh(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text("mesh = { data = 2, model = 3 }")
    asked = session.Options(mesh={"model": 4})
    assert session.needed_by_one(str(path), session.DEFAULTS) == 6
    assert session.needed_by_one(str(path), asked) == 4
    assert session.needed_by_one("rlhf.sft", session.DEFAULTS) == 1
