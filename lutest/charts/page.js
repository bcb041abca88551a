"use strict";
// Draws what the page's own data say, and nothing else: no address outside, no library.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const MOST_CHOSEN = 6, SLIDER_STEPS = 240, MOST_ROWS = 3000;
const SHAPES = ["M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-4.8L4.6,3.6H-4.6z",
  "M0,-5L5,0L0,5L-5,0z", "M0,4.8L4.6,-3.6H-4.6z", "M-4.5,-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z"];

// ---- elements: text is only ever set as text ----
const make = (space) => (name, attributes = {}, ...children) => {
  const element = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
};
const h = make(null), s = make("http://www.w3.org/2000/svg");
const bdi = (text) => h("bdi", {}, String(text));
const isolated = (text) => `\u2068${text}\u2069`; // what reads from right to left leaves its surroundings alone

const figure3 = (value) => {
  if (value === null || !Number.isFinite(value)) return "–";
  const digits = Math.abs(value) >= 1000 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value) || 1)));
  return value.toLocaleString("en", {minimumFractionDigits: Math.min(digits, 4), maximumFractionDigits: Math.min(digits, 4)});
};
const ms = (value) => `${figure3(value)} ms`;
const whole = (value) => value.toLocaleString("en");
const percent = (value) => value === null ? "–" : `${(100 * value).toFixed(1)} %`.replace("-", "−");
const label = (key) => data.keys[key].map(isolated).join(" · ");
const longLabel = (key) => data.columns.map((column, i) => `${isolated(column.name)} ${isolated(data.keys[key][i])}`).join(", ");
const level = (q) => `P${+(100 * q).toPrecision(10)}`;

// ---- what is asked, and the totals of it ----
const ids = data.keys.map((_, i) => i);
const median = data.quantiles.indexOf(0.5), tail = data.quantiles.indexOf(0.95);
const asked = {budget: 0, prompt: null, text: false, output: data.start.output, q: tail, workload: Object.keys(data.quality)[0]};
let chosen = [...data.start.chosen];

const between = (places, x) => { // the place before x, and how far x is on the way to the next
  let j = 0;
  while (j < places.length - 2 && places[j + 1] <= x) j++;
  if (places.length < 2) return [0, 0, 0];
  return [j, j + 1, Math.min(Math.max((x - places[j]) / (places[j + 1] - places[j]), 0), 1)];
};
const mixed = (a, b, share) => share === 0 ? a : share === 1 ? b : a + (b - a) * share;
const totalOf = (key, prompt, output, q) => {
  const held = data.totals[key];
  if (output > held.outputs[held.outputs.length - 1]) return null; // nothing is known of decode
  const [low, high, share] = between(held.outputs, output);
  const along = (row) => mixed(row[low], row[high], share);
  if (prompt === null) return along(held.own_ms[q]);
  if (prompt < held.reach[0] || prompt > held.reach[1]) return null; // no run was near
  const [below, above, part] = between(held.prompts, prompt);
  return mixed(along(held.ms[q][below]), along(held.ms[q][above]), part);
};
// Without an output length prefill decides, the total of one token, and has its share of the budget.
const promptOf = (key) => asked.prompt === null || !asked.text ? asked.prompt : asked.prompt + data.vision[key];
const latencies = () => ids.map((key) => totalOf(key, promptOf(key), asked.output ?? 1, asked.q));
const limit = () => asked.budget * (asked.output === null ? data.prefill_share : 1);
let latency = [];

// ---- tables behind pictures ----
const dataTable = (caption, columns, rows) => {
  const shown = rows.slice(0, MOST_ROWS);
  const kind = columns.map((_, i) => shown.some((row) => typeof row[i] === "string" && !/^([−+]?[\d.,]+( %)?|–)$/.test(row[i])) ? "text" : null);
  const cell = (value) => bdi(typeof value === "number" ? figure3(value) : value ?? "–");
  return h("table", {class: "data"}, h("caption", {}, caption, rows.length > MOST_ROWS ? `; the first ${whole(MOST_ROWS)} of ${whole(rows.length)} rows` : null),
    h("thead", {}, h("tr", {}, columns.map((name, i) => h("th", {scope: "col", class: kind[i]}, bdi(name))))),
    h("tbody", {}, shown.map((row) => h("tr", {}, row.map((value, i) => h("td", {class: kind[i]}, cell(value)))))));
};
const behind = (caption, columns, rows) => { // laid out when it is opened
  const place = h("div", {class: "scroll"});
  const details = h("details", {ontoggle: () => details.redraw()}, h("summary", {}, "Numbers"), place);
  details.redraw = () => { if (details.open) place.replaceChildren(dataTable(caption, columns, rows())); };
  return details;
};

