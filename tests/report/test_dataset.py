import subprocess
import sys

import numpy as np
import pytest

import purejaxpg.report
from purejaxpg import FaultError, InputError
from purejaxpg.sweep.store import Store


@pytest.fixture
def dataset(halved_in_part):
    pytest.importorskip("xarray")
    return purejaxpg.report.load(halved_in_part)


def test_every_stored_number_is_in_its_place_and_all_else_is_nan(halved_in_part, dataset):
    assert dict(dataset.sizes) == {"run": 8, "update": 8, "episode": 4}
    expected = {name: np.full(dataset[name].shape, np.nan) for name in dataset}
    with Store.read(halved_in_part) as store:
        rows = {run["run_id"]: i for i, run in enumerate(store.ledger.runs())}
        done = {unit["name"] for unit in store.ledger.units() if unit["done"]}
        arrays = {unit: store.arrays(unit) for unit in done}
        legs = [leg for leg in store.ledger.legs() if leg["unit"] in done]
    assert len(legs) > len(rows)
    for leg in legs:
        row = rows[leg["run_id"]]
        for name, array in arrays[leg["unit"]].items():
            at = slice(4) if name.startswith("evaluation/") else slice(leg["start"], leg["stop"])
            expected[name][row, at] = array[leg["row"]]
    assert set(expected) == {name for unit in arrays.values() for name in unit}
    for name, values in expected.items():
        wanted = ("run", "episode" if name.startswith("evaluation/") else "update")
        assert dataset[name].dims == wanted
        np.testing.assert_array_equal(dataset[name].values, values)


def test_coordinates_tell_the_runs_apart(halved_in_part, dataset):
    with Store.read(halved_in_part) as store:
        runs = store.ledger.runs()
    for name in ("run_id", "status", "stage", "seed", "score", "greedy_score"):
        assert dataset[name].dims == ("run",)
        assert dataset[name].values.tolist() == [run[name] for run in runs]
    for name in ("num_steps", "learning_rate"):
        assert dataset[name].values.tolist() == [run["swept"][name] for run in runs]
    assert dataset["update"].values.tolist() == list(range(1, 9))
    assert {"pending", "stopped", "done"} == set(dataset["status"].values)


def test_environment_steps_are_each_runs_own(dataset):
    for run in range(dataset.sizes["run"]):
        own = dataset.isel(run=run)
        known = int(own["updates"])
        steps = own["env_steps"].values
        per_update = 2 * int(own["num_steps"])
        np.testing.assert_array_equal(steps[:known], per_update * np.arange(1, known + 1))
        assert np.isnan(steps[known:]).all()


def test_it_can_be_selected_and_averaged(dataset):
    one = dataset.where(dataset.num_steps == 8, drop=True).sel(update=2)
    assert one.sizes["run"] == 4
    mean = dataset["evaluation/return"].mean("episode")
    np.testing.assert_allclose(mean, dataset.score, rtol=1e-6)


def test_importing_sweep_imports_neither_xarray_nor_jax():
    code = (
        "import sys, purejaxpg.report\n"
        "assert not {'jax', 'xarray', 'numpy'} & set(sys.modules)\n"
        "assert callable(purejaxpg.report.load)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_xarray_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(FaultError, match=r"pip install .* 'xarray"):
        purejaxpg.report.load(tmp_path)


def test_a_directory_without_results_is_refused(tmp_path):
    pytest.importorskip("xarray")
    with pytest.raises(InputError, match="not a result directory"):
        purejaxpg.report.load(tmp_path)
