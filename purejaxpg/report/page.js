"use strict";
// The table, the choice of an environment, and the charts. Everything that comes from results is
// set as text, never as markup.
const root = document.documentElement;
window.addEventListener("error", (event) => { root.dataset.error = event.message; });
root.classList.add("js");
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (tag, text, kind) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};
const textOf = (cell) => (cell === null ? "–" : Array.isArray(cell) ? cell[1] : String(cell));
const keyOf = (cell) => (Array.isArray(cell) ? cell[0] : cell === null || Number.isNaN(Number(cell)) ? cell : Number(cell));
const columnOf = (name) => data.columns.findIndex((column) => column.name.toLowerCase() === name);
let shown = null;  // rows that the filters leave; null: all of them
let boxed = null;  // rows in a box drawn over the parallel coordinates

// ---------------------------------------------------------------------------------------- curves

const coloured = new Set();  // rows whose curves are drawn
const colours = new Map();  // row -> the number of its colour
const chartOf = new Map();  // row -> the chart that holds its curve
const metricRows = new Set(data.figures.flatMap((figure) => Object.keys(figure.rows || {}).map(Number)));
const PALETTE = 8, MOST = 60;  // rows picked at a time
const view = { smooth: 1, single: false, range: null };

function addPicks(list) {
  const node = list.parentElement.querySelector(".picks");
  all("[data-row]", list).forEach((button, place) => {
    const row = Number(button.dataset.row);
    coloured.add(row);
    colours.set(row, place % PALETTE + 1);
    if (node) chartOf.set(row, node);
    button.addEventListener("click", () => pick(row));
  });
}

/** Charts without a list show their first rows. */
function addMetric(node) {
  const rows = Object.keys(data.figures[node.dataset.chart].rows).map(Number);
  if (!node.closest("[data-of]").querySelector(".picked")) rows.slice(0, 1).forEach((row) => { coloured.add(row); colourOf(row); });
}

const sameBlock = (a, b) => columnOf("environment") < 0 || data.rows[a][columnOf("environment")] === data.rows[b][columnOf("environment")];

function colourOf(row) {
  if (!colours.has(row)) colours.set(row, [...colours.keys()].filter((other) => sameBlock(other, row)).length % PALETTE + 1);
  return colours.get(row);
}

function labelOf(row) {
  const own = data.columns.map((column, i) => [column, data.rows[row][i]]);
  const fields = own.filter(([column, cell]) => column.group === "hyperparameters" && cell !== null);
  return `${textOf(data.rows[row][0])}.  ${fields.map(([column, cell]) => `${column.name} ${textOf(cell)}`).join(", ")}`;
}

function addCurve(row) {
  const environment = columnOf("environment"), name = data.rows[row][environment], colour = colourOf(row);
  const list = all(".picked").find((each) => environment < 0 || each.closest("[data-of]").dataset.of === name);
  const node = list && list.parentElement.querySelector(".picks");
  if (node && data.curves[row]) {
    const [grid, y] = data.curves[row];
    data.figures[node.dataset.chart].data.push({
      x: data.grids[grid], y, meta: row, mode: "lines", name: `#${textOf(data.rows[row][0])}`,
      line: { color: `@c${colour}`, width: 2.2 }, hovertemplate: "%{y:.4g}", visible: false,
    });
    chartOf.set(row, node);
  }
  if (!list) return;
  const item = make("li"), button = make("button", labelOf(row));
  button.type = "button";
  button.dataset.row = row;
  button.prepend(make("i", undefined, `k${colour}`));
  button.addEventListener("click", () => pick(row));
  item.append(button);
  list.insertBefore(item, all("li", list).find((each) => !each.querySelector("button")) || null);
}

const isPickable = (row) => Boolean(data.curves[row]) || chartOf.has(row) || metricRows.has(row);
const redraw = () => all(".picks[data-drawn], .metric[data-drawn]").forEach(draw);

/** Show or hide the curves of a row; draw them later if `quiet`. */
function pick(row, quiet = false) {
  if (!all(`.picked [data-row="${row}"]`).length) addCurve(row);
  const on = !coloured.has(row), node = chartOf.get(row);
  if (on) coloured.add(row); else coloured.delete(row);
  if (node) data.figures[node.dataset.chart].data.forEach((trace) => { if (trace.meta === row) trace.visible = on; });
  all(`[data-row="${row}"]`).forEach((button) => button.setAttribute("aria-pressed", on));
  if (!quiet) redraw();
}

