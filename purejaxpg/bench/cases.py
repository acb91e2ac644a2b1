"""The cases: each is a kind of agent, an environment and the numbers of both."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from purejaxpg import InputError, contract, trainers
from purejaxpg import config as configs

# As PureJaxRL's example has it.
BREAKOUT = {"env": "Breakout-MinAtar", "num_envs": 64, "num_minibatches": 8, "activation": "relu"}
# Small enough to compile and run in seconds anywhere; fields that an agent lacks are left out.
QUICK: dict[str, Any] = {
    "task": "enumerable-3-3",
    "num_envs": 2,
    "num_steps": 8,
    "max_steps": 20,
    "num_epochs": 1,
    "num_minibatches": 2,
    "num_critic_steps": 1,
    "num_gradient_steps": 2,
    "batch_size": 8,
    "replay_capacity": 1_000,
    "learning_starts": 16,
    "hidden": [8],
    "env_params": {"max_steps_in_episode": 20},
}
ACCELERATOR_MINUTES = 9.5
UPDATES = 60  # least length of a run: a segment of a sweep is a sixtieth of it


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement."""

    agent: str  # a name or a path
    num_agents: int
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the configuration
    rows: int | None = None  # of a unit; None: as a sweep chooses them
    flag: str = ""  # of XLA, added to those of the environment
    quick: bool = False
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)  # sources by field

    @property
    def name(self) -> str:
        """An id: equal for equal cases only."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Return the case as JSON can hold it."""
        return dataclasses.asdict(self)

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.label_without("")

    def label_without(self, axis: str) -> str:
        """Return the label that all cases along an axis ("agents" or "environments") share."""
        parts = [] if axis == "agents" else [f"x {self.num_agents}"]
        for name, value in self.fields.items():
            if name == contract.ENV:
                parts.insert(0, value)
            elif name != contract.NUM_ENVS or axis != "environments":
                parts.append(f"{name}={value}")
        parts += [f"rows={self.rows}"] if self.rows else []
        parts += [f"{name}={source}" for name, source in self.given.items()]
        return " ".join([self.agent, *parts, *([self.flag] if self.flag else [])])

    def sweep(self, shapes: bool = False) -> Any:
        """Return the spec of the sweep to be timed; with `shapes`, of a random model only these.

        Raises:
            InputError: it cannot be trained.
        """
        from purejaxpg.bench import givens
        from purejaxpg.sweep import spec as specs

        trainer = trainers.load(self.agent)
        fields = complete(trainer.Config, self.fields, self.quick)
        raw = {
            "agent": self.agent,
            "seeds": self.num_agents,
            "config": fields,
            **({"rows_per_device": self.rows} if self.rows else {}),
        }
        config = configs.build(trainer.Config, fields)
        trainer.check(config)
        given = givens.arrays(trainer, config, self.given, shapes)
        return specs.from_dict(raw, "bench", given=given)


