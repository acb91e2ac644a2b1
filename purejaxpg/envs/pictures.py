"""Moving pictures of episodes, drawn without a display.

An environment of one's own draws itself by `render(state, params)`, which returns an image, uint8
[H, W, 3]. One of another library does so by `film(states, params, steps)`, which returns an image
for each of some steps. gymnax.visualize draws gymnax's own.

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

from purejaxpg import FaultError, InputError, extras
from purejaxpg.envs import gymnax, masked
from purejaxpg.envs.interface import Env

MOST_FRAMES = 100  # gymnax needs about a tenth of a second for one
FRAME_MS = 50  # how long a frame is shown
LEAST_SIDE = 240  # pixels of a picture, about
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
    """Raise an error unless gymnax has a picture of `env_name` and pygame is there for it."""
    if env_name not in DRAWABLE:
        raise InputError(f"{env_name} cannot be drawn by gymnax; these can: {', '.join(DRAWABLE)}.")
    if env_name in _WITH_PYGAME:
        with _without_display():
            extras.load("pygame", "visualize", f"A picture of {env_name}")


def frame_steps(num_steps: int) -> list[int]:
    """Return the steps that are drawn: evenly spaced, at most MOST_FRAMES, and the last one."""
    stride = max(1, -(-(num_steps - 1) // (MOST_FRAMES - 1)))
    return [*range(0, num_steps - 1, stride), num_steps - 1]


def draws_itself(env: Env) -> bool:
    """Return whether an environment has `film`, or a `render` that is not gymnax's."""
    render = getattr(type(env.inner), "render", None)
    own = render is not None and render.__module__.split(".")[0] != "gymnax"
    return own or hasattr(env.inner, "film")


def require_picture(env: Env) -> None:
    """Raise an InputError unless an environment can be drawn."""
    if draws_itself(env):
        return
    if not gymnax.is_from_gymnax(env.inner) or hasattr(env.inner, "_env"):
        raise InputError(
            f"env {env.name!r} is not gymnax's own, so gymnax has no picture of it; give it a "
            "method render(state, params) that returns an image, uint8 [H, W, 3]."
        )
    require_drawable(env.name)


def save(path: Path, env: Env, params: Any, states: Any, rewards: np.ndarray) -> None:
    """Draw an episode as a GIF that repeats, or as an MP4.

    Args:
        path: the file, which must end in .gif or .mp4; it is replaced only once the picture is
            complete.
        env: the environment.
        params: its parameters.
        states: the environment's own state before each step, leaves [T, ...].
        rewards: [T].

    Raises:
        InputError: the environment has no picture.
    """
    require_picture(env)
    steps = frame_steps(len(rewards))
    temporary = path.with_name(f".{path.name}.tmp.gif")
    ready = temporary.with_suffix(path.suffix.lower())
    try:
        with _without_display():
            if draws_itself(env):
                _write_gif(temporary, own_frames(env, params, states, steps))
            else:
                frames = [jax.tree.map(lambda leaf, t=t: leaf[t], states) for t in steps]
                film = _film(env.name, steps)(env.inner, params, frames, np.cumsum(rewards)[steps])
                film.animate(str(temporary))
        if ready != temporary:
            _write_mp4(ready, temporary)
        os.replace(ready, path)
    finally:
        for file in (temporary, ready):
            file.unlink(missing_ok=True)


def own_frames(env: Env, params: Any, states: Any, steps: list[int]) -> list[np.ndarray]:
    """Let an environment draw some steps of an episode -> images [H, W, 3].

    Raises:
        InputError: what it draws is no image.
        FaultError: it needs a display, or a driver, that is not there.
    """
    inner = env.inner
    try:
        if hasattr(inner, "film"):
            images = inner.film(states, params, steps)
        else:
            images = [
                inner.render(jax.tree.map(lambda x, t=t: x[t], states), params) for t in steps
            ]
        frames = [np.asarray(image) for image in images]
    except (FaultError, InputError):
        raise
    except Exception as error:
        raise FaultError(f"{env.name} cannot be drawn here: {gymnax.reason(error)}.") from error
    for frame in frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise gymnax.refusal(
                env.name,
                inner,
                "render",
                f"must return an image, uint8 [H, W, 3], but returns {frame.dtype}"
                f"{list(frame.shape)}",
            )
    return frames


def _write_gif(path: Path, frames: list[np.ndarray]) -> None:
    """Write images [H, W, 3] of one size as a GIF that repeats; small ones are enlarged."""
    from PIL import Image

    scale = max(1, LEAST_SIDE // max(frames[0].shape))
    first, *rest = (Image.fromarray(f.repeat(scale, 0).repeat(scale, 1)) for f in frames)
    first.save(path, save_all=True, append_images=rest, duration=FRAME_MS, loop=0)


def _write_mp4(path: Path, gif: Path) -> None:
    """Write the frames of a GIF as an MP4, whose sides must be even."""
    from PIL import Image, ImageSequence

    writers = extras.load("imageio_ffmpeg", "video", "A picture that ends in .mp4")
    with Image.open(gif) as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    frames = [np.pad(f, [(0, f.shape[0] % 2), (0, f.shape[1] % 2), (0, 0)]) for f in frames]
    height, width, _ = frames[0].shape
    fps = 1000 / FRAME_MS
    writer = writers.write_frames(str(path), (width, height), fps=fps, macro_block_size=2)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _film(name: str, steps: list[int]) -> Any:
    """Return gymnax's visualizer with a name and the numbers of these steps in its titles."""

    class Film(gymnax.visualizer()):  # type: ignore[misc]
        def update(self, frame: int) -> None:
            super().update(frame)
            total = float(self.reward_seq[frame])
            self.ax.set_title(f"{name}: step {steps[frame] + 1}, return {total:.2f}")

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