// ---- scales and axes ----
const ticks = (low, high, log, wanted) => {
  if (log) {
    const found = [];
    for (const steps of [[1, 2, 5], [1, 3], [1]]) {
      found.length = 0;
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const step of steps) { const at = step * 10 ** power; if (at >= low * 0.999 && at <= high * 1.001) found.push(at); }
      if (found.length <= wanted + 2) break;
    }
    if (found.length > 1) return found;
  }
  const rough = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(+(i * step).toPrecision(12));
  return found;
};
const tickText = (value) => Math.abs(value) >= 1e4 && value % 1000 === 0 ? `${whole(value / 1000)}k` : +value.toPrecision(6) + "";
const scale = ({low, high, log}, from, to) => {
  const f = log ? Math.log : (value) => value;
  const span = f(high) - f(low) || 1;
  return (value) => from + (f(value) - f(low)) / span * (to - from);
};
const extent = (values) => {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value !== null && Number.isFinite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  return low <= high ? [low, high] : [0, 1];
};
// A chart that is drawn anew where its width or what it shows has changed.
const charts = [];
const chart = (parent, title, describe, draw, table) => {
  const caption = h("figcaption", {}), svg = s("svg", {role: "img"});
  const figure = h("figure", {}, h("h3", {}, title), svg, caption, table);
  parent.append(figure);
  const held = {
    draw() {
      const width = Math.max(280, Math.floor(figure.clientWidth || 600));
      svg.replaceChildren();
      const text = describe();
      caption.textContent = text;
      svg.setAttribute("aria-label", `${title}. ${text}`);
      draw(svg, width);
      table?.redraw();
    }, figure,
  };
  charts.push(held);
  return held;
};
const frame = (svg, width, height, x, y, margin = {}) => {
  const m = {left: 52, right: 16, top: 26, bottom: 42, ...margin};
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const sx = scale(x, m.left, width - m.right), sy = scale(y, height - m.bottom, m.top);
  for (const at of x.ticks ?? ticks(x.low, x.high, x.log, Math.max(3, Math.floor(width / 90))).filter((at) => !x.whole || Number.isInteger(at))) {
    svg.append(s("line", {class: "axis", x1: sx(at), x2: sx(at), y1: height - m.bottom, y2: height - m.bottom + 5}),
      s("text", {x: sx(at), y: height - m.bottom + 18, "text-anchor": "middle"}, x.text ? x.text(at) : tickText(at)));
  }
  for (const at of y.ticks ?? ticks(y.low, y.high, y.log, Math.max(3, Math.floor(height / 60)))) {
    svg.append(s("line", {class: "axis", x1: m.left, x2: width - m.right, y1: sy(at), y2: sy(at)}),
      s("text", {x: m.left - 7, y: sy(at) + 4, "text-anchor": "end"}, y.text ? y.text(at) : tickText(at)));
  }
  svg.append(s("text", {x: (m.left + width - m.right) / 2, y: height - 4, "text-anchor": "middle"}, x.label));
  svg.append(s("text", {x: 0, y: 11, class: "strong"}, y.label));
  return {sx, sy, bottom: height - m.bottom, top: m.top, left: m.left, right: width - m.right};
};
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
const hover = (element, text) => { element.append(s("title", {}, text)); return element; };

// ---- parts of the page ----
const main = document.querySelector("main");
const part = (id, title, ...texts) => {
  const section = h("section", {id}, h("h2", {}, title), texts.map((text) => h("p", {}, text)));
  main.append(section);
  return section;
};
const findings = (section, about) => {
  const held = (data.judged?.findings ?? []).filter((finding) => finding.about === about && finding.severity !== "ok");
  if (held.length) section.append(h("ul", {class: "findings"}, held.map((finding) =>
    h("li", {class: finding.severity}, h("b", {}, `${finding.severity}: ${finding.name.replaceAll("_", " ")}`), bdi(finding.sentence)))));
};

