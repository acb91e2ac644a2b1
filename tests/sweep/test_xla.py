"""XLA's options for GPUs: who gets them, that a user's flags win, and that XLA knows them all.

No GPU is needed: XLA reads the options of a GPU on every device.
"""

import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny_sweep

from purejaxpg import FaultError
from purejaxpg.sweep import compute, search, session, xla


def device(platform: str, version: str = "") -> Any:
    return types.SimpleNamespace(
        platform=platform, client=types.SimpleNamespace(platform_version=version)
    )


NVIDIA, AMD = device("gpu", "PJRT C API\ncuda 13000"), device("gpu", "PJRT C API\nrocm 60300")


@pytest.fixture(autouse=True)
def no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.mark.fast
@pytest.mark.parametrize("other", [device("cpu"), device("tpu"), AMD])
def test_other_devices_keep_the_defaults(other: Any) -> None:
    assert xla.options(NVIDIA)
    assert xla.options(other) == {} and xla.options(jax.devices()[0]) == {}


@pytest.mark.fast
@pytest.mark.parametrize("tuning", xla.TUNINGS)
def test_xla_knows_every_option_and_value(tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "way", lambda: tuning)
    options = xla.options(NVIDIA)
    assert options == {**xla.GRAPHS, **xla.TUNINGS[tuning]}
    lowered = jax.jit(jnp.sin).lower(1.0)
    lowered.compile(options)
    for name in options:  # so an option that XLA does not know would have been refused
        with pytest.raises(jax.errors.JaxRuntimeError, match=name):
            lowered.compile({**options, name: "no such value"})
        with pytest.raises(jax.errors.JaxRuntimeError, match="no_such"):
            lowered.compile({f"{name}_no_such": options[name]})


@pytest.mark.fast
def test_flags_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *others), value = xla.options(NVIDIA), "=FUSION"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_prefer_vector_width=512 --{first}{value}")
    assert list(xla.options(NVIDIA)) == others
    monkeypatch.setenv("XLA_FLAGS", f"--{first}_of_another_name{value}")
    assert list(xla.options(NVIDIA)) == [first, *others]


@pytest.mark.fast
def test_by_default_nothing_is_tuned_and_nothing_stored() -> None:
    assert xla.options(NVIDIA)["xla_gpu_autotune_level"] == 0
    assert not xla.stores_choices(NVIDIA)


@pytest.mark.fast
def test_programs_are_stored_only_where_there_is_a_cache_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xla, "TUNING", "stored")
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        assert "xla_gpu_autotune_level" not in xla.options(NVIDIA)
        assert xla.stores_choices(NVIDIA) and not xla.stores_choices(AMD)
        jax.config.update("jax_enable_compilation_cache", False)
        assert xla.options(NVIDIA)["xla_gpu_autotune_level"] == 0
        assert not xla.stores_choices(NVIDIA)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def test_the_options_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "options", lambda device: {"xla_no_such_option": 1})
    spec = tiny_sweep.swept()
    backend = compute.Backend(spec, jax.devices()[:1])
    (group, *_) = backend.groups(0, next(search.rounds(spec)), {})
    with pytest.raises(FaultError, match="xla_no_such_option"):
        backend.compile(group)


@pytest.mark.fast
def test_programs_can_be_kept_elsewhere(tmp_path: pathlib.Path) -> None:
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        session.use_cache(tmp_path)
        jax.jit(lambda x: jnp.sin(x) + 20261127).lower(1.0).compile()
    finally:
        session.use_cache(before)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.fast
@pytest.mark.parametrize("stored", [True, False])
def test_a_sweep_keeps_its_programs_if_it_is_to(
    stored: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[pathlib.Path] = []
    monkeypatch.setattr(session, "use_cache", places.append)
    monkeypatch.setattr(session, "_compute", lambda *_: None)
    monkeypatch.setattr(session, "report", lambda out, console: out)
    monkeypatch.setattr(xla, "stores_choices", lambda device: stored)
    options = session.Options(out=tmp_path / "out", quiet=True)
    session.run(tiny_sweep.swept(), options, jax.devices()[:1])
    assert places == [tmp_path / "out" / "programs"] * stored
