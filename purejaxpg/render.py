"""Pictures of an episode: classic control and MinAtar, drawn here with Pillow alone.

A frame is drawn three times as large as it will be and then averaged down, which smooths its edges.
Everything is drawn from observations: the one before a reset is known, the state is not.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from purejaxpg import InputError

MOST_FRAMES = 300
_OVER = 3  # drawn so many times larger
_SIZE = (480, 320)
_CELL, _HEADER, _MARGIN = 24, 34, 8  # of a MinAtar frame, pixels
_STEEP = 0.72  # of the mountain car's road
_SLOWEST = 12.0  # frames per second; below this a picture jerks

_PAPER, _GROUND, _RULE = "#fbfbf9", "#eceef0", "#d3d8de"
_INK, _SOFT = "#1f252c", "#5b6470"
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#9aa3ad"

Point = tuple[float, float]


class _Canvas:
    """A picture in world coordinates: ``unit`` pixels per unit, y upwards from ``origin``."""

    def __init__(self, size: tuple[int, int], origin: Point, unit: float) -> None:
        self.origin, self.unit, self.size = origin, unit, size
        self.image = Image.new("RGB", (size[0] * _OVER, size[1] * _OVER), _PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def at(self, point: Point) -> Point:
        """Return the pixel of a place in the world."""
        x, y = self.origin[0] + point[0] * self.unit, self.origin[1] - point[1] * self.unit
        return x * _OVER, y * _OVER

    def line(self, points: Sequence[Point], colour: str, width: float) -> None:
        """Draw a line of a width in pixels, with round ends and corners."""
        places = [self.at(point) for point in points]
        self.draw.line(places, colour, round(width * _OVER), joint="curve")
        for place in (places[0], places[-1]):
            self._disc(place, width / 2, colour)

    def disc(self, point: Point, radius: float, colour: str) -> None:
        """Draw a disc of a radius in pixels."""
        self._disc(self.at(point), radius, colour)

    def _disc(self, place: Point, radius: float, colour: str) -> None:
        (x, y), r = place, radius * _OVER
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def area(self, points: Sequence[Point], colour: str) -> None:
        """Fill a polygon."""
        self.draw.polygon([self.at(point) for point in points], fill=colour)

    def box(self, corners: tuple[float, float, float, float], colour: str, round_: float) -> None:
        """Fill a rectangle (left, top, right, bottom in pixels) with round corners."""
        left, top, right, bottom = (value * _OVER for value in corners)
        self.draw.rounded_rectangle((left, top, right, bottom), round_ * _OVER, fill=colour)

    def dashes(self, start: Point, end: Point, colour: str, width: float, pixels: float) -> None:
        """Draw a dashed line; ``pixels`` is the length of a dash and of a gap."""
        length = math.dist(start, end) * self.unit
        count = max(1, round(length / pixels / 2))
        for index in range(count):
            ends = (index / count, (index + 0.5) / count)
            a, b = (
                (start[0] + f * (end[0] - start[0]), start[1] + f * (end[1] - start[1]))
                for f in ends
            )
            self.draw.line([self.at(a), self.at(b)], colour, round(width * _OVER))

    def caption(self, step: int, total: str) -> Image.Image:
        """Write the step and the return into the upper corners -> the finished picture."""
        font = _font(14 * _OVER)
        y = 10 * _OVER
        self.draw.text((12 * _OVER, y), f"step {step}", _SOFT, font)
        self.draw.text(((self.size[0] - 12) * _OVER, y), f"return {total}", _INK, font, "ra")
        return self.image.reduce(_OVER)


def drawable() -> list[str]:
    """Return the names of the environments that can be drawn."""
    return [*_CLASSIC, *_GAMES]


def require_drawable(env_name: str) -> None:
    """Raise an InputError that lists what can be drawn, unless `env_name` can."""
    if env_name not in drawable():
        raise InputError(f"{env_name} cannot be drawn; these can: {', '.join(drawable())}.")


def shown(num: int) -> list[int]:
    """Return which of `num` moments are drawn: evenly many, at most MOST_FRAMES, and the last."""
    stride = _stride(num)
    return [*range(0, num - 1, stride), num - 1]


def speed(env_name: str, num: int) -> float:
    """Return the frames per second at which `num` moments play at the environment's own pace."""
    own = _CLASSIC[env_name].fps if env_name in _CLASSIC else 12.0
    return max(own / _stride(num), min(own, _SLOWEST))