// ---- the budget ----
const drawBudget = () => {
  const section = part("budget", "The budget",
    "Which configurations stay within a budget. Choose a configuration to see its curves below; up to six at a time.");
  const [low, high] = data.start.budgets;
  const atStep = (step) => +(low * (high / low) ** (step / SLIDER_STEPS)).toPrecision(3);
  const slider = h("input", {type: "range", id: "slider", min: 0, max: SLIDER_STEPS, step: 1});
  const number = h("input", {type: "number", id: "budget-ms", min: 0, step: "any", "aria-label": "Budget in ms, exactly"});
  const lengths = (name, list) => h("datalist", {id: name}, list.map((value) => h("option", {value})));
  const first = data.common;
  const limits = (list) => ({min: list[0], max: list[list.length - 1]});
  const prompt = h("input", {type: "number", id: "prompt", step: 1, list: "prompts", placeholder: "as measured", ...limits(first.prompts)});
  const output = h("input", {type: "number", id: "output", step: 1, list: "outputs", placeholder: "not known", ...limits(first.outputs)});
  const counts = h("select", {id: "counts"}, h("option", {value: ""}, "vision and text"), h("option", {value: "text"}, "the text alone"));
  const quantile = h("select", {id: "quantile"}, data.quantiles.map((q, i) => h("option", {value: i, selected: i === asked.q}, level(q))));
  output.value = asked.output ?? "";
  section.append(h("form", {class: "controls", onsubmit: (event) => event.preventDefault()},
    h("label", {class: "wide"}, "Budget", slider), h("label", {}, "Budget, ms", number),
    h("label", {}, "Prompt tokens", prompt), data.vision && h("label", {}, "They are", counts), h("label", {}, "Output tokens", output),
    h("label", {}, "Quantile", quantile), lengths("prompts", first.prompts), lengths("outputs", first.outputs)));
  const count = h("output", {class: "count", id: "count", for: "slider", "aria-live": "polite"});
  const wide = data.layout.across !== null && data.levels[data.layout.across].length > 10;
  const row = h("div", {class: wide ? null : "row"}), left = h("div", {}), right = h("div", {class: wide ? "row" : null});
  row.append(left, right);
  section.append(count, row);
  const cells = drawGrid(left);
  left.append(h("ul", {class: "legend"}, [["f0", "half of the budget or less"], ["f1", "to 80 %"], ["f2", "✓ fits"],
    ["o0", "over, by up to 25 %"], ["o1", "up to twice"], ["o2", "more"]].map(([name, text]) => h("li", {}, h("span", {class: `cell ${name}`}), text))));
  left.append(h("p", {class: "quiet"}, `In each cell: latency in ms; ✓ fits. Between computed lengths the page interpolates, off by ${percent(data.error)} at most.`));
  left.append(behindGrid = behind("Latency of each configuration", [...data.columns.map((c) => c.name), "n", "latency, ms", "fits"],
    () => ids.map((key) => [...data.keys[key].map(String), data.n[key], latency[key], latency[key] === null ? "not known" : latency[key] <= limit() ? "yes" : "no"])));
  drawFitting(right);
  if (asked.workload !== undefined) drawFrontier(right);

  const show = () => {
    const most = limit();
    let fitting = 0;
    for (const key of ids) {
      const share = latency[key] === null ? null : latency[key] / most, cell = cells[key], fits = share !== null && share <= 1;
      fitting += fits;
      const name = share === null ? "none" : share <= 0.5 ? "f0" : share <= 0.8 ? "f1" : share <= 1 ? "f2" : share <= 1.25 ? "o0" : share <= 2 ? "o1" : "o2";
      if (cell.button.className !== `cell ${name}`) cell.button.className = `cell ${name}`;
      cell.value.textContent = `${fits ? "✓ " : ""}${figure3(latency[key])}`;
      cell.button.title = `${longLabel(key)}: ${what()} ${latency[key] === null ? "not known: no run had a decode step, or was near this prompt length" : ms(latency[key])}, ${fits ? "fits" : "does not fit"}; n = ${whole(data.n[key])} runs`;
      cell.button.setAttribute("aria-label", cell.button.title);
    }
    const text = `${fitting} of ${ids.length} configurations fit ${ms(asked.budget)}`;
    count.textContent = `${text} (${what()}${asked.output === null ? ` within ${percent(data.prefill_share)} of it` : ""})`;
    count.dataset.fitting = fitting;
    slider.setAttribute("aria-valuetext", text);
    for (const held of [fittingChart, frontierChart, sharesChart]) held?.draw();
    behindGrid.redraw();
  };
  const ask = () => { latency = latencies(); show(); };
  const setBudget = (value, from) => {
    if (!(value > 0)) return;
    asked.budget = value;
    if (from !== number) number.value = value;
    if (from !== slider) slider.value = Math.round(SLIDER_STEPS * Math.log(value / low) / Math.log(high / low));
    show();
  };
  const held = (input) => {
    if (input.value === "") return null;
    const value = Math.min(Math.max(Math.round(+input.value), +input.min), +input.max);
    return Number.isFinite(value) ? value : null;
  };
  slider.addEventListener("input", () => setBudget(atStep(+slider.value), slider));
  number.addEventListener("input", () => setBudget(+number.value, number));
  for (const [name, input] of [["prompt", prompt], ["output", output]]) {
    input.addEventListener("input", () => { asked[name] = held(input); ask(); });
    input.addEventListener("change", () => { input.value = held(input) ?? ""; });
  }
  counts.addEventListener("change", () => { asked.text = counts.value === "text"; ask(); });
  quantile.addEventListener("change", () => { asked.q = +quantile.value; ask(); });
  return {
    start() { latency = latencies(); setBudget(data.start.budget); },
    mark() { for (const key of ids) cells[key].button.setAttribute("aria-pressed", chosen.includes(key)); },
  };
};
let behindGrid, fittingChart, frontierChart, sharesChart;
const what = () => {
  const prompt = asked.prompt === null ? "prompts as measured" : `${whole(asked.prompt)} ${asked.text ? "text" : "prompt"} tokens`;
  const stage = asked.output === null ? "prefill" : `total of ${whole(asked.output)} output token${asked.output === 1 ? "" : "s"}`;
  return `${level(data.quantiles[asked.q])} ${stage}, ${prompt}`;
};

// Cells of all configurations: the column with the most numbers across, one with few values as tables side by side, the
// rest down; where that leaves most places empty, one after the other with their names.
const drawGrid = (parent) => {
  const cells = [];
  const cell = (key, ...name) => {
    const value = h("span", {});
    const button = h("button", {type: "button", class: "cell", "data-key": key, "aria-pressed": "false", onclick: () => toggle(key)}, name, value);
    cells[key] = {button, value};
    return button;
  };
  const {across, beside, down} = data.layout;
  if (across === null) {
    parent.append(h("ul", {class: "cells"}, ids.map((key) => h("li", {}, cell(key, h("small", {}, data.keys[key].map((value, i) => [i ? " · " : "", bdi(value)]).flat()))))));
    return cells;
  }
  const named = (i, value) => [bdi(data.columns[i].name), " ", bdi(value)];
  const values = (i) => data.levels[i];
  const facets = h("div", {class: ids.length > 90 ? "facets small" : "facets"});
  for (const side of beside === null ? [null] : values(beside)) {
    const held = ids.filter((key) => beside === null || data.keys[key][beside] === side);
    const rows = new Map();
    for (const key of held) {
      const name = JSON.stringify(down.map((i) => data.keys[key][i]));
      rows.set(name, rows.get(name) ?? new Map()).get(name).set(data.keys[key][across], key);
    }
    facets.append(h("div", {class: "facet"}, beside === null ? null : h("h3", {}, named(beside, side)), h("div", {class: "scroll"},
      h("table", {class: "grid"},
        h("thead", {}, h("tr", {}, h("td", {class: "corner"}, bdi(data.columns[across].name), " →"), values(across).map((value) => h("th", {scope: "col"}, bdi(value))))),
        h("tbody", {}, [...rows].map(([name, row]) => h("tr", {},
          h("th", {scope: "row"}, JSON.parse(name).map((value, i) => [i ? " · " : "", ...named(down[i], value)]).flat()),
          values(across).map((value) => h("td", {}, row.has(value) ? cell(row.get(value)) : null)))))))));
  }
  parent.append(facets);
  return cells;
};

