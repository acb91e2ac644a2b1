"""The methods of the course by year, and what each of them builds on."""

import math
import pathlib
import re
import sys
from typing import NamedTuple

import _controls
import plotly.graph_objects as go

ALT = (
    "A timeline of policy-gradient methods from 1983 to 2025 in four columns: on-policy, trust "
    "region, off-policy and language models. Lines lead from each method to those that it builds "
    "on. The chosen one and all that led to it are marked; the sentence below names its paper."
)

LANES = ("on-<br>policy", "trust<br>region", "off-<br>policy", "LLM")
ON, REGION, OFF, TEXT = range(4)
CHAPTER = pathlib.Path(__file__).resolve().parents[1] / "course" / "17-timeline.md"


# The column of each method, and what it builds on. All else is in the tables of the chapter.
DRAWN = {
    "actor-critic": (ON,),
    "REINFORCE": (ON,),
    "natural gradient": (REGION,),
    "policy gradient theorem": (ON, "REINFORCE", "actor-critic"),
    "natural policy gradient": (REGION, "natural gradient", "policy gradient theorem"),
    "DPG": (OFF, "policy gradient theorem"),
    "TRPO": (REGION, "natural policy gradient"),
    "GAE": (ON, "actor-critic"),
    "DDPG": (OFF, "DPG"),
    "A3C, A2C": (ON, "policy gradient theorem"),
    "preferences": (TEXT, "TRPO", "A3C, A2C"),
    "PPO": (REGION, "TRPO", "GAE"),
    "SAC": (OFF, "DDPG"),
    "TD3": (OFF, "DDPG"),
    "RL of language models": (TEXT, "PPO", "preferences"),
    "summaries": (TEXT, "RL of language models"),
    "InstructGPT": (TEXT, "summaries"),
    "constitutional AI": (TEXT, "InstructGPT"),
    "DPO": (TEXT, "InstructGPT"),
    "RLAIF": (TEXT, "constitutional AI"),
    "KTO": (TEXT, "DPO"),
    "GRPO": (TEXT, "PPO"),
    "RLOO": (TEXT, "REINFORCE"),
    "ORPO": (TEXT, "DPO"),
    "DAPO": (TEXT, "GRPO"),
    "Dr. GRPO": (TEXT, "GRPO"),
    "CISPO": (TEXT, "GRPO"),
    "GSPO": (TEXT, "GRPO"),
}


class Method(NamedTuple):
    """One method, and the names of those that it builds on."""

    year: int
    name: str
    lane: int
    paper: str
    what: str
    parents: tuple[str, ...]


def methods(chapter: pathlib.Path = CHAPTER) -> list[Method]:
    """Return the methods that are drawn, by year, with the facts of the chapter's tables.

    Raises:
        ValueError: one of them is not in the chapter, or twice.
    """
    found = []
    for row in re.findall(
        r"^\| (\d{4} \| .*) \|$", chapter.read_text(encoding="utf-8"), re.MULTILINE
    ):
        year, name, what, paper = row.split(" | ")
        if name in DRAWN:
            lane, *parents = DRAWN[name]
            found.append(Method(int(year), name, lane, plain(paper), what, tuple(parents)))
    names = [method.name for method in found]
    if sorted(names) != sorted(DRAWN):
        wrong = sorted(set(DRAWN) - set(names)) or names
        raise ValueError(f"each method needs one row in the chapter; look at {wrong}")
    return sorted(found, key=lambda method: method.year)


def plain(markdown: str) -> str:
    """Return text without links and italics."""
    return re.sub(r"\[([^]]*)\](?:\[\w+\])?", r"\1", markdown).replace("*", "")


METHODS = methods()
PLACES = {method.name: i for i, method in enumerate(METHODS)}


def ancestry(place: int) -> list[int]:
    """Return a method and all that led to it, the latest first."""
    found = {place}
    for parent in METHODS[place].parents:
        found |= set(ancestry(PLACES[parent]))
    return sorted(found, reverse=True)


def edges(places: list[int]) -> tuple[list, list]:
    """Return lines from methods to their parents: x and y, with gaps between them."""
    x, y = [], []
    for place in places:
        for parent in METHODS[place].parents:
            x += [METHODS[place].lane, METHODS[PLACES[parent]].lane, math.nan]
            y += [place, PLACES[parent], math.nan]
    return x, y


def sentence(method: Method) -> str:
    """Return what a method is, its paper and what it builds on."""
    base = f" It builds on {' and '.join(method.parents)}." if method.parents else ""
    return f"{method.year}, {method.name}: {method.what}.{base} {method.paper}."


def figure() -> go.Figure:
    """Return the figure: a row for each method, and a slider over them."""
    chosen = ("method",)
    marked = [ancestry(place) for place in range(len(METHODS))]
    lines = [edges(places) for places in marked]
    states = {
        "data.1.x": (chosen, [x for x, _ in lines]),
        "data.1.y": (chosen, [y for _, y in lines]),
        "data.3.x": (chosen, [[METHODS[i].lane for i in places] for places in marked]),
        "data.3.y": (chosen, marked),
        "says.0": (chosen, [sentence(method) for method in METHODS]),
    }
    names = [f"{method.name}, {method.year}" for method in METHODS]
    start = PLACES["PPO"]
    controls = {"method": _controls.Control("Method", names, start, plays=True)}
    return _controls.attach(drawn(), controls, states)


def drawn() -> go.Figure:
    """Return the rows without what the slider marks."""
    places = list(range(len(METHODS)))
    faint = {"color": f"{_controls.GREY}70", "width": 1}
    blue = {"color": _controls.BLUE, "width": 3}
    shared = {"showlegend": False, "hoverinfo": "skip"}
    grey_dot = {"color": _controls.GREY, "size": 8}
    x, y = ([None if math.isnan(each) else each for each in line] for line in edges(places))
    dots = {"x": [method.lane for method in METHODS], "y": places, "mode": "markers"}
    names = [f"{method.name} {method.year}" for method in METHODS]
    lanes = list(range(len(LANES)))
    return _controls.figure(
        [
            go.Scatter(x=x, y=y, mode="lines", line=faint, **shared),
            go.Scatter(mode="lines", line=blue, **shared),
            go.Scatter(marker=grey_dot, **dots, **shared),
            go.Scatter(mode="markers", marker={"color": _controls.BLUE, "size": 13}, **shared),
        ],
        720,
        margin={"l": 172, "t": 40, "b": 8},
        xaxis={
            **{"tickvals": lanes, "ticktext": LANES, "side": "top", "range": [-0.5, 3.5]},
            **{"tickfont": {"size": 11}, "showgrid": False, "tickangle": 0},
        },
        yaxis={
            **{"tickvals": places, "ticktext": names, "range": [len(places) - 0.4, -0.6]},
            **{"tickfont": {"size": 11}},
        },
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
