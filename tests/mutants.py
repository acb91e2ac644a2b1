"""Mutation audit: change one place of a module at a time, and see whether its tests notice.

    python tests/mutants.py purejaxpg/agents/ppo.py --tests tests/agents/test_ppo.py

Run it in the folder where the module's import path starts. A mutant differs from the module in
one expression: an operator, a constant, an index, the order of two arguments, a dropped term or
keyword, a name exchanged for its sibling (terminated and done, actor and critic, target_x and x),
a statement x = f(x) undone. The default is one mutant per line, of alternating kinds; --all tests
every mutant, including those of functions named `check`, whose conditions have their own tests.
Docstrings, annotations, error messages, imports, decorators and the defaults of classes are not
changed.

The audit prints every survivor, and at the end the share of killed mutants. A mutant that raises
something other than a failed assertion is killed too, but proves less. These are counted
separately, and so are those that ran out of time.

Nothing is written into the source tree. The tests run in forks of one process that has imported
third-party modules but none of ours, and an import hook gives the fork its mutant. A test that
starts its own interpreter does not see the mutant. Tests that have killed mutants, and quick tests,
run first. Programs are compiled with few optimisations, unless --optimize is given, and the
programs of a mutant are not cached.
"""

import argparse
import ast
import collections
import contextlib
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
FUNCTIONS = (
    "min max", "minimum maximum", "sum mean", "argmin argmax", "any all", "zeros ones", "exp log",
    "zeros_like ones_like", "std var", "cumsum cumprod", "floor ceil", "sin cos", "nanmin nanmax",
)  # fmt: skip
SIBLINGS = (
    "terminated done", "terminated truncated", "done truncated", "actor critic", "low high",
    "lower upper", "before after", "old new", "first second", "start stop", "mean std",
)  # fmt: skip
TABLE = {frozenset(pair.split()) for pair in (*FUNCTIONS, *SIBLINGS)}
ALWAYS = {frozenset(pair.split()) for pair in FUNCTIONS}  # if one exists, so does the other
TAKES_FUNCTION = {"scan", "vmap", "grad", "map", "partial", "cond", "while_loop", "fori_loop"}
SYMMETRIC = {"min", "max", "minimum", "maximum", "logaddexp"}
UNDONE = {
    "stop_gradient", "clip", "minimum", "maximum", "abs", "sqrt", "square", "exp", "log", "log1p",
    "max", "min", "sort", "cumsum", "tanh", "floor",
}  # fmt: skip
PREFIXES = {"target", "next", "new", "old", "last", "initial", "final", "best", "raw", "previous"}
# Exchanging one of these with a neighbour would only crash.
OF_OWN_KIND = {"config", "state", "env", "generator", "transition", "critic", "actor", "batch"}
STARTS_A_BACKEND = {"gymnax"}  # when it is imported
NOT_CODE = {"annotation", "returns", "decorator_list", "type_params", "ctx", "op", "ops"}


class Site(NamedTuple):
    """A node, where it hangs, and the names that its outermost function uses."""

    node: Any
    parent: Any
    field: str
    index: int | None
    names: Any

    def put(self, new: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, new)
        else:
            getattr(self.parent, self.field)[self.index] = new


class Mutant(NamedTuple):
    line: int
    kind: str
    site: Site
    new: Any

    def __str__(self) -> str:
        return f"{self.line}, {ast.unparse(self.site.node)} -> {ast.unparse(self.new)}"


# --- what can be changed ------------------------------------------------------------------------


def left_alone(node: Any, parent: ast.AST, everything: bool) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.Assert):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: a guard that only raises
        return True
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return True
    if isinstance(node, ast.AnnAssign) and isinstance(parent, ast.ClassDef):
        return True
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
        return ast.unparse(node.targets[0]).istitle()  # a name for a type
    return isinstance(node, ast.FunctionDef) and node.name == "check" and not everything


def words(node: ast.AST) -> dict[str, set[str]]:
    """Names ("id"), attributes ("attr") and strings ("value") below a node."""
    names: dict[str, set[str]] = {"id": set(), "attr": set(), "value": set()}
    for each in ast.walk(node):
        for field in ("id", "attr", "value", "arg"):
            word = getattr(each, field, None)
            if isinstance(word, str) and not isinstance(each, ast.keyword):
                names["id" if field == "arg" else field].add(word)
    return names


