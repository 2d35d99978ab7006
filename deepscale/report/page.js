// The page: what of the data each figure shows, the legend, the table, and one run in detail. Text of a run is only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const byId = (id) => document.getElementById(id);
const single = runs.length === 1;
const depths = runs.map((run) => run.numbers.depth).filter(Boolean);
const sameDepth = new Set(depths).size < 2;
// Probes have one record each: then there is no first and last, and nothing over training.
const once = runs.every((run) => Object.values(run.curves).every((curves) => curves.steps[0] === curves.steps[1]));
const state = { quantity: "output", x: sameDepth ? "layer" : "relative", steps: "linear", hot: null, hidden: new Set(), run: null };
const FEW = 8, LISTED = 20;
const COLOURS = {
  light: ["#0072b2", "#d55e00", "#00845f", "#b4478a", "#a87400", "#3a9bd6", "#4b4b4b", "#7a3fc4"],
  dark: ["#56b4e9", "#ff8a3d", "#2fc49a", "#e49cc7", "#e6b800", "#9fd4f5", "#c9c9c9", "#b79bf0"],
};

const KINDS = {
  integer: (v) => v.toLocaleString("en"),
  number: (v) => number(v),
  percent: (v) => `${(100 * v).toFixed(2)} %`,
  seconds: (v) => (v < 1 ? `${number(1000 * v)} ms` : `${number(v)} s`),
  bytes: (v) => (v < 2 ** 30 ? `${number(v / 2 ** 20)} MiB` : `${number(v / 2 ** 30)} GiB`),
};
const known = (run, key) => typeof run.numbers[key] === "number";
const shown = (run, key) => (known(run, key) ? KINDS[data.numbers[key][1]](run.numbers[key]) : "–");