/** Show the curves of these rows and of no others of their environment. */
function pickOnly(wanted, within) {
  const rows = within.filter((row) => isPickable(row) && coloured.has(row) !== wanted.has(row));
  rows.slice(0, MOST).forEach((row) => pick(row, true));
  redraw();
}

/** "1-5 8" -> a set of numbers. */
function numbersOf(text) {
  const found = new Set();
  for (const [, first, last] of text.matchAll(/(\d+)(?:\s*-\s*(\d+))?/g)) {
    const from = Number(first), to = Math.min(Number(last || first), from + 1000);
    for (let number = from; number <= to; number += 1) found.add(number);
  }
  return found;
}

/** "10k-1.5M" -> [10000, 1500000]; null for anything else. */
function rangeOf(text) {
  const found = /^\s*([\d.]+)\s*([kMG]?)\s*-\s*([\d.]+)\s*([kMG]?)\s*$/.exec(text);
  if (!found) return null;
  const size = { "": 1, k: 1e3, M: 1e6, G: 1e9 };
  const ends = [found[1] * size[found[2]], found[3] * size[found[4]]];
  return ends[0] < ends[1] ? ends : null;
}

/** Means over a window of points, without those that are unknown. */
function smoothed(values) {
  const half = (view.smooth - 1) / 2;
  if (half === 0) return values;
  return values.map((value, i) => {
    if (value === null) return null;
    const own = values.slice(Math.max(0, i - half), i + half + 1).filter((other) => other !== null);
    return own.reduce((sum, other) => sum + other, 0) / own.length;
  });
}

/** A band is the outline of an area: its upper end, and its lower end backwards. */
function smoothTrace(trace) {
  const middle = trace.fill ? trace.y.length / 2 : trace.y.length;
  return { ...trace, y: [...smoothed(trace.y.slice(0, middle)), ...smoothed(trace.y.slice(middle))] };
}

/** The runs of the rows of a metric that are picked, thin. */
function singles(rows) {
  return [...coloured].filter((row) => rows[row]).flatMap((row) => rows[row][2].map((y) => ({
    x: data.grids[rows[row][0]], y, mode: "lines", line: { color: `@c${colourOf(row)} 66`, width: 1 }, hoverinfo: "skip", connectgaps: true,
  })));
}

/** A metric of the rows that are picked. */
function metric({ rows, layout }) {
  const lines = [...coloured].filter((row) => rows[row]).map((row) => ({
    x: data.grids[rows[row][0]], y: rows[row][1], mode: "lines", line: { color: `@c${colourOf(row)}`, width: 2 },
    name: data.rows[row] ? `#${textOf(data.rows[row][0])}` : "", hovertemplate: "%{y:.4g}", connectgaps: true,
  }));
  return { data: [...(view.single ? singles(rows) : []), ...lines].map(smoothTrace), layout };
}

/** The learning curves as they are to be seen. */
function curvesOf(node, { data: traces, layout }) {
  const tiles = all(".metric", node.closest("[data-of]")).map((tile) => data.figures[tile.dataset.chart]);
  const returns = tiles.find((tile) => tile.name === "episode/return");
  const bands = view.single && returns ? traces.filter((trace) => !(trace.fill && trace.meta !== undefined)) : traces;
  return { data: [...(view.single && returns ? singles(returns.rows) : []), ...bands].map(smoothTrace), layout };
}

function startTools(form) {
  const { smooth, single, ranks, steps } = form.elements;
  form.addEventListener("submit", (event) => event.preventDefault());
  smooth.addEventListener("input", () => {
    view.smooth = Number(smooth.value);
    form.querySelector("output").textContent = view.smooth > 1 ? `${view.smooth} points` : "none";
    redraw();
  });
  single.addEventListener("change", () => { view.single = single.checked; redraw(); });
  steps.addEventListener("change", () => { view.range = rangeOf(steps.value); redraw(); });
  ranks.addEventListener("change", () => {
    const own = root.dataset.environment, environment = columnOf("environment"), wanted = numbersOf(ranks.value);
    const within = [...data.rows.keys()].filter((row) => own === undefined || environment < 0 || data.rows[row][environment] === own);
    pickOnly(new Set(within.filter((row) => wanted.has(keyOf(data.rows[row][0])))), within);
  });
}

// ----------------------------------------------------------------------------------------- table

