import pathlib

import numpy as np
import pytest
from PIL import Image, ImageChops

from purejaxpg import InputError, envs, render

SHAPES = {name: envs.make(name).obs_size for name in render.drawable()}


def episode(name, steps, seed=0):
    """Observations that an environment could give, and rewards."""
    generator = np.random.default_rng(seed)
    size = SHAPES[name]
    if name.endswith("MinAtar"):
        obs = generator.random((steps + 1, size)) < 0.05
    elif name in ("Acrobot-v1", "Pendulum-v1"):
        angles = generator.uniform(-3, 3, (steps + 1, 2))
        pairs = [np.cos(angles[:, 0]), np.sin(angles[:, 0]), np.cos(angles[:, 1])]
        obs = np.stack([*pairs, np.sin(angles[:, 1]), *angles.T], axis=1)[:, :size]
    else:
        obs = generator.uniform(-0.2, 0.2, (steps + 1, size))
    return obs, np.ones(steps)


def params(name):
    return envs.params(envs.make(name), {})


def draw(name, obs, rewards=None, states=None):
    rewards = np.ones(len(obs) - 1) if rewards is None else rewards
    return render.frames(name, params(name), states, np.asarray(obs), rewards)


def centre(image, colour, tolerance=40):
    """Mean place (x, y) of the pixels of a colour."""
    distance = np.abs(np.asarray(image, int) - np.array(colour)).max(axis=2)
    rows, columns = np.nonzero(distance < tolerance)
    assert rows.size, f"no pixel is {colour}"
    return columns.mean(), rows.mean()


ORANGE, BLUE, INK = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x1F, 0x25, 0x2C)


@pytest.mark.parametrize("name", render.drawable())
def test_each_environment_is_drawn_and_saved(name, tmp_path: pathlib.Path):
    obs, rewards = episode(name, 4)
    frames = draw(name, obs, rewards)
    assert len(frames) == 5
    assert len({frame.size for frame in frames}) == 1
    assert all(frame.mode == "RGB" for frame in frames)
    assert ImageChops.difference(frames[0], frames[1]).getbbox() is not None
    path = tmp_path / "a.gif"
    render.save_gif(path, frames, render.speed(name, 5))
    with Image.open(path) as image:
        assert image.n_frames == 5 and image.size == frames[0].size
        image.seek(4)
        difference = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(frames[4], int))
    assert np.mean(difference > 60) < 0.01  # the palette keeps what matters
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gif"]


def test_an_environment_that_cannot_be_drawn_is_refused_with_those_that_can():
    with pytest.raises(InputError, match=r"Catch-bsuite cannot be drawn.*CartPole-v1.*MinAtar"):
        render.frames("Catch-bsuite", None, None, np.zeros((2, 3)), np.zeros(1))


def test_every_minatar_game_of_gymnax_has_its_colours():
    games = [name for name in envs.names() if name.endswith("MinAtar")]
    assert set(games) <= set(render.drawable())
    for name in games:
        assert len(render._GAMES[name]) == envs.make(name).obs_shape[-1]


@pytest.mark.parametrize(("num", "most"), [(2, 2), (300, 300), (301, 151), (10_001, 300)])
def test_a_long_episode_is_thinned_evenly_to_its_last_moment(num, most):
    chosen = render.shown(num)
    assert len(chosen) <= most <= render.MOST_FRAMES
    assert chosen[0] == 0 and chosen[-1] == num - 1
    gaps = np.diff(chosen)
    assert (gaps[:-1] == gaps[0]).all() and 0 < gaps[-1] <= gaps[0]


def test_a_long_episode_is_saved_with_few_frames_and_bytes(tmp_path):
    time = np.linspace(0, 20, 501)
    obs = np.stack([np.sin(time), time * 0, 0.1 * np.cos(time), time * 0], axis=1)
    frames = draw("CartPole-v1", obs)
    path = tmp_path / "a.gif"
    render.save_gif(path, frames, render.speed("CartPole-v1", 501))
    with Image.open(path) as image:
        assert image.n_frames == len(frames) == 251
        assert image.info["duration"] == 40  # 2 steps of 0.02 s
    assert path.stat().st_size < 1_000_000


