"""Figures that a reader can change: native controls over values that were computed beforehand.

Plotly draws its own sliders and buttons as parts of the picture, where a keyboard does not reach
them. So a figure carries a description of its controls, and of all that they change, in
`layout.meta`; `docs/_static/pictures.js` makes ordinary form elements of it. Without the script, a
figure shows the state that its controls start in.
"""

import dataclasses
import functools
import html
import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

FOLDER = pathlib.Path(__file__).resolve().parent
STATIC = FOLDER.parent / "_static"

# Of Okabe and Ito, some of them darker: each is at least three times as light as a dark page, or as
# dark as a white one, so that no figure needs two sets of colours.
BLUE, ORANGE, GREEN, PURPLE, GREY = COLOURS = "#0a79bb", "#d55e00", "#00966d", "#b8578f", "#7d8288"

Nested = Any  # lists of lists of numbers or texts

# What a control changes: names of controls, and values whose leading axes are their options.
State = tuple[Sequence[str], Any]


@dataclasses.dataclass(frozen=True)
class Control:
    """A slider or a list of options.

    Attributes:
        label: what it says beside the control.
        options: a text for each position.
        start: position at first.
        kind: "slider", or "choice" for options without an order.
        plays: whether a button moves it through all positions.
    """

    label: str
    options: Sequence[str]
    start: int = 0
    kind: str = "slider"
    plays: bool = False


def slider(label: str, values: Sequence[float], start: float, plays: bool = False) -> Control:
    """Return a slider over numbers, which starts at one of them."""
    options = [written(f"{value:g}") for value in values]
    return Control(label, options, list(values).index(start), plays=plays)


def choice(label: str, options: Sequence[str], start: int = 0) -> Control:
    """Return a list of options to choose from."""
    return Control(label, options, start, "choice")


def figure(traces: Sequence[Any], height: int, **layout: Any) -> go.Figure:
    """Return a figure with the look that all pictures share.

    Args:
        traces: plotly's.
        height: in pixels; the width is that of the page.
        **layout: more of plotly's layout.
    """
    look = {
        "height": height,
        "margin": {"l": 66, "r": 12, "t": 8, "b": 46},
        "font": {"size": 13, "family": "system-ui, sans-serif", "color": GREY},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {
            **{"orientation": "h", "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom"},
            **{"itemclick": False, "itemdoubleclick": False},
        },
        "dragmode": False,  # a finger that moves over the picture moves the page
        "template": None,
    }
    found = go.Figure(list(traces))
    found.update_layout(**look)
    found.update_layout(**layout)
    axis = {"fixedrange": True, "zeroline": False, "title_standoff": 6}
    found.update_xaxes(**axis)
    found.update_yaxes(**axis)
    return found


def attach(
    figure: go.Figure, controls: Mapping[str, Control], states: Mapping[str, State]
) -> go.Figure:
    """Give a figure controls and what they change; it then shows their first positions.

    Args:
        figure: without what changes.
        controls: by name.
        states: by path into the figure, such as `data.0.y` or `layout.shapes.0.x1`: the names of
            the controls that it depends on, and its values `[options of the first, ..., value]`.
            Paths `says.0`, `says.1`, ... are sentences below the picture.

    Returns:
        The same figure.

    Raises:
        ValueError: values that do not have an entry for each option.
    """
    numbers = {name: i for i, name in enumerate(controls)}
    found = []
    for path, (names, values) in states.items():
        sizes = tuple(len(controls[name].options) for name in names)
        values = values.tolist() if hasattr(values, "tolist") else values
        shape = lengths(values)
        if shape[: len(sizes)] != sizes:
            raise ValueError(f"{path} has values {shape}, but its controls have {sizes} options")
        by = [numbers[name] for name in names]
        found.append({"path": path, "by": by, **compact(values)})
    described = [dataclasses.asdict(control) for control in controls.values()]
    figure.update_layout(meta={"controls": described, "states": found})
    for path, value in state_at(figure, [control.start for control in controls.values()]).items():
        put(figure, path, value)
    return figure


def written(text: str) -> str:
    """Return a text whose numbers have a minus sign, which is read aloud, and no hyphen."""
    without_minus_zero = re.sub(r"-(0(?:\.0+)?)(?!\d|\.\d)", r"\1", text)
    return re.sub(r"-(?=\d)", "−", without_minus_zero)


def texts(form: str, *values: Any) -> Any:
    """Return a text for each entry of arrays of one shape, as nested lists.

    Args:
        form: of `str.format`, with a place for each array. Few digits keep a picture small: texts
            that occur twice are stored once.
        *values: the arrays.
    """
    write = np.vectorize(lambda *entry: written(form.format(*entry)), otypes=[object])
    return write(*values).tolist()


def lengths(values: Any) -> tuple[int, ...]:
    """Return the length of lists at each depth, along their first entries."""
    if isinstance(values, str) or not hasattr(values, "__len__"):
        return ()
    return (len(values), *lengths(values[0])) if len(values) else (0,)


