"""Result directories that several modules read."""

import pathlib

import pytest
import tiny_sweep

from purejaxpg.sweep import spec as specs


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Successive halving, to its end."""
    out = tmp_path_factory.mktemp("halved") / "sweep"
    tiny_sweep.run(specs.from_dict(tiny_sweep.HALVED, "tiny"), out)
    return out


@pytest.fixture(scope="module")
def halved_in_part(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same, interrupted: one unit of the last rung is still pending."""
    out = tmp_path_factory.mktemp("halved") / "sweep"
    with pytest.raises(KeyboardInterrupt):
        tiny_sweep.run(specs.from_dict(tiny_sweep.HALVED, "tiny"), out, stop_after=5)
    return out