def test_a_cart_stands_where_it_is_and_its_pole_leans_to_the_right():
    middle, right = draw("CartPole-v1", [[0, 0, 0, 0], [1.5, 0, 0.3, 0]])
    assert centre(middle, ORANGE)[0] == pytest.approx(240, abs=2)
    assert centre(right, INK)[0] > centre(middle, INK)[0] + 50
    assert centre(right, ORANGE)[0] > centre(right, INK)[0] - 60


def test_a_pendulum_points_where_its_angle_says():
    angles = np.array([0.0, np.pi / 2, np.pi])
    obs = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    up, left, down = (centre(frame, BLUE) for frame in draw("Pendulum-v1", obs))
    assert up[1] < left[1] - 30 < down[1] - 60
    assert left[0] < up[0] - 30 and up[0] == pytest.approx(down[0], abs=2)


def test_a_torque_is_drawn_where_the_state_is_known():
    class States:
        last_u = np.array([0.0, 2.0, 0.0])

    obs = np.tile([0.0, 1.0, 0.0], (4, 1))
    first, second, third, last = draw("Pendulum-v1", obs, states=States)
    centre(second, ORANGE)
    for frame in (first, third, last):
        with pytest.raises(AssertionError, match="no pixel"):
            centre(frame, ORANGE)


def test_an_acrobot_hangs_at_rest_and_reaches_above_the_line_when_upright():
    hanging, upright = draw("Acrobot-v1", [[1, 0, 1, 0, 0, 0], [-1, 0, 1, 0, 0, 0]])
    assert centre(hanging, ORANGE)[1] > centre(hanging, BLUE)[1] + 30
    line = centre(upright, (0x00, 0x9E, 0x73), 60)[1]
    assert centre(upright, ORANGE)[1] < line + 2


def test_a_car_drives_uphill_to_the_flag():
    valley, goal = draw("MountainCar-v0", [[-0.5, 0], [0.5, 0]])
    assert centre(goal, BLUE)[0] > centre(valley, BLUE)[0] + 200
    assert centre(goal, BLUE)[1] < centre(valley, BLUE)[1] - 100
    flag = centre(valley, (0x00, 0x9E, 0x73), 60)
    assert centre(goal, BLUE)[0] == pytest.approx(flag[0], abs=25)


def test_a_cell_of_a_game_has_the_colour_of_its_first_channel():
    grid = np.zeros((1, 10, 10, 4))
    grid[0, 2, 7, 3] = 1  # a brick
    grid[0, 9, 1, 0] = grid[0, 9, 1, 2] = 1  # the paddle, above a trail
    frame = draw("Breakout-MinAtar", grid.reshape(1, -1), np.zeros(0))[0]
    pixel = [8 + 24 * 7 + 12, 34 + 24 * 2 + 12], [8 + 24 + 12, 34 + 24 * 9 + 12]
    assert frame.getpixel(tuple(pixel[0])) == (0xFF, 0x8A, 0x3D)
    assert frame.getpixel(tuple(pixel[1])) == (0x56, 0xB4, 0xE9)


def test_the_corner_counts_steps_and_sums_rewards(monkeypatch):
    written = []
    original = render._Canvas.caption

    def caption(canvas, step, total):
        written.append((step, total))
        return original(canvas, step, total)

    monkeypatch.setattr(render._Canvas, "caption", caption)
    obs = np.zeros((4, 2))
    draw("MountainCar-v0", obs, [-1.0, -1.0, -1.0])
    draw("MountainCarContinuous-v0", obs, [-0.25, 0.5, 100.0])
    assert written[:4] == [(0, "0"), (1, "-1"), (2, "-2"), (3, "-3")]
    assert written[4:] == [(0, "0.0"), (1, "-0.2"), (2, "0.2"), (3, "100.2")]
