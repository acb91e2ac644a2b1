"""Which devices have kernels, and the sentences that say which form of a loop runs."""

import types

import pytest

from purejaxpg import InputError
from purejaxpg.fused import paths

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("9.0", ""),
        ("8.0", ""),
        ("10.3", ""),
        ("7.5", "kernels need an NVIDIA GPU of compute capability 8.0, and this one has 7.5"),
        ("gfx942", "kernels need an NVIDIA GPU"),
    ],
)
def test_old_devices_and_those_of_others_have_no_kernels(capability: str, reason: str) -> None:
    assert paths.too_old(types.SimpleNamespace(compute_capability=capability)) == reason


def test_what_is_recorded_can_be_read() -> None:
    ways = [
        paths.Path("values", True),
        paths.Path("values", False, "there are none"),
        paths.Path("values", False, "there are none", networks=True),
    ]
    with paths.recorded() as recorded:
        for way in ways:
            paths.record(None, way)
    assert [*map(str, recorded)] == [
        "The values run in one kernel.",
        "The values run in plain JAX, because there are none.",
        "The values run in plain JAX with the networks in kernels, because there are none.",
    ]
    paths.record(None, ways[0])  # outside of the context nobody listens
    assert recorded == ways


def test_a_required_kernel_that_is_not_there_is_an_error() -> None:
    config = types.SimpleNamespace(fused="require")
    paths.record(config, paths.Path("values", True))
    with pytest.raises(InputError, match="fused is 'require', but the values run in plain JAX"):
        paths.record(config, paths.Path("values", False, "there are none"))