const PAGE = 25;
const TESTS = {
  "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
};

/** A condition on a column (`IQM>400`), or a word that any cell may hold -> a test of a row. */
function condition(word) {
  const [, name, sign, value] = /^(.+?)(<=|>=|<|>|=)(.+)$/.exec(word) || [];
  const column = name === undefined ? -1 : columnOf(name.replaceAll("_", " ")) >= 0 ? columnOf(name.replaceAll("_", " ")) : columnOf(name);
  if (column < 0) return (row, text) => text.includes(word);
  const number = Number(value);
  return (row) => {
    const cell = row[column];
    if (cell === null) return false;
    if (sign === "=") return keyOf(cell) === number || textOf(cell).toLowerCase() === value;
    return typeof keyOf(cell) === "number" && TESTS[sign](keyOf(cell), number);
  };
}

function startTable(section) {
  const body = section.querySelector("tbody"), heads = all("thead th[data-column]", section);
  const search = section.querySelector("input"), output = section.querySelector("output");
  const [back, next] = all(".tools button", section);
  const texts = data.rows.map((row) => row.slice(0, -1).map(textOf).join(" ").toLowerCase());
  const failed = new Set(data.failed), environment = columnOf("environment");
  let order = data.rows.map((_, index) => index), left = order, page = 0, sorted = 0, down = false, last = null;

  function cellOf(value, column, index) {
    const td = make("td", textOf(value), column.kind);
    if (column.name === "rank" && isPickable(index)) {
      const button = make("button", textOf(value), "pick");
      button.type = "button";
      button.title = "Show or hide the learning curve";
      button.dataset.row = index;
      button.setAttribute("aria-pressed", coloured.has(index));
      td.replaceChildren(button);
    }
    if (column.kind === "main") td.style.setProperty("--v", `${Math.round(100 * data.rows[index].at(-1))}%`);
    if (column.kind.includes("text")) td.title = td.textContent;
    return td;
  }

  function show() {
    const pages = Math.max(1, Math.ceil(left.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    body.replaceChildren(...left.slice(page * PAGE, (page + 1) * PAGE).map((index) => {
      const tr = make("tr", undefined, failed.has(index) ? "failed" : "");
      tr.append(...data.columns.map((column, i) => cellOf(data.rows[index][i], column, index)));
      return tr;
    }));
    const from = left.length ? page * PAGE + 1 : 0, whole = data.rows.length;
    const more = left.length === whole ? "" : ` (${whole.toLocaleString("en")} in all)`;
    output.textContent = `${from}–${Math.min((page + 1) * PAGE, left.length)} of ${left.length.toLocaleString("en")}${more}`;
    back.disabled = page === 0;
    next.disabled = page === pages - 1;
  }

  function compare(a, b) {
    const x = keyOf(data.rows[a][sorted]), y = keyOf(data.rows[b][sorted]);
    if (x === null || y === null) return (x === null) - (y === null);  // unknown values come last
    const sign = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return (down ? -sign : sign) || a - b;
  }

  function filter() {
    const tests = search.value.toLowerCase().split(/\s+/).filter(Boolean).map(condition);
    const own = root.dataset.environment;
    left = order.filter((index) => (boxed === null || boxed.has(index))
      && tests.every((test) => test(data.rows[index], texts[index]))
      && (own === undefined || environment < 0 || data.rows[index][environment] === own));
    const before = shown;
    shown = tests.length || boxed ? new Set(left) : null;
    page = 0;
    show();
    if (shown || before) all(".parallel[data-drawn]").forEach(draw);
  }

  function sortBy(column) {
    down = column === sorted ? !down : Boolean(data.columns[column].down);
    sorted = column;
    order = [...order].sort(compare);
    heads.forEach((th) => th.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    filter();
  }

  heads.forEach((th, column) => {
    const button = make("button", th.textContent);
    button.type = "button";
    button.addEventListener("click", () => sortBy(column));
    th.replaceChildren(button);
  });
  body.addEventListener("click", (event) => {
    const button = event.target.closest("[data-row]");
    if (!button) return;
    const row = Number(button.dataset.row), [a, b] = [left.indexOf(last), left.indexOf(row)].sort((x, y) => x - y);
    if (event.shiftKey && a >= 0) {
      const between = left.slice(a, b + 1).filter((other) => other !== last);
      pickOnly(new Set(coloured.has(row) ? [] : between), between);
    } else pick(row);
    last = row;
  });
  let wait = 0;
  search.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(filter, 120); });
  back.addEventListener("click", () => { page -= 1; show(); });
  next.addEventListener("click", () => { page += 1; show(); });
  document.addEventListener("filter", filter);
  heads[0].setAttribute("aria-sort", "ascending");
  filter();
}

function startEnvironments(bar) {
  const buttons = all("button", bar);
  buttons.forEach((chosen) => chosen.addEventListener("click", () => {
    const own = chosen.dataset.environment;
    if (own === undefined) delete root.dataset.environment; else root.dataset.environment = own;
    buttons.forEach((button) => button.setAttribute("aria-pressed", button === chosen));
    all("[data-of]").forEach((block) => { block.hidden = own !== undefined && block.dataset.of !== own; });
    document.dispatchEvent(new Event("filter"));
  }));
}

// ---------------------------------------------------------------------------------------- charts

const dark = matchMedia("(prefers-color-scheme: dark)"), touch = matchMedia("(pointer: coarse)");
const CHARACTER = 6.9;  // width of an average character at 12 px

/** A copy of a figure in the colours of the page: "@c1 40" is the style's --c1, a quarter opaque. */
function paint(figure) {
  const style = getComputedStyle(root);
  return JSON.parse(JSON.stringify(figure), (key, value) => {
    const token = /color$/.test(key) && typeof value === "string" && /^@(\w+) ?(\w*)$/.exec(value);
    return token ? style.getPropertyValue(`--${token[1]}`).trim() + token[2] : value;
  });
}

/** Labels of rows, cut in their middles to the room beside the values. */
function fit(notes, width) {
  notes.forEach((note) => {
    if (note.name !== "label") return;
    const value = notes.find((other) => other.name === "value" && other.y === note.y);
    const most = Math.max(8, Math.floor((width - 24) / CHARACTER) - (value ? value.text.length - 7 : 0));
    const letters = note.text.match(/&\w+;|./gsu) || [];  // an entity is one letter
    if (letters.length <= most) return;
    const tail = Math.floor(most / 3);
    note.text = `${letters.slice(0, most - tail - 1).join("")}…${letters.slice(letters.length - tail).join("")}`;
  });
}

function layoutOf(own, width) {
  const axis = {
    gridcolor: "@rule", zerolinecolor: "@rule", linecolor: "@grey", automargin: true, fixedrange: touch.matches,
    exponentformat: "power", nticks: Math.max(3, Math.floor(width / 55)), zeroline: false,
  };
  const layout = paint({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "@soft" },
    margin: { l: 44, r: 10, t: 10, b: 36 }, dragmode: touch.matches ? false : "zoom",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "@soft", activecolor: "@accent" },
    hoverlabel: { bgcolor: "@raised", bordercolor: "@grey", font: { color: "@ink" }, namelength: 24 },
    ...own, xaxis: { ...axis, ...own.xaxis }, yaxis: { ...axis, nticks: 6, ...own.yaxis },
  });
  (layout.annotations || []).forEach((note) => { note.font = { color: getComputedStyle(root).getPropertyValue("--ink").trim(), size: 12.5 }; });
  fit(layout.annotations || [], width);
  return layout;
}

