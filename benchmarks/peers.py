"""How fast is a sweep of this package beside its peers, at equal settings on the same machine?

A sample is a process of its own, pinned to its cores: it compiles, runs once to warm up, then times
whole trainings with fresh seeds. Samples alternate between the two sides, and so does the side that
begins a pair. A row is the median over pairs of the ratio of environment steps per second, with a
bootstrap interval. Every sample is saved at once, so the same command resumes when interrupted.
A step of a language model is a token of a completion, with its padding. Both sides count the tokens
that they generate and train on, and the parameters; a row whose sides differ in these is refused.

A row of speed is void if the two sides do not learn alike. `--gate` tests that with 64 seeds per
side: the 95% interval of the difference of means, of the final return and of the area under the
curve, has to lie within a margin. Both are of training episodes, defined alike on both sides.

Both sides compute on the device that jax finds, which JAX_PLATFORMS changes: on a GPU, if there is
one and the jax of both can use it. A row whose sides differ in that is refused.

No peer's code is here. `peer_drivers/` calls the public functions of each peer in an environment of
its own, installed by pip; PureJaxRL, which is not a package, is a checkout.

Run, on a Linux machine that does nothing else:

    python benchmarks/peers.py --make-envs            # once: .venv-peers/, about 3 GB
    git clone https://github.com/luchris429/purejaxrl .venv-peers/checkout
    python benchmarks/peers.py --list                 # the rows
    python benchmarks/peers.py                        # all of them, one after another
    python benchmarks/peers.py --work ppo-cartpole-64 --pairs 5 --cores 1
    python benchmarks/peers.py --peer trl --cores 1   # language models, one thread on both sides
    python benchmarks/peers.py --gate                 # the learning gate
    python benchmarks/peers.py --gate --limits-end    # ours makes PureJaxRL's mistake, too
    python benchmarks/peers.py --accelerator          # on a GPU: its rows, in ten minutes

A machine without a network gets a folder with wheels, WHEELS/purejaxrl/*.whl, and a checkout:

    python benchmarks/peers.py --make-envs --wheels WHEELS --envs ENVS
    python benchmarks/peers.py --accelerator --envs ENVS --checkout CHECKOUT

What the wheels lack, jax among it, is then this Python's own.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import shutil
import signal
import site
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats as distributions

import purejaxpg
from purejaxpg import FaultError, InputError, cli, stats
from purejaxpg.sweep import session

HERE = pathlib.Path(__file__).resolve().parent
JAX = ("jax==0.10.2", "jaxlib==0.10.2", "flax==0.12.8", "optax==0.2.8", "distrax==0.1.9")
TORCH = ("torch==2.13.0", "gymnasium==1.4.0", "stable-baselines3==2.9.2")
PINS = {  # what each peer's environment holds
    "purejaxrl": (*JAX, "gymnax==0.0.9"),
    "rejax": (*JAX, "gymnax==0.0.9", "rejax==0.1.3"),
    "sb3": TORCH,
    "sbx": (*JAX[:4], *TORCH, "sbx-rl==0.28.0"),
    "trl": (TORCH[0], "transformers==5.24.0", "accelerate==1.15.0", "trl==1.16.0"),
}
BUSY = 0.1  # cores that other work may keep busy before a measurement is refused or marked
PLATFORMS = "JAX_PLATFORMS"
TIMEOUT_S = 3600  # of a sample
ACCELERATOR_MINUTES = 9.5
STRETCHES = 20  # of a learning curve
GATE_SEEDS, GATE_SIDE_BY_SIDE = 64, 16

# ---------------------------------------------------------------------------------------- the rows

PPO = {
    "env": "CartPole-v1",
    "num_envs": 4,
    "num_steps": 128,
    "num_epochs": 4,
    "num_minibatches": 4,
    "hidden": [64, 64],
    "activation": "tanh",
    "learning_rate": 2.5e-4,
    "learning_rate_schedule": "linear",
    "normalize_advantage": True,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_eps": 0.2,
    "vf_clip_eps": 0.2,
    "vf_coef": 0.5,
    "ent_coef": 0.01,
    "max_grad_norm": 0.5,
    "total_timesteps": 65_536,
}
# PureJaxRL's own example on MinAtar.
MINATAR = {
    **PPO,
    "env": "Breakout-MinAtar",
    "num_envs": 64,
    "num_minibatches": 8,
    "activation": "relu",
    "learning_rate": 5e-3,
}


@dataclasses.dataclass(frozen=True)
class Work:
    """The work that both sides of a row do."""

    algorithm: str
    agents: int
    repetitions: int
    settings: Mapping[str, Any]
    peers: Mapping[str, Mapping[str, Any]]  # name of a row's peer -> how its job differs
    gate_steps: int | None = None  # of a run of the learning gate; None: not gated
    max_return: float | None = None  # None: unbounded, so the best of any seed is used
    margin: float = math.nan  # of the learning gate, as a share of max_return
    large: bool = False  # for accelerators
    model: Mapping[str, int] | None = None  # of a language model: the sizes of a GPT-2


SAC = {
    "env": "Pendulum-v1",
    "num_envs": 1,
    "num_steps": 1,
    "num_gradient_steps": 1,
    "batch_size": 256,
    "replay_capacity": 10_000,
    "learning_starts": 256,
    "hidden": [64, 64],
    "activation": "relu",
    "orthogonal_init": False,
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "gamma": 0.99,
    "tau": 0.005,
    "total_timesteps": 2_304,
}
LANGUAGE = {
    "task": "sentiment",
    "num_updates": 40,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "learning_rate_schedule": "linear",
    "max_grad_norm": 1.0,
    "beta": 0.1,
}
GRPO = {
    **LANGUAGE,
    "group_size": 8,
    "num_epochs": 1,
    "scale": "group",
    "normaliser": "sequence",
    "kl_placement": "loss",
    "kl_estimator": "k3",
    "kl_times_ratio": True,
    "temperature": 1.0,
    "clip_eps": 0.2,
    "clip_eps_high": 0.2,
}
DPO = {**LANGUAGE, "loss": "sigmoid"}


def gpt2(width: int) -> dict[str, int]:
    """Return the sizes of a GPT-2 of two layers for the sequences of the task."""
    heads = {"num_layers": 2, "num_heads": 2}
    return {"width": width, "mlp_width": 4 * width, "context": 20, **heads}


TRL: dict[str, Any] = {"trl": {}}
PUREJAXRL: dict[str, Any] = {"purejaxrl": {}}
# One agent after another, so that its rate does not depend on how many there are.
SB3 = {"sb3": {"agents": 1}, "sb3-2": {"agents": 2, "processes": 2}}
REJAX: dict[str, Any] = {"rejax": {}}
SBX = {"sbx": {"agents": 1}}
WORKS = {
    "ppo-cartpole-1": Work("ppo", 1, 1, PPO | {"total_timesteps": 500_000}, PUREJAXRL),
    "ppo-cartpole-64": Work(
        "ppo", 64, 2, PPO, PUREJAXRL | SB3, 500_000, max_return=500.0, margin=0.02
    ),
    "ppo-cartpole-256": Work("ppo", 256, 1, PPO, PUREJAXRL),
    "ppo-breakout-16": Work("ppo", 16, 2, MINATAR, PUREJAXRL, 1_000_000, margin=0.05),
    "ppo-cartpole-2048": Work(
        "ppo", 2048, 1, PPO | {"total_timesteps": 131_072}, PUREJAXRL, large=True
    ),
    "ppo-cartpole-64-long": Work(
        "ppo", 64, 1, PPO | {"total_timesteps": 500_000}, PUREJAXRL, large=True
    ),
    "ppo-breakout-256": Work(
        "ppo", 256, 1, MINATAR | {"total_timesteps": 327_680}, PUREJAXRL, large=True
    ),
    "sac-pendulum-1": Work("sac", 1, 3, SAC, REJAX | SBX),
    "sac-pendulum-1-1e5": Work("sac", 1, 2, SAC | {"replay_capacity": 100_000}, REJAX),
    "sac-pendulum-1-1e6": Work("sac", 1, 1, SAC | {"replay_capacity": 1_000_000}, REJAX),
    "sac-pendulum-1-wide": Work("sac", 1, 1, SAC | {"hidden": [256, 256]}, REJAX | SBX),
    "sac-pendulum-8": Work("sac", 8, 2, SAC, REJAX | SBX),
    "ddpg-pendulum-8": Work("ddpg", 8, 2, SAC | {"noise_std": 0.1}, REJAX),
    **{f"grpo-d{n}": Work("rlhf.grpo", 1, 2, GRPO, TRL, model=gpt2(n)) for n in (16, 32, 64)},
    "grpo-d16-small": Work("rlhf.grpo", 1, 2, GRPO | {"batch_size": 16}, TRL, model=gpt2(16)),
    **{f"dpo-d{n}": Work("rlhf.dpo", 1, 2, DPO, TRL, model=gpt2(n)) for n in (16, 32, 64)},
}
# The rows of a GPU. A CPU would need hours for the large ones, so it has to be asked for them.
ACCELERATOR = ("ppo-cartpole-2048", "ppo-cartpole-64-long", "ppo-cartpole-1", "ppo-breakout-256")
GATED = "purejaxrl"  # the peer with the same algorithm whose training returns are available

OURS = (
    "On a CPU ours runs one device a core. It brings the metrics to the host sixty times a run; "
    "its compile time holds initialisation and evaluation, which a peer's does not."
)
INEQUALITIES = {
    "purejaxrl": (
        "PureJaxRL is one process and one vmap, as it documents; XLA keeps most of that on one "
        "core (--cores 1 gives both sides one). It stores the info of every step, ours only sums. "
        "gymnax 0.0.9 against 1.0.1. On a CPU its QR decompositions are taken one after another; "
        "otherwise it sometimes hangs on two cores."
    ),
    "rejax": (
        "Rejax is one process and one vmap, as it documents, its evaluation taken out. It warms "
        "SAC up with its policy, ours at random. TD3 replaces DDPG, which it lacks: twice the "
        "critics, half the steps of the actor. gymnax 0.0.9 against 1.0.1."
    ),
    "sb3": (
        "Stable-Baselines3 trains agents one after another, so its rate for one agent holds for "
        "any number; torch has one thread, its environments are written in Python. sb3-2 is two "
        "processes, one per core. Its clipped value loss is the clipped error alone, not halved."
    ),
    "sbx": (
        "SBX trains one agent, whose rate holds for any number; the environment is written in "
        "Python. One model does all repetitions, because a new one would compile again."
    ),
    "trl": (
        "TRL makes its trainer before the clock starts; torch has one thread. Both train a GPT-2 "
        "with random parameters in 32 bits. TRL's generation would stop when all completions of a "
        "batch have ended, and pads prompts to the longest of a batch, ours always to 4 tokens; "
        "its optimiser is AdamW without decay, its reward a Python function. It collects metrics."
    ),
}
# --limits-end removes this one.
LIMITS_END = "It treats a time limit as the end of an episode; ours bootstraps."
TAKE_LIMITS_FOR_ENDS = ("purejaxrl", "rejax")


@dataclasses.dataclass(frozen=True)
class Row:
    """A work, and a peer to compare with."""

    work: str
    peer: str  # a driver's name, perhaps with a variant after a dash

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.work} / {self.peer}"

    @property
    def driver(self) -> str:
        """Name of the driver that runs it."""
        return self.peer.partition("-")[0]

    def jobs(self, checkout: pathlib.Path, steps: int | None = None) -> dict[str, dict[str, Any]]:
        """Return the jobs of both sides; `steps` replaces the number of steps of the work."""
        work = WORKS[self.work]
        if steps is not None:
            work = shortened(work, steps)
        ours = {
            "peer": "ours",
            "algorithm": work.algorithm,
            "agents": work.agents,
            "repetitions": work.repetitions,
            "settings": dict(work.settings),
        }
        if work.model is not None:
            ours |= {"model": work.model, "texts": texts(work)}
        theirs = {**ours, "peer": self.driver, "checkout": str(checkout), **work.peers[self.peer]}
        return {"ours": ours, "peer": theirs}

    def gate_jobs(
        self, checkout: pathlib.Path, seeds: int, steps: int | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return the jobs of both sides of the learning gate.

        Args:
            checkout: of PureJaxRL.
            seeds: of each side.
            steps: of a run; None: as the work has it.
        """
        steps = steps or WORKS[self.work].gate_steps or 0
        settings = WORKS[self.work].settings
        least = STRETCHES * settings["num_envs"] * settings["num_steps"]
        if steps < least:
            raise InputError(f"--steps must be {least} or more for {self.work}, but is {steps}.")
        together = min(seeds, GATE_SIDE_BY_SIDE)
        longer = {
            "agents": together,
            "repetitions": math.ceil(seeds / together) - 1,  # the first counts, too
        }
        return {side: {**job, **longer} for side, job in self.jobs(checkout, steps).items()}


