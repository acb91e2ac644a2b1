"""A package that is not installed is named, with the command that installs it."""

import json

import pytest

from purejaxpg import InputError, extras

pytestmark = pytest.mark.fast


def test_an_installed_package_is_returned() -> None:
    assert extras.load("json", "analysis", "This") is json


def test_a_missing_package_is_named() -> None:
    with pytest.raises(InputError) as caught:
        extras.load("no_such_module", "analysis", "A Parquet file")
    wanted = "A Parquet file needs the extra `analysis`: pip install 'purejaxpg[analysis]'."
    assert str(caught.value) == wanted
