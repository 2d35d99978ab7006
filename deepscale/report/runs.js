// The runs of the page, their colours, and their packed numbers as series for charts.

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
  number: (v) => (v >= 0.01 && v < 1000 ? v.toFixed(3) : number(v)),
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