def sites(node: ast.AST, names: Any, everything: bool) -> Iterator[Site]:
    for field, value in ast.iter_fields(node):
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            code = isinstance(child, ast.AST) and field not in NOT_CODE
            if not code or left_alone(child, node, everything):
                continue
            inner = words(child) if isinstance(node, ast.Module) else names
            yield Site(child, node, field, index if isinstance(value, list) else None, inner)
            yield from sites(child, inner, everything)


def are_siblings(a: str, b: str) -> bool:
    """In the table, or all words but one agree: next_obs and obs, key_env and key_actor."""
    if frozenset((a, b)) in TABLE:
        return True
    x, y = a.split("_"), b.split("_")
    other = sum(p != q for p, q in zip(x, y, strict=False))
    longer = x if len(x) > len(y) else y
    if len(x) != len(y):
        return longer[0] in PREFIXES and longer[1:] == (y if longer is x else x)
    return len(x) > 1 and other == 1


def siblings(word: str, names: set[str]) -> list[str]:
    known = names | {each for pair in ALWAYS if word in pair for each in pair}
    return sorted(each for each in known if each != word and are_siblings(word, each))


def changed(node: Any, **fields: Any) -> Any:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def exchanged(items: list[Any], i: int) -> list[Any]:
    return [*items[:i], items[i + 1], items[i], *items[i + 2 :]]


def changes(site: Site) -> Iterator[tuple[str, Any]]:
    """Pairs of a kind and a node that may replace the site's."""
    node = site.node
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
        yield "operator", changed(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.BinOp):
        yield from (("term dropped", part) for part in (node.left, node.right))
        if isinstance(node.op, ast.Mult | ast.Div | ast.Pow):
            yield "sign", ast.UnaryOp(ast.USub(), node)
    if isinstance(node, ast.BoolOp):
        yield from (("condition dropped", part) for part in node.values)
    if isinstance(node, ast.Compare):
        yield from (
            ("comparison", changed(node, ops=[new(), *node.ops[1:]]))
            for new in COMPARISONS[type(node.ops[0])]
        )
    if isinstance(node, ast.UnaryOp):
        yield "sign", node.operand
    if isinstance(node, ast.IfExp):
        yield "branches", changed(node, body=node.orelse, orelse=node.body)
    if site.field in ("test", "ifs") and not isinstance(site.parent, ast.IfExp):
        yield "sign", ast.UnaryOp(ast.Not(), node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call dropped", ast.Pass()
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        target = node.targets[0].id
        given = [a.id for a in getattr(node.value, "args", []) if isinstance(a, ast.Name)]
        if target in given:
            yield "undone", changed(node, value=ast.Name(target, ast.Load()))
    yield from changes_of_a_word(site)
    yield from changes_of_a_call(node)
    yield from changes_of_an_index(node)


def changes_of_a_word(site: Site) -> Iterator[tuple[str, Any]]:
    """Constants, names, attributes, strings."""
    node = site.node
    value = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int | float):
        news = {1: None} if value == 0 else {value + 1: None, 2 * value: None}
        yield from (("constant", ast.Constant(new)) for new in news if new != value)
    loads = isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
    for field in ("id", "attr", "value"):
        word = getattr(node, field, None)
        if loads and isinstance(word, str) and not isinstance(site.parent, ast.JoinedStr):
            for sibling in siblings(word, site.names[field]):
                yield "name", changed(node, **{field: sibling})


def is_of_own_kind(node: ast.AST) -> bool:
    text = ast.unparse(node)
    dtype = text.endswith(("float32", "float64", "int32", "bool"))
    return text in OF_OWN_KIND or "key" in text or dtype or isinstance(node, ast.Lambda)


def changes_of_a_call(node: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, ast.Call):
        return
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    first = 1 if name in {*TAKES_FUNCTION, "where"} else 0
    for i in range(first, len(node.args) - 1 if name not in SYMMETRIC else 0):
        if any(is_of_own_kind(each) for each in node.args[i : i + 2]):
            continue
        yield "arguments", changed(node, args=exchanged(node.args, i))
    values = [keyword.value for keyword in node.keywords]
    for i in range(len(values)):
        if i + 1 < len(values):
            pairs = zip(node.keywords, exchanged(values, i), strict=True)
            yield "arguments", changed(node, keywords=[changed(k, value=v) for k, v in pairs])
        rest = [*node.keywords[:i], *node.keywords[i + 1 :]]
        if node.keywords[i].arg != "strict":
            yield "keyword dropped", changed(node, keywords=rest)
    if name in UNDONE and node.args:
        yield "undone", node.args[0]


