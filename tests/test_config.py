"""The rule that floats are traced, and the way from plain values to a configuration and back."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxpg
from purejaxpg import config as configs

pytestmark = pytest.mark.fast


@configs.dataclass
class Config:
    """One field of each kind."""

    env: str = "CartPole-v1"  # which environment
    env_kwargs: tuple[tuple[str, Any], ...] = ()  # of its constructor
    num_steps: int = 4
    hidden: tuple[int, ...] = (8, 8)  # widths
    rates: tuple[float, ...] = (0.5,)
    layers: tuple[str, ...] = ("a",)
    fast: bool = False  # or not  # really
    learning_rate: float = 1e-3  # of Adam
    clip: float = float("inf")  # inf: off
    env_params: dict[str, float] = dataclasses.field(default_factory=dict)  # e.g. gravity

    @property
    def batch_size(self) -> int:
        return 2 * self.num_steps


def is_one_sentence(text: str) -> bool:
    return text[-1] in ".?" and ". " not in text and "\n" not in text and not text.endswith("..")


# --- floats are traced --------------------------------------------------------------------------


def test_leaves_are_the_floats_and_the_environment_parameters() -> None:
    config = Config(env_params={"length": 2.0, "gravity": 1.0})
    paths = jax.tree_util.tree_leaves_with_path(config)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in paths}
    assert leaves == {
        "learning_rate": 1e-3,
        "clip": math.inf,
        "env_params.gravity": 1.0,
        "env_params.length": 2.0,
    }


@pytest.mark.parametrize(
    ("fields", "traces"),
    [
        ({"learning_rate": 0.5, "clip": 3.0}, 1),
        ({"env_params": {"gravity": 7.0}}, 1),
        ({"num_steps": 5}, 2),
        ({"fast": True}, 2),
        ({"hidden": (8,)}, 2),
        ({"rates": (0.25,)}, 2),
        ({"env": "Acrobot-v1"}, 2),
        ({"env_kwargs": (("size", 3),)}, 2),
        ({"env_params": {"length": 1.0}}, 2),
        ({"env_params": {"gravity": 1.0, "length": 1.0}}, 2),
    ],
)
def test_number_of_traces(fields: dict[str, Any], traces: int) -> None:
    seen = []

    @jax.jit
    def program(config: Config) -> jax.Array:
        seen.append(config)
        return config.learning_rate * config.num_steps + sum(config.env_params.values())

    first = Config(env_params={"gravity": 1.0})
    second = dataclasses.replace(first, **fields)
    for config in (first, second, first, second):
        expected = config.learning_rate * config.num_steps + sum(config.env_params.values())
        assert float(program(config)) == pytest.approx(expected, rel=1e-6)
    assert len(seen) == traces


def test_static_parts_compare_by_value() -> None:
    """Two equal configurations made apart are one cache entry."""
    one = configs.build(Config, {"hidden": [4, 4], "env_kwargs": {"b": [1, 2], "a": "x"}})
    two = configs.build(Config, {"env_kwargs": {"a": "x", "b": [1, 2]}, "hidden": [4, 4]})
    structures = [jax.tree.structure(config) for config in (one, two)]
    assert structures[0] == structures[1]
    assert hash(structures[0]) == hash(structures[1])
    assert structures[0] != jax.tree.structure(dataclasses.replace(one, num_steps=5))


def test_a_batch_of_configurations_maps() -> None:
    rows = jax.tree.map(
        lambda *x: jnp.stack(x),
        *(Config(learning_rate=x, env_params={"gravity": 2 * x}) for x in (1.0, 2.0, 3.0)),
    )
    assert rows.num_steps == 4
    result = jax.jit(jax.vmap(lambda c: c.learning_rate + c.env_params["gravity"]))(rows)
    assert result.tolist() == [3.0, 6.0, 9.0]


def test_configurations_are_frozen_and_replaced() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_steps = 5  # type: ignore[misc]
    changed = dataclasses.replace(config, num_steps=5, learning_rate=0.1)
    assert (changed.num_steps, changed.learning_rate, changed.batch_size) == (5, 0.1, 10)
    assert (config.num_steps, config.learning_rate, config.batch_size) == (4, 1e-3, 8)


def test_a_configuration_passes_through_jit_unchanged() -> None:
    config = Config(hidden=(3,), env_kwargs=(("size", 3),), env_params={"gravity": 1.5})
    returned = jax.jit(lambda config: config)(config)
    assert isinstance(returned, Config)
    assert jax.tree.structure(returned) == jax.tree.structure(config)
    assert float(returned.env_params["gravity"]) == 1.5
    assert float(returned.clip) == math.inf


# --- build --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", 1, 1.0),
        ("learning_rate", 0.25, 0.25),
        ("learning_rate", np.float64(0.25), 0.25),
        ("clip", math.inf, math.inf),
        ("num_steps", 7, 7),
        ("num_steps", 5e2, 500),
        ("fast", True, True),
        ("env", "Acrobot-v1", "Acrobot-v1"),
        ("hidden", [16, 32.0], (16, 32)),
        ("hidden", (16,), (16,)),
        ("hidden", [], ()),
        ("rates", [1, 0.5], (1.0, 0.5)),
        ("layers", ["x", "y"], ("x", "y")),
        ("env_kwargs", {"size": 4, "flag": True}, (("flag", True), ("size", 4))),
        ("env_kwargs", {"desc": ["SF", ["a"]]}, (("desc", ("SF", ("a",))),)),
        ("env_kwargs", {}, ()),
        ("env_params", {"gravity": 9, "flag": True}, {"flag": True, "gravity": 9}),
    ],
)
def test_build_converts(name: str, value: Any, expected: Any) -> None:
    built = getattr(configs.build(Config, {name: value}), name)
    assert built == expected
    assert type(built) is type(expected)
    if isinstance(expected, tuple):
        assert [type(item) for item in built] == [type(item) for item in expected]
    if isinstance(expected, dict):
        assert list(built) == sorted(built)  # so that equal tables are one structure


def test_missing_fields_keep_their_default() -> None:
    assert configs.build(Config, {}) == Config()
    assert configs.build(Config, {"num_steps": 9}) == Config(num_steps=9)


# Field, value, the words for what would be right, and the name and value of the message where
# they are not those of the field: an item of a list, a value in a table.
REFUSED = [
    ("learning_rate", "fast", "a number", None, None),
    ("learning_rate", math.nan, "a number", None, None),
    ("learning_rate", True, "a number", None, None),
    ("learning_rate", None, "a number", None, None),
    ("learning_rate", [0.1], "a number", None, None),
    ("num_steps", 1.5, "a whole number", None, None),
    ("num_steps", math.inf, "a whole number", None, None),
    ("num_steps", math.nan, "a whole number", None, None),
    ("num_steps", False, "a whole number", None, None),
    ("num_steps", "4", "a whole number", None, None),
    ("fast", 1, "true or false", None, None),
    ("fast", "yes", "true or false", None, None),
    ("env", 3, "a string", None, None),
    ("hidden", 64, "a list, each item a whole number", None, None),
    ("hidden", "64", "a list, each item a whole number", None, None),
    ("hidden", {"a": 1}, "a list, each item a whole number", None, None),
    ("hidden", [64, "a"], "a whole number", "hidden[1]", "a"),
    ("hidden", [64, [64]], "a whole number", "hidden[1]", [64]),
    ("hidden", [True], "a whole number", "hidden[0]", True),
    ("rates", [0.5, math.nan], "a number", "rates[1]", math.nan),
    ("layers", ["a", 1], "a string", "layers[1]", 1),
    ("env_kwargs", ["size", 3], "a table of names and values", None, None),
    ("env_kwargs", 3, "a table of names and values", None, None),
    ("env_params", [9.8], "a table of names and values", None, None),
    ("env_params", {"gravity": "low"}, "a finite number", "env_params.gravity", "low"),
    ("env_params", {"gravity": math.inf}, "a finite number", "env_params.gravity", math.inf),
    ("env_params", {"gravity": math.nan}, "a finite number", "env_params.gravity", math.nan),
    ("env_params", {"gravity": [1.0]}, "a finite number", "env_params.gravity", [1.0]),
]


@pytest.mark.parametrize(("field", "value", "words", "name", "shown"), REFUSED)
def test_build_refuses(field: str, value: Any, words: str, name: str | None, shown: Any) -> None:
    with pytest.raises(purejaxpg.InputError) as error:
        configs.build(Config, {field: value})
    culprit = shown if name else value
    assert str(error.value) == f"{name or field} must be {words}, but is {culprit!r}."
    assert is_one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"learning_rate": 10**400}, "learning_rate"),
        ({"num_steps": 10**400}, "num_steps"),
        ({"env_params": {"gravity": -(10**400)}}, "env_params.gravity"),
    ],
)
def test_a_number_beyond_all_floats_is_refused(values: dict[str, Any], name: str) -> None:
    """TOML as Python reads it has no largest integer."""
    with pytest.raises(purejaxpg.InputError, match=f"^{name} must be a .*number, but is") as error:
        configs.build(Config, values)
    assert is_one_sentence(str(error.value))


@pytest.mark.parametrize("value", [{"inner": {"a": 1}}, {"inner": [{"a": 1}]}, {"inner": {1}}])
def test_an_argument_that_cannot_be_part_of_a_program_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(purejaxpg.InputError) as error:
        configs.build(Config, {"env_kwargs": value})
    text = str(error.value)
    assert text.startswith("env_kwargs.inner must be ")
    assert is_one_sentence(text)


def test_unknown_fields() -> None:
    with pytest.raises(purejaxpg.InputError) as near:
        configs.build(Config, {"num_steps": 3, "lerning_rate": 1.0})
    message = "There is no field 'lerning_rate'; did you mean 'learning_rate'?"
    assert str(near.value) == message
    for name in ("lr", "LR", "Learning_Rate"):
        with pytest.raises(purejaxpg.InputError, match="did you mean 'learning_rate'"):
            configs.build(Config, {name: 1.0})
    with pytest.raises(purejaxpg.InputError, match="no field 'zzz'; there are: env, ") as far:
        configs.build(Config, {"zzz": 1.0})
    assert "env_params" in str(far.value)
    assert is_one_sentence(str(far.value))
    with pytest.raises(purejaxpg.InputError, match="no field 'batch_size'"):
        configs.build(Config, {"batch_size": 3})  # derived, so it cannot be set


# --- checks of values ---------------------------------------------------------------------------


def at_least(**fields: Any) -> None:
    configs.at_least(Config(**fields), 1, "num_steps", "learning_rate")


def between(**fields: Any) -> None:
    configs.between(Config(**fields), 0.0, 1.0, "learning_rate")


def one_of(**fields: Any) -> None:
    configs.one_of(Config(**fields), "env", ("a", "b"))


def divides(**fields: Any) -> None:
    configs.divides(Config(**fields), "num_steps", 12, "batch_size")


@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (
            at_least,
            {"num_steps": 1, "learning_rate": 1.0},
            {"num_steps": 0, "learning_rate": 1.0},
            "num_steps must be 1 or more, but is 0.",
        ),
        (
            at_least,
            {"learning_rate": math.inf},
            {"learning_rate": math.nan},
            "learning_rate must be 1 or more, but is nan.",
        ),
        (
            between,
            {"learning_rate": 1.0},
            {"learning_rate": 1.5},
            "learning_rate must be between 0.0 and 1.0, but is 1.5.",
        ),
        (
            between,
            {"learning_rate": 0.0},
            {"learning_rate": math.nan},
            "learning_rate must be between 0.0 and 1.0, but is nan.",
        ),
        (one_of, {"env": "b"}, {"env": "c"}, "env must be one of 'a', 'b', but is 'c'."),
        (
            divides,
            {"num_steps": 4},
            {"num_steps": 5},
            "num_steps must divide batch_size, but 5 does not divide 12.",
        ),
    ],
)
def test_checks_name_the_field_and_the_value(check: Any, good: Any, bad: Any, message: str) -> None:
    check(**good)
    with pytest.raises(purejaxpg.InputError) as error:
        check(**bad)
    assert str(error.value) == message


# --- words and help -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("learning_rate", ["3e-4"], 3e-4),
        ("learning_rate", ["1"], 1.0),
        ("clip", ["inf"], math.inf),
        ("num_steps", ["12"], 12),
        ("num_steps", ["5e5"], 500_000),
        ("fast", ["true"], True),
        ("fast", ["False"], False),
        ("env", ["Acrobot-v1"], "Acrobot-v1"),
        ("env", ["12"], "12"),
        ("hidden", ["64", "32"], (64, 32)),
        ("rates", ["1", "0.5"], (1.0, 0.5)),
        ("layers", ["x", "1"], ("x", "1")),
        ("hidden", ["[64, 32]"], (64, 32)),
        ("hidden", ["[64,", "32]"], (64, 32)),
        ("hidden", ["(64,32)"], (64, 32)),
        ("hidden", ["64,32"], (64, 32)),
        ("hidden", ["[]"], ()),
    ],
)
def test_words_of_a_command_line(name: str, words: list[str], expected: Any) -> None:
    value = configs.parse(name, configs.field_types(Config)[name], words)
    assert getattr(configs.build(Config, {name: value}), name) == expected


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("learning_rate", ["fast"], "learning_rate must be a number, but is 'fast'."),
        ("learning_rate", ["nan"], "learning_rate must be a number, but is nan."),
        ("learning_rate", ["1", "2"], "learning_rate must be a number, but is '1 2'."),
        ("num_steps", ["1.5"], "num_steps must be a whole number, but is 1.5."),
        ("fast", ["1"], "fast must be true or false, but is '1'."),
        ("hidden", ["64", "x"], "hidden[1] must be a whole number, but is 'x'."),
    ],
)
def test_bad_words_of_a_command_line(name: str, words: list[str], message: str) -> None:
    value = configs.parse(name, configs.field_types(Config)[name], words)
    with pytest.raises(purejaxpg.InputError) as error:
        configs.build(Config, {name: value})
    assert str(error.value) == message


def test_describe_has_words_for_every_kind() -> None:
    hints = configs.field_types(Config)
    assert list(hints) == [field.name for field in dataclasses.fields(Config)]
    assert {name: configs.describe(hint) for name, hint in hints.items()} == {
        "env": "a string",
        "env_kwargs": "a table of names and values",
        "num_steps": "a whole number",
        "hidden": "a list, each item a whole number",
        "rates": "a list, each item a number",
        "layers": "a list, each item a string",
        "fast": "true or false",
        "learning_rate": "a number",
        "clip": "a number",
        "env_params": "a table of names and values",
    }


def test_a_field_of_a_type_that_no_file_can_hold_is_named() -> None:
    for value in (0.5, [1], {"a": 1}):
        with pytest.raises(purejaxpg.InputError) as error:
            configs.coerce("bonus", float | None, value)
        assert str(error.value).startswith(
            "bonus cannot be set or swept, because it is annotated float | None: only float, int, "
        )
        assert is_one_sentence(str(error.value))


def test_help_texts_are_the_comments() -> None:
    texts = configs.field_help(Config)
    assert texts["env"] == "which environment"
    assert texts["num_steps"] == ""
    assert texts["fast"] == "or not  # really"
    assert texts["env_params"] == "e.g. gravity"
    assert set(texts) == set(configs.field_types(Config))


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            env="DeepSea-bsuite",
            env_kwargs=(("desc", ("SF", "FG")), ("size", 5)),
            num_steps=9,
            hidden=(3,),
            rates=(),
            fast=True,
            learning_rate=0.1,
            clip=2.0,
            env_params={"deterministic": False, "size": 3, "unscaled_move_cost": 0.5},
        ),
    ],
)
def test_to_dict_and_build_are_inverse(config: Config) -> None:
    plain = configs.to_dict(config)
    assert configs.build(Config, plain) == config
    # What is written to a result directory is read back from JSON.
    again = configs.build(Config, json.loads(json.dumps(plain)))
    assert again == config
    assert jax.tree.structure(again) == jax.tree.structure(config)
