"""Learning curves of A2C."""

import sys

import _controls
import _curves
import plotly.graph_objects as go

ALT = _curves.alt("A2C")


def figure() -> go.Figure:
    """Return the figure."""
    return _curves.figure("a2c")


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