def changes_of_an_index(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name | ast.BinOp):
        new = ast.BinOp(node.slice, ast.Add(), ast.Constant(1))
        yield "index", changed(node, slice=new)
    if not isinstance(node, ast.Slice):
        return
    for field in ("lower", "upper"):
        bound = getattr(node, field)
        if bound is not None:
            yield "index", changed(node, **{field: None})
        if bound is not None and not isinstance(bound, ast.Constant):
            shifted = ast.BinOp(bound, ast.Sub(), ast.Constant(1))
            yield "index", changed(node, **{field: shifted})


def all_mutants(tree: ast.Module, everything: bool = True) -> list[Mutant]:
    mutants, seen = [], set()
    for site in sites(tree, words(tree), everything):
        line = getattr(site.node, "lineno", getattr(site.parent, "lineno", 0))
        for kind, new in changes(site):
            mutant = Mutant(line, kind, site, new)
            text = (id(site.node), ast.unparse(new))
            if text[1] != ast.unparse(site.node) and text not in seen:
                mutants.append(mutant)
            seen.add(text)
    return sorted(mutants, key=lambda mutant: mutant.line)


def one_per_line(mutants: list[Mutant]) -> list[Mutant]:
    """For each line, a mutant of the kind that was chosen least often so far."""
    lines: dict[int, list[Mutant]] = collections.defaultdict(list)
    for mutant in mutants:
        lines[mutant.line].append(mutant)
    taken, chosen = collections.Counter[str](), []
    for line, those in lines.items():
        least = min((taken[mutant.kind], mutant.kind) for mutant in those)[1]
        taken[least] += 1
        of_kind = [mutant for mutant in those if mutant.kind == least]
        chosen.append(of_kind[line % len(of_kind)])
    return chosen


# --- the runs -----------------------------------------------------------------------------------


