"""Learning curves of SAC."""

import sys

import _controls
import _curves
import plotly.graph_objects as go

ALT = _curves.alt("SAC")


def figure() -> go.Figure:
    """Return the figure."""
    return _curves.figure("sac")


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