def compact(values: Any) -> dict[str, Nested]:
    """Return values as lists: numbers with four digits, repeated texts as places in a list."""
    texts: dict[str, int] = {}

    def short(value: Any) -> Nested:
        if isinstance(value, list | tuple):
            return [short(each) for each in value]
        if isinstance(value, str):
            return texts.setdefault(value, len(texts))
        return float(f"{value:.4g}") if np.isfinite(value) else None

    found = {"values": short(values)}
    return {**found, "words": list(texts)} if texts else found


def state_at(figure: go.Figure, positions: Sequence[int]) -> dict[str, Any]:
    """Return what a figure shows, by path, where its controls are at some positions."""
    found = {}
    for state in figure.layout.meta["states"]:
        value = state["values"]
        for control in state["by"]:
            value = value[positions[control]]
        found[state["path"]] = worded(value, state.get("words"))
    return found


def worded(value: Nested, words: Sequence[str] | None) -> Nested:
    """Return texts for their places in a list."""
    if words is None:
        return value
    return [worded(each, words) for each in value] if isinstance(value, list) else words[value]


def put(figure: go.Figure, path: str, value: Any) -> None:
    """Set a part of a figure; sentences are not part of it."""
    *parents, name = path.split(".")
    if parents[0] == "says":
        return
    target = figure
    for parent in parents:
        target = target[int(parent) if parent.isdigit() else parent]
    target[name] = value


# -------------------------------------------------------------------------------------------- pages


def names() -> list[str]:
    """Return the names of all scripts of pictures."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


@functools.cache
def load(name: str) -> Any:
    """Return the module of a picture, which has `ALT` and `figure`.

    Raises:
        ValueError: there is no such picture.
    """
    if name not in names():
        raise ValueError(f"there is no picture {name!r}; there are {', '.join(names())}")
    # A name of its own: several pictures are called as modules of other folders are.
    found = importlib.util.spec_from_file_location(f"picture_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def made(name: str, *arguments: str) -> tuple[go.Figure, str]:
    """Return a figure, and the sentences for those who cannot see it.

    Args:
        name: of the script.
        *arguments: of its `figure`. If that takes any, the script has `alt` in place of `ALT`.

    Raises:
        ValueError: there is no such picture, or not of these arguments.
    """
    module = load(name)
    wanted = parameters(module)
    if len(arguments) != len(wanted):
        asked = " ".join(wanted) or "no argument"
        raise ValueError(f"the picture {name!r} takes {asked}, not {' '.join(arguments)!r}")
    figure = module.figure(*arguments)
    return figure, module.alt(*arguments) if arguments else module.ALT


def parameters(module: Any) -> list[str]:
    """Return the names of what a picture is made of, as its usage shows them."""
    return [name.upper() for name in inspect.signature(module.figure).parameters]


def fragment(name: str, *arguments: str) -> str:
    """Return the HTML of a picture for a page that has plotly.js, `pictures.js` and its style."""
    return fragment_of("-".join((name, *arguments)), *made(name, *arguments))


def fragment_of(name: str, figure: go.Figure, alt: str) -> str:
    """Return the HTML of a figure that is made; the page knows it by a name of its own."""
    text = figure.to_json().replace("</", "<\\/")
    alt = html.escape(alt)
    return (
        f'<figure class="picture" id="picture-{name}" data-name="{name}">'
        '<form class="picture-controls" onsubmit="return false"></form>'
        f'<div class="picture-plot" role="img" aria-label="{alt}"></div>'
        '<p class="picture-says" role="status"></p>'
        f"<figcaption>{alt}</figcaption>"
        f'<script type="application/json">{text}</script></figure>\n'
    )


def page_of(title: str, fragments: str) -> str:
    """Return a whole page of pictures, which needs no other file."""
    from plotly.offline import get_plotlyjs

    style = (STATIC / "pictures.css").read_text(encoding="utf-8")
    script = (STATIC / "pictures.js").read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>:root {{ color-scheme: light dark; font-family: system-ui, sans-serif }} {style}"
        f"</style></head><body>{fragments}<script>{get_plotlyjs()}</script>"
        f"<script>{script}</script></body></html>\n"
    )


def main(module: Any) -> None:
    """Write the page of a picture: `python docs/pictures/NAME.py [ARGUMENT] PAGE.html`."""
    name = pathlib.Path(module.__file__).stem
    *arguments, page = sys.argv[1:] or [""]
    if not page or len(arguments) != len(parameters(module)):
        words = [f"{name}.py", *parameters(module), "PAGE.html"]
        sys.exit(f"usage: python docs/pictures/{' '.join(words)}")
    try:
        text = page_of(name, fragment(name, *arguments))
    except ValueError as fault:
        sys.exit(f"{fault}")
    pathlib.Path(page).write_text(text, encoding="utf-8")