const drawFitting = (parent) => {
  const table = behind("How many configurations fit", ["budget, ms", "configurations"], () => sortedLatencies().map((value, i) => [value / share(), i + 1]));
  const share = () => asked.output === null ? data.prefill_share : 1;
  const sortedLatencies = () => latency.filter((value) => value !== null).sort((a, b) => a - b);
  fittingChart = chart(parent, "How many fit", () => `Configurations within a budget, by budget: ${what()}. The dashed line is the budget.`, (svg, width) => {
    const [low, high] = data.start.budgets, found = sortedLatencies().map((value) => value / share());
    const {sx, sy, bottom, top} = frame(svg, width, 200, {low, high, log: true, label: "budget, ms"}, {low: 0, high: ids.length, label: "configurations"});
    const inside = (value) => Math.min(Math.max(value, low), high);
    const points = [[sx(low), sy(0)]];
    found.forEach((value, i) => points.push([sx(inside(value)), sy(i)], [sx(inside(value)), sy(i + 1)]));
    points.push([sx(high), sy(found.length)]);
    svg.append(s("path", {class: "step", d: path(points)}), s("line", {class: "now", x1: sx(inside(asked.budget)), x2: sx(inside(asked.budget)), y1: top, y2: bottom}));
  }, table);
};

const frontier = () => { // by rising latency, and so by rising quality: as `table.frontier`
  const held = data.quality[asked.workload].filter((row) => latency[row.key] !== null);
  const front = [];
  for (const row of [...held].sort((a, b) => latency[a.key] - latency[b.key] || b.quality - a.quality))
    if (!front.length || row.quality > front[front.length - 1].quality) front.push(row);
  return [held, front];
};
const drawFrontier = (parent) => {
  const workloads = Object.keys(data.quality);
  if (workloads.length > 1) parent.append(h("p", {class: "controls"}, h("label", {}, "Workload", h("select", {id: "workload", onchange: (event) => { asked.workload = event.target.value; frontierChart.draw(); }},
    workloads.map((name) => h("option", {value: name}, name))))));
  const names = [...data.columns.map((column) => column.name), "latency, ms", "quality", "n", "fits"];
  const table = behind("The frontier: no other configuration is as fast and better", names,
    () => frontier()[1].map((row) => [...data.keys[row.key].map(String), latency[row.key], row.quality, row.n, latency[row.key] <= limit() ? "yes" : "no"]));
  frontierChart = chart(parent, "Quality over latency", () => {
    const best = frontier()[1].filter((row) => latency[row.key] <= limit()).pop();
    const text = best ? `The best that fits: ${label(best.key)}, quality ${figure3(best.quality)} (n = ${whole(best.n)}) at ${ms(latency[best.key])}.` : "None that fits has a quality.";
    return `${text} The line joins the configurations that are worth choosing; filled ones fit.`;
  }, (svg, width) => {
    const [held, front] = frontier();
    const [low, high] = extent(held.map((row) => latency[row.key])), [worst, best] = extent(held.map((row) => row.quality)), gap = (best - worst) * 0.08 || 0.05;
    const x = {low: low * 0.93, high: Math.max(high * 1.07, low * 1.2), log: high > 4 * low, label: "latency, ms"};
    const {sx, sy, top, bottom, left, right} = frame(svg, width, 260, x, {low: worst - gap, high: best + gap, label: "quality"});
    svg.append(s("path", {class: "step", d: path(front.flatMap((row, i) => [...(i ? [[sx(latency[row.key]), sy(front[i - 1].quality)]] : []), [sx(latency[row.key]), sy(row.quality)]]))}));
    const at = sx(limit());
    if (at >= left && at <= right) svg.append(s("line", {class: "now", x1: at, x2: at, y1: top, y2: bottom}));
    for (const row of held) svg.append(hover(s("circle", {class: `option${latency[row.key] <= limit() ? " fits" : ""}`, cx: sx(latency[row.key]), cy: sy(row.quality), r: front.includes(row) ? 5 : 3.2, onclick: () => toggle(row.key)}),
      `${longLabel(row.key)}: quality ${figure3(row.quality)} (n = ${whole(row.n)}), ${ms(latency[row.key])}`));
  }, table);
};

