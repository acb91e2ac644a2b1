"""The mutation audit: the changes it makes, the code it skips, and its report of survivors."""

import ast
import pathlib
import subprocess
import sys

import mutants
import pytest

pytestmark = pytest.mark.fast

TOY = '''
"""A docstring that says 1 + 1."""

def area(width: float, height: float) -> float:
    return width * height


def price(area: float) -> float:
    return area + 10


if __name__ == "__main__":
    print(1 + 1)
'''
TESTS = """
import toy

def test_area():
    assert toy.area(3.0, 2.0) == 6.0

def test_price():
    toy.price(3.0)
"""


def texts(source: str) -> set[str]:
    """The new texts of all mutants of a source."""
    return {ast.unparse(mutant.new) for mutant in mutants.all_mutants(ast.parse(source))}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a + b", {"a - b", "a", "b"}),
        ("x = a ** b", {"a * b", "a", "b", "-a ** b"}),
        ("x += a", {"x -= a"}),
        ("x = a < b", {"a <= b", "a > b"}),
        ("x = a and b", {"a or b", "a", "b"}),
        ("x = -a", {"a"}),
        ("x = ~a", {"a"}),
        ("x = 0", {"1"}),
        ("x = 1.5", {"2.5", "3.0"}),
        ("x = f(a, b)", {"f(b, a)"}),
        ("x = f(a=b, c=d)", {"f(a=d, c=b)", "f(c=d)", "f(a=b)"}),
        ("x = f(x)", {"x = x"}),
        ("x = where(a, b, c)", {"where(a, c, b)"}),
        ("x = b if a else c", {"c if a else b"}),
        ("if a:\n    f()", {"not a", "pass"}),
        ("x = a[i]", {"a[i + 1]"}),
        ("x = a[:n]", {":", ":n - 1"}),
        ("x = a.sum()", {"a.mean"}),
        ("x = lax.stop_gradient(a)", {"a"}),
        ("x = f(terminated), g(done)", {"done", "terminated"}),
        ("x = f(target_params), g(params)", {"params", "target_params"}),
        ("x = a['actor'], a['critic']", {"'critic'", "'actor'"}),
        ("x = a.obs, a.next_obs", {"a.next_obs", "a.obs"}),
    ],
)
def test_what_is_changed(source: str, expected: set[str]) -> None:
    assert texts(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "import a",
        "'''Says 1 + 1.'''",
        "def f(x: a + b) -> a + b: pass",
        "raise ValueError(f'{1 + 1}')",
        "class A:\n    x: float = 1.0",
        "@jit(a + b)\ndef f(): pass",
        "Floats = NDArray[float]",
        "if __name__ == '__main__':\n    f(1 + 1)",
    ],
)
def test_what_is_left_alone(source: str) -> None:
    assert texts(source) == set()


def test_conditions_of_check_are_left_to_all() -> None:
    tree = ast.parse("def check(x):\n    if x > 1:\n        f()")
    assert mutants.all_mutants(tree, everything=True)
    assert not mutants.all_mutants(tree, everything=False)


def test_one_per_line_alternates_between_kinds() -> None:
    chosen = mutants.one_per_line(mutants.all_mutants(ast.parse("x = a * b\n" * 3)))
    assert [mutant.line for mutant in chosen] == [1, 2, 3]
    assert len({mutant.kind for mutant in chosen}) == 3


def audit(folder: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "toy.py").write_text(TOY)
    (folder / "test_toy.py").write_text(TESTS)
    script = pathlib.Path(mutants.__file__).resolve()
    command = [sys.executable, str(script), "toy.py", "--tests", "test_toy.py", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_killed_and_a_surviving_mutant(tmp_path: pathlib.Path) -> None:
    done = audit(tmp_path, "--all", "--lines", "5-9")
    assert done.returncode == 0, done.stdout + done.stderr
    # Killed in line 5: the quotient, either factor alone, the other sign. No test checks the sum of
    # line 9, its terms or its constant.
    *survivors, total, how = done.stdout.splitlines()
    assert total == "9 mutants, 4 killed, 44.4%"
    assert how == "of the killed, 0 crashed and 0 timed out"
    assert "toy.py:9, area + 10 -> area - 10" in survivors
    assert len(survivors) == 5 and all(line.startswith("toy.py:9, ") for line in survivors)
    assert (tmp_path / "toy.py").read_text() == TOY


def test_tests_that_fail_anyway_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "conftest.py").write_text("def pytest_runtest_call(item): assert False")
    done = audit(tmp_path)
    assert done.returncode == 1 and "fail without a mutant" in done.stdout
