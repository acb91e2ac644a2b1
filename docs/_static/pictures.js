// Gives each picture its controls, and draws what they choose from values computed beforehand.
"use strict";
(() => {
  const STEP = 180; // milliseconds between two positions of a control that plays

  const make = (tag, properties, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  const worded = (value, words) => {
    if (!words) return value;
    return Array.isArray(value) ? value.map((each) => worded(each, words)) : words[value];
  };

  const valueOf = (state, positions) =>
    worded(state.by.reduce((values, control) => values[positions[control]], state.values), state.words);

  const put = (target, path, value) => {
    const names = path.split(".");
    const last = names.pop();
    names.reduce((inner, name) => (inner[name] ??= {}), target)[last] = value;
  };

  // Text and lines have the colour of the page's text, whichever style the page has.
  const coloured = (layout, node) => {
    const ink = getComputedStyle(node).color;
    const faint = ink.replace(/rgba?\(([^)]*)\)/, (_, parts) => `rgba(${parts.split(",").slice(0, 3)},0.16)`);
    for (const [name, part] of Object.entries(layout)) {
      if (/^[xy]axis\d*$/.test(name)) Object.assign(part, { gridcolor: faint, linecolor: faint, zerolinecolor: faint });
    }
    layout.font.color = ink;
    return layout;
  };

  const start = (picture) => {
    const text = picture.querySelector("script").textContent;
    const plot = picture.querySelector(".picture-plot");
    const says = picture.querySelector(".picture-says");
    const { controls, states } = JSON.parse(text).layout.meta;
    const positions = controls.map((control) => control.start);

    const draw = () => {
      const figure = { ...JSON.parse(text), says: [] };
      for (const state of states) put(figure, state.path, valueOf(state, positions));
      delete figure.layout.meta;
      const sentence = Object.values(figure.says).join(" ");
      if (says.textContent !== sentence) says.textContent = sentence;
      Plotly.react(plot, figure.data, coloured(figure.layout, picture), { displayModeBar: false });
    };

    controls.forEach((control, number) => {
      const id = `${picture.id}-${number}`;
      const show = (position) => {
        positions[number] = position;
        draw();
      };
      const add = control.kind === "choice" ? choice : slider;
      picture.querySelector(".picture-controls").append(add(control, id, show));
    });

    draw();
    new ResizeObserver(() => plot.offsetWidth && Plotly.Plots.resize(plot)).observe(plot);
    const again = { attributes: true, attributeFilter: ["data-theme", "data-mode", "class"] };
    new MutationObserver(draw).observe(document.documentElement, again);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  };

  const choice = (control, id, show) => {
    const options = control.options.map((text, value) => make("option", { value, textContent: text }));
    const select = make("select", { id }, ...options);
    select.selectedIndex = control.start;
    select.addEventListener("change", () => show(select.selectedIndex));
    const label = make("label", { htmlFor: id, textContent: control.label });
    return make("div", { className: "picture-control" }, label, select);
  };

  const slider = (control, id, show) => {
    const last = control.options.length - 1;
    const range = make("input", { type: "range", id, min: 0, max: last, step: 1 });
    range.value = control.start;
    const label = make("label", { htmlFor: id, textContent: control.label });
    const output = make("output", { htmlFor: id });
    const read = () => {
      output.value = control.options[range.value];
      range.setAttribute("aria-valuetext", output.value);
    };
    read();
    range.addEventListener("input", () => (read(), show(Number(range.value))));
    const node = make("div", { className: "picture-control" }, label, output, range);
    if (control.plays) {
      node.classList.add("picture-plays");
      node.append(player(range, last));
    }
    return node;
  };

  const player = (range, last) => {
    const button = make("button", { type: "button", textContent: "Play" });
    let timer = null;
    const move = (position) => {
      range.value = position;
      range.dispatchEvent(new Event("input"));
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      button.textContent = "Play";
    };
    button.addEventListener("click", () => {
      if (timer !== null) return stop();
      if (Number(range.value) === last) move(0);
      button.textContent = "Stop";
      timer = setInterval(() => {
        move(Number(range.value) + 1);
        if (Number(range.value) === last) stop();
      }, STEP);
    });
    return button;
  };

  const all = () => document.querySelectorAll("figure.picture").forEach(start);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
