"""A package that is not installed is named, with the command that installs it."""

import json

import pytest

from purejaxpg import FaultError, extras

pytestmark = pytest.mark.fast


def test_an_installed_package_is_returned() -> None:
    assert extras.load("json", "analysis", "This") is json


def test_a_missing_package_is_named() -> None:
    with pytest.raises(FaultError) as caught:
        extras.load("no_such_module", "analysis", "A Parquet file")
    said = str(caught.value)
    # The package is not on the index, so the command names what its extra installs.
    assert said.startswith("A Parquet file needs more packages: pip install 'pandas<4,>=2.2' ")
    assert "pyarrow" in said and "purejaxpg" not in said and said.endswith("'.")
