"""Pictures of episodes: gymnax draws them, and a GIF is there whole or not at all."""

import pathlib
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax import random
from PIL import Image

from purejaxpg import FaultError, InputError, envs
from purejaxpg.envs import gymnax, pictures

NAMES = ["Pendulum-v1", "Breakout-MinAtar", "Catch-bsuite", "FourRooms-misc", "PointRobot-misc"]


def episode(name: str, steps: int) -> tuple[envs.Env, Any, Any]:
    """An environment, its parameters and the states before each of some steps."""
    env = envs.make(name)
    _, start = env.inner.reset(random.key(0), env.default_params)
    states = jax.tree.map(lambda leaf: np.stack([leaf] * steps), start)
    if name == "Pendulum-v1":
        states = states.replace(theta=np.linspace(0.0, np.pi, steps))
    return env, env.default_params, states


def frames(path: Any) -> list[np.ndarray]:
    with Image.open(path) as image:
        return [frame(image, number) for number in range(image.n_frames)]


def frame(image: Image.Image, number: int) -> np.ndarray:
    image.seek(number)
    return np.asarray(image.convert("RGB"), int)


@pytest.mark.parametrize("name", NAMES)
def test_one_of_each_kind_is_drawn_and_saved(name, tmp_path):
    path = tmp_path / "a.gif"
    path.write_bytes(b"old")
    pictures.save(path, *episode(name, 2), np.ones(2))
    first, second = frames(path)
    assert first.shape == second.shape == (500, 600, 3)
    assert first[130:470, 150:450].min() < 200  # empty axes are white there
    assert (first != second).any()  # at least the title
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gif"]


def test_a_pendulum_is_drawn_where_its_angle_says(tmp_path):
    path = tmp_path / "a.gif"
    pictures.save(path, *episode("Pendulum-v1", 2), np.ones(2))
    up, down = (np.nonzero(each[:, :, 0] - each[:, :, 2] > 60)[0].mean() for each in frames(path))
    assert up < down - 60


def test_every_name_is_gymnaxs():
    assert set(pictures.DRAWABLE) - {"MaskedCartPole-v1"} < set(gymnax.names())
    assert {name for name in gymnax.names() if name.endswith("MinAtar")} < set(pictures.DRAWABLE)


def test_an_environment_without_a_picture_is_refused_with_those_that_have_one():
    with pytest.raises(InputError, match=r"FrozenLake-misc cannot be drawn.*CartPole-v1.*Catch"):
        pictures.require_drawable("FrozenLake-misc")


def drawn(render: Any, path: Any, steps: int = 3) -> None:
    """Draw some steps of Catch with a `render` of its own."""
    env, params, states = episode("Catch-bsuite", steps)
    states = states.replace(time=np.arange(steps))
    own = type("Catch", (type(env.inner),), {"__module__": "mine", "render": render})()
    pictures.save(path, envs.Env("Mine", own, params, (1,), 3, ()), params, states, np.ones(steps))


def test_an_environment_of_ones_own_draws_itself(tmp_path):
    def render(self: Any, state: Any, params: Any) -> np.ndarray:
        return np.full((3, 5, 3), 100 * state.time, np.uint8)

    drawn(render, tmp_path / "a.gif")
    seen = frames(tmp_path / "a.gif")
    assert [int(each[0, 0, 0]) for each in seen] == [0, 100, 200]
    assert seen[0].shape == (144, 240, 3)  # whole pixels become squares


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (np.zeros((3, 5, 3)), InputError, r"render of Catch must return .* float64\[3, 5, 3\]"),
        (np.zeros((3, 5), np.uint8), InputError, r"must return an image"),
        (None, FaultError, "Mine cannot be drawn here: ZeroDivisionError"),
    ],
)
def test_what_is_no_image_is_refused(image, error, words, tmp_path):
    def render(self: Any, state: Any, params: Any) -> Any:
        return 1 / 0 if image is None else image

    with pytest.raises(error, match=words):
        drawn(render, tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_an_mp4_has_the_same_frames_and_even_sides(tmp_path, monkeypatch):
    """With a stand-in for the package that calls ffmpeg."""
    written: list[Any] = []

    def write_frames(path: str, size: Any, **options: Any) -> Any:
        pathlib.Path(path).write_bytes(b"mp4")
        written.append((size, options["fps"]))
        while True:
            written.append((yield).shape)

    def render(self: Any, state: Any, params: Any) -> np.ndarray:
        return np.full((241, 5, 3), state.time, np.uint8)

    writers = types.SimpleNamespace(write_frames=write_frames)
    monkeypatch.setattr(pictures.extras, "load", lambda *_: writers)
    drawn(render, tmp_path / "a.mp4")
    assert written == [((6, 242), 20.0), *[(242, 6, 3)] * 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_ones_own_environment_under_a_name_of_gymnax_has_no_picture(tmp_path):
    env, params, states = episode("Catch-bsuite", 2)
    own = type("Catch", (type(env.inner),), {"__module__": "mine"})()
    with pytest.raises(InputError, match="'Catch-bsuite' is not gymnax's own"):
        other = envs.Env("Catch-bsuite", own, params, (1,), 3, ())
        pictures.save(tmp_path / "a.gif", other, params, states, np.ones(2))
    assert not list(tmp_path.iterdir())


def test_a_missing_pygame_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(FaultError, match=r"CartPole-v1 needs .*pip install 'gymnax\[visualize"):
        pictures.require_drawable("CartPole-v1")
    pictures.require_drawable("Breakout-MinAtar")


@pytest.mark.parametrize(("num", "most"), [(1, 1), (2, 2), (100, 100), (101, 51), (10_000, 100)])
def test_a_long_episode_is_thinned_evenly_to_its_last_step(num, most):
    steps = pictures.frame_steps(num)
    assert len(steps) <= most <= pictures.MOST_FRAMES
    assert steps[0] == 0 and steps[-1] == num - 1
    gaps = np.diff(steps)
    assert num == 1 or ((gaps[:-1] == gaps[0]).all() and 0 < gaps[-1] <= gaps[0])


def test_titles_have_the_step_and_the_return_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_FRAMES", 3)
    written = []
    env, params, states = episode("Catch-bsuite", 5)
    make = pictures._film

    def film(name: str, steps: list[int]) -> Any:
        class Watched(make(name, steps)):  # type: ignore[misc]
            def update(self, number: int) -> None:
                super().update(number)
                written.append(self.ax.get_title())

        return Watched

    monkeypatch.setattr(pictures, "_film", film)
    pictures.save(tmp_path / "a.gif", env, params, states, np.array([1.0, 0, 0.5, 0, -2.0]))
    returns = [(1, "1.00"), (3, "1.50"), (5, "-0.50")]
    assert written == [f"Catch-bsuite: step {step}, return {total}" for step, total in returns]


def test_a_failed_picture_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.gif"
    path.write_bytes(b"old")
    env, params, states = episode("Catch-bsuite", 2)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        pictures.save(path, env, params, states, np.ones(2))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gif"]