class Hook(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Compiles one module from the mutated tree; Python imports all others."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self.tree = tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_code(self, name: str) -> Any:
        return compile(ast.fix_missing_locations(self.tree), self.path, "exec")


class Audit:
    """A pytest plugin that forks before the collection; each fork continues with a mutant."""

    def __init__(self, options: argparse.Namespace, tree: ast.Module, log: Any, file: Any) -> None:
        self.options, self.tree, self.log, self.file = options, tree, log, file
        self.is_fork, self.passed = False, False
        self.notes: dict[str, Any] = {"seconds": {}, "killer": None, "error": None}
        self.kills, self.seconds = collections.Counter[str](), dict[str, float]()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool | None:
        started = time.monotonic()
        # If pytest had them earlier, it would load the conftest.py beside them, and with it the
        # module.
        session.config.args[:] = self.options.tests
        status, notes = self.run(None, 3600.0)
        if self.is_fork:
            return None
        if status != 0:
            say(f"The tests fail without a mutant: exit status {status}.")
            return True
        limit = self.options.limit or 60.0 + 3.0 * (time.monotonic() - started)
        self.seconds = notes["seconds"]
        preload(notes["modules"])
        outcomes = collections.Counter[str]()
        for number, mutant in enumerate(self.options.mutants, 1):
            outcome = self.outcome(mutant, limit, f"{number}/{len(self.options.mutants)}")
            if self.is_fork:
                return None
            outcomes[outcome] += 1
        summary(outcomes)
        self.passed = True
        return True

    def outcome(self, mutant: Mutant, limit: float, number: str) -> str:
        started = time.monotonic()
        status, notes = self.run(mutant, limit)
        if self.is_fork:
            return ""
        killer, error = notes.get("killer"), notes.get("error")
        self.kills[killer or ""] += 1
        asserted = error in ("AssertionError", "Failed")
        outcome = "killed" if asserted else "crashed"
        outcome = "timed out" if status is None else "survived" if status == 0 else outcome
        if outcome == "survived" or self.options.verbose:
            say(f"{self.options.module}:{mutant}")
        if self.options.verbose:
            took = f"{time.monotonic() - started:.1f} s"
            say(f"    {number} {mutant.kind}: {outcome} ({took}) {killer or ''} {error or ''}")
        return outcome

    def run(self, mutant: Mutant | None, limit: float) -> tuple[int | None, dict[str, Any]]:
        """Fork. Return at once in the fork; return its exit status and notes in the parent."""
        for file in (self.file, self.log):
            file.seek(0)
            file.truncate()
        child = os.fork()
        if child == 0:
            self.is_fork = True
            self.install(mutant)
            return None, {}
        status = waited(child, limit)
        self.file.seek(0)
        text = self.file.read()
        return status, json.loads(text) if text else {}

    def install(self, mutant: Mutant | None) -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if mutant is None:
            return
        sys.dont_write_bytecode = True
        if "jax" in sys.modules:  # read the cache of programs, add nothing to it
            sys.modules["jax"].config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        mutant.site.put(mutant.new)
        name = ".".join(self.options.module.with_suffix("").parts)
        sys.meta_path.insert(0, Hook(name, str(self.options.module.resolve()), self.tree))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def worth(item: pytest.Item) -> float:
            return (self.kills[item.nodeid] + 0.1) / (self.seconds.get(item.nodeid, 0.0) + 0.1)

        items.sort(key=worth, reverse=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = self.notes["seconds"]
        seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        self.notes.update(killer=node.nodeid, error=call.excinfo.typename)

    def pytest_sessionfinish(self) -> None:
        if self.is_fork:
            json.dump({**self.notes, "modules": list(sys.modules)}, self.file)
            self.file.flush()


def preload(names: list[str]) -> None:
    """Import the modules that the tests imported, except ours and those that start a backend."""
    for name in names:
        if name.split(".")[0] in STARTS_A_BACKEND:
            continue
        with contextlib.suppress(Exception, SystemExit):
            spec = importlib.util.find_spec(name)
            if spec and "site-packages" in str(spec.origin):
                importlib.import_module(name)
    bridge = sys.modules.get("jax._src.xla_bridge")
    assert not (bridge and bridge.backends_are_initialized()), "its threads do not survive a fork"


def waited(child: int, limit: float) -> int | None:
    """Exit status of a fork, or None if it was stopped at its limit."""
    try:
        end = time.monotonic() + limit
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    except BaseException:
        os.killpg(child, signal.SIGKILL)
        raise
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


OUT = sys.stdout


def say(*lines: str) -> None:
    print(*lines, sep="\n", file=OUT, flush=True)


def summary(outcomes: collections.Counter[str]) -> None:
    number = sum(outcomes.values())
    killed = number - outcomes["survived"]
    rate = f"{100 * killed / number:.1f}%" if number else "no rate"
    say(f"{number} mutants, {killed} killed, {rate}")
    say(f"of the killed, {outcomes['crashed']} crashed and {outcomes['timed out']} timed out")


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("module", type=pathlib.Path, help="file to change, relative to here")
    parser.add_argument("--tests", nargs="+", default=[], help="arguments of pytest")
    parser.add_argument("--deselect", action="append", default=[], help="a test to leave out")
    parser.add_argument("--lines", default="1-1000000", help="only these, as in 100-200")
    parser.add_argument("--all", action="store_true", help="every mutant, not one per line")
    parser.add_argument("--sample", type=int, help="this many of them, by a fixed seed")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--limit", type=float, help="seconds per mutant; else by the tests' own")
    parser.add_argument("--optimize", action="store_true", help="compile as the tests do")
    parser.add_argument("--verbose", action="store_true", help="print the killed as well")
    return parser.parse_args(given)


def selected(options: argparse.Namespace, tree: ast.Module) -> list[Mutant]:
    first, last = (int(end) for end in options.lines.split("-"))
    mutants = [m for m in all_mutants(tree, options.all) if first <= m.line <= last]
    mutants = mutants if options.all else one_per_line(mutants)
    if options.sample is not None and options.sample < len(mutants):
        picked = sorted(random.Random(0).sample(range(len(mutants)), options.sample))
        mutants = [mutants[i] for i in picked]
    return mutants


def main() -> int:
    global OUT
    options = parsed()
    tree = ast.parse(options.module.read_text())
    options.mutants = selected(options, tree)
    if options.list:
        say(*(f"{options.module}:{mutant}  ({mutant.kind})" for mutant in options.mutants))
        return 0
    sys.path.insert(0, os.getcwd())
    if not options.optimize:
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    OUT = os.fdopen(os.dup(1), "w")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so a fork stops with it
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as notes:
        os.dup2(log.fileno(), 1)
        return run(Audit(options, tree, log, notes))


def run(audit: Audit) -> int:
    given = [".", *(f"--deselect={each}" for each in audit.options.deselect)]
    status = pytest.main(["-x", "-q", "-s", "-p", "no:cacheprovider", *given], plugins=[audit])
    if audit.is_fork:
        sys.stdout.flush()
        os._exit(status)
    if not audit.passed:
        audit.log.seek(0)
        say(audit.log.read())
    return 0 if audit.passed else 1


if __name__ == "__main__":
    sys.exit(main())