// ---- curves ----
const chips = [];
const chooser = (parent) => {
  const list = h("ul", {class: "chosen"}), select = h("select", {onchange: () => { if (select.value !== "") toggle(+select.value); select.value = ""; }},
    h("option", {value: ""}, "add a configuration …"), ids.map((key) => h("option", {value: key}, label(key))));
  parent.append(h("div", {class: "controls"}, h("label", {}, "Configuration", select), list));
  chips.push(() => list.replaceChildren(...chosen.map((key, i) => h("li", {}, h("button", {type: "button", class: `s${i}`, title: "leave out", "aria-label": `leave out ${longLabel(key)}`, onclick: () => { toggle(key); select.focus(); }},
    s("svg", {viewBox: "-6 -6 12 12", "aria-hidden": "true"}, s("path", {class: "knot", d: SHAPES[i]})), h("span", {}, data.keys[key].map((value, j) => [j ? " · " : "", bdi(value)]).flat()), " ×")))));
};
const drawCurve = (parent, stage, title, axis, unit) => {
  const dots = data.judged?.dots?.[stage];
  const held = () => chosen.map((key, i) => ({key, i, curve: data.curves[key][stage]})).filter(({curve}) => curve);
  const table = behind(`${title}: knots of the chosen configurations`, [...data.columns.map((c) => c.name), axis, "n", "source", "P50, ms", "P95, ms"],
    () => held().flatMap(({key, curve}) => curve.tokens.map((at, j) => [...data.keys[key].map(String), at, curve.n[j], curve.source[j], curve.p50_ms[j], curve.p95_ms[j]])));
  chart(parent, title, () => {
    const lacking = chosen.length - held().length;
    return `P50 solid, P95 dashed, in ms${unit}; filled marks rest on runs, open ones do not, dotted is beyond all runs${dots ? "; dots are single runs" : ""}.${lacking ? ` ${lacking} of the chosen have no decode step.` : ""}`;
  }, (svg, width) => {
    const shown = held();
    if (!shown.length) return frame(svg, width, 120, {low: 0, high: 1, ticks: [], label: axis}, {low: 0, high: 1, ticks: [], label: chosen.length ? "no decode step" : "nothing chosen"});
    const rest = (curve) => curve.tokens.filter((_, j) => curve.n[j] > 0 && curve.source[j] !== "extrapolated");
    const low = 0, high = Math.ceil(1.15 * Math.max(...shown.map(({curve}) => Math.max(curve.tokens[0], ...rest(curve)))));
    for (const one of shown) one.curve = clipped(one.curve, high);
    const seen = shown.flatMap(({key}) => (dots?.[key] ?? []).map(([, value]) => value)).sort((a, b) => a - b);
    const lowest = Math.min(...shown.flatMap(({curve}) => curve.p50_ms.filter((_, j) => curve.n[j] > 0 || curve.n.every((n) => !n))));
    const top = Math.max(...shown.flatMap(({curve}) => curve.p95_ms), seen.length ? seen[Math.floor(0.99 * (seen.length - 1))] : 0) * 1.05;
    const log = lowest > 0 && top > 12 * lowest, bottom = log ? 0.8 * lowest : 0;
    const {sx, sy} = frame(svg, width, 320, {low, high, label: axis}, {low: bottom, high: top, log, label: "ms"});
    for (const {key, i} of shown) for (const [at, value] of dots?.[key] ?? [])
      if (at <= high && value <= top && value >= bottom) svg.append(s("circle", {class: `dot s${i}`, cx: sx(at).toFixed(1), cy: sy(value).toFixed(1), r: 2}));
    for (const {key, i, curve} of shown) {
      const points = (name) => [[sx(0), sy(curve[name][0])], ...curve.tokens.map((at, j) => [sx(at), sy(curve[name][j])]), ...(curve.end ? [[sx(high), sy(curve.end[name])]] : [])];
      const measured = curve.source.map((source) => source !== "extrapolated");
      const from = measured.indexOf(true) + 1, to = measured.lastIndexOf(true) + 2;
      const [p50, p95] = [points("p50_ms"), points("p95_ms")];
      svg.append(s("path", {class: `band s${i}`, d: `${path(p50)}${path([...p95].reverse()).replace("M", "L")}z`}));
      for (const [name, line] of [["p50", p50], ["p95", p95]]) {
        svg.append(s("path", {class: `${name} s${i}`, d: path(line.slice(from, to))}));
        for (const guess of [line.slice(0, from + 1), line.slice(to - 1)]) if (guess.length > 1) svg.append(s("path", {class: `${name} guess s${i}`, d: path(guess)}));
      }
      curve.tokens.forEach((at, j) => {
        const open = curve.n[j] === 0 || !["measured", "calibrated"].includes(curve.source[j]);
        svg.append(hover(s("path", {class: `knot s${i}${open ? " open" : ""}`, d: SHAPES[i], transform: `translate(${sx(at).toFixed(1)},${sy(curve.p50_ms[j]).toFixed(1)}) scale(${open ? 0.7 : 0.8})`}),
          `${longLabel(key)}, ${whole(at)} ${axis}: P50 ${ms(curve.p50_ms[j])}, P95 ${ms(curve.p95_ms[j])}; ${curve.source[j]}, n = ${whole(curve.n[j])}`));
      });
    }
  }, table);
};
const clipped = (curve, high) => { // a line is exact between its knots, so it may end between them
  const last = curve.tokens.findIndex((at) => at > high);
  if (last < 1) return curve;
  const share = (high - curve.tokens[last - 1]) / (curve.tokens[last] - curve.tokens[last - 1]);
  const cut = Object.fromEntries(Object.entries(curve).map(([name, values]) => [name, values.slice(0, last)]));
  cut.end = Object.fromEntries(["p50_ms", "p95_ms"].map((name) => [name, mixed(curve[name][last - 1], curve[name][last], share)]));
  return {...cut, high};
};
const drawCurves = () => {
  const section = part("curves", "How latency grows", "Prefill is everything up to the first token. A decode step makes one token more, and attends over all tokens before it.");
  findings(section, "curves");
  chooser(section);
  const row = h("div", {class: "row"});
  section.append(row);
  drawCurve(row, "prefill", "Prefill over prompt length", "prompt tokens", " a run");
  drawCurve(row, "decode_step", "Decode step over KV length", "tokens in the KV cache", " a step");
};

