"""Learning curves of PPO with a GRU."""

import sys

import _controls
import _curves
import plotly.graph_objects as go

ALT = _curves.alt("PPO with a GRU")


def figure() -> go.Figure:
    """Return the figure."""
    return _curves.figure("ppo_rnn")


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
