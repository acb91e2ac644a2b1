"""Environments of craftax: "craftax:Craftax-Symbolic-v1", "craftax:Craftax-Classic-Pixels-v1".

Its parameters are `env_params`, but for `max_timesteps`, which is called `max_steps_in_episode`
here as everywhere. `env_kwargs` are fields of its `StaticEnvParams`, such as `num_levels`.
"""

import dataclasses
import importlib
from typing import Any

import jax
import numpy as np
from flax import struct

from purejaxpg import config as configs
from purejaxpg import extras
from purejaxpg.envs import gymnax, libraries

PIXELS = 16  # of a side of a block in a picture
NAMES = [
    f"Craftax-{kind}-v1" for kind in ("Symbolic", "Pixels", "Classic-Symbolic", "Classic-Pixels")
]


def make(name: str, **kwargs: Any) -> Any:
    """Return the environment that craftax calls `name`, without its automatic resets."""
    library = extras.load("craftax.craftax_env", "craftax", f"Environment 'craftax:{name}'")
    configs.require_known(name, NAMES, "environment of craftax named")
    env = library.make_craftax_env_from_name(name, auto_reset=False)
    if kwargs:
        env = type(env)(dataclasses.replace(env.static_env_params, **kwargs))
    return Craftax(env)


class Craftax(libraries.Adapter):
    """An environment of craftax."""

    packages = ("craftax",)

    def __init__(self, env: Any) -> None:
        self.env, own = env, env.default_params
        values = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        values["max_steps_in_episode"] = values.pop("max_timesteps")
        fields = {"__annotations__": dict.fromkeys(values, Any)}
        params = struct.dataclass(type("Params", (), fields))(**values)
        super().__init__(params, gymnax.spaces.Discrete(env.num_actions))

    def start(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """Start an episode -> observation and state."""
        return self.env.reset_env(key, self._own(params))

    def advance(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> Any:
        """Step without a time limit -> observation, state, reward, whether it terminated."""
        return self.env.step_env(key, state, action, self._own(params))[:4]

    def film(self, states: Any, params: Any, steps: list[int]) -> Any:
        """Return an image of each of some steps."""
        package = type(self.env).__module__.rsplit(".envs.", 1)[0]
        renderer = importlib.import_module(f"{package}.renderer")
        draw = jax.jit(renderer.make_craftax_pixel_renderer(PIXELS))
        images = [np.asarray(draw(state)) for state in libraries.chosen(states, steps)]
        return [np.clip(image, 0, 255).astype(np.uint8) for image in images]

    def _own(self, params: Any) -> Any:
        """Return craftax's parameters, in which time is unlimited."""
        values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
        del values["max_steps_in_episode"]
        return dataclasses.replace(
            self.env.default_params, **values, max_timesteps=libraries.UNLIMITED
        )
