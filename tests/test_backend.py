"""Which form of a function is traced."""

import jax
import pytest

from purejaxpg import backend

pytestmark = pytest.mark.fast


def test_tests_run_on_a_cpu() -> None:
    assert jax.default_backend() == "cpu"
    assert not backend.on_gpu()


@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", False), ("tpu", False), ("gpu", True), ("cuda", True)]
)
def test_the_first_device_decides(
    monkeypatch: pytest.MonkeyPatch, platform: str, expected: bool
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert backend.on_gpu() is expected


def test_the_default_device_decides_if_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a program is traced."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    seen: list[bool] = []
    trace = jax.jit(lambda x: seen.append(backend.on_gpu()) or x)
    with jax.default_device(jax.devices("cpu")[0]):
        trace.lower(1.0)
    with jax.default_device("cpu"):
        trace.lower(1.0)
    trace.lower(1.0)
    assert seen == [False, False, True]
