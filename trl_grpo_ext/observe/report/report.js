"use strict";
// Everything shown comes from the data block and is written with textContent: nothing in it is ever parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function show(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return Number.isInteger(value) ? String(value) : value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
}

function table(heads, rows, numeric = () => false) {
  const cell = (tag, value, i) => {
    const content = value instanceof Node ? value : tag === "td" ? show(value) : value;
    const node = make(tag, { className: numeric(i) ? "number" : "" }, content);
    if (tag === "td") node.dataset.head = heads[i];
    return node;
  };
  const head = make("tr", {}, ...heads.map((text, i) => cell("th", text, i)));
  const body = rows.map((row) => make("tr", {}, ...row.map((value, i) => cell("td", value, i))));
  return make("div", { className: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

// Headline

function headline() {
  const runs = make("div", { className: "runs" });
  for (const run of data.runs) {
    const card = make("div", { className: "card" });
    if (data.runs.length > 1) card.append(make("h3", { textContent: run.name }));
    const sign = { good: "▲ ", bad: "▼ ", neutral: "■ " }[run.headline.tone];
    card.append(make("p", { className: `verdict ${run.headline.tone}`, textContent: sign + run.headline.text }));
    for (const alarm of run.headline.alarms) {
      const text = make("strong", { textContent: `Alarm ${alarm.name}` });
      const rest = ` since step ${alarm.step}: ${alarm.evidence} ${alarm.remedy ? `→ ${alarm.remedy}` : ""}`;
      card.append(make("p", { className: "notice alarm" }, text, rest));
    }
    const list = make("dl", { className: "numbers" });
    for (const [label, value, detail] of run.headline.numbers) {
      const value_ = make("dd", { className: "value", textContent: value });
      const detail_ = make("dd", { className: "quiet", textContent: detail });
      list.append(make("div", {}, make("dt", { textContent: label }), value_, detail_));
    }
    card.append(list);
    for (const note of run.notes) card.append(make("p", { className: "quiet note", textContent: note }));
    runs.append(card);
  }
  byId("headline").append(runs);
  const names = data.runs.map((run) => run.name).join(" and ");
  document.title = `Run ${names}`;
  byId("title").textContent = `Run ${names}`;
  byId("written").textContent = `Report of ${data.runs.map((run) => run.folder).join(" and ")}, written ${data.written}`;
}

// Plots

const AXES = { step: "optimizer step", rollouts: "rollouts sampled", hours: "hours since the first log" };
const DASHES = ["none", "6 4", "2 3"];
const LEFT = 60, RIGHT = 10, TOP = 8, BOTTOM = 36, HEIGHT = 220;

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const large = Math.max(Math.abs(low), Math.abs(high));
  const text = (v) => large >= 1e5 || large < 1e-3 ? (v === 0 ? "0" : v.toExponential(1)) : v.toFixed(digits);
  return found.map((v) => [v, text(v)]);
}

function logTicks(low, high) {
  const found = [];
  const every = Math.max(1, Math.ceil((high - low) / 6));
  for (let i = Math.ceil(low); i <= high; i += every) found.push([i, Math.abs(i) < 4 ? String(10 ** i) : `1e${i}`]);
  return found.length > 1 ? found : [[low, show(10 ** low)], [high, show(10 ** high)]];
}

function span(values, pad) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) return [0, 1];
  const room = high > low ? pad * (high - low) : pad === 0 ? 0.5 : Math.max(Math.abs(high) * 0.1, 1e-9);
  return [low - room, high + room];
}

function className(line, kind) {
  return `${kind}${line.color < 0 ? "-total" : line.color % 6}`;
}

function dash(line) {
  return DASHES[Math.floor(Math.max(line.color, 0) / 6) % DASHES.length];
}

