"""Sweeps: specification, planning, execution, results and report."""

import os
from typing import Any


def load(directory: str | os.PathLike[str]) -> Any:
    """Read the results of a sweep into an ``xarray.Dataset``; see ``dataset.load``."""
    from purejaxpg.sweep import dataset

    return dataset.load(directory)