function el(tag, properties = {}, ...children) {
  const { dataset, style, ...own } = properties, element = Object.assign(document.createElement(tag), own);
  Object.assign(element.dataset, dataset);
  for (const [key, value] of Object.entries(style ?? {})) element.style.setProperty(key, value);
  for (const [key, value] of Object.entries(own)) if (key.startsWith("aria-")) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// -------------------------------------------------------------------------------------------------------------- colours

// More runs than colours that can be told apart: a scale, over the first of these that differs between the runs.
const scaled = runs.length <= FEW ? null : ["depth", "validation_accuracy", "parameters"].find((key) => new Set(runs.map((run) => run.numbers[key])).size > 2);
const scaleOf = (run) => (scaled ? (scaled === "validation_accuracy" ? run.numbers[scaled] : Math.log10(run.numbers[scaled])) : runs.indexOf(run));
const scaleEnds = runs.map(scaleOf).filter(Number.isFinite).reduce(([lo, hi], v) => [Math.min(lo, v), Math.max(hi, v)], [Infinity, -Infinity]);
const colours = new Map();

function colour(run) {
  if (!colours.has(run)) {
    const of = COLOURS[dark.matches ? "dark" : "light"], at = (scaleOf(run) - scaleEnds[0]) / (scaleEnds[1] - scaleEnds[0] || 1);
    colours.set(run, runs.length <= FEW ? of[runs.indexOf(run)] : Number.isFinite(at) ? css(shade(at)) : theme("--soft"));
  }
  return colours.get(run);
}

// --------------------------------------------------------------------------------------------------------------- series

const cache = new WeakMap();

// The base64 arrays of `packed` as one { y (log10, NaN for a gap), zeros, nonfinite } per record.
function unpacked(packed) {
  if (!cache.has(packed)) {
    const array = (text) => text && new Int16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
    const [y, zeros, nonfinite, closed] = [packed.y, packed.z, packed.n, packed.c].map(array), size = y.length / packed.steps.length;
    const part = (all, r) => all?.subarray(r * size, (r + 1) * size), some = (part) => (part?.some((n) => n) ? part : undefined);
    cache.set(packed, packed.steps.map((_, r) => ({
      y: Float32Array.from(part(y, r), (v) => (v === -32768 ? NaN : v / 700)), zeros: some(part(zeros, r)), nonfinite: some(part(nonfinite, r)),
      closed: some(part(closed, r)),
    })));
  }
  return cache.get(packed);
}

const placeOf = (packed) => (typeof packed.place === "number" ? data.places[packed.place] : packed.place);
const depthOf = (run, place) => run.numbers.depth ?? place.last[place.last.length - 1];
const columnsOf = (run, place) => Float32Array.from(place.first, (v, i) => (v + place.last[i]) / 2 / (state.x === "relative" ? depthOf(run, place) : 1));

function reading(row, i, place, what) {
  const n = place.count[i], { first, last } = place, parts = [];
  const things = what === "weight" ? "layers" : "blocks";
  if (!Number.isNaN(row.y[i])) parts.push((n > 1 ? "geometric mean " : "") + number(10 ** row.y[i]));
  const why = !row.closed?.[i] ? "" : row.closed[i] === row.zeros[i] ? ": closed by gamma" : `, ${row.closed[i]} of them closed by gamma`;
  if (row.zeros?.[i]) parts.push((n > 1 ? `${row.zeros[i]} of ${n} ${things} exactly 0` : "exactly 0") + why);
  if (row.nonfinite?.[i]) parts.push(n > 1 ? `${row.nonfinite[i]} of ${n} ${things} not finite` : "not finite");
  const where = first[i] === last[i] ? `layer ${first[i].toLocaleString("en")}` : `layers ${first[i].toLocaleString("en")} to ${last[i].toLocaleString("en")}`;
  return `${where}${n > 1 ? `, ${n} ${things}` : ""}\n${parts.join("; ") || "not recorded"}`;
}

function curve(run, packed, r, what, extra) {
  const place = placeOf(packed), row = unpacked(packed)[r], step = packed.steps[r];
  const text = (i) => `${run.name}\nstep ${step.toLocaleString("en")}, ${reading(row, i, place, what)}`;
  return { run, x: columnsOf(run, place), ...row, text, ...extra };
}

function thinned(all, what) {
  const most = Math.max(1, ...all.filter(Boolean).map((packed) => Math.max(...placeOf(packed).count)));
  return most > 1 ? `A point stands for up to ${most} neighbouring ${what === "weight" ? "layers" : "blocks"}: their geometric mean. ` : "";
}

const visible = () => runs.filter((run) => !state.hidden.has(run));
// At the end of a line: what tells few runs apart in little room.
const label = (run) => {
  if (single || runs.length > 6) return "";
  return new Set(depths).size === runs.length ? `${run.numbers.depth.toLocaleString("en")} layers` : run.name.length < 16 ? run.name : "";
};

// The range of log10 values, opened a little; one decade around nothing.
function range(series, least = 0.5) {
  let [lo, hi] = [Infinity, -Infinity];
  for (const s of series) for (const v of s.y) if (v < lo || v > hi) [lo, hi] = [Math.min(lo, v), Math.max(hi, v)];
  if (lo > hi) return [-1, 0];
  const pad = Math.max(0.04 * (hi - lo), (least - hi + lo) / 2, 0.02);
  return [lo - pad, hi + pad];
}
const xRange = (series) => (state.x === "relative" ? [0, 1] : [0, Math.max(1, ...series.map((s) => s.run.numbers.depth ?? s.x[s.x.length - 1]))]);

// -------------------------------------------------------------------------------------------------------------- figures

const hot = { hot: () => state.hot, onHot: setHot, colour };
const depthAxis = { ...hot, yLog: true, get xLabel() { return state.x === "relative" ? "depth: image 0 → logits 1" : "layer, from image to logits"; } };
const figures = {};

function setHot(run) {
  if (single || state.hot === run) return;
  state.hot = run;
  for (const chart of Object.values(figures)) if (chart.series && !chart.at) chart.mark();
  for (const row of byId("table").querySelectorAll("tbody tr")) row.classList.toggle("hot", row.dataset.id === run?.id);
}

function overlay() {
  const ends = once ? [["first", "at the only record"]] : [["first", "at the first record"], ["last", "at the last record"]];
  for (const name of ["gradient", "signal"]) byId(`${name}-last`).hidden = once;
  for (const [name, what] of [["gradient", state.quantity], ["signal", "signal"]]) {
    const series = ends.map((_, r) => visible().filter((run) => run.curves[what]).map((run) => curve(run, run.curves[what], r, what, { label: label(run) })));
    const both = series.flat(), y = range(both), x = xRange(both);
    const bands = { zeros: both.some((s) => s.zeros), nonfinite: both.some((s) => s.nonfinite) };
    ends.forEach(([end, when], r) => {
      const chart = (figures[`${name}-${end}`] ??= new Chart(byId(`${name}-${end}`), "", depthAxis));
      chart.title(`${data.quantities[what][0].toUpperCase()}${data.quantities[what].slice(1)}, ${when}`);
      chart.bands = bands;
      chart.update(series[r], x, y);
    });
  }
  byId("thinned").textContent = thinned(runs.map((run) => run.curves[state.quantity]), state.quantity) +
    "Gradients are those of the mean loss of a whole step, before clipping. Point at a line, or focus a figure and use the arrow keys.";
}

function training() {
  const log = state.steps === "log", chart = (figures.training ??= new Chart(byId("first-layer"), "Mean |gradient| of the stem’s weight", {
    ...hot, yLog: true, get xLog() { return state.steps === "log"; }, xLabel: "optimiser step",
  }));
  const series = visible().filter((run) => run.first_layer).map((run) => {
    const points = run.first_layer.filter(([step]) => !log || step > 0), marks = (test) => (points.some(test) ? points.map((p) => +test(p)) : undefined);
    const text = (i) => `${run.name}\nstep ${points[i][0].toLocaleString("en")}: ${points[i][1] === 0 ? "exactly 0" : points[i][1] === "inf" ? "not finite" : number(points[i][1])}`;
    return {
      run, text, label: label(run), x: points.map(([step]) => (log ? Math.log10(step) : step)), y: points.map(([, v]) => (v > 0 ? Math.log10(v) : NaN)),
      zeros: marks(([, v]) => v === 0), nonfinite: marks(([, v]) => v === "inf"),
    };
  });
  byId("training").hidden = !runs.some((run) => run.first_layer?.length > 1);
  const steps = series.flatMap((s) => [s.x[0] ?? 0, s.x[s.x.length - 1] ?? 1]), lo = log ? Math.min(...steps) : 0;
  chart.update(series, [lo, Math.max(lo + 0.3, ...steps)], range(series));
}

function scatter(id, caption, kinds, options, floor) {
  const chart = (figures[id] ??= new Chart(byId(id), caption, { ...hot, dots: true, xLog: true, xLabel: "layers", ...options }));
  const series = visible().filter((run) => known(run, "depth")).flatMap((run) => kinds.filter(([key]) => known(run, key)).map(([key, text, hollow]) => ({
    run, hollow, x: [Math.log10(run.numbers.depth)], y: [options.yLog ? Math.log10(run.numbers[key] / 2 ** 30) : run.numbers[key]],
    text: () => `${run.name}\n${shown(run, "depth")} layers\n${text} ${shown(run, key)}`,
  })));
  byId(id).hidden = !runs.some((run) => kinds.some(([key]) => known(run, key)));
  const x = series.map((s) => s.x[0]), [lo, hi] = [Math.min(...x), Math.max(...x)];
  chart.update(series, series.length ? [lo - 0.1, hi + 0.1] : [1, 2], floor ?? range(series));
}

function against() {
  scatter("accuracy", "Accuracy: ● validation, ○ test", [["validation_accuracy", "validation"], ["test_accuracy", "test", true]],
    { yFormat: (v) => `${Math.round(100 * v)} %`, rule: { value: 0.5, text: "converged: validation above 50 %" } }, [0, 1]);
  scatter("memory", "Peak memory: ● measured, with what was there at the start; ○ planned, without", [["peak_memory_bytes", "measured"], ["planned_memory_bytes", "planned", true]],
    { yLog: true, yFormat: (v) => `${number(v)} GiB` });
  byId("against").hidden = single || (byId("accuracy").hidden && byId("memory").hidden);
}

function drawAll() {
  colours.clear();
  if (!single) overlay();
  training();
  against();
  if (state.run) one.draw?.();
  legend();
  for (const swatch of document.querySelectorAll("tbody i")) swatch.style.setProperty("--swatch", colour(runs[swatch.dataset.index]));
}

// --------------------------------------------------------------------------------------------------------------- legend

function toggle(run, on) {
  state.hidden[on ? "delete" : "add"](run);
  for (const box of document.querySelectorAll("tbody input")) box.checked = !state.hidden.has(runs[box.dataset.index]);
  drawAll();
}

function legend() {
  const host = byId("legend"), focused = [...host.children].indexOf(document.activeElement);
  const chips = runs.length > LISTED ? [] : runs.map((run) => el("button", {
    className: "chip", type: "button", "aria-pressed": String(!state.hidden.has(run)), style: { "--swatch": colour(run) }, title: "show or hide",
    onclick: () => toggle(run, state.hidden.has(run)), onpointerenter: () => setHot(run), onpointerleave: () => setHot(null),
  }, el("i"), run.name));
  if (runs.length > FEW) {
    const bar = Array.from({ length: 9 }, (_, i) => css(shade(i / 8))).join(",");
    const end = (v) => (!scaled ? "" : scaled === "validation_accuracy" ? `${Math.round(100 * v)} %` : Math.round(10 ** v).toLocaleString("en"));
    const names = { depth: "layers", validation_accuracy: "validation accuracy", parameters: "parameters" };
    host.replaceChildren(el("span", { className: "scale" }, end(scaleEnds[0]) || "first run", el("i", { style: { background: `linear-gradient(90deg,${bar})` } }),
      `${end(scaleEnds[1]) || "last run"} ${names[scaled] ?? ""}`, chips.length ? "" : " · runs are shown and hidden in the table"), ...chips);
  } else host.replaceChildren(...chips);
  host.children[focused]?.focus();
}

// ---------------------------------------------------------------------------------------------------------------- table

const mark = (run) => (run.verdict === "healthy" ? "healthy" : run.verdict ? "ill" : "none");
const verdict = (run) => run.verdict || (Object.keys(run.curves).length ? "not judged" : run.status === "RUNNING" ? "running, no record yet" : "no record");
const numberColumn = (key) => ({ key, text: data.numbers[key][0], value: (run) => run.numbers[key], cell: (run) => shown(run, key), right: true });
const has = (column) => runs.some((run) => ![undefined, null, ""].includes(column.value(run)));

const columns = [
  { key: "name", text: "run", value: (run) => run.name },
  { key: "verdict", text: "verdict", value: verdict, cell: verdict, mark },
  ...["depth", "parameters"].map(numberColumn),
  ...["validation_accuracy", "test_accuracy"].map(numberColumn),
  { key: "converged", text: "converged", value: (run) => (run.converged === null ? undefined : run.converged ? "yes" : "no") },
  ...["validation_loss", "training_loss", "step_s", "planned_memory_bytes", "peak_memory_bytes"].map(numberColumn),
  ...data.settings.map((name) => {
    const numeric = runs.every((run) => !run.settings[name] || Number.isFinite(Number(run.settings[name])));
    const value = (run) => (numeric && run.settings[name] ? Number(run.settings[name]) : run.settings[name]);
    return { key: `setting-${name}`, text: name, value, cell: (run) => run.settings[name] ?? "–", right: numeric };
  }),
  { key: "status", text: "status", value: (run) => run.status.toLowerCase() || undefined },
].filter(has);

function compare(column, sign) {
  const missing = (v) => v === undefined || v === null || v === "";
  return (a, b) => {
    const [x, y] = [column.value(a), column.value(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true }));
  };
}