def shortened(work: Work, steps: int) -> Work:
    """Return a work whose runs have so many steps."""
    length = {"total_timesteps": steps}
    if work.model is not None:
        length = {"num_updates": max(1, steps // texts(work)["tokens_per_update"])}
    return dataclasses.replace(work, settings={**work.settings, **length})


def texts(work: Work) -> dict[str, Any]:
    """Return what both sides of a language model's row read: prompts, and pairs for DPO.

    Completions of pairs are random words and an end, all as long as completions can be.
    """
    from purejaxpg.rlhf import tasks

    task, rng = tasks.make(work.settings["task"]), np.random.default_rng(0)
    length, batch = task.completion_length, work.settings["batch_size"]
    share = np.where(task.held_out, 0.0, task.prompt_probability)
    count = work.settings["num_updates"] * batch  # so that no side begins anew
    drawn = rng.choice(len(share), count, p=share / share.sum())
    prompts = [" ".join(task.words[i] for i in task.prompt_ids[x] if i) for x in drawn]
    found = {"words": task.words, "length": length, "tokens_per_update": batch * length}
    if work.algorithm == "rlhf.dpo":
        chosen, rejected = (
            [" ".join([*rng.choice(task.words[3:], length - 1), task.words[2]]) for _ in prompts]
            for _ in range(2)
        )
        both = zip(prompts, chosen, rejected, strict=True)
        pairs = [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in both]
        return found | {"tokens_per_update": 2 * batch * length, "pairs": pairs}
    table, unfinished = task.additive or (np.zeros(0), 0.0)
    reward = {"reward": table.tolist(), "unfinished": float(unfinished)}
    return found | reward | {"prompts": [{"prompt": prompt} for prompt in prompts]}


def rows(names: Sequence[str], gate: bool) -> list[Row]:
    """Return the rows of some works, or of all but the large; `gate`: only those with a gate."""
    for name in names:
        if name not in WORKS:
            raise InputError(f"--work must be one of {', '.join(WORKS)}, but is {name!r}.")
        if gate and WORKS[name].gate_steps is None:
            raise InputError(f"--gate has no settings for {name!r}.")
    wanted = names or [name for name, work in WORKS.items() if not work.large]
    return [
        Row(name, peer)
        for name in dict.fromkeys(wanted)
        for peer in WORKS[name].peers
        if not (gate and (WORKS[name].gate_steps is None or peer != GATED))
    ]


# ------------------------------------------------------------------------------------- environments


def python_of(driver: str, envs: pathlib.Path) -> pathlib.Path:
    """Return the Python that runs a driver."""
    return pathlib.Path(sys.executable) if driver == "ours" else envs / driver / "bin" / "python"


def missing(row: Row, envs: pathlib.Path, checkout: pathlib.Path) -> str | None:
    """Return what a row lacks on this machine, or None."""
    if not python_of(row.driver, envs).exists():
        return f"there is no environment {envs / row.driver} (--make-envs makes it)"
    if row.driver == "purejaxrl" and not (checkout / "purejaxrl" / "ppo.py").exists():
        return f"there is no checkout of PureJaxRL at {checkout}"
    return None


def make_envs(envs: pathlib.Path, wheels: pathlib.Path | None) -> None:
    """Make the environments that are missing; with `wheels`, those that it has folders for."""
    for driver in PINS:
        if python_of(driver, envs).exists():
            print(f"{envs / driver} is there already.")
        elif wheels is None:
            make_env(envs / driver, [*PINS[driver], *plugin(PINS[driver])])
        elif files := sorted(map(str, (wheels / driver).glob("*.whl"))):
            make_env_offline(envs / driver, files)
        else:
            print(f"{wheels / driver} holds no wheels.")


def plugin(pins: Sequence[str]) -> list[str]:
    """Return what makes the jax of an environment use a GPU if ours does."""
    version = next((pin for pin in pins if pin.startswith("jax==")), None)
    ours = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    kinds = [kind for kind in ("cuda12", "cuda13") if f"jax-{kind}-plugin" in ours]
    return [version.replace("jax", f"jax[{kind}]") for kind in kinds if version]


def make_env(folder: pathlib.Path, pins: Sequence[str]) -> None:
    """Make an environment of its own from the packages of an index."""
    print(f"Installing {' '.join(pins)} into {folder} ...", flush=True)
    venv.create(folder, with_pip=True)
    install([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *pins], folder)


def make_env_offline(folder: pathlib.Path, wheels: Sequence[str]) -> None:
    """Make an environment of wheels, and of this Python's own packages for the rest."""
    print(f"Installing {len(wheels)} wheels into {folder} ...", flush=True)
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    offline = ["--no-index", "--no-deps", "--target", str(packages), *wheels]
    install([sys.executable, "-m", "pip", "install", "-q", *offline], folder)
    own = [path for path in site.getsitepackages() if os.path.isdir(path)]
    (packages / "own.pth").write_text("\n".join(own) + "\n")  # looked through after `packages`


def install(command: Sequence[str], folder: pathlib.Path) -> None:
    """Run pip.

    Raises:
        FaultError: it failed; the environment is gone again.
    """
    if subprocess.run(command).returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise FaultError(f"pip could not install into {folder}; see above.")


# ------------------------------------------------------------------------------------------ samples


class Samples:
    """The file of results: saved after every sample, and read when a command resumes."""

    def __init__(self, path: pathlib.Path) -> None:
        """Read the samples that exist."""
        self.path = path
        self.rows: list[Mapping[str, Any]] = []  # what the samples come to
        try:
            self.found: list[dict[str, Any]] = json.loads(path.read_text())["samples"]
        except FileNotFoundError:
            self.found = []
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"--out {path} does not hold results of peers.py: {error}.") from error

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the sample with this key, if it was taken."""
        return next((s for s in self.found if all(s[k] == v for k, v in key.items())), None)

    def add(self, sample: dict[str, Any]) -> None:
        """Keep a sample."""
        self.found.append(sample)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"rows": self.rows, "samples": self.found}, indent=1))
        temporary.replace(self.path)


@contextlib.contextmanager
def watched(seen: dict[str, Any]) -> Iterator[None]:
    """Note how many cores other work kept busy during the block (Linux; else None)."""
    before, began = busy_s(), time.monotonic()
    yield
    after, took = busy_s(), time.monotonic() - began
    known = before is not None and after is not None
    seen["others_busy"] = max(0.0, after - before) / took if known else None
    seen["wall_s"] = took


def busy_s() -> float | None:
    """Return the seconds for which our cores were busy with other work."""
    try:
        lines = pathlib.Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    times = [list(map(int, line.split()[1:9])) for line in lines if line.split()[0] in names]
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = sum(sum(t) - t[3] - t[4] for t in times)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return ticks / os.sysconf("SC_CLK_TCK") - sum(u.ru_utime + u.ru_stime for u in used)


def refuse_busy(anyway: bool) -> None:
    """Refuse to measure beside other work, unless `anyway`.

    Raises:
        FaultError: other work keeps our cores busy.
    """
    seen: dict[str, Any] = {}
    with watched(seen):
        time.sleep(2)
    busy = seen["others_busy"]
    if busy is None:
        print("Warning: this system does not report other work.", file=sys.stderr)
    elif busy > BUSY and anyway:
        print(f"WARNING: other work keeps {busy:.1f} cores busy: no result.", file=sys.stderr)
    elif busy > BUSY:
        raise FaultError(
            f"Other work keeps {busy:.1f} cores busy (load {os.getloadavg()[0]:.1f}), so nothing "
            "can be timed; --anyway measures nevertheless, to try things."
        )


class TimeIsUp(Exception):
    """The minutes of the command are over."""


def take(
    job: Mapping[str, Any],
    python: pathlib.Path,
    cores: Sequence[int],
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Run one job in a process of its own and return its result.

    Args:
        job: as `peer_drivers/common.py` describes it.
        python: of the peer's environment.
        cores: that the process is pinned to.
        deadline: by `time.monotonic`, when it is killed.

    Raises:
        TimeIsUp: it had not ended at the deadline.
        FaultError: the driver failed or did not end.
    """
    driver = HERE / "peer_drivers" / f"drive_{job['peer']}.py"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
    kept |= {name: value for name, value in os.environ.items() if name == PLATFORMS}
    kept["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # each sample compiles
    own = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    paths = {"PYTHONPATH": os.pathsep.join(own)} if job["peer"] == "ours" else {}
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, watched(seen):
        source, target = pathlib.Path(folder, "job.json"), pathlib.Path(folder, "result.json")
        source.write_text(json.dumps(job))
        command = [str(python), str(driver), str(source), str(target)]
        finish(command, {**kept, **paths}, cores, deadline)
        result = json.loads(target.read_text())
    return {**result, **seen, "time": time.strftime("%Y-%m-%d %H:%M:%S")}


def finish(
    command: Sequence[str],
    env: Mapping[str, str],
    cores: Sequence[int],
    deadline: float = math.inf,
) -> None:
    """Run a command on `cores` to its end, and kill all processes that it left.

    Raises:
        TimeIsUp: it had not ended at the deadline, by `time.monotonic`.
        FaultError: it failed or did not end.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeIsUp
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # which the process inherits
    try:
        child = subprocess.Popen(
            command,
            env=env,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
    finally:
        os.sched_setaffinity(0, own)
    try:
        _, text = child.communicate(timeout=min(left, TIMEOUT_S))
    except subprocess.TimeoutExpired as error:
        if left < TIMEOUT_S:
            raise TimeIsUp from error
        raise FaultError(f"{command[1]} had not ended after {TIMEOUT_S} s.") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode:
        last = (text.strip().splitlines() or ["no message"])[-1]
        raise FaultError(f"{command[1]} failed: {last}")


def source_hash() -> str:
    """Return a hash of the package and the drivers: other code is a different measurement."""
    digest = hashlib.sha256()
    for folder in (pathlib.Path(purejaxpg.__file__).parent, HERE / "peer_drivers"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def circumstances(jobs: Mapping[str, Any], cores: Sequence[int]) -> str:
    """Return a hash of everything that has to be equal in all samples of a row."""
    settings = {
        side: {k: v for k, v in job.items() if k != "checkout"} for side, job in jobs.items()
    }
    content = [settings, list(cores), source_hash(), machine(), PINS, os.environ.get(PLATFORMS)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def machine() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def order(pair: int) -> tuple[str, str]:
    """Return the order of the sides in a pair: they take turns."""
    return ("ours", "peer") if pair % 2 == 0 else ("peer", "ours")


def steady(sample: Mapping[str, Any], clock: str = "seconds") -> float:
    """Return the steps per second of a sample's median repetition, by a clock of its result."""
    return sample["env_steps"] / statistics.median(sample[clock])


# --------------------------------------------------------------------------------------- statistics


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of ours / theirs over pairs, and its 95% bootstrap interval."""
    ratios = np.asarray(ours) / np.asarray(theirs)
    low, high = stats.bootstrap_ci(ratios, np.median, resamples=10_000)
    return float(np.median(ratios)), float(low), float(high)


def learning(episodes: Sequence[Any]) -> dict[str, list[float]]:
    """Reduce the training episodes of each seed to two numbers.

    Args:
        episodes: sums of returns, and counts, of the episodes that ended, both [seeds, updates].

    Returns:
        "final": mean return of the episodes that ended in the last tenth of the run; "area": the
        mean, over twenty equal stretches of the run, of their mean returns. Both [seeds], NaN if
        no episode ended.
    """
    sums, counts = (
        np.stack([part.sum(axis=1) for part in np.array_split(np.asarray(x), STRETCHES, axis=1)])
        for x in episodes
    )  # [stretches, seeds]
    last = STRETCHES // 10
    with np.errstate(invalid="ignore"):
        final = sums[-last:].sum(axis=0) / counts[-last:].sum(axis=0)
        curve = np.ma.masked_invalid(sums / counts)
    return {"final": final.tolist(), "area": curve.mean(axis=0).filled(np.nan).tolist()}


def overall(episodes: Sequence[Any]) -> float | None:
    """Return the mean return of all training episodes of all seeds, or None if there are none."""
    count = np.sum(episodes[1]) if episodes else 0
    return float(np.sum(episodes[0]) / count) if count else None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether two sides learn alike, by one number."""

    ours: float  # mean
    theirs: float
    low: float  # of the 95% interval of the difference of means
    high: float
    margin: float

    @property
    def passed(self) -> bool:
        """Whether the whole interval lies within the margin; false if it is not a number."""
        return self.low >= -self.margin and self.high <= self.margin


def verdict(ours: Sequence[float], theirs: Sequence[float], margin: float) -> Verdict:
    """Compare the means of two sides by Welch's interval, against a margin on both sides of 0."""
    welch = distributions.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return Verdict(
        float(np.mean(ours)), float(np.mean(theirs)), float(welch.low), float(welch.high), margin
    )


def gate(work: Work, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Verdict]:
    """Decide whether two sides learn alike, by each of the numbers of `learning`."""
    best = max(float(np.max(side["final"])) for side in (ours, theirs))
    margin = work.margin * (work.max_return or best)
    return {name: verdict(ours[name], theirs[name], margin) for name in ours}


# ---------------------------------------------------------------------------------------- measuring


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where and how the measurements are made."""

    samples: Samples
    envs: pathlib.Path
    checkout: pathlib.Path
    cores: tuple[int, ...]
    steps: int | None = None  # of a run, to try things
    limits_end: bool = False  # in the gate, ours treats a time limit as an end
    deadline: float = math.inf  # by `time.monotonic`; no sample ends later

    def sample(
        self, kind: str, row: Row, jobs: Mapping[str, Any], pair: int, side: str
    ) -> dict[str, Any]:
        """Return a sample from the file, or take it now.

        Args:
            kind: "speed" or "gate".
            row: of the sample.
            jobs: of both sides.
            pair: number of the pair, which decides the seeds.
            side: "ours" or "peer".
        """
        where = circumstances(jobs, self.cores)
        key = {"kind": kind, "row": row.name, "where": where, "pair": pair, "side": side}
        found = self.samples.get(key)
        if found is None:
            job = jobs[side] | {"first_seed": 0 if kind == "gate" else 10_000 * pair}
            python = python_of(job["peer"], self.envs)
            taken = take(job, python, self.cores, self.deadline)
            episodes = taken.pop("episodes")
            taken["mean_return"] = overall(episodes)
            taken["learning"] = learning(episodes) if kind == "gate" else None
            found = {**key, "machine": machine(), **taken}
            self.samples.add(found)
        return found


Taken = dict[str, list[dict[str, Any]]]  # side -> samples


def measure(setup: Setup, found: Sequence[Row], pairs: int, taken: Mapping[Row, Taken]) -> None:
    """Take the missing samples, a pair of each row after the other, into `taken`.

    Raises:
        TimeIsUp: at the deadline.
        FaultError: as for `take`, or the sides of a row were on different devices.
    """
    for pair in range(pairs):
        for row in found:
            jobs = row.jobs(setup.checkout, setup.steps)
            both = {}
            for side in order(pair):
                both[side] = sample = setup.sample("speed", row, jobs, pair, side)
                busy = sample["others_busy"]
                mark = f"; OTHER WORK KEPT {busy:.1f} CORES BUSY" if (busy or 0) > BUSY else ""
                print(
                    f"  {row.name}, pair {pair + 1} of {pairs}, {side}: {steady(sample):,.0f} "
                    f"steps/s (compiling {sample['compile_s']:.1f} s){mark}",
                    file=sys.stderr,
                    flush=True,
                )
            refuse_other_device(row, both["ours"]["device"], both["peer"]["device"])
            refuse_other_work(row, both["ours"]["work"], both["peer"]["work"])
            for side, sample in both.items():
                taken[row][side].append(sample)


def refuse_other_device(row: Row, ours: str, theirs: str) -> None:
    """Raise a FaultError if the sides of a row were not on the same kind of device."""
    if ours != theirs:
        raise FaultError(
            f"{row.name} cannot be compared: ours ran on {ours!r} and the peer on {theirs!r}; "
            f"{PLATFORMS}=cpu keeps both on the CPU."
        )


def refuse_other_work(row: Row, ours: Mapping[str, int], theirs: Mapping[str, int]) -> None:
    """Raise a FaultError if the sides of a language model's row did not do the same work."""
    if ours != theirs:
        raise FaultError(
            f"{row.name} cannot be compared: a repetition of ours did {ours}, and one of the "
            f"peer {theirs}."
        )


def summary(row: Row, taken: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Reduce the samples of a row."""
    rates = {side: [steady(sample) for sample in samples] for side, samples in taken.items()}
    ratio, low, high = paired(rates["ours"], rates["peer"])
    first = {side: samples[0] for side, samples in taken.items()}
    cpu_ratio = None
    if first["ours"]["work"]:  # language models, whose sides are one process each
        cpu = [[steady(each, "cpu_s") for each in taken[side]] for side in ("ours", "peer")]
        cpu_ratio = paired(*cpu)[0]
    return {
        "row": row.name,
        "pairs": len(rates["ours"]),
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "low": low,
        "high": high,
        "rates": {side: statistics.median(values) for side, values in rates.items()},
        "compile_s": {
            side: statistics.median(s["compile_s"] for s in samples)
            for side, samples in taken.items()
        },
        "peak_bytes": {side: max(s["peak_bytes"] for s in all_) for side, all_ in taken.items()},
        "mean_return": {side: sample["mean_return"] for side, sample in first.items()},
        "disturbed": sum((s["others_busy"] or 0) > BUSY for all_ in taken.values() for s in all_),
        "versions": {side: sample["versions"] for side, sample in first.items()},
        "cores": first["ours"]["cores"],
        "machine": first["ours"]["machine"],
        "device": first["ours"]["device"],
        "work": first["ours"]["work"],
    }


def measure_gate(setup: Setup, row: Row, seeds: int) -> dict[str, Any]:
    """Train both sides of a row on many seeds and decide whether they learn alike."""
    jobs = row.gate_jobs(setup.checkout, seeds, setup.steps)
    if setup.limits_end:
        jobs["ours"]["limits_end"] = True
    sides = {side: setup.sample("gate", row, jobs, 0, side) for side in ("ours", "peer")}
    found = gate(WORKS[row.work], sides["ours"]["learning"], sides["peer"]["learning"])
    return {
        "row": row.name + (", limits treated as ends" if setup.limits_end else ""),
        "seeds": len(sides["ours"]["learning"]["final"]),
        "passed": all(v.passed for v in found.values()),
        "numbers": {name: dataclasses.asdict(v) for name, v in found.items()},
    }


# ------------------------------------------------------------------------------------------ showing


def table(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table of speeds."""
    heads = ["work / peer", "ours, steps/s", "peer", "ours / peer", "95%", "by CPU time"]
    heads += ["pairs", "compiling, s"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in found:
        rates, compile_s = row["rates"], row["compile_s"]
        disturbed = f" ({row['disturbed']} samples disturbed)" if row["disturbed"] else ""
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]" if row["pairs"] > 1 else "-"
        by_cpu = "-" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.2f}"
        yield (
            f"| {row['row']} | {rates['ours']:,.0f} | {rates['peer']:,.0f} | {row['ratio']:.2f} "
            f"| {interval} | {by_cpu} | {row['pairs']}{disturbed} "
            f"| {compile_s['ours']:.1f}, {compile_s['peer']:.1f} |"
        )


def gate_table(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table of the learning gate."""
    yield "| work / peer | seeds | number | ours | peer | difference, 95% | margin | |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in found:
        for name, v in row["numbers"].items():
            passed = "passed" if Verdict(**v).passed else "NOT PASSED"
            yield (
                f"| {row['row']} | {row['seeds']} | {name} | {v['ours']:.2f} | {v['theirs']:.2f} "
                f"| [{v['low']:.2f}, {v['high']:.2f}] | {v['margin']:.2f} | {passed} |"
            )


def remaining(found: Sequence[Row], limits_end: bool = False) -> Iterator[str]:
    """Yield the remaining differences between the two sides."""
    yield f"Remaining differences. {OURS}"
    for driver in dict.fromkeys(row.driver for row in found):
        limits = "" if limits_end or driver not in TAKE_LIMITS_FOR_ENDS else f" {LIMITS_END}"
        yield f"- {INEQUALITIES[driver]}{limits}"


def make_parser() -> cli.Parser:
    """Return the parser of the options."""
    parser = cli.Parser(prog="peers.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add, path = parser.add_argument, pathlib.Path
    add("--work", nargs="+", default=[], metavar="NAME", help="these only (see --list)")
    add("--peer", nargs="+", default=[], metavar="NAME", help="rows of these peers only")
    add("--list", action="store_true", help="show the rows and what they lack on this machine")
    add("--pairs", type=int, default=5, metavar="N", help="of samples (5)")
    add("--cores", type=int, metavar="N", help="pin both sides to N cores (all)")
    add("--accelerator", action="store_true", help="the rows of a GPU, in ten minutes")
    add("--minutes", type=float, metavar="M", help="stop then (without end; --accelerator: 9.5)")
    add("--gate", action="store_true", help="compare learning, not speed")
    add("--seeds", type=int, default=GATE_SEEDS, metavar="N", help="a side, for --gate (64)")
    add("--limits-end", action="store_true", help="--gate: ours treats time limits as ends, too")
    add("--envs", type=path, default=path(".venv-peers"), metavar="DIR", help=".venv-peers")
    add("--checkout", type=path, metavar="DIR", help="of PureJaxRL (ENVS/checkout)")
    add("--make-envs", action="store_true", help="make the environments of the peers in --envs")
    add("--wheels", type=path, metavar="DIR", help="--make-envs from DIR/PEER/*.whl, offline")
    add("--steps", type=int, metavar="N", help="length of a run, to try things")
    add("--out", type=path, default=path("results/peers.json"), metavar="FILE", help="of samples")
    add("--json", action="store_true", help="print a summary as JSON, not a table")
    add("--anyway", action="store_true", help="measure even if the machine is busy")
    return parser


def chosen(options: Any, envs: pathlib.Path, checkout: pathlib.Path) -> list[Row]:
    """Return the requested rows that can be run, and print which cannot."""
    if options.accelerator and options.work:
        raise InputError("--accelerator and --work must not be given together: each names rows.")
    names = ACCELERATOR if options.accelerator else options.work
    wanted = [
        row
        for row in rows(names, options.gate)
        if not options.peer or row.peer in options.peer or row.driver in options.peer
    ]
    lacking = {row: missing(row, envs, checkout) for row in wanted}
    for row, reason in lacking.items():
        if reason or options.list:
            print(f"{row.name}: {reason or 'can be run'}", file=sys.stderr)
    found = [row for row in wanted if not lacking[row]]
    if not found and not options.list:
        raise InputError("There is no row left to run (see --list).")
    return found


def own_cores(wanted: int | None) -> tuple[int, ...]:
    """Return the cores to pin both sides to."""
    here = sorted(os.sched_getaffinity(0))
    if wanted is not None and not 1 <= wanted <= len(here):
        raise InputError(f"--cores must be from 1 to {len(here)}, but is {wanted}.")
    return tuple(here[:wanted])


def run(options: Any) -> None:
    """Measure, or list, or make environments, as the options ask."""
    for name in ("pairs", "seeds"):
        if getattr(options, name) < 2:
            raise InputError(f"--{name} must be 2 or more, but is {getattr(options, name)}.")
    if options.minutes is not None and options.minutes <= 0:
        raise InputError(f"--minutes must be more than 0, but is {options.minutes}.")
    envs = options.envs.absolute()
    checkout = (options.checkout or envs / "checkout").absolute()
    if options.make_envs:
        return make_envs(envs, options.wheels and options.wheels.absolute())
    found = chosen(options, envs, checkout)
    if options.list:
        return None
    if options.limits_end and not options.gate:
        raise InputError("--limits-end needs --gate.")
    cores, out = own_cores(options.cores), Samples(options.out)
    deadline = time.monotonic() + 60 * minutes(options)
    setup = Setup(out, envs, checkout, cores, options.steps, options.limits_end, deadline)
    if options.gate:  # learning does not depend on what else runs
        gated(options, setup, found)
    else:
        refuse_busy(options.anyway)
        compared(options, setup, found)
    return None


def minutes(options: Any) -> float:
    """Return the minutes that the command may take."""
    unasked = ACCELERATOR_MINUTES if options.accelerator else math.inf
    return unasked if options.minutes is None else options.minutes


def compared(options: Any, setup: Setup, found: Sequence[Row]) -> None:
    """Measure the speed of rows, and show what is complete, also after an interruption."""
    taken: dict[Row, Taken] = {row: {"ours": [], "peer": []} for row in found}
    try:
        measure(setup, found, options.pairs, taken)
    except TimeIsUp:
        print("Time is up: the same command takes the missing samples.", file=sys.stderr)
    finally:
        done = [row for row in found if taken[row]["ours"]]
        setup.samples.rows = [summary(row, taken[row]) for row in done]
        if done:
            setup.samples.write()
        show(options, setup.samples.rows, found)


def gated(options: Any, setup: Setup, found: Sequence[Row]) -> None:
    """Compare the learning of rows, and show what is complete, also after an interruption."""
    summaries: list[dict[str, Any]] = []
    try:
        for row in found:
            summaries.append(measure_gate(setup, row, options.seeds))
    except TimeIsUp:
        print("Time is up: the same command takes the missing samples.", file=sys.stderr)
    finally:
        show(options, summaries, found)


def show(options: Any, summaries: Sequence[Mapping[str, Any]], found: Sequence[Row]) -> None:
    """Print summaries."""
    if options.json:
        print(json.dumps(summaries, indent=1))
        return
    for line in (gate_table if options.gate else table)(summaries):
        print(line)
    for line in remaining(found, options.limits_end):
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and return the exit status: 0 done, 1 fault, 2 bad input, 130 interrupted."""
    try:
        run(make_parser().parse_args(argv))
    except InputError as error:
        return cli.complain(error, session.EXIT_INPUT)
    except FaultError as error:
        return cli.complain(error, session.EXIT_FAULT)
    except KeyboardInterrupt:
        done = "Interrupted; complete samples are kept, and the same command resumes."
        return cli.complain(done, session.EXIT_INTERRUPTED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