def complete(config_type: Any, fields: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """Return the fields of a run that is long enough to be timed, its warm-up included.

    Args:
        config_type: the agent's Config.
        fields: those that differ from its defaults.
        quick: make everything small.
    """
    known = configs.field_types(config_type)
    small = {name: value for name, value in QUICK.items() if quick and name in known}
    wanted: dict[str, Any] = {**small, **fields}
    config = configs.build(config_type, wanted)
    whole = not quick or "total_timesteps" in fields
    return {**wanted, **contract.timed(config, UPDATES, whole)}


def choose(asked: Any, on_cpu: bool) -> list[Case]:
    """Return the cases for the options of the command line.

    Args:
        asked: the options.
        on_cpu: whether the devices are those of a CPU.

    Raises:
        InputError: the options do not go together, or a case cannot be trained.
    """
    listed = {
        f"--{name.replace('_', '-')}": getattr(asked, name)
        for name in ("agents", "num_agents", "num_envs", "env", "rows")
    }
    chosen_by = [name for name, value in listed.items() if value is not None]
    chosen_by += ["--given"] if asked.given else []
    ready_made = [name for name in ("full", "accelerator") if getattr(asked, name)]
    options = [f"--{name}" for name in ready_made] + chosen_by
    configs.require(
        len(ready_made) + bool(chosen_by) < 2,
        f"{' and '.join(options[:2])} must not be given together: each chooses the cases.",
    )
    if chosen_by:
        agents, numbers = asked.agents or ["ppo"], asked.num_agents or [1, 16, 64]
        chosen = product(agents, numbers, asked.num_envs or [], asked.env, asked.rows)
    elif ready_made:
        chosen = full() if asked.full else accelerator(on_cpu)
    else:
        chosen = default(on_cpu)
    chosen = [dataclasses.replace(case, given=dict(asked.given)) for case in chosen]
    chosen = with_flags(chosen, asked.flags)
    if asked.quick:  # but numbers that are asked for are measured
        chosen = made_quick(chosen, max(asked.num_agents or [2]), max(asked.num_envs or [2]))
    check(chosen)
    return chosen


def product(
    agents: Sequence[str],
    num_agents: Sequence[int],
    num_envs: Sequence[int],
    env: str | None,
    rows: int | None,
) -> list[Case]:
    """Return every combination.

    Args:
        agents: names or paths.
        num_agents: how many are trained together.
        num_envs: environments of each agent; none leaves each agent its own number.
        env: name of the environment; None: the agent's own.
        rows: agents in a unit; None: as a sweep chooses.

    Raises:
        InputError: a number is not 1 or more.
    """
    wanted_rows = [] if rows is None else [rows]
    named = {"--num-agents": num_agents, "--num-envs": num_envs, "--rows": wanted_rows}
    for name, numbers in named.items():
        for number in numbers:
            configs.require(number > 0, f"{name} must be 1 or more, but is {number}.")
    fixed: dict[str, Any] = {} if env is None else {contract.ENV: env}
    every = [{**fixed, contract.NUM_ENVS: number} for number in num_envs] or [fixed]
    return [
        Case(agent, count, fields, rows)
        for agent, fields, count in itertools.product(agents, every, num_agents)
    ]


def with_flags(cases: Iterable[Case], flags: Sequence[str]) -> list[Case]:
    """Return each case as it is, then with each of XLA's flags alone.

    Raises:
        InputError: a flag is not of the form xla_name=value.
    """
    for flag in flags:
        name, equals, _ = flag.partition("=")
        configs.require(
            name.startswith("xla_") and bool(equals),
            f"--flags must look like xla_name=value, but one is {flag!r}.",
        )
    return [
        dataclasses.replace(case, flag=flag)
        for case in cases
        for flag in (["", *flags] if not case.flag else [case.flag])
    ]


def default(on_cpu: bool) -> list[Case]:
    """Return a short benchmark: PPO over the number of agents, each other kind once."""
    numbers, one = ([1, 16, 64], 16) if on_cpu else ([1, 64, 2048], 64)
    others = ["reinforce", "a2c", "npg", "trpo", "ppo_rnn", "ddpg", "sac"]
    return product(["ppo"], numbers, [], None, None) + product(others, [one], [], None, None)


def full() -> list[Case]:
    """Return every kind over 1 to 4096 agents, and over 1 to 8192 environments of one agent.

    The minibatches of ppo_rnn are whole environments, so it does not run with a single one.
    """
    kinds = ["ppo", "a2c", "reinforce", "npg", "trpo", "ddpg", "sac"]
    agents = product([*kinds, "ppo_rnn"], [4**i for i in range(7)], [], None, None)
    return agents + product(kinds, [1], [1, 8, 64, 512, 4096, 8192], None, None)


# They decide whether loops run as CUDA graphs and in which order, and whether kernels are tuned.
FLAGS = (
    "xla_gpu_enable_command_buffer=",
    "xla_gpu_command_buffer_scheduling_mode=SERIALIZE",
    "xla_gpu_autotune_level=4",
    "xla_gpu_enable_while_loop_unrolling=WHILE_LOOP_UNROLLING_DOUBLE_BUFFER",
)
CPU_FLAGS = (
    "xla_cpu_multi_thread_eigen=false",
    "xla_cpu_prefer_vector_width=512",
)


def accelerator(on_cpu: bool) -> list[Case]:
    """Return the cases worth knowing of an accelerator, the most important first.

    PPO on CartPole at the published sizes, MinAtar's Breakout, SAC, then XLA's flags.
    """
    first = [Case("ppo", number) for number in (2048, 1, 64, 8192)]
    second = [Case("ppo", 256, BREAKOUT), Case("sac", 64), Case("sac", 1)]
    between = [Case("ppo", 512), Case("ppo", 1, BREAKOUT), Case("sac", 1024)]
    flags = CPU_FLAGS if on_cpu else FLAGS
    flagged = with_flags([Case("ppo", 1), Case("ppo", 2048)], flags)
    return first + second + [case for case in flagged if case.flag] + between


def made_quick(cases: Iterable[Case], num_agents: int = 2, num_envs: int = 2) -> list[Case]:
    """Return small versions of the cases, each once, with at most so many agents and environments.

    Args:
        cases: to be made small.
        num_agents: the most that are trained together.
        num_envs: the most of each agent.
    """
    small = {}
    for case in cases:
        fields = dict(case.fields)
        capped = {k: min(v, num_envs) if k == contract.NUM_ENVS else v for k, v in fields.items()}
        agents = min(case.num_agents, num_agents)
        case = dataclasses.replace(case, num_agents=agents, fields=capped, quick=True)
        small[case.name] = case
    return list(small.values())


def check(cases: Iterable[Case]) -> None:
    """Raise an InputError if a case cannot be trained."""
    single = [dataclasses.replace(case, num_agents=1, flag="") for case in cases]
    for case in {case.name: case for case in single}.values():
        try:
            case.sweep(shapes=True)
        except InputError as error:
            raise type(error)(f"{case.label}: {error}") from error
