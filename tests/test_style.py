"""Rules of shape that a linter does not know: length, nesting, imports, order, forbidden names.

A check is a function of (path, source) that returns complaints. Files are found by pattern, so a
new agent is under the rules from its first line. Every check also has to fail on a bad snippet and
to pass on a good one, so that none of them can be empty.
"""

import ast
import graphlib
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.fast

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ["purejaxpg/**/*.py"]
AGENTS = ["purejaxpg/agents/[!_]*.py"]
LANGUAGE_MODELS = ["purejaxpg/rlhf/[!_]*.py"]
EVERYTHING = [*PACKAGE, "tests/**/*.py", "experiments/**/*.py", "benchmarks/**/*.py"]

MAX_FUNCTION_LINES = 40
MAX_NESTING = 2
MAX_ON_POLICY_LINES = 260
MAX_OFF_POLICY_LINES = 310

Function = ast.FunctionDef | ast.AsyncFunctionDef

CORE = {"root", "backend", "kernels", "config"}
SHARED = {
    *("envs", "fused", "layout", "networks", "normalize", "optimizers", "prng", "replay"),
    "schedules",
}
BESIDE = {
    *("checkpoint", "contract", "disk", "evaluate", "extras", "host", "signals", "stats", "trees"),
}
INNER = {
    *(*CORE, *SHARED, *BESIDE),
    *("hidden", "modules", "streams", "text", "tracebacks", "trainers"),
}
OUTER = {*INNER, "sweep", "cluster", "report"}
# Group of a module -> groups that it may import. Every module of the package has its group here.
MAY_IMPORT: dict[str, set[str]] = {
    "root": set(),
    "backend": set(),
    "kernels": {"backend", "kernels"},
    "config": {"root"},
    **dict.fromkeys(SHARED, CORE),
    "modules": {"root", "config", "tracebacks"},
    "checkpoint": {"root", "config", "disk", "text"},
    "disk": {"root"},
    "envs": {*CORE, "envs", "extras", "modules"},
    "evaluate": {*CORE, *SHARED, "contract"},
    "fused": {*CORE, "fused"},
    "networks": {*CORE, "fused"},
    "streams": {"root"},
    "extras": {"root"},
    "host": {"root", "layout"},
    "agents": {*CORE, *SHARED},
    "rlhf": {*CORE, *SHARED, "disk", "extras", "host", "tracebacks"},
    "stats": {"root"},
    "text": set(),
    "trees": {"root"},
    "contract": {*CORE, *SHARED, "text", "tracebacks", "trees"},
    "hidden": {"contract", "envs", "trainers"},
    "signals": set(),
    "tracebacks": set(),
    "trainers": {*CORE, "contract", "modules", "tracebacks"},
    "sweep": {*INNER, "sweep"},
    "cluster": {*INNER, "sweep", "cluster"},
    "report": {*INNER, "sweep", "report"},
    "bench": {*OUTER, "bench"},
    # It takes the trainers of language models apart, so it imports them.
    "lab": {*INNER, "rlhf", "report", "lab"},
    "cli": {*OUTER, "bench", "lab"},
}
# The modules inside a package that put packages together.
COMPOSES = {"purejaxpg.sweep.session": OUTER, "purejaxpg.sweep.sources": OUTER}
# They only hold modules, so to list them is not to depend on one.
FOLDERS = {"purejaxpg.agents", "purejaxpg.rlhf"}

# What stands at the top level of an agent, in this order. Helpers may stand anywhere between.
SECTIONS = [
    "Config",
    "check",
    "Transition",
    "TrainState",
    "a network",
    "make_optimizer",
    "init",
    "rollout or interact",
    "a loss",
    "update",
    "train",
    "policy",
    "__main__",
]

# The same for a trainer of language models. What measures a trained model may stand in any order.
RLHF_SECTIONS = [
    "Config",
    "Given",
    "Batch",
    "TrainState",
    "check",
    "check_given",
    "read",
    "make_optimizer",
    "init",
    "rollout or draw",
    "objective",
    "loss",
    "update",
    "train",
    "score, samples, frontier or model",
    "__main__",
]
OPTIONAL_SECTIONS = {"Batch", "check_given", "read", "rollout or draw", "objective"}


