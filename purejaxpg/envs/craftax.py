"""Environments of craftax: "craftax:Craftax-Symbolic-v1", "craftax:Craftax-Classic-Pixels-v1".

Its parameters are `env_params`, but for `max_timesteps`, which is called `max_steps_in_episode`
here as everywhere. `env_kwargs` are fields of its `StaticEnvParams`, such as `num_levels`.
"""

import dataclasses
from typing import Any

import jax
from flax import struct

from purejaxpg import config as configs
from purejaxpg import extras
from purejaxpg.envs import gymnax, libraries

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
        return self.env.reset_env(jax.random.wrap_key_data(key), self._own(params))

    def advance(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> Any:
        """Step without a time limit -> observation, state, reward, whether it terminated."""
        raw = jax.random.wrap_key_data(key)
        return self.env.step_env(raw, state, action, self._own(params))[:4]

    def _own(self, params: Any) -> Any:
        """Return craftax's parameters, in which time is unlimited."""
        values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
        del values["max_steps_in_episode"]
        return dataclasses.replace(
            self.env.default_params, **values, max_timesteps=libraries.UNLIMITED
        )