// ---- an output length that nobody knows ----
const shareAt = ({budget_ms, share}, budget) => {
  if (!budget_ms.length) return null;
  const [low, high, part] = between(budget_ms, budget);
  return mixed(share[low], share[high], part);
};
const drawShares = () => {
  const section = part("lengths", "When nobody knows how many tokens come out",
    "The probability that a run stays within a budget, over the table's output lengths: of prompts as measured.");
  findings(section, "lengths");
  const row = h("div", {class: "row"});
  section.append(row);
  const held = () => chosen.map((key, i) => ({key, i, ...data.shares[key]})).filter(({budget_ms}) => budget_ms.length);
  const table = behind("P(total ≤ budget) of the chosen configurations", [...data.columns.map((c) => c.name), "budget, ms", "probability"],
    () => held().flatMap(({key, budget_ms, share}) => budget_ms.map((budget, j) => [...data.keys[key].map(String), budget, share[j]])));
  sharesChart = chart(row, "P(total ≤ budget)", () => held().length
    ? `Within ${ms(asked.budget)}: ${held().map((one) => `${label(one.key)} ${percent(shareAt(one, asked.budget))}`).join("; ")}.`
    : "None of the chosen has a decode step.", (svg, width) => {
    const shown = held(), [low, high] = extent(shown.flatMap(({budget_ms}) => budget_ms));
    const {sx, sy, top, bottom} = frame(svg, width, 300, {low, high: Math.max(high, low * 1.1), log: true, label: "budget, ms"}, {low: 0, high: 1, label: "probability", ticks: [0, 0.25, 0.5, 0.75, 1]});
    for (const {key, i, budget_ms, share} of shown) {
      svg.append(s("path", {class: `p50 s${i}`, d: path([...budget_ms.map((at, j) => [sx(at), sy(share[j])]), [sx(high), sy(share[share.length - 1])]])}));
      for (let j = i % 3; j < budget_ms.length; j += 3) svg.append(hover(s("path", {class: `knot s${i}`, d: SHAPES[i], transform: `translate(${sx(budget_ms[j]).toFixed(1)},${sy(share[j]).toFixed(1)}) scale(.7)`}),
        `${longLabel(key)}: ${percent(share[j])} within ${ms(budget_ms[j])}`));
    }
    if (asked.budget >= low && asked.budget <= high) svg.append(s("line", {class: "now", x1: sx(asked.budget), x2: sx(asked.budget), y1: top, y2: bottom}));
  }, table);
  const together = new Map();
  for (const pairs of Object.values(data.lengths)) for (const [tokens, n] of pairs) together.set(tokens, (together.get(tokens) ?? 0) + n);
  const all = [...together].sort((a, b) => a[0] - b[0]), runs = all.reduce((sum, [, n]) => sum + n, 0), longest = all[all.length - 1][0];
  const size = Math.max(1, Math.ceil(longest / 48)), bins = new Map();
  for (const [tokens, n] of all) { const bin = Math.floor((tokens - 1) / size); bins.set(bin, (bins.get(bin) ?? 0) + n); }
  const lengthTable = behind("Output lengths of the table's runs", ["workload", "output tokens", "runs"], () => Object.entries(data.lengths).flatMap(([name, pairs]) => pairs.map(([tokens, n]) => [name, tokens, n])));
  chart(row, "Output lengths", () => `${whole(runs)} runs of ${whole(all[0][0])} to ${whole(longest)} output tokens${size > 1 ? `; a bar is ${size} lengths` : ""}. Workloads: ${Object.keys(data.lengths).map(isolated).join(", ")}.`, (svg, width) => {
    const most = Math.max(...bins.values());
    const {sx, sy} = frame(svg, width, 300, {low: 0.5, high: Math.ceil(longest / size) * size + 0.5, label: "output tokens", whole: true}, {low: 0, high: most * 1.05, label: "runs"});
    for (const [bin, n] of bins) {
      const from = bin * size + 0.5, x = sx(from) + 0.5;
      svg.append(hover(s("rect", {class: "bar", x, y: sy(n), width: Math.max(1, sx(from + size) - x - 0.5), height: sy(0) - sy(n)}),
        `${size > 1 ? `${bin * size + 1} to ${(bin + 1) * size}` : bin + 1} output tokens: ${whole(n)} runs, ${percent(n / runs)}`));
    }
  }, lengthTable);
};

// ---- runs ----
const STAGES = ["prefill", "decode step", "decode total", "total"];
const bars = (svg, width, rows, x, nominal) => { // a row each: a mark, its interval, and its name where there is room
  const space = rows.length <= 40 ? 17 : Math.max(3, Math.min(9, 900 / rows.length)), named = space >= 12;
  const left = named ? Math.min(width * 0.42, 12 + 6.4 * Math.max(4, ...rows.map(({name}) => name.replace(/[\u2068\u2069]/g, "").length))) : 14;
  const height = 52 + rows.length * space;
  const {sx, top, bottom} = frame(svg, width, height, x, {low: 0, high: 1, ticks: [], label: ""}, {left, top: 12});
  for (const at of nominal) svg.append(s("line", {class: "now", x1: sx(at), x2: sx(at), y1: top, y2: bottom}));
  rows.forEach((row, i) => {
    const y = top + (i + 0.5) * space, inside = (value) => Math.min(Math.max(value, x.low), x.high);
    const mark = s("g", {class: row.fault ? "s1" : "s0"});
    if (row.lower !== null) mark.append(s("line", {class: "p50", style: `stroke-width:${Math.min(1.6, space / 3)}`, x1: sx(inside(row.lower)), x2: sx(inside(row.upper)), y1: y, y2: y}));
    const scaled = Math.min(0.9, space / 13);
    mark.append(s("path", {class: "knot", d: row.fault ? SHAPES[3] : SHAPES[0], transform: `translate(${sx(inside(row.value)).toFixed(1)},${y.toFixed(1)}) scale(${scaled})`}));
    svg.append(hover(mark, row.text));
    if (named) svg.append(hover(s("text", {x: left - 8, y: y + 4, "text-anchor": "end"}, row.name), row.text));
  });
};
const select = (name, values, chosenValue, change) => h("label", {}, name, h("select", {onchange: (event) => change(event.target.value)}, values.map(([value, text]) => h("option", {value, selected: value === chosenValue}, text))));