# --- reading source -----------------------------------------------------------------------------


def docstring_lines(node: ast.AST) -> int:
    """Lines that the docstring of `node` occupies."""
    body = getattr(node, "body", [])
    if ast.get_docstring(node, clean=False) is None:
        return 0
    return body[0].end_lineno - body[0].lineno + 1


def functions(tree: ast.AST, depth: int = 1) -> Iterator[tuple[Function, int]]:
    """Each function with its depth: 1 at the top level or in a class, 2 in another function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node, depth
            yield from functions(node, depth + 1)
        else:
            yield from functions(node, depth)


def is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def group(module: str) -> str:
    """Group of `purejaxpg.kernels.returns` is `kernels`, of `purejaxpg` itself `root`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "root"


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_module(name: str) -> bool:
    if name.removeprefix("purejaxpg.") in MAY_IMPORT:
        return True
    location = ROOT / name.replace(".", "/")
    return location.is_dir() or location.with_suffix(".py").is_file()


def is_trainer(module: str) -> bool:
    """Tell whether a module of rlhf is a trainer, and not one that the trainers share."""
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    return path.is_file() and re.search(r"^def train\(", path.read_text(), re.M) is not None


def imports(tree: ast.AST, skip_main: bool = False) -> Iterator[tuple[int, str, str]]:
    """Line, module and imported name ('' for a module) of everything taken from this package."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "purejaxpg":
                    yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            for alias in node.names:
                full = f"{source}.{alias.name}"
                if source.split(".")[0] == "purejaxpg":
                    yield (
                        (node.lineno, full, "")
                        if is_module(full)
                        else (
                            node.lineno,
                            source,
                            alias.name,
                        )
                    )
        elif not (skip_main and is_main_guard(node)):
            yield from imports(node, skip_main)


def comments(source: str) -> list[tuple[int, str, bool]]:
    """Line, text and whether it has the line to itself, of each comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [
        (token.start[0], token.string, token.line.lstrip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    ]


# --- the checks ---------------------------------------------------------------------------------


def nesting(path: str, source: str) -> list[str]:
    return [
        f"{path}:{node.lineno}: {node.name} is a function {depth} deep, {MAX_NESTING} at most"
        for node, depth in functions(ast.parse(source))
        if depth > MAX_NESTING
    ]


def function_length(path: str, source: str) -> list[str]:
    """Signature and body count; decorators and the docstring do not."""
    complaints = []
    for node, _ in functions(ast.parse(source)):
        lines = node.end_lineno - node.lineno + 1 - docstring_lines(node)
        if lines > MAX_FUNCTION_LINES:
            complaints.append(
                f"{path}:{node.lineno}: {node.name} has {lines} lines, {MAX_FUNCTION_LINES} at most"
            )
    return complaints


def agent_length(path: str, source: str) -> list[str]:
    """Blank lines and the module docstring do not count: listing departures must cost nothing."""
    tree = ast.parse(source)
    names = {node.name for node in tree.body if isinstance(node, Function)}
    limit = MAX_OFF_POLICY_LINES if "interact" in names else MAX_ON_POLICY_LINES
    body = source.splitlines()[docstring_lines(tree) :]
    lines = sum(1 for line in body if line.strip())
    return [f"{path}: {lines} lines, {limit} at most"] if lines > limit else []


def import_direction(path: str, source: str) -> list[str]:
    here = module_of(path)
    if group(here) not in MAY_IMPORT:
        return [f"{path}: a new part of the package needs its place in MAY_IMPORT"]
    tree = ast.parse(source)
    complaints = [
        f"{path}:{node.lineno}: a relative import; write it in full"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    for line, module, name in imports(tree, skip_main=group(here) in ("agents", "rlhf")):
        target = "root" if module in FOLDERS and not name else group(module)
        shared_in_rlhf = group(here) == group(module) == "rlhf" and not is_trainer(module)
        allowed = COMPOSES.get(here, MAY_IMPORT[group(here)])
        if target not in allowed and not shared_in_rlhf:
            complaints.append(f"{path}:{line}: {here} must not import {module}")
    return complaints


def cycles(sources: dict[str, str]) -> list[str]:
    """Modules that import each other, directly or not; also inside functions and for types only."""
    graph = {
        module_of(path): {module for _, module, _ in imports(ast.parse(source), skip_main=True)}
        for path, source in sources.items()
    }
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def modules_not_names(path: str, source: str) -> list[str]:
    return [
        f"{path}:{line}: import the module {module}, not the name {name}"
        for line, module, name in imports(ast.parse(source))
        if name
    ]


def section_of(node: ast.stmt) -> str | None:
    """Which of SECTIONS a statement at the top level of an agent is, if any."""
    if is_main_guard(node):
        return "__main__"
    name = getattr(node, "name", "")
    if isinstance(node, ast.ClassDef) and any("Module" in ast.unparse(b) for b in node.bases):
        return "a network"
    if name.startswith("make_optimizer"):
        return "make_optimizer"
    if name in ("rollout", "interact"):
        return "rollout or interact"
    if name in ("loss", "surrogate") or name.endswith("_loss"):
        return "a loss"
    return name if name in SECTIONS else None


def section_order(path: str, source: str) -> list[str]:
    found = [(node, section_of(node)) for node in ast.parse(source).body]
    return out_of_order(path, found, SECTIONS, set())


def rlhf_section_of(node: ast.stmt) -> str | None:
    """Which of RLHF_SECTIONS a statement at the top level of a trainer is, if any."""
    name = "__main__" if is_main_guard(node) else getattr(node, "name", "")
    for section in RLHF_SECTIONS:
        if name in re.split(", | or ", section):
            return section
    return None


def rlhf_section_order(path: str, source: str) -> list[str]:
    """A module with a Config is a trainer; the others are what trainers share."""
    found = [(node, rlhf_section_of(node)) for node in ast.parse(source).body]
    if "Config" not in [section for _, section in found]:
        return []
    return out_of_order(path, found, RLHF_SECTIONS, OPTIONAL_SECTIONS)


def out_of_order(
    path: str,
    found: list[tuple[ast.stmt, str | None]],
    sections: list[str],
    optional: set[str],
) -> list[str]:
    """Complaints about sections that are missing, or that stand after a later one."""
    present = {section for _, section in found}
    complaints = [
        f"{path}: {name} is missing" for name in sections if name not in {*present, *optional}
    ]
    seen: set[int] = set()
    for node, section in found:
        if section is None:
            continue
        here = sections.index(section)
        later = sorted(place for place in seen if place > here)
        if later:
            what = getattr(node, "name", section)
            complaints.append(f"{path}:{node.lineno}: {what} belongs before {sections[later[0]]}")
        seen.add(here)
    return complaints


UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load"}


def unsafe_loading(path: str, source: str) -> list[str]:
    """A file that somebody sends must not be able to run code."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).removeprefix("builtins.")
            if name in UNSAFE_CALLS:
                complaints.append(f"{path}:{node.lineno}: a call of {name}")
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    complaints.append(f"{path}:{node.lineno}: allow_pickle must be False")
        complaints += [
            f"{path}:{node.lineno}: an import of {module}"
            for module in modules
            if module.split(".")[0] in UNSAFE_MODULES
        ]
    return complaints


RBG = ("rbg", "unsafe_rbg")


def forbidden_jax(path: str, source: str) -> list[str]:
    """Choosing rbg is forbidden; recognising it in a list of known names is not."""
    complaints = []
    tree = ast.parse(source)
    listed = {
        child for node in ast.walk(tree) if isinstance(node, ast.Tuple) for child in node.elts
    }
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.alias) and node.name in ("PRNGKey", "empty", "empty_like"):
            text = f"jnp.{node.name}"
        if text.split(".")[-1] == "PRNGKey" or text == "jnp.PRNGKey":
            complaints.append(f"{path}:{line}: an untyped key; use jax.random.key")
        if re.fullmatch(r"(jnp|jax\.numpy)\.empty(_like)?", text):
            complaints.append(f"{path}:{line}: {text} is uninitialised memory from jax 0.11")
        if isinstance(node, ast.Constant) and node not in listed and node.value in RBG:
            complaints.append(f"{path}:{line}: rbg keys make a run depend on its neighbours")
    return complaints


def forbidden_names(path: str, source: str) -> list[str]:
    """A random key is `key` everywhere, so that a reader need not ask which kind it is."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "id", None) or getattr(node, "arg", None)
        if name in ("rng", "_rng") and not isinstance(node, ast.keyword):
            complaints.append(
                f"{path}:{node.lineno}: {name}; a jax key is key, anything else says what"
            )
    return complaints


# Of a trainer's metrics and fields; `contract.py` has names for them.
OF_A_TRAINER = re.compile(r"(episode|evaluation)/\w*")
FIELDS_OF_A_TRAINER = {"env", "env_params", "env_kwargs", "num_envs", "learning_starts"}


def trainer_unseen(path: str, source: str) -> list[str]:
    """Only `contract.py` looks inside a trainer."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and OF_A_TRAINER.fullmatch(text):
            complaints.append(f"{path}:{node.lineno}: {text!r}; ask contract.py for the name")
        of_config = isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("config")
        if of_config and node.attr in FIELDS_OF_A_TRAINER:
            complaints.append(f"{path}:{node.lineno}: config.{node.attr}; ask contract.py")
    return complaints


CODE = (
    ast.Assign,
    ast.AugAssign,
    ast.Return,
    ast.Import,
    ast.ImportFrom,
    ast.Delete,
    ast.Raise,
    ast.FunctionDef,
    ast.ClassDef,
    ast.If,
    ast.For,
    ast.While,
    ast.With,
)


def is_arithmetic(node: ast.stmt) -> bool:
    """`G_2 = 3 + 4/2` is a case worked by hand, which is what comments in tests are for."""
    numbers = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    return isinstance(node, ast.Assign) and all(
        isinstance(n, numbers) for n in ast.walk(node.value)
    )


def is_code(text: str) -> bool:
    """Tell whether a comment's text is a statement. Prose and shapes like [T, N] are not."""
    text = text.strip()
    for candidate in (text, f"{text} pass"):
        try:
            body = ast.parse(candidate).body
        except (SyntaxError, ValueError):
            continue
        for node in body:
            has_value = isinstance(node, ast.AnnAssign) and node.value is not None
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            if (isinstance(node, CODE) and not is_arithmetic(node)) or has_value or is_call:
                return True
    return False


def commented_out_code(path: str, source: str) -> list[str]:
    """Single lines, and blocks of lines: the first line of a call alone is not a statement."""
    complaints = []
    block: list[tuple[int, str]] = []
    own_line = [
        (line, text[1:].removeprefix(" ")) for line, text, alone in comments(source) if alone
    ]
    for line, text in [*own_line, (-1, "")]:
        if block and line != block[-1][0] + 1:
            lines = "\n".join(each for _, each in block)
            if any(is_code(each) for _, each in block) or is_code(lines):
                complaints.append(f"{path}:{block[0][0]}: commented-out code")
            block = []
        block.append((line, text))
    return complaints


def unreasoned_todo(path: str, source: str) -> list[str]:
    """`TODO: ` and a sentence that says what and why; the other words for it are not used."""
    marks = re.compile(
        r"\b(TODO|FIX" + r"ME|XX" + r"X|HACK)\b(?!: \w+ \w+ \w+ \w+)|\b(FIX" + r"ME|HACK)\b"
    )
    return [
        f"{path}:{line}: a mark without a reason: {text}"
        for line, text, _ in comments(source)
        if marks.search(text)
    ]


CHECKS = {
    nesting: PACKAGE,
    function_length: PACKAGE,
    agent_length: AGENTS,
    import_direction: PACKAGE,
    modules_not_names: AGENTS,
    section_order: AGENTS,
    rlhf_section_order: LANGUAGE_MODELS,
    unsafe_loading: PACKAGE,
    forbidden_jax: PACKAGE,
    forbidden_names: PACKAGE,
    trainer_unseen: [f"purejaxpg/{part}/*.py" for part in ("sweep", "cluster", "report")],
    commented_out_code: EVERYTHING,
    unreasoned_todo: EVERYTHING,
}


def by_name(check: object) -> str:
    return check.__name__


@pytest.mark.parametrize("check", CHECKS, ids=by_name)
def test_sources(check):
    paths = sorted({path for pattern in CHECKS[check] for path in ROOT.glob(pattern)})
    assert paths, f"no file matches {CHECKS[check]}"
    complaints = []
    for path in paths:
        complaints += check(path.relative_to(ROOT).as_posix(), path.read_text())
    assert not complaints, "\n" + "\n".join(complaints)


def test_no_module_imports_itself_through_others():
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob(PACKAGE[0])
    }
    assert len(sources) > 50
    assert cycles(sources) == []


def test_a_cycle_is_seen():
    plan = "def f():\n from purejaxpg.sweep import space"
    space = "if TYPE_CHECKING:\n    from purejaxpg.sweep import plan as plans"
    both = {"purejaxpg/sweep/plan.py": plan, "purejaxpg/sweep/space.py": space}
    (cycle,) = cycles(both)
    assert "purejaxpg.sweep.plan -> purejaxpg.sweep.space" in cycle
    assert cycles({**both, "purejaxpg/sweep/space.py": "import jax"}) == []


# --- the checks fail where they should ----------------------------------------------------------

AGENT = """
class Config: pass
def check(config): pass
class Transition: pass
class TrainState: pass
class Actor(nn.Module): pass
def make_optimizer(config): pass
def init(key, config): pass
def rollout(key, state, config): pass
def loss(params, batch, config): pass
def update(key, state, config): pass
def train(key, config): pass
def policy(key, state, obs, config): pass
if __name__ == "__main__": from purejaxpg import cli
"""
OFF_POLICY = AGENT.replace("rollout", "interact").replace(
    "def loss(", "def actor_loss(): pass\ndef critic_loss("
)
AGENT_PATH = "purejaxpg/agents/some.py"


TRAINER = """
class Config: pass
class Given: pass
class Batch: pass
class TrainState: pass
def check(config): pass
def check_given(config, given): pass
def policy_of(params, given): pass
def make_optimizer(config): pass
def init(key, config, given): pass
def rollout(key, state, config, given): pass
def advantages(batch, config): pass
def objective(log_prob, batch): pass
def loss(params, batch, config, given): pass
def update(key, state, config, given): pass
def train(key, config, given): pass
def score(key, state, config, num_episodes, given): pass
def model(state, config, given): pass
if __name__ == "__main__": from purejaxpg import cli
"""
TRAINER_PATH = "purejaxpg/rlhf/some.py"


def without(section: str, source: str = AGENT) -> str:
    return "\n".join(line for line in source.splitlines() if section not in line)


def moved_to_the_end(section: str) -> str:
    (line,) = (line for line in TRAINER.splitlines() if section in line)
    return f"{without(section, TRAINER)}\n{line}"


BAD = [
    (nesting, AGENT_PATH, "def a():\n def b():\n  def c(): pass"),
    (nesting, AGENT_PATH, "class A:\n def a(self):\n  def b():\n   if b:\n    def c(): pass"),
    (function_length, AGENT_PATH, "def a():\n" + " x = 1\n" * 40),
    (function_length, AGENT_PATH, "def a():\n def b():\n" + "  x = 1\n" * 40),
    (function_length, AGENT_PATH, 'async def a():\n "doc"\n' + " x = 1\n" * 40),
    (agent_length, AGENT_PATH, '"doc"\n' + "x = 1\n" * 261),
    (agent_length, AGENT_PATH, "def interact(): pass\n" + "x = 1\n" * 310),
    (import_direction, "purejaxpg/kernels/returns.py", "from purejaxpg import config"),
    (import_direction, "purejaxpg/kernels/returns.py", "import purejaxpg"),
    (import_direction, "purejaxpg/envs.py", "from purejaxpg import networks"),
    (import_direction, "purejaxpg/envs.py", "def f():\n import purejaxpg.cli as c"),
    (import_direction, AGENT_PATH, "from purejaxpg.agents import ppo"),
    (import_direction, AGENT_PATH, "import purejaxpg.agents.ppo as ppo"),
    (import_direction, AGENT_PATH, "from purejaxpg import cli"),
    (import_direction, AGENT_PATH, "def f():\n from purejaxpg.sweep import engine"),
    (import_direction, AGENT_PATH, "from . import ppo"),
    (import_direction, "purejaxpg/rlhf/ppo.py", "from purejaxpg.agents import ppo"),
    (import_direction, "purejaxpg/sweep/engine.py", "from purejaxpg.agents import ppo"),
    (import_direction, "purejaxpg/sweep/engine.py", "from purejaxpg import cli"),
    (import_direction, "purejaxpg/evaluate.py", "import purejaxpg.agents.ppo"),
    (import_direction, "purejaxpg/sweep/engine.py", "from purejaxpg.agents import *"),
    (import_direction, "purejaxpg/kernels/returns.py", "import purejaxpg.agents"),
    (import_direction, "purejaxpg/cli.py", "def f():\n from purejaxpg.agents import ppo"),
    (
        import_direction,
        "purejaxpg/cli.py",
        "if __name__ == '__main__':\n import purejaxpg.agents.ppo",
    ),
    (import_direction, "purejaxpg/unheard_of.py", ""),
    (modules_not_names, AGENT_PATH, "from purejaxpg.kernels.returns import gae"),
    (modules_not_names, AGENT_PATH, "from purejaxpg import InputError"),
    (modules_not_names, AGENT_PATH, "from purejaxpg.kernels import *"),
    *((section_order, AGENT_PATH, without(name)) for name in ("check(", "TrainState", "__name__")),
    (section_order, AGENT_PATH, without("Actor")),
    (section_order, AGENT_PATH, without("rollout")),
    (section_order, AGENT_PATH, without("loss(") + "\ndef loss_of_time(): pass"),
    (section_order, AGENT_PATH, without("Config") + "\nclass Config: pass"),
    (section_order, AGENT_PATH, OFF_POLICY + "\ndef temperature_loss(): pass"),
    *(
        (rlhf_section_order, TRAINER_PATH, without(name, TRAINER))
        for name in ("Given", "TrainState", "check(", "init(", "loss(", "train(", "__name__")
    ),
    *(
        (rlhf_section_order, TRAINER_PATH, moved_to_the_end(name))
        for name in ("Config", "Batch", "check_given(", "rollout(", "objective(", "model(")
    ),
    (unsafe_loading, "", "import pickle"),
    (unsafe_loading, "", "from cloudpickle import loads"),
    (unsafe_loading, "", "def f():\n import joblib.numpy_pickle"),
    (unsafe_loading, "", "eval('1')"),
    (unsafe_loading, "", "import builtins\nbuiltins.exec('1')"),
    (unsafe_loading, "", "yaml.load(stream)"),
    (unsafe_loading, "", "np.load(path, allow_pickle=True)"),
    (unsafe_loading, "", "np.load(path, allow_pickle=trusted)"),
    (forbidden_jax, "", "jax.random.PRNGKey(0)"),
    (forbidden_jax, "", "from jax.random import PRNGKey"),
    (forbidden_jax, "", "jax.random.key(0, impl='rbg')"),
    (forbidden_jax, "", "jnp.empty((3,))"),
    (forbidden_jax, "", "x = jax.numpy.empty_like"),
    (forbidden_jax, "", "from jax.numpy import empty"),
    (forbidden_names, "", "rng, key = split(key)"),
    (forbidden_names, "", "def f(_rng): pass"),
    (forbidden_names, "", "lambda rng: 0"),
    (trainer_unseen, "", "metrics['episode/count']"),
    (trainer_unseen, "", "EVALUATION = 'evaluation/'"),
    (trainer_unseen, "", "leg.run.config.env"),
    (trainer_unseen, "", "getattr(x, 'y') or config.learning_starts"),
    (commented_out_code, "", "# x = gae(reward)\n"),
    (commented_out_code, "", "x = 1\n# print(x)\ny = 2\n"),
    (commented_out_code, "", "# The old way:\n#     return x + 1\n"),
    (commented_out_code, "", "# if done:\n#     x = 2\n"),
    (commented_out_code, "", "# gae(\n#     reward,\n# )\n"),
    (commented_out_code, "", "# for t in steps:\n"),
    (commented_out_code, "", "# x: int = 3"),
    (unreasoned_todo, "", "# TODO"),
    (unreasoned_todo, "", "x = 1  # TODO: later"),
    (unreasoned_todo, "", "# FIX" + "ME: this sentence has a reason in it"),
]
LONG_DOCSTRING = '"""x' + "\n" * 90 + '"""'
MODULE_IMPORTS = """
from purejaxpg import config as configs
from purejaxpg.kernels import returns
from jax import lax
"""
SAFE_LOADING = """
import json, yaml
yaml.safe_load(stream)
np.load(path, allow_pickle=False)
model.eval()
"""
GOOD_JAX = """
jax.random.key(0)
np.empty(3)
jnp.zeros(3)
for name in ("threefry2x32", "rbg"): pass
"""
PROSE = """
# [T, N]
# Adam eps of the paper
# note: see the paper
# gamma (per step)
# G_2 = 3 + 4/2
x = 1  # x = 1
# fmt: off
# noqa: E501
# type: ignore
"""
GOOD = [
    (nesting, AGENT_PATH, "class A:\n def a(self):\n  def b(): return lambda: 0"),
    (function_length, AGENT_PATH, f"@a\ndef a():\n {LONG_DOCSTRING}\n" + " x = 1\n" * 39),
    (agent_length, AGENT_PATH, f"{LONG_DOCSTRING}\n" + "x = 1\n\n" * 260),
    (agent_length, AGENT_PATH, "def interact(): pass\n" + "x = 1\n" * 309),
    (import_direction, AGENT_PATH, AGENT + MODULE_IMPORTS),
    (import_direction, "purejaxpg/kernels/returns.py", "import jax"),
    (import_direction, "purejaxpg/cli.py", "from purejaxpg import InputError, envs"),
    (import_direction, "purejaxpg/sweep/spec.py", "import purejaxpg.agents"),
    (import_direction, "purejaxpg/rlhf/ppo.py", "from purejaxpg.rlhf import transformer"),
    (modules_not_names, AGENT_PATH, MODULE_IMPORTS),
    (section_order, AGENT_PATH, AGENT),
    (section_order, AGENT_PATH, OFF_POLICY),
    (section_order, AGENT_PATH, AGENT.replace("def loss", "def helper(): pass\ndef surrogate")),
    (rlhf_section_order, TRAINER_PATH, TRAINER),
    (rlhf_section_order, TRAINER_PATH, TRAINER.replace("rollout", "draw")),
    (rlhf_section_order, TRAINER_PATH, without("Batch", without("check_given", TRAINER))),
    (rlhf_section_order, "purejaxpg/rlhf/tokens.py", "def init(): pass\ndef check(): pass"),
    (unsafe_loading, "", SAFE_LOADING),
    (forbidden_jax, "", GOOD_JAX),
    (forbidden_names, "", "key_env = 0\nf(rng=key)\nrngs = 1"),
    (trainer_unseen, "", "'the metrics episode/count and so on'; config.num_updates; self.env"),
    (commented_out_code, "", PROSE),
    (unreasoned_todo, "", "# TODO: share this at the third identical copy\n"),
]


@pytest.mark.parametrize(("check", "path", "source"), BAD)
def test_bad_snippet_is_seen(check, path, source):
    assert check(path, source)


@pytest.mark.parametrize(("check", "path", "source"), GOOD)
def test_good_snippet_passes(check, path, source):
    assert check(path, source) == []


def test_what_is_out_of_order_is_named():
    source = moved_to_the_end("def update")
    (complaint,) = rlhf_section_order(TRAINER_PATH, source)
    line = len(source.splitlines())
    assert complaint == f"{TRAINER_PATH}:{line}: update belongs before train"


def test_every_check_is_itself_tested():
    assert {check for check, _, _ in BAD} == {check for check, _, _ in GOOD} == set(CHECKS)