function table() {
  const heads = columns.map((column, c) => el("th", { scope: "col", className: column.right ? "right" : "", dataset: { key: column.key } },
    el("button", { type: "button", onclick: () => sort(c) }, column.text)));
  const rows = runs.map((run, index) => {
    const name = el("div", {}, el("input", { type: "checkbox", checked: true, title: "show in the figures", "aria-label": `show ${run.name}`,
      dataset: { index }, onchange: (event) => toggle(run, event.target.checked) }), el("i", { dataset: { index } }),
    el("button", { type: "button", title: run.name, onclick: () => choose(run, true) }, run.name));
    const cells = columns.slice(1).map((column) => el("td", { className: `${column.right ? "right" : ""} ${column.mark?.(run) ?? ""}`, title: column.key === "verdict" ? run.text || run.problem : "" },
      String((column.cell ?? column.value)(run) ?? "–")));
    return el("tr", { dataset: { id: run.id }, onpointerenter: () => setHot(run), onpointerleave: () => setHot(null) }, el("th", { scope: "row" }, name), ...cells);
  });
  byId("table").querySelector("table").append(el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
  byId("table-note").append("Settings are the ones that differ between the runs. ",
    columns.some((column) => column.key === "converged") ? "Converged: validation accuracy above 50 %. " : "", data.table ? link(data.table, "all settings as CSV") : "");
}

function sort(c) {
  const heads = [...byId("table").querySelectorAll("thead th")], up = heads[c].getAttribute("aria-sort") !== "ascending";
  heads.forEach((head, i) => (i === c ? head.setAttribute("aria-sort", up ? "ascending" : "descending") : head.removeAttribute("aria-sort")));
  const rows = new Map([...byId("table").querySelectorAll("tbody tr")].map((row) => [row.dataset.id, row]));
  byId("table").querySelector("tbody").append(...[...runs].sort(compare(columns[c], up ? 1 : -1)).map((run) => rows.get(run.id)));
}

// A file beside the page, or one that is inside it, compressed.
function link(path, text) {
  if (!(path in data.files)) return el("a", { href: path }, text);
  return el("button", { type: "button", onclick: async () => {
    const bytes = Uint8Array.from(atob(data.files[path]), (c) => c.charCodeAt(0));
    const plain = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).blob();
    const url = URL.createObjectURL(new Blob([plain], { type: "text/csv" }));
    el("a", { href: url, download: path.replace(/^runs\//, "").replaceAll("/", "_") }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  } }, text);
}

// -------------------------------------------------------------------------------------------------------------- one run

const one = {};

// runs/<id>/details.js calls this.
function details(id, detail) {
  data.details[id] = detail;
  if (state.run?.id === id) showRun(state.run);
}

function choose(run, scroll) {
  state.run = run;
  one.draw = null;
  byId("which").value = run.id;
  if (scroll) byId("one").scrollIntoView({ block: "start" });
  if (data.details[run.id] || !Object.keys(run.curves).length) return showRun(run);
  byId("run").replaceChildren(el("p", { className: "note" }, "loading …"));
  const path = `runs/${run.id}/details.js`;
  document.head.append(el("script", { src: path, onerror: () => byId("run").replaceChildren(
    el("p", { className: "ill" }, `${path} is missing beside this page: copy the whole folder, or make one file: deepscale report --single-file`)) }));
}

function showRun(run) {
  const facts = el("dl", { className: "facts" }, ...Object.keys(data.numbers).filter((key) => known(run, key)).map((key) =>
    el("div", {}, el("dt", {}, data.numbers[key][0]), el("dd", {}, shown(run, key)))));
  const judged = el("p", {}, el("strong", { className: mark(run) }, verdict(run)), run.text ? `: ${(run.text.startsWith(run.verdict) ? run.text.slice(run.verdict.length) : run.text).replace(/^[:,]? */, "")}` : run.problem ? `: ${run.problem}` : "");
  const settings = el("details", {}, el("summary", {}, "all settings"), el("dl", { className: "facts" }, ...Object.entries(run.settings).map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
  const files = run.files.length ? [el("ul", { className: "files" }, ...run.files.map((path) => el("li", {}, link(path, path.split("/").pop()))))] : [];
  if (run.files.length && run.records_in_files < run.records)
    files.push(el("p", { className: "note" }, `The files hold all layers at ${run.records_in_files} of ${run.records} records; gradflow.npz holds them all.`));
  const detail = data.details[run.id], body = el("div");
  byId("run").replaceChildren(judged, ...(facts.children.length ? [facts] : []), body, ...files, ...(Object.keys(run.settings).length ? [settings] : []));
  if (detail && Object.keys(detail).length) steps(run, detail, body);
}

// A slider over the records, gradient and signal at the chosen one, and the heatmap of all.
function steps(run, detail, host) {
  const slider = el("input", { type: "range", min: 0, "aria-label": "record" }), output = el("output");
  const quantity = el("select", { "aria-label": "gradient" }, ...["output", "weight"].filter((key) => detail[key]).map((key) => el("option", { value: key }, data.quantities[key])));
  const places = ["gradient", "signal", "heat"].map((name) => el("figure", { className: name === "heat" ? "wide" : "" }));
  const key = el("p", { className: "scale note" }), note = el("p", { className: "note" });
  host.replaceChildren(el("div", { className: "stepper" }, quantity, slider, output), el("div", { className: "grid" }, ...places, el("div", { className: "wide" }, key, note)));
  const gradient = new Chart(places[0], "", { ...depthAxis, onHot: null, hot: null }), signal = new Chart(places[1], "", { ...depthAxis, onHot: null, hot: null });
  const heat = new Heatmap(places[2], "", { get xLabel() { return depthAxis.xLabel; } });
  quantity.value = detail[state.quantity] ? state.quantity : quantity.options[0]?.value ?? "";

  const panel = (chart, what, step) => {
    const packed = detail[what];
    chart.box.parentElement.hidden = !packed;
    if (!packed) return;
    const all = packed.steps.map((_, r) => curve(run, packed, r, what)), r = Math.max(0, packed.steps.findLastIndex((s) => s <= step));
    chart.title(`${data.quantities[what][0].toUpperCase()}${data.quantities[what].slice(1)} at step ${packed.steps[r].toLocaleString("en")}${r ? "; dashed: the first record" : ""}`);
    chart.bands = { zeros: all.some((s) => s.zeros), nonfinite: all.some((s) => s.nonfinite) };
    chart.update([...(r ? [{ ...all[0], ghost: true }] : []), all[r]], xRange(all), range(all));
  };
  one.draw = () => {
    const what = quantity.value || "signal", packed = detail[what], place = placeOf(packed);
    slider.max = packed.steps.length - 1;
    slider.hidden = places[2].hidden = note.hidden = key.hidden = packed.steps.length < 2;
    const r = Number(slider.value), step = packed.steps[r], rows = unpacked(packed), [lo, hi] = range(rows, 0.1);
    output.textContent = `step ${step.toLocaleString("en")}` + (packed.steps.length > 1 ? `, record ${r + 1} of ${packed.steps.length}` : "") + (packed.steps.length < run.records ? ` (chosen of ${run.records})` : "");
    panel(gradient, what, step);
    if (what !== "signal") panel(signal, "signal", step);
    const columns = columnsOf(run, place);
    heat.title(`All records: step downwards, depth to the right, coloured by ${data.quantities[what]}`);
    heat.update({ rows, columns, steps: packed.steps, x: xRange([{ run, x: columns }]), y: [lo, hi], chosen: r,
      text: (row, i) => `step ${packed.steps[row].toLocaleString("en")}\n${reading(rows[row], i, place, what)}` });
    note.textContent = thinned([packed], what) + "Click into the heatmap, or move the slider, to choose a record.";
    const bar = Array.from({ length: 9 }, (_, i) => css(shade(i / 8, true))).join(","), swatch = (rgb, text) => el("span", {}, el("b", { style: { background: rgb } }), text);
    key.replaceChildren(number(10 ** lo), el("i", { style: { background: `linear-gradient(90deg,${bar})` } }), number(10 ** hi),
      ...(rows.some((row) => row.zeros) ? [swatch("rgb(204 121 167)", "exactly 0")] : []),
      ...(rows.some((row) => row.closed) ? [swatch("rgb(128 128 128)", "exactly 0: closed by gamma")] : []),
      ...(rows.some((row) => row.nonfinite) ? [swatch("rgb(213 94 0)", "not finite")] : []));
  };
  slider.oninput = () => one.draw();
  quantity.onchange = () => one.draw();
  heat.over.addEventListener("click", () => { if (heat.at) { slider.value = heat.at[0]; one.draw(); } });
  slider.max = 1e6;
  slider.value = detail[quantity.value || "signal"].steps.length - 1;
  one.draw();
}

// ---------------------------------------------------------------------------------------------------------------- start

function start() {
  const counts = {};
  for (const run of runs) counts[verdict(run)] = (counts[verdict(run)] ?? 0) + 1;
  if (!single) byId("verdicts").textContent = Object.entries(counts).sort((a, b) => b[1] - a[1]).map(([name, n]) => `${n.toLocaleString("en")} ${name}`).join(" · ");
  byId("warnings").append(...data.warnings.map((text) => el("li", {}, text)));
  for (const fieldset of document.querySelectorAll("fieldset[data-state]")) {
    const name = fieldset.dataset.state;
    for (const input of fieldset.querySelectorAll("input")) input.checked = input.value === state[name];
    fieldset.onchange = (event) => { state[name] = event.target.value; drawAll(); };
  }
  if (!single && !runs.some((run) => run.curves.output)) state.quantity = "weight";
  document.body.classList.toggle("single", single);
  byId("overlay").hidden = byId("table").hidden = single;
  byId("which").append(el("option", { value: "", disabled: true, selected: true }, "choose a run"), ...runs.map((run) => el("option", { value: run.id }, run.name)));
  byId("which").onchange = (event) => choose(runs.find((run) => run.id === event.target.value));
  byId("which").parentElement.hidden = single;
  if (!single) table();
  drawAll();
  if (single) choose(runs[0]);
  else byId("run").append(el("p", { className: "note" }, "The gradient of one run at each of its records, its heatmap, settings and files: choose it here or in the table."));
  dark.addEventListener("change", drawAll);
  // The second frame begins when the first one is on the screen.
  requestAnimationFrame(() => requestAnimationFrame(() => { document.documentElement.dataset.drawn = performance.now(); }));
}

start();
