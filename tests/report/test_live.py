"""The page of a sweep while it runs: written by a thread, which never harms the sweep."""

import functools
import io
import json
import pathlib
import re
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import stand_in
from rich.console import Console

from purejaxpg.report import live, page, writer
from purejaxpg.sweep import engine, search, session
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import store as stores

TRAINER: Any = types.SimpleNamespace(Config=stand_in.Config)
SPEC: Any = types.SimpleNamespace(
    name="study", agent_name="none", agent=TRAINER, num_configs=6, seeds=(0, 1), conditions=[{}]
)


def make_progress() -> tuple[progresses.Progress, io.StringIO]:
    printed = io.StringIO()
    progress = progresses.Progress(Console(file=printed, width=200))
    progress.begin(SPEC, search.rehearse(search.rounds(stand_in.spec("plain"))))  # type: ignore[arg-type]
    return progress, printed


def run(out: pathlib.Path, then: Callable[[live.Page], None]) -> str:
    """Run a sweep of the stand-in with its page; call `then` after each commit -> the output."""
    progress, printed = make_progress()
    rounds = search.rounds(stand_in.spec("plain"))  # type: ignore[arg-type]
    backend: Any = stand_in.Backend()
    store = stores.Store.open(out, {"kind": "plain"}, "kind = 'plain'\n")
    with store, live.Page(store.path, progress) as current:
        after = functools.partial(then, current)
        engine.run(rounds, store, backend, progress, 1e9, None, after)
    return printed.getvalue()


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_S", "EVERY_S", "SHARE"):
        monkeypatch.setattr(live, name, 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("whole") / "out"
    stand_in.run(out, "plain")
    return stand_in.contents(out)


@pytest.mark.usefixtures("eager")
def test_the_page_is_written_while_the_sweep_runs(
    tmp_path: pathlib.Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    begun: list[None] = []  # one entry for each page
    now = progresses.Progress.now

    def counted(progress: progresses.Progress) -> Any:
        begun.append(None)
        return now(progress)

    def read(current: live.Page) -> None:
        """Read a page that was begun after the commit: the one being written may be older."""
        wanted = len(begun) + 2  # when the second page begins, the first one is complete
        wait_for(lambda: len(begun) >= wanted)
        texts.append(current.target.read_text("utf-8"))

    monkeypatch.setattr(progresses.Progress, "now", counted)

    printed = run(tmp_path / "out", read)
    assert stand_in.contents(tmp_path / "out") == whole
    assert printed.count("The page shows the sweep while it runs: ") == 1
    assert all(text.rstrip().endswith("</html>") for text in texts)
    shares = [float(re.search(r'<progress max="1" value="([^"]+)"', text)[1]) for text in texts]  # type: ignore[index]
    assert shares == [0.5, 1.0]
    # The last page is that of a finished sweep, which loads itself no more.
    written = writer.write(tmp_path / "out", session.make_console()) / "index.html"
    assert 'class="live"' not in written.read_text("utf-8")


@pytest.mark.usefixtures("eager")
def test_a_page_that_cannot_be_written_is_mentioned_once(
    tmp_path: pathlib.Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[None] = []

    def full(*_: object) -> str:
        tries.append(None)
        raise OSError(28, "No space left on device")

    def several(_: live.Page) -> None:
        wait_for(lambda: len(tries) > 3)

    monkeypatch.setattr(writer, "page_text", full)
    printed = run(tmp_path / "out", several)
    assert stand_in.contents(tmp_path / "out") == whole
    assert printed.count("Note: the page ") == 1 and "No space left" in printed


def test_an_interrupted_sweep_does_not_wait_for_its_page(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is writing and cannot be stopped."""
    release = live.threading.Event()
    monkeypatch.setattr(live, "FIRST_S", 0.0)
    monkeypatch.setattr(live, "INTERRUPTED_S", 0.01)
    monkeypatch.setattr(writer, "page_text", lambda *_: release.wait() and "")
    progress, _ = make_progress()
    with pytest.raises(KeyboardInterrupt), live.Page(tmp_path, progress) as current:
        raise KeyboardInterrupt
    assert not current.thread.done()
    release.set()
    current.thread.result()
    assert not current.target.exists()  # too late to be written


def test_writing_takes_a_small_share_of_the_time(tmp_path: pathlib.Path) -> None:
    current = live.Page(tmp_path, make_progress()[0])
    assert current.every_s == live.EVERY_S
    current.cost_s = 3.0
    assert current.every_s == 3.0 * live.SHARE > live.EVERY_S


# ------------------------------------------------------------------------------------ its contents


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a unit that is committed and others that are not."""
    out = tmp_path_factory.mktemp("begun") / "out"

    def stop(_: stores.Store) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stand_in.run(out, "plain", after_commit=stop)
    return out


def unfinished(out: pathlib.Path) -> Any:
    """The progress of a sweep whose next unit has done 4 updates."""
    progress, _ = make_progress()
    with stores.Store.read(out) as store:
        (name, *_) = store.ledger.pending()
    round_ = next(search.rounds(stand_in.spec("plain")))  # type: ignore[arg-type]
    (group,) = stand_in.Backend().groups(0, round_, {})
    units = [unit for unit in group.units if unit.name == name]
    rows = len(units[0].legs)
    pieces = [{"episode/return_sum": np.full((rows, 4), 7.0), "episode/count": np.ones((rows, 4))}]
    progress.batch = plans.Batch(group, units, 4, None, np.zeros(rows, int), pieces)
    return progress


def test_the_curves_of_runs_in_progress_are_drawn(begun: pathlib.Path) -> None:
    now = page.Now(0.25, ("about 90 s left",), 20.0, 0.0)
    text = writer.page_text(begun, now, live.in_progress(unfinished(begun)))
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    sevens = [t for f in data["figures"] for t in f.get("data", ()) if t.get("y") == [7.0] * 4]
    assert sevens and sevens[0]["x"] == [5, 15, 25, 35]
    assert "25%</b> about 90 s left." in text and "In progress" in text
    without = writer.page_text(begun, now, {})
    assert "In progress" not in without and "Unfinished: " in without


def test_a_unit_that_was_committed_meanwhile_counts_once(begun: pathlib.Path) -> None:
    progress = unfinished(begun)
    with stores.Store.read(begun) as store:
        (done, *_) = (unit["name"] for unit in store.ledger.units() if unit["done"])
    (facts,) = live.in_progress(progress).values()
    text = writer.page_text(begun, page.Now(0.5, (), 20.0, 0.0), {done: facts})
    assert "In progress" not in text


def test_the_page_of_a_pipeline_is_written_too(
    begun: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[pathlib.Path, float]] = []
    monkeypatch.setattr(writer, "page_text", lambda *_: "<html>")
    monkeypatch.setattr(writer, "write_stages", lambda root, now: told.append((root, now.share)))
    (tmp_path / "stages.json").touch()
    current = live.Page(tmp_path / "one", unfinished(begun))
    current.directory.mkdir()
    current.write()
    (tmp_path / "stages.json").unlink()
    current.write()
    assert told == [(tmp_path, 0.0)] and current.target.read_text("utf-8") == "<html>"


def test_the_page_of_a_running_pipeline_loads_itself_again() -> None:
    stage = {"name": "one", "agent": "ppo", "given": "", "link": None, "ranked": []}
    text = page.render_stages("study", [stage], "", now=page.Now(0.5, ("soon",), 20.0, 0.0))
    assert '<meta http-equiv="refresh" content="20">' in text and "50%</b> soon." in text
    assert "refresh" not in page.render_stages("study", [stage], "")