def frames(
    env_name: str, env_params: Any, states: Any, obs: np.ndarray, rewards: np.ndarray
) -> list[Image.Image]:
    """Draw an episode.

    Args:
        env_name: one of ``drawable()``.
        env_params: the environment's parameters, as ``envs.params`` gives them.
        states: the environment's own state before each step, leaves ``[T, ...]``; only a pendulum
            is drawn with something out of it, its torque. None draws without.
        obs: raw observations ``[T + 1, D]``, the last one after the last step.
        rewards: ``[T]``.

    Returns:
        RGB pictures of equal size, at most MOST_FRAMES.

    Raises:
        InputError: the environment cannot be drawn.
    """
    require_drawable(env_name)
    obs, rewards = np.asarray(obs, np.float64), np.asarray(rewards, np.float64)
    totals = np.concatenate([[0.0], np.cumsum(rewards)])
    digits = 0 if np.array_equal(rewards, rewards.round()) else 1
    if env_name in _CLASSIC:
        scene = _CLASSIC[env_name]
        extra = _torques(states, len(obs))
        canvases = (scene.draw(obs[t], env_params, extra[t]) for t in shown(len(obs)))
    else:
        colours = _GAMES[env_name]
        canvases = (_game(obs[t], colours) for t in shown(len(obs)))
    return [
        canvas.caption(t, f"{totals[t]:.{digits}f}")
        for t, canvas in zip(shown(len(obs)), canvases, strict=True)
    ]


