"use strict";
// Sorting, searching and paging of the table, the choice of an environment, a cross-hair on curves.
// Everything that comes from results is set as text, never as markup.
const root = document.documentElement;
window.addEventListener("error", (event) => { root.dataset.error = event.message; });
root.classList.add("js");

const make = (tag, text, kind) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};

// ---------------------------------------------------------------------------------------- table

const PAGE = 25;

function startTable(section) {
  const data = JSON.parse(section.querySelector("script[type='application/json']").textContent);
  const body = section.querySelector("tbody");
  const buttons = [...section.querySelectorAll("thead th[data-column]")];
  const search = section.querySelector("input");
  const count = section.querySelector("output");
  const [back, next] = section.querySelectorAll(".tools button");
  const texts = data.rows.map((row) => row.map((cell) => data.columns && textOf(cell)).join(" ").toLowerCase());
  let order = data.rows.map((_, index) => index), shown = order, page = 0, sorted = 0, down = false;

  function textOf(cell) { return cell === null ? "" : Array.isArray(cell) ? String(cell[1]) : String(cell); }
  function keyOf(cell) { return Array.isArray(cell) ? cell[0] : cell; }

  function cell(value, column, row) {
    const td = make("td", value === null ? "–" : textOf(value), column.kind);
    if (column.main !== undefined) td.style.setProperty("--v", `${Math.round(100 * row[row.length - 1])}%`);
    if (column.kind && column.kind.includes("text")) td.title = td.textContent;
    return td;
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const rows = shown.slice(page * PAGE, (page + 1) * PAGE).map((index) => {
      const row = data.rows[index], tr = make("tr");
      if (data.failed.includes(index)) tr.className = "failed";
      data.columns.forEach((column, i) => tr.append(cell(row[i], column, row)));
      return tr;
    });
    body.replaceChildren(...rows);
    const all = shown.length === data.rows.length ? "" : ` of ${data.rows.length}`;
    const from = shown.length ? page * PAGE + 1 : 0;
    count.textContent = `${from}–${Math.min((page + 1) * PAGE, shown.length)} of ${shown.length}${all && ` (${data.rows.length} in all)`}`;
    back.disabled = page === 0;
    next.disabled = page === pages - 1;
  }

  function compare(a, b) {
    const x = keyOf(data.rows[a][sorted]), y = keyOf(data.rows[b][sorted]);
    if (x === null || y === null) return (x === null) - (y === null);  // unknown last, either way
    const sign = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return (down ? -sign : sign) || a - b;
  }

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const own = root.dataset.environment;
    shown = order.filter((index) => words.every((word) => texts[index].includes(word))
      && (own === undefined || data.environment < 0 || data.rows[index][data.environment] === own));
    page = 0;
    draw();
  }

  function sortBy(column) {
    down = column === sorted ? !down : Boolean(data.columns[column].down);
    sorted = column;
    order = [...order].sort(compare);
    buttons.forEach((th) => th.removeAttribute("aria-sort"));
    buttons[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    filter();
  }

  buttons.forEach((th, column) => {
    const button = make("button", th.textContent);
    button.type = "button";
    button.addEventListener("click", () => sortBy(column));
    th.replaceChildren(button);
  });
  search.addEventListener("input", filter);
  back.addEventListener("click", () => { page -= 1; draw(); });
  next.addEventListener("click", () => { page += 1; draw(); });
  document.addEventListener("environment", filter);
  buttons[0].setAttribute("aria-sort", "ascending");
  filter();
}

// --------------------------------------------------------------------------------- environments

function startEnvironments(bar) {
  const buttons = [...bar.querySelectorAll("button")];
  const choose = (chosen) => {
    const own = chosen.dataset.environment;
    if (own === undefined) delete root.dataset.environment; else root.dataset.environment = own;
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button === chosen)));
    document.querySelectorAll("[data-of]").forEach((block) => {
      block.hidden = own !== undefined && block.dataset.of !== own;
    });
    document.dispatchEvent(new Event("environment"));
  };
  buttons.forEach((button) => button.addEventListener("click", () => choose(button)));
}

// ------------------------------------------------------------------------------------ cross-hair

function startChart(svg) {
  const lines = JSON.parse(svg.dataset.chart);
  const outputs = [...svg.closest("figure").querySelectorAll(".legend output")];
  const box = svg.viewBox.baseVal;
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cross.setAttribute("class", "cross");
  svg.append(cross);
  if (!lines.length) return;
  svg.addEventListener("pointermove", (event) => {
    const place = svg.getBoundingClientRect();
    const x = ((event.clientX - place.left) / place.width) * box.width;
    lines.forEach((line, i) => {
      let near = 0;
      line.x.forEach((at, k) => { if (Math.abs(at - x) < Math.abs(line.x[near] - x)) near = k; });
      if (i === 0) cross.setAttribute("d", `M${line.x[near]} 10V${box.height - 42}`);
      if (outputs[i]) outputs[i].textContent = `${line.v[near]} at ${line.s[near]}`;
    });
  });
  svg.addEventListener("pointerleave", () => {
    cross.removeAttribute("d");
    outputs.forEach((output) => { output.textContent = ""; });
  });
}

document.querySelectorAll(".ranking").forEach(startTable);
document.querySelectorAll(".envs").forEach(startEnvironments);
document.querySelectorAll("svg[data-chart]").forEach(startChart);
root.dataset.ready = "true";
