"""Three trainers of a pipeline: a reference, a judge that is given it, a learner given both.

They are bandits that record in their metrics what they were given.
"""

import pathlib

REFERENCE = """
import jax.numpy as jnp
from flax import struct
import bandit
from bandit import *
from purejaxpg import config as configs


@configs.dataclass
class Config:
    learning_rate: float = 0.5
    num_updates: int = 8
    steps_per_update: int = 4
    arms: int = 3  # of the model


def model(state, config, *given):
    return bandit.Model(state.params[: config.arms], "reference")
"""

JUDGE = """
import jax
from flax import struct
import bandit
from bandit import *

UNIT = "verdicts"


@struct.dataclass
class Given:
    reference: bandit.Model


def init(key, config, given):
    return State(0.5 * given.reference.logits)


def update(key, state, config, given):
    state, metrics = bandit.update(key, state, config)
    return state, {**metrics, "given/reference": given.reference.logits[0]}


def score(key, state, config, num_episodes, given):
    return bandit.score(key, state, config, num_episodes)


def model(state, config, *given):
    return bandit.Model(state.params, "judge")
"""

LEARNER = """
import json
import jax
import numpy as np
from flax import struct
import bandit
from bandit import *
from purejaxpg import InputError


@struct.dataclass
class Given:
    reference: bandit.Model
    judge: bandit.Model
    data: jax.Array | None = None  # [examples]


def check_given(config, given):
    if given.reference.logits.shape != (3,):
        raise InputError(f"reference must have 3 arms, but has {given.reference.logits.shape[0]}.")


def read(name, path, config):
    return np.array([json.loads(line)["x"] for line in path.read_text().splitlines()], np.float32)


def init(key, config, given):
    return State(given.reference.logits)


def update(key, state, config, given):
    state, metrics = bandit.update(key, state, config)
    own = {"given/reference": given.reference.logits[0], "given/judge": given.judge.logits[0]}
    if given.data is not None:
        own["given/data"] = given.data.sum()
    return state, {**metrics, **own}


def score(key, state, config, num_episodes, given):
    scores = bandit.score(key, state, config, num_episodes)
    return {**scores, "evaluation/judge": scores["evaluation/return"] * 0 + given.judge.logits[0]}
"""

PIPELINE = """
seeds = 2
eval_episodes = 8

[[stage]]
name = "first"
agent = "./reference.py"
rows_per_device = 2
[stage.sweep]
learning_rate = [0.1, 0.5]

[[stage]]
name = "judge"
agent = "./judge.py"
rows_per_device = 1
given = { reference = "first" }
config = { num_updates = 8, steps_per_update = 4 }

[[stage]]
name = "learner"
agent = "./learner.py"
rows_per_device = 2
given = { reference = "first:best", judge = "judge" }
config = { num_updates = 8, steps_per_update = 4 }
sweep = { learning_rate = [0.1, 1.0] }
"""


def write(folder: pathlib.Path, text: str = PIPELINE) -> pathlib.Path:
    """Write the trainers and a sweep file into a folder -> the file."""
    folder.mkdir(parents=True, exist_ok=True)
    trainers = {"reference": REFERENCE, "judge": JUDGE, "learner": LEARNER}
    for name, source in trainers.items():
        (folder / f"{name}.py").write_text(source, "utf-8")
    (folder / "relay.toml").write_text(text, "utf-8")
    return folder / "relay.toml"
