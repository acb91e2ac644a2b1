"""The site: code in its pages, and, once it is built, its links and what they load."""

import ast
import html.parser
import importlib
import itertools
import pathlib
import re
import sys
import urllib.parse

import browser
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BUILT = DOCS / "_build" / "html"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
# What a page loads by itself, as (element, attribute); a hyperlink is followed by the reader only.
LOADS = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def missing_names(source):
    """Names that a program takes from modules of the package and that these do not have."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("purejaxpg"):
            module = importlib.import_module(node.module)
            found += [f"{node.module}.{name.name}" for name in node.names if not has(module, name)]
    return found


def has(module, name):
    try:
        return hasattr(module, name.name) or importlib.import_module(
            f"{module.__name__}.{name.name}"
        )
    except ImportError:
        return False


@pytest.mark.fast
def test_the_python_of_every_page_is_valid_and_its_imports_exist():
    programs = [(page, block) for page in PAGES for block in python_blocks(page)]
    assert programs
    for page, block in programs:
        compile(block, page.name, "exec")
        assert missing_names(block) == [], page.name


def test_a_wrong_import_is_noticed():
    assert missing_names("from purejaxpg.kernels import losses, lossses") == [
        "purejaxpg.kernels.lossses"
    ]


# --- of the extensions --------------------------------------------------------------------------


@pytest.fixture
def extensions(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    yield importlib.import_module
    for path in (DOCS / "_ext").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.site
def test_a_docstring_keeps_its_equations_code_and_characters(extensions):
    lines = ["One *x*.", "", "    a|b = c_", "", "Of `f(a)`s, a|b and c_ * d:", "1. one", "2. two"]
    assert extensions("docstrings").converted(lines) == [
        *("One *x*.", "", "::", "", "    a|b = c_", ""),
        *(r"Of ``f(a)``\ s, a\|b and c\_ \* d:", "", "1. one", "2. two", ""),
    ]


@pytest.mark.site
def test_every_module_has_a_page(extensions):
    modules = extensions("reference").modules()
    assert {"purejaxpg.kernels.losses", "purejaxpg.agents.ppo", "purejaxpg.contract"} <= {*modules}
    for name in modules:
        assert (BUILT / "reference" / "api" / f"{name}.html").is_file(), name


# --- of the pages that were built ---------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a page links to, loads, and names; `text_links` are those of its own text."""

    def __init__(self, path):
        super().__init__()
        self.links, self.text_links, self.loads, self.names = [], [], [], set()
        self.headings, self.silent, self.expanders, self.in_text = [], [], [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.in_text |= tag == "article"
        if re.fullmatch("h[1-6]", tag) and self.in_text:
            self.headings.append(int(tag[1]))
        if tag == "summary" and not self.in_text:
            self.expanders.append(dict(attrs).get("aria-label"))
        if tag == "img" and not dict(attrs).get("alt"):
            self.silent.append(dict(attrs)["src"])
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.names.add(value)
            if (tag, name) == ("a", "href"):
                self.links.append(value)
                self.text_links += [value] if self.in_text else []
            if (tag, name) in LOADS:
                self.loads.append(value)

    def handle_endtag(self, tag):
        self.in_text &= tag != "article"


@pytest.fixture(scope="module")
def built():
    pages = {path: Page(path) for path in BUILT.rglob("*.html") if "_static" not in path.parts}
    assert len(pages) > 100, "build the site first: make docs"
    return pages


def is_remote(address):
    return bool(re.match(r"(https?:)?//", address))


def target(page, address):
    """The file that a link of a page leads to, and the place in it."""
    parts = urllib.parse.urlsplit(address)
    path = urllib.parse.unquote(parts.path)
    return (page.parent / path).resolve() if path else page, urllib.parse.unquote(parts.fragment)


@pytest.mark.site
def test_every_link_within_the_site_leads_somewhere(built):
    wrong = []
    for page, content in built.items():
        for address in {link for link in content.links if link and "://" not in link}:
            path, place = target(page, address)
            known = built[path].names if path in built else set()
            if not path.exists() or (place and path in built and place not in known):
                wrong.append(f"{page.relative_to(BUILT)}: {address}")
    assert not wrong, "\n".join(wrong[:40])


@pytest.mark.site
def test_nothing_is_loaded_from_elsewhere(built):
    loads = {(page, load) for page, content in built.items() for load in content.loads}
    assert len(loads) > 1000
    assert [f"{page}: {load}" for page, load in loads if is_remote(load)] == []
    for sheet in (BUILT / "_static").rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        found = re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", text)
        assert not any(is_remote(address) for address in found), sheet


@pytest.mark.site
def test_what_is_loaded_exists(built):
    wrong = {
        load
        for page, content in built.items()
        for load in content.loads
        if not load.startswith("data:") and not target(page, load)[0].exists()
    }
    assert wrong == set()


@pytest.mark.site
def test_two_clicks_lead_from_the_front_page_to_every_page(built):
    """Through the text of pages alone; the files of the repository may be a third click away."""
    reached = {BUILT / "index.html"}
    for _ in range(2):
        links = [(page, link) for page in reached & {*built} for link in built[page].text_links]
        reached |= {target(page, link)[0] for page, link in links if not is_remote(link)}
    wanted = {page for page in built if page.relative_to(BUILT).parts[0] != "source"}
    assert wanted - reached == {BUILT / "search.html"}  # a button of every page leads there


@pytest.mark.site
def test_pages_have_one_title_an_outline_and_texts_for_pictures(built):
    outlines = {page: content.headings for page, content in built.items() if content.headings}
    assert len(outlines) > 200
    for page, levels in outlines.items():
        assert levels[0] == 1 and levels.count(1) == 1, page
        assert all(b <= a + 1 for a, b in itertools.pairwise(levels)), page
    assert {page: content.silent for page, content in built.items() if content.silent} == {}


@pytest.mark.site
def test_the_expanders_of_the_sidebar_have_names(built):
    assert built[BUILT / "course" / "index.html"].expanders == ["Pages of Course"]
    of_site = [content for page, content in built.items() if page.stem != "example-report"]
    assert all(name for content in of_site for name in content.expanders)


@pytest.mark.site
def test_a_formula_keeps_the_mark_behind_it(built):
    text = (BUILT / "course" / "08-ppo.html").read_text(encoding="utf-8")
    assert re.search(r'"kept-together"><span class="math[^>]*>[^<]*</span>:</span> it grows', text)
    assert not re.search(r'<span class="math[^>]*>[^<]*</span>[.,:;!?)]+(?!</span>)', text)


@pytest.mark.site
def test_options_and_small_numbers_stay_on_one_line(built):
    text = (BUILT / "sweeps.html").read_text(encoding="utf-8")
    assert '"kept-together"><span class="pre">--snapshot</span></span>' in text
    assert not re.search(r'<span class="pre">--[a-z]', text.replace('"kept-together"><span', ""))
    text = (BUILT / "algorithms" / "sac.html").read_text(encoding="utf-8")
    assert '<span class="kept-together">3e-4</span>' in text


@pytest.mark.site
def test_the_example_report_is_that_of_a_confirmed_sweep(built):
    report = BUILT / "example-report.html"
    for name in ("index", "how-to/read-a-report"):
        page = BUILT / f"{name}.html"
        assert report in {target(page, link)[0] for link in built[page].text_links}
    text = report.read_text(encoding="utf-8")
    assert "<title>example · sweep report</title>" in text and "on\n8 fresh seeds" in text
    assert "learning_rate<b>" in text and "IQM of 4 seeds" in text and "plotly.js v" in text


NARROW = (
    *("index", "search", "algorithms/ppo", "algorithms/rlhf-dpo", "course/05-gae", "benchmarks"),
    *("how-to/from-purejaxrl-cleanrl-sb3", "how-to/memory", "reference/command-line"),
    *("reference/api/purejaxpg.agents.ppo_rnn", "reference/api/purejaxpg.sweep.engine"),
    *("source/tests/theory/test_policy_gradient.py", "example-report"),
)


@pytest.mark.site
@browser.needed
def test_no_page_is_wider_than_a_narrow_screen(built, tmp_path):
    """Wide tables, formulas and code scroll by themselves."""
    with browser.session(tmp_path) as window:
        window.screen(375, 800)
        for name in NARROW:
            window.open(BUILT / f"{name}.html")
            window.value("window.MathJax?.startup.promise.then(() => true)")
            assert window.value("document.documentElement.scrollWidth") <= 375, name


@pytest.mark.site
@browser.needed
def test_a_keyboard_sees_where_it_is(built, tmp_path):
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    with browser.session(tmp_path) as window:
        for width, controls in ((375, 6), (1400, 3)):
            window.screen(width, 800)
            window.open(BUILT / "index.html")
            for _ in range(controls):
                window.press("Tab")
                focus = window.value("document.activeElement.outerHTML")
                assert window.value(outline) == "solid", focus
