"""Moving pictures of episodes, drawn by gymnax.visualize without a display.

With the extra `visualize`, which installs pygame: CartPole, masked or not, Acrobot, Pendulum,
MountainCar and MountainCarContinuous. Always: the five games of MinAtar, Catch, FourRooms,
MetaMaze, PointRobot and Pong. gymnax 1.0.1 has no pictures of DeepSea, MemoryChain, UmbrellaChain,
DiscountingChain, FrozenLake, Reacher, Swimmer and the four bandits.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from purejaxpg import InputError, extras
from purejaxpg.envs import gymnax, masked
from purejaxpg.envs.interface import Env

MOST_FRAMES = 100  # gymnax needs about a tenth of a second for one
_WITH_PYGAME = (
    "CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0",
    masked.NAME,
)  # fmt: skip
_WITHOUT = (
    "Asterix-MinAtar", "Breakout-MinAtar", "Freeway-MinAtar", "Seaquest-MinAtar",
    "SpaceInvaders-MinAtar", "Catch-bsuite", "FourRooms-misc", "MetaMaze-misc", "PointRobot-misc",
    "Pong-misc",
)  # fmt: skip
DRAWABLE = _WITH_PYGAME + _WITHOUT


def require_drawable(env_name: str) -> None:
    """Raise an InputError unless gymnax has a picture of `env_name` and pygame is there for it."""
    if env_name not in DRAWABLE:
        raise InputError(f"{env_name} cannot be drawn by gymnax; these can: {', '.join(DRAWABLE)}.")
    if env_name in _WITH_PYGAME:
        with _without_display():
            extras.load("pygame", "visualize", f"A picture of {env_name}")


def frame_steps(num_steps: int) -> list[int]:
    """Return the steps that are drawn: evenly spaced, at most MOST_FRAMES, and the last one."""
    stride = max(1, -(-(num_steps - 1) // (MOST_FRAMES - 1)))
    return [*range(0, num_steps - 1, stride), num_steps - 1]


def save_gif(path: Path, env: Env, params: Any, states: Any, rewards: np.ndarray) -> None:
    """Draw an episode as a GIF that repeats.

    Args:
        path: the file, which must end in .gif; it is replaced only once the picture is complete.
        env: one of gymnax's own environments.
        params: its parameters.
        states: the environment's own state before each step, leaves [T, ...].
        rewards: [T].

    Raises:
        InputError: the environment has no picture.
    """
    require_drawable(env.name)
    if not gymnax.is_from_gymnax(env.inner) or hasattr(env.inner, "_env"):
        raise InputError(f"env {env.name!r} is not gymnax's own, so gymnax has no picture of it.")
    steps = frame_steps(len(rewards))
    frames = [jax.tree.map(lambda leaf, t=t: leaf[t], states) for t in steps]
    temporary = path.with_name(f".{path.name}.tmp.gif")
    try:
        with _without_display():
            film = _film(steps)(env.inner, params, frames, np.cumsum(rewards)[steps])
            film.animate(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _film(steps: list[int]) -> Any:
    """Return gymnax's visualizer with the numbers of these steps in its titles."""

    class Film(gymnax.visualizer()):  # type: ignore[misc]
        def update(self, frame: int) -> None:
            super().update(frame)
            total = float(self.reward_seq[frame])
            self.ax.set_title(f"{self.env.name}: step {steps[frame] + 1}, return {total:.2f}")

    return Film


@contextlib.contextmanager
def _without_display() -> Iterator[None]:
    """Draw in memory: no window of matplotlib's, no window or sound of pygame's."""
    import matplotlib.pyplot as plt

    for driver in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER"):
        os.environ.setdefault(driver, "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    backend = plt.get_backend()
    plt.switch_backend("agg")
    try:
        yield
    finally:
        plt.switch_backend(backend)
