"""The methods of the course by year, and what each of them builds on."""

import math
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


class Method(NamedTuple):
    """One method, and the names of those that it builds on."""

    year: int
    name: str
    lane: int
    paper: str
    what: str
    parents: tuple[str, ...] = ()


METHODS = (
    Method(1983, "actor-critic", ON, "Barto, Sutton and Anderson, IEEE Transactions SMC 13",
           "A critic's error of one step trains the actor."),
    Method(1992, "REINFORCE", ON, "Williams, Machine Learning 8",
           "The return times the score is an unbiased gradient."),
    Method(1998, "natural gradient", REGION, "Amari, Neural Computation 10",
           "Steps are measured by the Fisher information, not by the size of the parameters."),
    Method(2000, "policy gradient theorem", ON, "Sutton et al., NIPS 12",
           "The gradient needs values of actions, and no derivative of the states visited.",
           ("REINFORCE", "actor-critic")),
    Method(2001, "natural policy gradient", REGION, "Kakade, NIPS 14",
           "The natural gradient of the return.", ("natural gradient", "policy gradient theorem")),
    Method(2014, "DPG", OFF, "Silver et al., ICML",
           "A deterministic policy follows the critic's slope along the action.",
           ("policy gradient theorem",)),
    Method(2015, "TRPO", REGION, "Schulman et al., arXiv:1502.05477",
           "A line search keeps each natural step within a bounded divergence.",
           ("natural policy gradient",)),
    Method(2015, "GAE", ON, "Schulman et al., arXiv:1506.02438",
           "λ trades the bias of the critic for the variance of the return.", ("actor-critic",)),
    Method(2015, "DDPG", OFF, "Lillicrap et al., arXiv:1509.02971",
           "Replay and target networks make the deterministic gradient work with deep networks.",
           ("DPG",)),
    Method(2016, "A3C, A2C", ON, "Mnih et al., arXiv:1602.01783",
           "Many environments at once replace the replay buffer.",
           ("policy gradient theorem",)),
    Method(2017, "preferences", TEXT, "Christiano et al., arXiv:1706.03741",
           "A reward model learns from comparisons by people.", ("TRPO", "A3C, A2C")),
    Method(2017, "PPO", REGION, "Schulman et al., arXiv:1707.06347",
           "Clipping the probability ratio replaces the line search.", ("TRPO", "GAE")),
    Method(2018, "SAC", OFF, "Haarnoja et al., arXiv:1801.01290",
           "The entropy of a stochastic actor is part of the objective.", ("DDPG",)),
    Method(2018, "TD3", OFF, "Fujimoto et al., arXiv:1802.09477",
           "The smaller of two critics, and a delayed actor.", ("DDPG",)),
    Method(2019, "RL of language models", TEXT, "Ziegler et al., arXiv:1909.08593",
           "PPO on a learned reward, less the divergence from the model at first.",
           ("PPO", "preferences")),
    Method(2020, "summaries", TEXT, "Stiennon et al., arXiv:2009.01325",
           "Learned rewards beat imitation in summaries.", ("RL of language models",)),
    Method(2022, "InstructGPT", TEXT, "Ouyang et al., arXiv:2203.02155",
           "Demonstrations, a reward model, then PPO.", ("summaries",)),
    Method(2022, "constitutional AI", TEXT, "Bai et al., arXiv:2212.08073",
           "Written principles and the model's own judgement replace labels of harmlessness.",
           ("InstructGPT",)),
    Method(2023, "DPO", TEXT, "Rafailov et al., arXiv:2305.18290",
           "The policy itself stands for the reward, so that comparisons train it directly.",
           ("InstructGPT",)),
    Method(2023, "RLAIF", TEXT, "Lee et al., arXiv:2309.00267",
           "A model labels the comparisons.", ("constitutional AI",)),
    Method(2024, "KTO", TEXT, "Ethayarajh et al., arXiv:2402.01306",
           "Single answers, good or bad, instead of pairs.", ("DPO",)),
    Method(2024, "GRPO", TEXT, "Shao et al., arXiv:2402.03300",
           "The mean of a group of answers replaces PPO's critic.", ("PPO",)),
    Method(2024, "RLOO", TEXT, "Ahmadian et al., arXiv:2402.14740",
           "REINFORCE with the mean of the other answers as baseline.", ("REINFORCE",)),
    Method(2024, "ORPO", TEXT, "Hong et al., arXiv:2403.07691",
           "Imitation and comparison in one loss, without a reference model.", ("DPO",)),
    Method(2025, "DAPO", TEXT, "Yu et al., arXiv:2503.14476",
           "Clips higher above than below, and counts all tokens of a batch alike.", ("GRPO",)),
    Method(2025, "Dr. GRPO", TEXT, "Liu et al., arXiv:2503.20783",
           "Leaves out the divisions that bias GRPO by length and by difficulty.", ("GRPO",)),
    Method(2025, "CISPO", TEXT, "MiniMax, arXiv:2506.13585",
           "Clips the weight of a token and keeps its gradient.", ("GRPO",)),
    Method(2025, "GSPO", TEXT, "Zheng et al., arXiv:2507.18071",
           "One ratio for a whole answer.", ("GRPO",)),
)  # fmt: skip
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
    return f"{method.year}, {method.name}: {method.what}{base} {method.paper}."


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
