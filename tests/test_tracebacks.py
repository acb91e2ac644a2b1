"""Errors in a user's code: which lines are shown, and how many."""

import ast
import pathlib
import sys

import pytest
from test_trainers import FLAGS, fork, write

import purejaxpg
from purejaxpg import cli, config, tracebacks

HEAD = "import helper_of_traced"


def in_function(text: str, name: str) -> str:
    """Return the text of a module whose function `name` fails in a module beside it."""
    functions = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    (found,) = (function for function in functions if function.name == name)
    lines = text.splitlines(keepends=True)
    lines.insert(found.body[1].lineno - 1, "    helper_of_traced.fail()\n")  # after the docstring
    return "".join(lines)


@pytest.mark.parametrize("name", ["check", "init", "update", "policy"])
def test_an_error_in_a_fork_shows_its_own_lines_first(
    tmp_path: pathlib.Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    helper = "import jax.numpy as jnp\n\ndef fail():\n    return jnp.zeros(2) + jnp.zeros(3)\n"
    write(tmp_path / "helper_of_traced.py", helper)
    path = fork(tmp_path, HEAD, f"fails_in_{name}.py")
    path.write_text(in_function(path.read_text("utf-8"), name), "utf-8")
    assert cli.main(["train", path.name, *FLAGS, "--out", "o"]) == 2
    lines = capsys.readouterr().err.splitlines()
    del sys.modules["helper_of_traced"]
    assert len(lines) <= 10
    assert lines[-6].startswith(f"fails_in_{name}.py, line ") and lines[-6].endswith(f"in {name}")
    assert lines[-5:-2] == [
        "    helper_of_traced.fail()",
        "helper_of_traced.py, line 4, in fail",
        "    return jnp.zeros(2) + jnp.zeros(3)",
    ]
    assert lines[-2].startswith("TypeError: add got incompatible shapes")
    assert lines[0].startswith("fails_in_") and "PUREJAXPG_TRACEBACK=1" in lines[-1]


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("\n    return state\n", "\n    return state, 1\n", "init in mine.py must return one "),
        ("return state, {**", "return {**", "update in mine.py must return two values, "),
        ("distribution.sample(seed=key)\n", "2 * (obs,)\n", "policy in mine.py must return one "),
    ],
)
def test_a_fork_that_returns_something_else_is_one_sentence(
    tmp_path: pathlib.Path,
    right: str,
    wrong: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = fork(tmp_path, "import math")
    text = path.read_text("utf-8")
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), "utf-8")
    config = "config = {total_timesteps = 64, num_envs = 2, num_steps = 16, hidden = [4]}"
    write(tmp_path / "s.toml", f'agent = "./mine.py"\nseeds = 1\n{config}\n')
    for command in (
        ["train", "mine.py", *FLAGS],
        ["sweep", "s.toml", "--quiet"],
        ["plan", "s.toml"],
    ):
        assert cli.main([*command, "--out", command[0]]) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith(words) and complaint.count("\n") == 1
        assert ", but returns " in complaint


@pytest.mark.fast
def test_an_error_of_an_import_shows_the_line(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    fork(tmp_path, "import nowhere_at_all", "missing.py")
    write(tmp_path / "broken.py", "x = 1\ndef f(:\n    pass\n")
    assert cli.main(["train", "missing.py"]) == 2
    first, second, third, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("missing.py, line ") and second == "    import nowhere_at_all"
    assert third.startswith("agent 'missing.py' cannot be imported: ModuleNotFoundError: No module")
    assert cli.main(["train", "broken.py"]) == 2
    first, second, third, _ = capsys.readouterr().err.splitlines()
    assert (first, second) == ("broken.py, line 2", "    def f(:")
    assert "cannot be imported: SyntaxError: " in third
    assert not {"missing", "broken"} & set(sys.modules)
    monkeypatch.setenv(tracebacks.WHOLE, "1")
    assert cli.main(["train", "missing.py"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.fast
def test_an_error_of_the_package_is_none_of_a_users() -> None:
    try:
        config.field_types(3)
    except TypeError as error:
        inner = error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None)
    assert tracebacks.explain(inner) is None


@pytest.mark.fast
def test_what_is_installed_is_not_local(tmp_path: pathlib.Path) -> None:
    assert tracebacks.is_local(tmp_path / "mine.py")
    assert not tracebacks.is_local(tmp_path / ".venv" / "lib" / "site-packages" / "x.py")
    for module in (purejaxpg, pytest, pathlib):
        assert not tracebacks.is_local(pathlib.Path(str(module.__file__)))