class Plot {
  constructor(panel) {
    this.panel = panel;
    this.legend = make("ul", { className: "legend" });
    this.svg = draw("svg", { role: "img", tabindex: 0, "aria-label": panel.title });
    this.node = make("div", { className: "plot" }, make("h3", { textContent: panel.title }), this.legend, this.svg);
    this.entries = panel.lines.map((line) => {
      const swatch = draw("svg", { viewBox: "0 0 22 10" });
      const stroke = { class: className(line, "s"), "stroke-width": 2.5, "stroke-dasharray": dash(line) };
      swatch.append(draw("line", { x1: 0, x2: 22, y1: 5, y2: 5, ...stroke }));
      const value = make("span");
      const label = data.runs.length > 1 ? data.axes[line.run].name : line.label;
      this.legend.append(make("li", {}, swatch, `${label} `, value));
      return value;
    });
    this.where = make("li", { className: "quiet" });
    const banded = panel.lines.some((line) => line.low);
    this.hint = banded ? `last values; band: ${panel.band}` : "last values";
    this.legend.append(this.where);
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.read(null));
    this.svg.addEventListener("blur", () => this.read(null));
    this.svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const at = this.stops.indexOf(this.at);
      const next = at < 0 ? (move > 0 ? 0 : this.stops.length - 1) : at + move;
      this.read(this.stops[Math.max(0, Math.min(this.stops.length - 1, next))]);
    });
  }

  render(kind) {
    const { panel } = this;
    const width = this.svg.clientWidth || 400;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const axisOf = (line) => data.axes[line.run].x[kind] || [];
    const map = (v) => (v === null ? null : panel.log ? Math.log10(v) : v);
    this.series = panel.lines.map((line) => {
      const x = axisOf(line);
      const points = x.map((at, i) => [at, line.y[i], line.low && line.low[i], line.high && line.high[i]]);
      return points.filter(([at, y]) => at !== null && y !== null);
    });
    this.stops = [...new Set(this.series.flatMap((points) => points.map((p) => p[0])))].sort((a, b) => a - b);
    const [x0, x1] = span(panel.lines.flatMap(axisOf), 0);
    const values = this.series.flatMap((points) => points.flatMap((p) => p.slice(1).filter((v) => v !== null).map(map)));
    const [y0, y1] = span([...values, ...(panel.limits || [])], 0.06);
    this.x = (v) => LEFT + ((v - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
    this.invert = (at) => x0 + ((at - LEFT) / (width - LEFT - RIGHT)) * (x1 - x0);
    const y = (v) => TOP + (1 - (map(v) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
    const parts = [];
    for (const [value, text] of panel.log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
      const at = TOP + (1 - (value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
      parts.push(draw("line", { class: "tick", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
      parts.push(draw("text", { x: LEFT - 5, y: at + 4, "text-anchor": "end" }, text));
    }
    for (const [value, text] of ticks(x0, x1, Math.max(3, Math.floor(width / 75)))) {
      parts.push(draw("text", { x: this.x(value), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, text));
    }
    parts.push(draw("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, AXES[kind]));
    const unit = panel.unit + (panel.log ? ", logarithmic" : "");
    const middle = (TOP + HEIGHT - BOTTOM) / 2;
    parts.push(draw("text", { x: 10, y: middle, "text-anchor": "middle", transform: `rotate(-90 10 ${middle})` }, unit));
    this.series.forEach((points, i) => {
      const line = panel.lines[i];
      const band = points.filter((p) => p[2] !== null && p[3] !== null && p[2] !== undefined);
      if (band.length > 1) {
        const edge = [...band.map((p) => [p[0], p[3]]), ...band.reverse().map((p) => [p[0], p[2]])];
        const path = edge.map(([a, b]) => `${this.x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
        parts.push(draw("polygon", { class: `band ${className(line, "f")}`, points: path }));
      }
      const path = points.map(([a, b]) => `${this.x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
      const stroke = { class: `line ${className(line, "s")}`, "stroke-dasharray": dash(line) };
      parts.push(draw("polyline", { ...stroke, points: path }));
      if (points.length < 20) {
        const dot = (p) => draw("circle", { class: className(line, "f"), cx: this.x(p[0]), cy: y(p[1]), r: 2.6 });
        parts.push(...points.map(dot));
      }
    });
    data.axes.forEach((axis, run) => {
      const [kindOfMark, whose] = data.runs.length > 1 ? [`mark f${run}`, `${axis.name}: alarm`] : ["mark", "Alarm"];
      for (const alarm of axis.alarms) {
        const index = axis.x.step.findIndex((step) => step >= alarm.step);
        const at = index < 0 ? null : (axis.x[kind] || [])[index];
        if (at === null || at === undefined) continue;
        const [cx, cy] = [this.x(at), HEIGHT - BOTTOM - 10 * run];
        const title = draw("title", {}, `${whose} ${alarm.name} at step ${alarm.step}`);
        parts.push(draw("path", { class: kindOfMark, d: `M${cx - 5} ${cy}h10l-5 -9z` }, title));
      }
    });
    this.cursor = draw("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    this.svg.replaceChildren(...parts, this.cursor);
    this.kind = kind;
    this.read(null);
  }

  point(offset) {
    const at = this.invert(offset);
    let best = null;
    for (const stop of this.stops) if (best === null || Math.abs(stop - at) < Math.abs(best - at)) best = stop;
    this.read(best);
  }

  // The values at `at`, or the last ones.
  read(at) {
    this.at = at;
    this.series.forEach((points, i) => {
      const before = at === null ? points : points.filter((p) => p[0] <= at);
      this.entries[i].textContent = before.length ? show(before[before.length - 1][1]) : "–";
    });
    const unit = { step: "step", rollouts: "rollouts", hours: "hours" }[this.kind];
    this.where.textContent = at === null ? this.hint : `at ${unit} ${show(at)}`;
    this.cursor.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.x(at));
  }
}

function plots() {
  if (data.constants.length) {
    byId("plots").hidden = byId("constants").hidden = false;
    byId("constants").textContent = `Never moved: ${data.constants.join("; ")}.`;
  }
  if (!data.panels.length) return;
  byId("plots").hidden = false;
  const main = [], extra = [];
  for (const panel of data.panels) {
    const plot = new Plot(panel);
    (panel.is_extra ? extra : main).push(plot);
    (panel.is_extra ? byId("extras").querySelector(".grid") : byId("panels")).append(plot.node);
  }
  if (extra.length) {
    byId("extras").hidden = false;
    byId("extras").querySelector("summary").textContent = `Other metrics (${extra.length})`;
  }
  const select = byId("axis");
  for (const kind of Object.keys(AXES)) {
    if (data.axes.every((axis) => kind in axis.x)) select.append(make("option", { value: kind, textContent: AXES[kind] }));
  }
  // Two runs are compared at the same number of rollouts where both count them.
  const kinds = [...select.options].map((option) => option.value);
  if (data.runs.length > 1 && kinds.includes("rollouts")) select.value = "rollouts";
  const render = () => {
    main.forEach((plot) => plot.render(select.value));
    if (byId("extras").open) extra.forEach((plot) => plot.render(select.value));
  };
  select.addEventListener("change", render);
  byId("extras").addEventListener("toggle", render);
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    render();
  }).observe(document.body);
  render();
  const averaged = Math.max(...data.axes.map((axis) => axis.averaged));
  const marks = data.axes.some((axis) => axis.alarms.length) ? "Triangles mark alarms. " : "";
  const bands = averaged > 1 ? `Every point averages ${averaged} logs. ` : "";
  byId("averaged").textContent = `${marks}${bands}Point at a plot to read its values.`;
}

// Tasks

function tasks() {
  const box = byId("tasks").querySelector("div");
  for (const run of data.runs.filter((run) => run.tasks.length)) {
    byId("tasks").hidden = false;
    if (data.runs.length > 1) box.append(make("h3", { textContent: run.name }));
    box.append(table(data.task_heads, run.tasks, (i) => i > 0 && i !== 4));
  }
}

// Alarms

function alarms() {
  const box = byId("alarms").querySelector("div");
  for (const run of data.runs) {
    if (data.runs.length > 1) box.append(make("h3", { textContent: run.name }));
    if (!run.alarms.length) {
      box.append(make("p", { textContent: "No alarm was raised." }));
      continue;
    }
    const rows = run.alarms.map((alarm) => [
      alarm.step, alarm.cleared === null ? "open" : alarm.cleared, alarm.name, alarm.evidence, alarm.cause, alarm.remedy, alarm.action,
    ]);
    box.append(table(["Raised at step", "Cleared at step", "Alarm", "Evidence", "Likely cause", "Remedy", "Action taken"], rows, (i) => i < 2));
    if (run.alarms_left_out) box.append(make("p", { textContent: `${run.alarms_left_out} older alarms are not shown.` }));
  }
}

// Held-out prompts

function heldOut() {
  const box = byId("held-out").querySelector("div");
  for (const run of data.runs.filter((each) => each.held_out)) {
    const { first, last, table: rows, answers, note } = run.held_out;
    byId("held-out").hidden = false;
    if (data.runs.length > 1) box.append(make("h3", { textContent: run.name }));
    const signed = (v) => (v > 0 ? `+${show(v)}` : show(v));
    const shown = rows.map(([name, before, after, change, noise, count, verdict]) => [
      name, before, after, signed(change), noise === null ? "–" : `± ${show(noise)}`, count, verdict,
    ]);
    const heads = ["Measure", `Step ${first}`, `Step ${last}`, "Change", "Noise", "Prompts", "Verdict"];
    box.append(table(heads, shown, (i) => i > 0 && i < 6));
    const told = "Noise is twice the standard error of the change, each prompt compared with itself.";
    box.append(make("p", { className: "quiet", textContent: `${note} ${told}` }));
    if (answers.length) box.append(pairs(answers, first, last));
  }
}

function pairs(answers, first, last) {
  const gain = (a) => (a[2] === null || a[4] === null ? 0 : a[4] - a[2]);
  const orders = { "as in the dataset": () => 0, "largest gain": (a, b) => gain(b) - gain(a), "largest loss": (a, b) => gain(a) - gain(b) };
  const select = make("select", {}, ...Object.keys(orders).map((name) => make("option", { value: name, textContent: name })));
  const list = make("div"), more = make("button", { type: "button", textContent: "Show more" });
  let limit = 10;
  const update = () => {
    const found = [...answers].sort(orders[select.value]);
    list.replaceChildren(...found.slice(0, limit).map((answer) => pair(answer, gain(answer), first, last)));
    more.hidden = found.length <= limit;
  };
  select.addEventListener("input", () => { limit = 10; update(); });
  more.addEventListener("click", () => { limit += PAGE; update(); });
  update();
  const controls = make("p", { className: "controls" }, make("label", {}, "Answers, sorted by ", select));
  return make("div", {}, controls, list, more);
}

function pair([question, before, valueBefore, after, valueAfter], gain, first, last) {
  const what = make("span", { className: "what", textContent: question });
  const numbers = `reward ${show(valueBefore)} → ${show(valueAfter)}`;
  const badge = make("span", { className: `badge ${gain > 0 ? "good" : gain < 0 ? "bad" : ""}`, textContent: gain > 0 ? "better" : gain < 0 ? "worse" : "same" });
  const node = make("details", { className: "group card" }, make("summary", {}, what, make("span", { className: "quiet", textContent: numbers }), badge));
  node.addEventListener("toggle", () => {
    if (!node.open || node.childElementCount > 1) return;
    const side = (step, text) => make("div", {}, make("h3", { textContent: `Step ${step}` }), make("div", { className: "text", textContent: text }));
    node.append(make("pre", { textContent: question }), make("div", { className: "sides" }, side(first, before), side(last, after)));
  });
  return node;
}

// Groups

const PAGE = 30;

function groups() {
  const controls = Object.fromEntries(["which", "text", "step", "kind", "order"].map((id) => [id, byId(id)]));
  data.runs.forEach((run, i) => controls.which.append(make("option", { value: i, textContent: run.name })));
  controls.which.parentElement.hidden = data.runs.length < 2;
  const steps = () => {
    const found = [...new Set(data.runs[controls.which.value].groups.map((group) => group.step))];
    controls.step.replaceChildren(make("option", { value: "", textContent: "all steps" }));
    for (const step of found) controls.step.append(make("option", { value: step, textContent: step }));
  };
  const orders = {
    newest: (a, b) => b.step - a.step, oldest: (a, b) => a.step - b.step,
    spread: (a, b) => b.spread - a.spread, best: (a, b) => b.mean - a.mean, worst: (a, b) => a.mean - b.mean,
  };
  let limit = PAGE;
  const update = () => {
    const run = data.runs[controls.which.value];
    const words = controls.text.value.toLowerCase();
    const hasText = (group) => [group.prompt, ...group.rows.map((row) => row[0])].some((t) => t.toLowerCase().includes(words));
    const found = run.groups.filter((group) =>
      (controls.step.value === "" || group.step === Number(controls.step.value)) &&
      (controls.kind.value === "" || group.flat === (controls.kind.value === "flat")) &&
      (words === "" || hasText(group)));
    found.sort(orders[controls.order.value]);
    byId("list").replaceChildren(...found.slice(0, limit).map((group) => card(run, group)));
    const matching = run.groups.length ? `${found.length} of ${run.groups.length} groups. ` : "";
    byId("found").textContent = matching + run.groups_note;
    byId("more").hidden = found.length <= limit;
  };
  const restart = () => {
    limit = PAGE;
    update();
  };
  for (const control of Object.values(controls)) control.addEventListener("input", restart);
  controls.which.addEventListener("input", () => { steps(); restart(); });
  byId("more").addEventListener("click", () => { limit += PAGE; update(); });
  steps();
  update();
}

function card(run, group) {
  const what = make("span", { className: "what", textContent: group.prompt });
  const flat = make("span", { className: "badge", textContent: group.flat ? "flat" : "informative" });
  const numbers = `step ${group.step} · ${group.rows.length} completions · mean ${show(group.mean)} · spread ${show(group.spread)}`;
  const summary = make("summary", {}, what, make("span", { className: "quiet", textContent: numbers }), flat);
  const node = make("details", { className: "group card" }, summary);
  node.addEventListener("toggle", () => {
    if (!node.open || node.childElementCount > 1) return;
    const rows = group.rows.map(([completion, advantage, total, values]) => [
      show(advantage), show(total), make("div", { className: "text", textContent: completion }), ...values,
    ]);
    const heads = ["Advantage", "Total reward", "Completion", ...run.columns];
    const isText = (i) => i === 2 || group.rows.some((row) => typeof row[3][i - 3] === "string");
    node.append(make("pre", { textContent: group.prompt }), table(heads, rows, (i) => !isText(i)));
  });
  return node;
}

// Configuration and versions

function configuration() {
  const box = byId("configuration").querySelector("div");
  const names = data.runs.map((run) => run.name);
  const fold = (text, content) => make("details", {}, make("summary", { textContent: text }), content);
  if (names.length > 1) {
    box.append(data.differences.length
      ? table(["Option that differs", ...names], data.differences)
      : make("p", { textContent: "The configurations do not differ, as far as they are known." }));
  }
  const versions = byId("versions").querySelector("div");
  for (const run of data.runs) {
    const part = make("div");
    if (run.facts.length) part.append(table(["Run", "Value"], run.facts));
    if (run.changed.length || run.unchanged.length) {
      part.append(table(["Option set", "Value", "Default"], run.changed));
      part.append(fold(`Options at their default (${run.unchanged.length})`, table(["Option", "Value", "Default"], run.unchanged)));
    } else part.append(make("p", { textContent: "The configuration is unknown." }));
    box.append(names.length > 1 ? fold(`All of ${run.name}`, part) : part);
    if (names.length > 1) versions.append(make("h3", { textContent: run.name }));
    versions.append(run.versions.length ? table(["Package", "Version"], run.versions) : make("p", { textContent: "The versions are unknown." }));
  }
}

headline();
tasks();
plots();
heldOut();
alarms();
groups();
configuration();
