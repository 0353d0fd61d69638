// Draws the figures of a page and switches interactive ones between their stored states. No kernel, no server.
"use strict";

(() => {
  const clone = (x) => JSON.parse(JSON.stringify(x));

  // The figure of state k: the first figure with its listed values replaced (see seqarch/explore.py).
  function figureOf(stored, k) {
    const figure = clone({ data: stored.data, layout: stored.layout });
    const explore = figure.layout.meta.explore;
    delete figure.layout.meta.explore;
    for (const [p, v] of explore.states[k]) {
      const path = explore.paths[p], value = explore.values[v];
      let target = figure;
      for (const key of path.slice(0, -1)) target = target[key];
      const last = path[path.length - 1];
      if (value !== null && typeof value === "object" && value.$delete) delete target[last];
      else target[last] = clone(value);
    }
    return figure;
  }

  // Text and tooltips in the colours of the page's theme; narrow screens get smaller margins.
  function dressed(figure, width) {
    const style = getComputedStyle(document.body);
    const ink = style.color;
    const paper = getComputedStyle(document.documentElement).getPropertyValue("--pst-color-background").trim() || "#fff";
    figure.layout.font = Object.assign({}, figure.layout.font, { color: ink });
    figure.layout.hoverlabel = { bgcolor: paper, font: { color: ink } };
    if (width < 500) {
      figure.layout.font.size = 11;
      const margin = figure.layout.margin || {};
      figure.layout.margin = { l: Math.min(margin.l ?? 44, 44), r: 8, t: margin.t ?? 40, b: margin.b ?? 44 };
      for (const name of ["title"]) {
        const title = figure.layout[name];
        if (title && title.text) figure.layout[name] = Object.assign({}, title, { font: { size: 12 } });
      }
    }
    return figure;
  }

  function makeControl(control, onChange) {
    const label = document.createElement("label");
    const text = document.createElement("span");
    text.textContent = control.name.replaceAll("_", " ");
    let input, read;
    if (control.kind === "choice") {
      input = document.createElement("select");
      control.values.forEach((value, i) => input.add(new Option(value, i)));
      input.value = control.start;
      read = () => Number(input.value);
    } else if (control.kind === "toggle") {
      input = document.createElement("input");
      input.type = "checkbox";
      input.checked = control.start === 1;
      read = () => (input.checked ? 1 : 0);
    } else {
      input = document.createElement("input");
      Object.assign(input, { type: "range", min: 0, max: control.values.length - 1, step: 1, value: control.start });
      read = () => Number(input.value);
    }
    label.append(text, input);
    if (control.kind === "slider") {
      const shown = document.createElement("output");
      label.append(shown);
      const say = () => {
        shown.textContent = control.values[read()];
        input.setAttribute("aria-valuetext", String(control.values[read()]));
      };
      input.addEventListener("input", say);
      say();
    }
    input.addEventListener("input", onChange);
    return { label, read };
  }

  function start(element) {
    const plot = element.querySelector(".seqarch-plot");
    const stored = JSON.parse(element.querySelector('script[type="application/json"]').textContent);
    const explore = (stored.layout.meta || {}).explore;
    let controls = [];
    const state = () => controls.reduce((k, c, i) => k * explore.controls[i].values.length + c.read(), 0);
    const draw = () => {
      const figure = explore ? figureOf(stored, state()) : clone({ data: stored.data, layout: stored.layout });
      dressed(figure, element.clientWidth);
      Plotly.react(plot, figure.data, figure.layout, { responsive: true, displaylogo: false, displayModeBar: false });
      plot.dataset.state = explore ? state() : 0;
    };
    if (explore) {
      const bar = element.querySelector(".seqarch-controls");
      controls = explore.controls.map((c) => makeControl(c, draw));
      bar.append(...controls.map((c) => c.label));
      bar.hidden = false;
    }
    draw();
    return draw;
  }

  const drawn = [];
  // Figures are drawn when they come near the screen: a long page opens quickly.
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      drawn.push(start(entry.target));
    }
  }, { rootMargin: "800px" });
  document.querySelectorAll(".seqarch-figure").forEach((f) => observer.observe(f));

  // The theme switch changes an attribute of <html>; all figures follow.
  new MutationObserver(() => drawn.forEach((draw) => draw()))
    .observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
})();