def save_gif(path: Path, frames: Sequence[Image.Image], fps: float) -> None:
    """Write pictures as a GIF that repeats.

    Args:
        path: where to; a file there is replaced.
        frames: pictures of equal size.
        fps: frames per second; the format counts in hundredths of a second.
    """
    chosen = [frames[-1], *frames[:: max(1, len(frames) // 12)]]
    sheet = Image.new("RGB", (chosen[0].width, sum(frame.height for frame in chosen)))
    for index, frame in enumerate(chosen):
        sheet.paste(frame, (0, index * frame.height))
    # One palette for all, without dithering: what does not move then costs nothing.
    palette = sheet.quantize(64, dither=Image.Dither.NONE)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = 10 * max(2, round(100 / fps))
    temporary = path.with_name(f".{path.name}.tmp")
    small[0].save(
        temporary,
        "GIF",
        save_all=True,
        append_images=small[1:],
        duration=duration,
        loop=0,
        optimize=True,
    )
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------- details


def _stride(num: int) -> int:
    return max(1, math.ceil((num - 1) / (MOST_FRAMES - 1)))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _torques(states: Any, num: int) -> np.ndarray:
    """Return the torque shown in each of `num` frames; NaN: none."""
    found = np.full(num, np.nan)
    applied = np.asarray(getattr(states, "last_u", np.zeros(0)), np.float64).reshape(-1)[1:num]
    found[1 : 1 + len(applied)] = applied
    return found


def _cartpole(obs: np.ndarray, params: Any, _: float) -> _Canvas:
    width, height = _SIZE
    limit = float(params.x_threshold)
    canvas = _Canvas(_SIZE, (width / 2, height - 92), width / (2 * limit + 0.8))
    px = 1 / canvas.unit
    x, angle = float(obs[0]), float(obs[2])
    canvas.area([(-99, -14 * px), (99, -14 * px), (99, -99), (-99, -99)], _GROUND)
    canvas.line([(-99, -14 * px), (99, -14 * px)], _RULE, 2)
    for edge in (-limit, limit):
        canvas.dashes((edge, -14 * px), (edge, 56 * px), _GREY, 1.5, 5)
    length = 2 * float(params.length) * 1.5  # half as long again as it is, to be seen better
    top = 16 * px
    tip = (x + length * math.sin(angle), top + length * math.cos(angle))
    for wheel in (-20, 20):
        canvas.disc((x + wheel * px, -7 * px), 7, _SOFT)
    left, upper = (value / _OVER for value in canvas.at((x, top)))
    canvas.box((left - 36, upper, left + 36, upper + 22), _INK, 4)
    canvas.line([(x, top), tip], _ORANGE, 9)
    canvas.disc((x, top), 6.5, _PAPER)
    canvas.disc((x, top), 4, _SOFT)
    return canvas


def _acrobot(obs: np.ndarray, params: Any, _: float) -> _Canvas:
    width, height = _SIZE
    lengths = float(params.link_length_1), float(params.link_length_2)
    reach = sum(lengths)
    canvas = _Canvas(_SIZE, (width / 2, height / 2 + 12), (height / 2 - 28) / reach)
    first = math.atan2(obs[1], obs[0])
    second = first + math.atan2(obs[3], obs[2])
    elbow = (lengths[0] * math.sin(first), -lengths[0] * math.cos(first))
    tip = (elbow[0] + lengths[1] * math.sin(second), elbow[1] - lengths[1] * math.cos(second))
    # The task ends when the tip, of links of length 1, is above 1.
    canvas.dashes((-1.6 * reach, 1.0), (1.6 * reach, 1.0), _GREEN, 1.5, 6)
    canvas.line([(0.0, 0.0), elbow], _BLUE, 11)
    canvas.line([elbow, tip], _ORANGE, 9)
    for joint in ((0.0, 0.0), elbow):
        canvas.disc(joint, 7.5, _INK)
        canvas.disc(joint, 3, _PAPER)
    canvas.disc(tip, 5.5, _INK)
    return canvas


def _pendulum(obs: np.ndarray, params: Any, torque: float) -> _Canvas:
    width, height = _SIZE
    length = float(params.l)
    canvas = _Canvas(_SIZE, (width / 2, height / 2 + 12), (height / 2 - 36) / length)
    tip = (-length * float(obs[1]), length * float(obs[0]))
    canvas.dashes((0.0, 0.0), (0.0, length), _RULE, 2, 5)
    canvas.line([(0.0, 0.0), tip], _BLUE, 14)
    canvas.disc(tip, 13, _BLUE)
    if np.isfinite(torque) and abs(torque) > 0.05 * float(params.max_torque):
        _turn(canvas, torque / float(params.max_torque))
    canvas.disc((0.0, 0.0), 9, _INK)
    canvas.disc((0.0, 0.0), 3.5, _PAPER)
    return canvas


def _turn(canvas: _Canvas, share: float) -> None:
    """Draw an arc with an arrow: a torque, anticlockwise where positive; ±1 is half a turn."""
    px, sign = 1 / canvas.unit, math.copysign(1.0, share)
    radius, span = 36 * px, min(1.0, abs(share)) * math.pi
    start = math.pi / 2 - sign * span / 2
    angles = start + sign * np.linspace(0.0, span, 40)
    points = [(radius * math.cos(a), radius * math.sin(a)) for a in angles]
    canvas.line(points, _ORANGE, 4)
    along = float(angles[-1]) + sign * math.pi / 2
    (x, y), size = points[-1], 9 * px
    corners = [(along, 1.2), (along + 2.3, 1.0), (along - 2.3, 1.0)]
    canvas.area(
        [(x + size * r * math.cos(a), y + size * r * math.sin(a)) for a, r in corners], _ORANGE
    )


def _mountain_car(obs: np.ndarray, params: Any, _: float) -> _Canvas:
    width, height = _SIZE
    low, high, goal = (
        float(getattr(params, name)) for name in ("min_position", "max_position", "goal_position")
    )
    unit = width / (high - low)
    canvas = _Canvas(_SIZE, (-low * unit, height - 36.0), unit)
    px, x = 1 / unit, float(obs[0])
    places = np.linspace(low - 0.05, high + 0.05, 160)
    hill = [(float(place), _hill(place)) for place in places]
    canvas.area([*hill, (high + 0.05, -9.0), (low - 0.05, -9.0)], _GROUND)
    canvas.line(hill, _GREY, 3)
    foot = (goal, _hill(goal))
    pole = (goal, foot[1] + 46 * px)
    canvas.line([foot, pole], _INK, 2.5)
    flag = [pole, (goal - 22 * px, pole[1] - 8 * px), (goal, pole[1] - 17 * px)]
    canvas.area(flag, _GREEN)
    _car(canvas, x)
    return canvas


def _hill(x: float) -> float:
    """Return the height of the road: the sine of the dynamics, made flatter to fit the picture."""
    return _STEEP * (0.45 * math.sin(3 * x) + 0.55)


def _car(canvas: _Canvas, x: float) -> None:
    px, slope = 1 / canvas.unit, math.atan(_STEEP * 1.35 * math.cos(3 * x))
    cos, sin = math.cos(slope), math.sin(slope)

    def place(along: float, above: float) -> Point:
        return x + px * (along * cos - above * sin), _hill(x) + px * (along * sin + above * cos)

    body = [(-22, 8), (22, 8), (22, 17), (11, 18), (6, 27), (-12, 27), (-17, 18), (-22, 17)]
    canvas.area([place(*corner) for corner in body], _BLUE)
    window = [(-9, 18.5), (6, 18.5), (3, 24), (-9, 24)]
    canvas.area([place(*corner) for corner in window], _PAPER)
    for wheel in (-12, 12):
        canvas.disc(place(wheel, 7), 7, _INK)
        canvas.disc(place(wheel, 7), 2.5, _GREY)


@dataclasses.dataclass(frozen=True)
class _Scene:
    """How an environment of classic control is drawn, and its pace in frames per second."""

    draw: Callable[[np.ndarray, Any, float], _Canvas]
    fps: float


_CLASSIC: Mapping[str, _Scene] = {
    "CartPole-v1": _Scene(_cartpole, 50.0),
    "Acrobot-v1": _Scene(_acrobot, 15.0),
    "Pendulum-v1": _Scene(_pendulum, 20.0),
    "MountainCar-v0": _Scene(_mountain_car, 30.0),
    "MountainCarContinuous-v0": _Scene(_mountain_car, 30.0),
}

# The colour of each channel of the observation; where two are set, the earlier one shows.
_TRAILS = ("#56657a", "#66768c", "#7788a0", "#8b9bb3", "#a3b1c6")
_GAMES: Mapping[str, tuple[str, ...]] = {
    "Asterix-MinAtar": ("#56b4e9", "#ff6b4a", "#8a4a3f", "#f2c14e"),
    "Breakout-MinAtar": ("#56b4e9", "#ffffff", "#6f7c8f", "#ff8a3d"),
    "Freeway-MinAtar": ("#f2c14e", "#ff6b4a", *_TRAILS),
    "Seaquest-MinAtar": (
        "#f2c14e", "#b8923a", "#ffffff", "#56657a", "#ff9d85", "#ff6b4a", "#e79ac6", "#56b4e9",
        "#2fc79a", "#2fc79a",
    ),
    "SpaceInvaders-MinAtar": (
        "#56b4e9", "#2fc79a", "#2fc79a", "#2fc79a", "#ffffff", "#ff6b4a",
    ),
}  # fmt: skip
_NIGHT, _GRID = "#1b222b", "#242d38"


def _game(obs: np.ndarray, colours: Sequence[str]) -> _Canvas:
    """Draw the grid of a MinAtar game, one square a cell."""
    channels = len(colours)
    side = math.isqrt(obs.size // channels)
    grid = obs.reshape(side, side, channels) != 0
    edge = side * _CELL
    size = (edge + 2 * _MARGIN, edge + _HEADER + _MARGIN)
    canvas = _Canvas(size, (0.0, 0.0), 1.0)
    left, top = _MARGIN, _HEADER
    canvas.box((left, top, left + edge, top + edge), _NIGHT, 4)
    for row, column in np.ndindex(side, side):
        x, y = left + column * _CELL, top + row * _CELL
        present = np.flatnonzero(grid[row, column])
        colour = colours[present[0]] if present.size else _GRID
        gap = 1.5 if present.size else 2.5
        canvas.box((x + gap, y + gap, x + _CELL - gap, y + _CELL - gap), colour, 4)
    return canvas