const drawJudged = () => {
  const held = data.judged, by = (group, stage) => held[group].filter((score) => score.stage === stage);
  const clamped = held.n_clamped ? `, ${whole(held.n_clamped)} clamped at zero decode` : "";
  const left = Object.entries(held.left_out).map(([reason, n]) => `${whole(n)} ${reason}`).join(", ");
  const section = part("runs", "Against runs", `The table's predictions held against ${whole(held.n_runs)} runs${clamped}${left ? `; left out: ${left}` : ""}. Outliers stay.`);
  section.append(...held.warnings.map((text) => h("p", {class: "note"}, h("b", {}, "warning: "), bdi(text))));
  findings(section, "runs");
  const levels = Object.keys(held.overall[0].coverage), title = (name) => name.toUpperCase().replace("_", ".");
  section.append(h("div", {class: "scroll"}, dataTable("All runs; errors are of P50, ≤ P95 is the share of observations at or below the predicted P95",
    ["stage", "n", "R²", "MAE, ms", "MAPE", "median error", "bias", ...levels.map((q) => `pinball ${title(q)}, ms`), ...levels.map((q) => `≤ ${title(q)}`)],
    held.overall.map((score) => [score.stage, whole(score.n), score.r_squared === null ? "–" : score.r_squared.toFixed(4), score.mae_ms, percent(score.mape), percent(score.median_ape), percent(score.bias),
      ...levels.map((q) => score.pinball_ms[q]), ...levels.map((q) => percent(score.coverage[q][0]))]))));
  const row = h("div", {class: "row"}), state = {stage: "total", level: "p95"};
  section.append(row);
  const scatterTable = behind("Single runs, a sample", [...data.columns.map((c) => c.name), "observed, ms", "P50, ms", "P95, ms"],
    () => held.runs.map(([key, observed, p50, p95]) => [...data.keys[key].map(String), observed, p50, p95]));
  chart(row, "Predicted and observed totals", () => `${whole(held.runs.length)} runs, as many of each configuration. On the solid line a run takes as long as the predicted P50; orange diamonds took longer than their P95.`, (svg, width) => {
    const shown = held.runs.filter(([, observed, p50]) => observed > 0 && p50 > 0);
    const [low, high] = extent(shown.flatMap(([, observed, p50]) => [observed, p50]));
    const axis = {low: low * 0.95, high: high * 1.05, log: true}, {sx, sy} = frame(svg, width, 380, {...axis, label: "predicted P50, ms"}, {...axis, label: "observed, ms"});
    const dots = [[], []];
    for (const [, observed, p50, p95] of shown) dots[+(observed > p95)].push(`M${sx(p50).toFixed(1)},${sy(observed).toFixed(1)}`);
    svg.append(s("path", {class: "dot s0", d: dots[0].map((at) => `${at}m-2,0a2,2 0 1,0 4,0a2,2 0 1,0 -4,0`).join("")}),
      s("path", {class: "dot s1", style: "opacity:.8", d: dots[1].map((at) => `${at}m0,-3.2l3.2,3.2l-3.2,3.2l-3.2,-3.2z`).join("")}),
      s("path", {class: "step", d: path([[sx(axis.low), sy(axis.low)], [sx(axis.high), sy(axis.high)]])}));
  }, scatterTable);
  const errorTable = behind("By output length", ["stage", "output tokens", "n", "median error", "bias", ...levels.map((q) => `≤ ${title(q)}`)],
    () => held.by_output_tokens.map((score) => [score.stage, score.output_tokens, whole(score.n), percent(score.median_ape), percent(score.bias), ...levels.map((q) => percent(score.coverage[q][0]))]));
  chart(row, "Error of P50 by output length", () => `Median of (predicted − observed) / observed: above 0 predicted too high. ${STAGES.map((stage, i) => ["● ", "■ ", "▲ ", "◆ "][i] + stage).filter((_, i) => by("by_output_tokens", STAGES[i]).length).join(", ")}.`, (svg, width) => {
    const bands = [...new Set(held.by_output_tokens.map((score) => score.output_tokens))].sort((a, b) => parseInt(a) - parseInt(b));
    const [low, high] = extent([0, ...held.by_output_tokens.map((score) => score.bias)]), gap = Math.max(0.01, (high - low) * 0.1);
    const {sx, sy, left: from, right: to} = frame(svg, width, 380, {low: -0.5, high: bands.length - 0.5, ticks: bands.map((_, i) => i), text: (i) => bands[i], label: "output tokens"},
      {low: low - gap, high: high + gap, label: "error", text: (value) => `${+(100 * value).toPrecision(4)} %`}, {left: 60});
    svg.append(s("line", {class: "now", x1: from, x2: to, y1: sy(0), y2: sy(0)}));
    STAGES.forEach((stage, i) => {
      const scores = by("by_output_tokens", stage).filter((score) => score.bias !== null).sort((a, b) => bands.indexOf(a.output_tokens) - bands.indexOf(b.output_tokens));
      const at = (score) => [sx(bands.indexOf(score.output_tokens)), sy(score.bias)];
      svg.append(s("path", {class: `p50 s${i}`, d: path(scores.map(at))}), ...scores.map((score) => hover(s("path", {class: `knot s${i}`, d: SHAPES[i], transform: `translate(${at(score).map((v) => v.toFixed(1))})`}),
        `${stage}, ${score.output_tokens} output tokens: ${percent(score.bias)}, n = ${whole(score.n)}`)));
    });
  }, errorTable);
  const controls = h("div", {class: "controls"});
  section.append(controls);
  const coverageTable = behind("Coverage of each configuration, with its 95 % interval", ["stage", ...data.columns.map((c) => c.name), "n", "quantile", "share at or below", "from", "to", "median error", "bias"],
    () => held.by_key.flatMap((score) => levels.map((q) => [score.stage, ...data.keys[score.place].map(String), whole(score.n), title(q), ...score.coverage[q].map(percent), percent(score.median_ape), percent(score.bias)])));
  const coverage = chart(section, "Coverage of each configuration", () => {
    const scores = by("by_key", state.stage), q = data.quantiles[levels.indexOf(state.level)];
    const off = scores.filter(({coverage: {[state.level]: [, lower, upper]}}) => lower !== null && (lower > q || upper < q)).length;
    return `Share of the runs whose ${state.stage} stays at or below the predicted ${title(state.level)}; ${percent(q)} is right (dashed). ${scores[0]?.coverage[state.level][1] === null ? "Steps of a run go together: they have no interval." : `Lines are 95 % intervals: ${off} of ${scores.length} leave it out (orange diamonds); of right ones, one in twenty does.`}`;
  }, (svg, width) => {
    const q = data.quantiles[levels.indexOf(state.level)];
    const rows = by("by_key", state.stage).map((score) => {
      const [value, lower, upper] = score.coverage[state.level];
      return {name: label(score.place), value, lower, upper, fault: lower !== null && (lower > q || upper < q), text: `${longLabel(score.place)}: ${percent(value)} (${percent(lower)} to ${percent(upper)}), n = ${whole(score.n)} ${state.stage === "decode step" ? "steps" : "runs"}`};
    }).sort((a, b) => a.value - b.value);
    const [low] = extent(rows.flatMap((one) => [one.lower, one.value]));
    bars(svg, width, rows, {low: Math.max(0, Math.floor(low * 20) / 20), high: 1, label: `share at or below the predicted ${title(state.level)}`, text: (value) => `${+(100 * value).toPrecision(3)} %`}, [q]);
  }, coverageTable);
  const stages = STAGES.filter((stage) => by("by_key", stage).length);
  controls.append(select("Stage", stages.map((name) => [name, name]), state.stage, (value) => { state.stage = value; coverage.draw(); }),
    select("Quantile", levels.map((name) => [name, title(name)]), state.level, (value) => { state.level = value; coverage.draw(); }));
};