// All buttons are named here: others would send data away.
const BAR = { modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
const BINS = 5;

/** Parallel coordinates as ordinary lines: plotly's own need WebGL and know no logarithms. */
function parallel({ axes, lines }) {
  const gaps = (some) => ({
    x: some.flatMap(() => [...axes.keys(), null]), y: some.flatMap((line) => [...line.slice(2), null]),
  });
  const left = lines.filter(([row]) => shown === null || shown.has(row));
  const stroke = { mode: "lines", hoverinfo: "skip" };
  const traces = [{ ...gaps(lines.filter(([row]) => shown !== null && !shown.has(row))), ...stroke, line: { color: "@grey 30", width: 1 } }];
  const alpha = left.length > 120 ? "66" : "cc";
  traces.push({ ...gaps(left.filter((line) => line[1])), ...stroke, line: { color: `@c2 ${alpha}`, width: 1, dash: "dash" } });
  for (let bin = 0; bin < BINS; bin += 1) {
    const own = left.filter((line) => !line[1] && Math.min(BINS - 1, Math.floor(line.at(-1) * BINS)) === bin);
    traces.push({ ...gaps(own), ...stroke, line: { color: `@p${bin} ${alpha}`, width: bin === BINS - 1 ? 1.6 : 1.1 } });
  }
  const quiet = { marker: { opacity: 0 } };
  traces.push({
    x: left.flatMap(() => [...axes.keys()]), y: left.flatMap((line) => line.slice(2)), mode: "markers", ...quiet,
    selected: quiet, unselected: quiet, customdata: left.flatMap(([row]) => axes.map(() => row)), hovertemplate: "%{text}<extra></extra>",
    text: left.flatMap(([row]) => axes.map(() => clean(`${labelOf(row)}: ${textOf(data.rows[row][columnOf("iqm")])}`).replaceAll(", ", "<br>"))),
  });
  const notes = axes.flatMap((axis, x) => axis.ticks.map(([y, text]) => ({
    x, y, text, xanchor: x === axes.length - 1 ? "right" : "left", xshift: x === axes.length - 1 ? -4 : 4, showarrow: false, bgcolor: "@paper b0", borderpad: 1,
  })));
  return { data: traces, layout: {
    height: 420, margin: { l: 30, r: 30, t: 34, b: 12 }, annotations: notes, dragmode: touch.matches ? false : "select",
    xaxis: { side: "top", tickvals: [...axes.keys()], ticktext: axes.map((axis) => axis.name), range: [-0.1, axes.length - 0.9], fixedrange: true, gridcolor: "@grey", automargin: false, tickangle: 0 },
    yaxis: { visible: false, range: [-0.04, 1.04], fixedrange: true },
  } };
}

const clean = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function draw(node) {
  const raw = data.figures[node.dataset.chart], many = node.classList.contains("parallel");
  const picks = node.classList.contains("picks");
  const figure = many ? parallel(raw) : raw.rows ? metric(raw) : picks ? curvesOf(node, raw) : raw;
  const layout = layoutOf(figure.layout, node.clientWidth);
  if (view.range && (picks || raw.rows)) layout.xaxis.range = view.range;
  layout.uirevision = String(view.range);  // keeps the reader's zoom when a curve is added
  const bar = picks ? BAR : { displayModeBar: false };
  if (many && node.layout) layout.selections = node.layout.selections;
  Plotly.react(node, paint(figure.data), layout, { responsive: true, displaylogo: false, ...bar });
  if (many && !node.dataset.drawn) {
    node.on("plotly_selected", (event) => box(event && event.points.map((point) => point.customdata)));
    node.on("plotly_deselect", () => box(null));
  }
  node.dataset.drawn = "true";
}

function box(rows) {
  boxed = rows && rows.length ? new Set(rows) : null;
  document.dispatchEvent(new Event("filter"));
}

function startCharts() {
  const seen = new IntersectionObserver((entries) => {
    // One by one, so that the page answers between two charts.
    entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
      seen.unobserve(entry.target);
      setTimeout(() => draw(entry.target));
    });
    setTimeout(() => { root.dataset.ready = "true"; });
  }, { rootMargin: "300px" });
  all(".chart").forEach((node) => seen.observe(node));
  if (!all(".chart").length) root.dataset.ready = "true";
  dark.addEventListener("change", () => all(".chart[data-drawn]").forEach(draw));
  window.addEventListener("beforeprint", () => all(".chart:not([data-drawn])").forEach(draw));
}

// ------------------------------------------------------------------------------- a running sweep

const SILENT_S = 300;  // after which a sweep that writes no new page has probably stopped

/** Loads the page again at the same place, when there is a new one and nobody is filtering. */
function startLive(node) {
  const every = Number(node.dataset.every), age = Date.now() / 1000 - Number(node.dataset.written);
  if (history.state) window.scrollTo(0, history.state.place);
  if (age > SILENT_S + 3 * every) {
    node.lastElementChild.textContent = "It has not been written for a while: the sweep has probably stopped.";
    return;
  }
  setInterval(() => {
    if (all("input").some((input) => input.value !== input.defaultValue || input.checked !== input.defaultChecked) || Object.keys(root.dataset).includes("environment")) return;
    history.replaceState({ place: window.scrollY }, "");
    location.reload();
  }, 1000 * every);
}

all(".picked").forEach(addPicks);
all(".metric").forEach(addMetric);
all(".curve-tools").forEach(startTools);
all(".ranking").forEach(startTable);
all(".envs").forEach(startEnvironments);
window.addEventListener("load", startCharts);
window.addEventListener("load", () => all(".live").forEach(startLive));