// ---- another table ----
const drawChanges = () => {
  const held = data.changes, name = (row) => row.place === null ? "all together" : label(row.place);
  const counted = ["slower", "faster", "same", "not sure"].map((verdict) => `${held.rows.filter((row) => row.verdict === verdict).length} ${verdict}`).join(", ");
  const section = part("changes", "What changed", `Since ${isolated(held.old)}: of ${held.rows.length} figures, ${counted}, beyond a tolerance of ${percent(held.tolerance)}. With a probability of 95 % none of the intervals is wrong.`);
  for (const [title, keys] of [["In the older table alone", held.only_old], ["New", held.only_new]])
    if (keys.length) section.append(h("p", {}, `${title}: ${keys.map((key) => key.map(isolated).join(" · ")).join("; ")}.`));
  const change = (ratio) => ratio === null ? "–" : `${ratio >= 1 ? "+" : "−"}${Math.abs(100 * (ratio - 1)).toFixed(1)} %`;
  const cells = (row) => [row.stage, name(row), level(row.q), row.old_ms, row.new_ms, change(row.ratio), `${change(row.lower)} to ${change(row.upper)}`, `${whole(row.n_old)}, ${whole(row.n_new)}`, row.verdict];
  const titles = ["stage", "configuration", "quantile", "old, ms", "new, ms", "change", "interval", "runs", ""];
  section.append(h("div", {class: "scroll"}, dataTable("All configurations together", titles, held.rows.filter((row) => row.place === null).map(cells))));
  const state = {stage: held.rows.some((row) => row.stage === "total") ? "total" : "prefill", q: "0.95"}, controls = h("div", {class: "controls"});
  section.append(controls);
  const shown = () => held.rows.filter((row) => row.place !== null && row.stage === state.stage && row.q === +state.q);
  const picture = chart(section, "Change of each configuration", () => `New over old, the surest and largest first: ${state.stage}, ${level(+state.q)}. Dashed: no change. Orange diamonds got slower beyond the tolerance.`, (svg, width) => {
    const rows = shown().map((row) => ({name: name(row), value: row.ratio, lower: row.lower, upper: row.upper, fault: row.verdict === "slower",
      text: `${longLabel(row.place)}: ${change(row.ratio)} (${change(row.lower)} to ${change(row.upper)}), ${ms(row.old_ms)} to ${ms(row.new_ms)}; ${row.verdict}; n = ${whole(row.n_old)} and ${whole(row.n_new)}`}));
    const [low, high] = extent([0.98, 1.02, ...rows.flatMap((row) => [row.lower, Math.min(row.upper, 4)])]);
    bars(svg, width, rows, {low, high, log: high > 3 * low, label: "new / old", text: (value) => change(value)}, [1]);
  }, behind("Every change, the surest and largest first", titles, () => held.rows.map(cells)));
  controls.append(select("Stage", [...new Set(held.rows.map((row) => row.stage))].map((value) => [value, value]), state.stage, (value) => { state.stage = value; picture.draw(); }),
    select("Quantile", [...new Set(held.rows.map((row) => row.q))].sort().map((q) => [String(q), level(q)]), state.q, (value) => { state.q = value; picture.draw(); }));
};

const toggle = (key) => {
  chosen = chosen.includes(key) ? chosen.filter((held) => held !== key) : [...chosen, key].slice(-MOST_CHOSEN);
  redrawChosen();
};
const redrawChosen = () => {
  budget.mark();
  for (const show of chips) show();
  for (const held of charts) held.draw();
};

const budget = drawBudget();
drawCurves();
if (data.shares) drawShares();
if (data.judged) drawJudged();
if (data.changes) drawChanges();
document.getElementById("parts").append(...[...document.querySelectorAll("main > section")].map((section) => h("li", {}, h("a", {href: `#${section.id}`}, section.querySelector("h2").textContent))));
budget.start();
redrawChosen();
let width = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; for (const held of charts) held.draw(); } });
window.addEventListener("beforeprint", () => { for (const held of charts) held.draw(); });
})();
