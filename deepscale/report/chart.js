"use strict";
// Axes, lines, dots and heatmaps on canvas. An axis that is logarithmic is given log10 of its values everywhere below.

const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const MARGIN = { left: 50, right: 14, label: 96, top: 10, bottom: 36 };
const BAND = 18; // height of the strips for what has no logarithm
const dark = matchMedia("(prefers-color-scheme: dark)");

const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function number(value, power = false) {
  if (value === 0) return "0";
  const e = Math.floor(Math.log10(Math.abs(value)) + 1e-9);
  if (e >= -3 && e < 7 && !power) return value.toLocaleString("en", { maximumSignificantDigits: Math.max(3, e + 1) });
  const mantissa = (value / 10 ** e).toFixed(1).replace(/\.0$/, "");
  const decade = "10" + [...String(e)].map((c) => SUPERSCRIPT[c]).join("");
  return mantissa === "1" ? decade : `${mantissa}×${decade}`;
}

function linearTicks(lo, hi, count) {
  const rough = (hi - lo) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((m) => m * unit >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + 1e-9 * step; i++) ticks.push(i * step);
  return ticks;
}

// Decades, so many of them that they fit; 2 and 5 between them where there are few; plain steps inside one decade.
function logTicks(lo, hi, count) {
  if (hi - lo < 0.7) return linearTicks(10 ** lo, 10 ** hi, count).filter((v) => v > 0).map(Math.log10);
  const stride = Math.max(1, Math.ceil((hi - lo) / count));
  const between = (hi - lo) * 3 <= count + 1 ? [0, Math.log10(2), Math.log10(5)] : [0];
  const ticks = [];
  for (let e = Math.floor(lo / stride) * stride; e <= hi; e += stride) for (const m of between) ticks.push(e + m);
  return ticks.filter((t) => t >= lo - 1e-9 && t <= hi + 1e-9);
}

// The text, or as much of it as fits.
function fitting(c, text, width) {
  let cut = text;
  while (cut && c.measureText(cut).width > width) cut = `${cut.slice(0, -2)}…`;
  return cut;
}

// 0 to 1 as a colour of viridis, without the end that is lost on the background.
function shade(t, whole = false) {
  const [from, to] = whole ? [0, 1] : dark.matches ? [0.25, 1] : [0, 0.86];
  const at = (from + Math.min(1, Math.max(0, t)) * (to - from)) * (VIRIDIS.length - 1), i = Math.min(VIRIDIS.length - 2, Math.floor(at));
  const part = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
  return [0, 1, 2].map((k) => Math.round(part(VIRIDIS[i], k) * (1 - at + i) + part(VIRIDIS[i + 1], k) * (at - i)));
}
const css = (rgb) => `rgb(${rgb})`;

// A canvas for what is many, one over it for axes and what is pointed at. `draw` and `inspect` belong to Chart and Heatmap.
class Plot {
  constructor(host, caption, options) {
    this.options = options;
    this.caption = document.createElement("figcaption");
    this.box = document.createElement("div");
    this.box.className = "plot";
    [this.under, this.over] = [0, 1].map(() => this.box.appendChild(document.createElement("canvas")));
    this.over.tabIndex = 0;
    this.over.setAttribute("role", "img");
    host.replaceChildren(this.caption, this.box);
    this.title(caption);
    this.over.addEventListener("pointermove", (event) => this.point(event.offsetX, event.offsetY));
    this.over.addEventListener("pointerdown", (event) => this.point(event.offsetX, event.offsetY));
    this.over.addEventListener("pointerleave", () => this.leave());
    this.over.addEventListener("blur", () => this.leave());
    this.over.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") this.leave();
      if (!move) return;
      event.preventDefault();
      this.move(move[0] * (event.shiftKey ? 10 : 1), move[1]);
    });
    new ResizeObserver(() => this.width !== this.box.clientWidth && this.draw()).observe(this.box);
  }

  title(caption) {
    this.caption.textContent = caption;
    this.over.setAttribute("aria-label", `${caption}. Arrow keys read the values.`);
  }

  // A context of the box's size in CSS pixels, empty.
  context(canvas) {
    const ratio = devicePixelRatio || 1;
    [this.width, this.height] = [this.box.clientWidth, this.box.clientHeight];
    [canvas.width, canvas.height] = [this.width * ratio, this.height * ratio];
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    c.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    c.lineJoin = "round";
    return c;
  }

  frame(right, above, below) {
    this.area = { left: MARGIN.left, right: this.width - right, top: MARGIN.top + above, bottom: this.height - MARGIN.bottom - below };
  }

  px(x) { return this.area.left + ((x - this.x[0]) / (this.x[1] - this.x[0] || 1)) * (this.area.right - this.area.left); }
  py(y) { return this.area.bottom - ((y - this.y[0]) / (this.y[1] - this.y[0] || 1)) * (this.area.bottom - this.area.top); }

  xAxis(c, below) {
    const { left, right, bottom } = this.area, { xLog, xFormat = number, xLabel } = this.options;
    const ticks = (xLog ? logTicks : linearTicks)(this.x[0], this.x[1], Math.max(2, Math.floor((right - left) / 90)));
    c.fillStyle = theme("--soft");
    c.textBaseline = "top";
    for (const tick of ticks) {
      const text = xFormat(xLog ? 10 ** tick : tick), half = c.measureText(text).width / 2;
      c.textAlign = "center";
      c.fillText(text, Math.min(this.px(tick), this.width - half - 1), bottom + below + 5);
    }
    c.textAlign = "right";
    c.fillText(xLabel, right, bottom + below + 20);
  }

  tip(text, x, y) {
    const tip = document.getElementById("tip"), at = this.over.getBoundingClientRect();
    tip.textContent = text;
    tip.hidden = false;
    const left = at.left + x + 14 + tip.offsetWidth > innerWidth ? at.left + x - 14 - tip.offsetWidth : at.left + x + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(innerHeight - tip.offsetHeight - 4, at.top + y + 12))}px`;
  }

  leave() {
    document.getElementById("tip").hidden = true;
    this.at = null;
    this.options.onHot?.(null);
    this.mark();
  }
}

// Lines or dots. A series: { run, x, y (arrays; y NaN for a gap), zeros, nonfinite (counts or absent), text(i), hollow, ghost, label }.
class Chart extends Plot {
  update(series, x, y) {
    Object.assign(this, { series, x, y, at: null });
    this.draw();
  }

  draw() {
    if (!this.series || !this.box.clientWidth) return;
    const c = this.context(this.under), any = (key) => this.bands?.[key] || this.series.some((s) => s[key]);
    const above = any("nonfinite") ? BAND : 0, below = any("zeros") ? BAND : 0;
    this.labelled = this.width > 460 && this.series.some((s) => s.label);
    this.frame(this.labelled ? MARGIN.label : MARGIN.right, above, below);
    [this.above, this.below] = [above, below];
    this.ticks(c);
    c.globalAlpha = this.series.length > 60 ? 0.5 : this.series.length > 20 ? 0.7 : 1;
    for (const s of this.series) this.line(c, s, this.series.length > 20 ? 1 : 1.6);
    this.mark();
  }

  // The y axis: makes room for its texts, draws its grid and the strips above and below it.
  ticks(c) {
    const { top, bottom, right } = this.area, { yLog, yFormat = (v) => number(v, yLog && this.y[1] - this.y[0] > 4) } = this.options;
    const ticks = (yLog ? logTicks : linearTicks)(this.y[0], this.y[1], Math.max(2, Math.floor((bottom - top) / 34)));
    this.yTicks = ticks.map((tick) => [Math.round(this.py(tick)) + 0.5, yFormat(yLog ? 10 ** tick : tick)]);
    const texts = [...this.yTicks.map(([, text]) => text), ...(this.above || this.below ? ["exactly 0"] : [])];
    const left = (this.area.left = Math.max(MARGIN.left, ...texts.map((text) => c.measureText(text).width + 12)));
    c.strokeStyle = theme("--grid");
    c.beginPath();
    for (const [y] of this.yTicks) {
      c.moveTo(left, y);
      c.lineTo(right, y);
    }
    c.stroke();
    for (const [height, from, text] of [[this.above, top - BAND, "not finite"], [this.below, bottom + 1, "exactly 0"]]) {
      if (!height) continue;
      c.fillStyle = theme("--band");
      c.fillRect(left, from, right - left, BAND - 1);
      this.yTicks.push([from + BAND / 2, text]);
    }
  }

  line(c, s, width) {
    c.strokeStyle = c.fillStyle = s.ghost ? theme("--soft") : this.options.colour(s.run);
    c.lineWidth = width;
    c.setLineDash(s.ghost ? [3, 3] : []);
    if (!this.options.dots) {
      c.beginPath();
      let drawing = false;
      for (let i = 0; i < s.x.length; i++) {
        const gap = Number.isNaN(s.y[i]);
        if (!gap) c[drawing ? "lineTo" : "moveTo"](this.px(s.x[i]), this.py(s.y[i]));
        drawing = !gap;
      }
      c.stroke();
    }
    const radius = this.options.dots ? 4 : s.x.length <= 40 && this.series.length <= 20 && !s.ghost ? 2 : 0;
    for (let i = 0; i < s.x.length; i++) {
      const alone = Number.isNaN(s.y[i - 1] ?? NaN) && Number.isNaN(s.y[i + 1] ?? NaN);
      if (Number.isNaN(s.y[i]) || !(radius || alone)) continue;
      c.beginPath();
      c.arc(this.px(s.x[i]), this.py(s.y[i]), radius || 1.5, 0, 7);
      s.hollow ? c.stroke() : c.fill();
    }
    c.setLineDash([]);
    for (const [key, top] of [["zeros", this.area.bottom + 3], ["nonfinite", this.area.top - BAND + 2]]) {
      // Up to six runs each have a lane of their own in the strip.
      const marked = this.series.filter((other) => other[key]), lanes = Math.min(6, marked.length), height = (BAND - 5) / lanes;
      s[key]?.forEach((n, i) => n && c.fillRect(this.px(s.x[i]) - 1, top + (marked.indexOf(s) % lanes) * height, 2, Math.max(1.5, height - 0.5)));
    }
  }

  // Axes, direct labels, and what is pointed at.
  mark() {
    if (!this.area) return;
    const c = this.context(this.over), { left, right, bottom } = this.area, now = this.options.hot?.();
    this.under.style.opacity = now ? 0.3 : 1;
    c.textBaseline = "middle";
    c.fillStyle = theme("--soft");
    c.textAlign = "right";
    for (const [y, text] of this.yTicks) c.fillText(text, left - 6, y);
    c.lineWidth = 1;
    c.strokeStyle = theme("--line");
    c.strokeRect(left + 0.5, bottom + 0.5, right - left, 0);
    this.xAxis(c, this.below);
    if (this.options.rule) this.rule(c);
    if (this.labelled) this.direct(c, now);
    for (const s of this.series) if (now && s.run === now && !s.ghost) this.line(c, s, 2.6);
    if (this.at) this.cursor(c);
  }

  rule(c) {
    const { value, text } = this.options.rule, y = this.py(value);
    c.strokeStyle = c.fillStyle = theme("--soft");
    c.setLineDash([4, 4]);
    c.beginPath();
    c.moveTo(this.area.left, y);
    c.lineTo(this.area.right, y);
    c.stroke();
    c.setLineDash([]);
    c.textAlign = "left";
    c.textBaseline = "bottom";
    c.fillText(text, this.area.left + 4, y - 2);
  }

  // Names at the ends of the lines, pushed apart.
  direct(c, now) {
    const ends = this.series.filter((s) => s.label && !s.ghost).map((s) => {
      let i = s.x.length - 1;
      while (i > 0 && Number.isNaN(s.y[i])) i--;
      return { s, y: Number.isNaN(s.y[i]) ? this.area.bottom + this.below / 2 : this.py(s.y[i]), x: this.px(s.x[i]) };
    }).sort((a, b) => a.y - b.y);
    ends.forEach((end, i) => (end.y = Math.max(end.y, i ? ends[i - 1].y + 13 : 6)));
    for (let i = ends.length - 1; i >= 0; i--) ends[i].y = Math.min(ends[i].y, i === ends.length - 1 ? this.area.bottom + this.below - 2 : ends[i + 1].y - 13);
    c.textAlign = "left";
    c.textBaseline = "middle";
    for (const { s, y, x } of ends) {
      c.globalAlpha = now && now !== s.run ? 0.3 : 1;
      c.fillStyle = this.options.colour(s.run);
      c.fillText(fitting(c, s.label, this.width - Math.min(x, this.area.right) - 8), Math.min(x, this.area.right) + 6, y);
    }
    c.globalAlpha = 1;
  }

  place(s, i) {
    if (!Number.isNaN(s.y[i])) return [this.px(s.x[i]), this.py(s.y[i])];
    if (s.zeros?.[i]) return [this.px(s.x[i]), this.area.bottom + BAND / 2];
    return s.nonfinite?.[i] ? [this.px(s.x[i]), this.area.top - BAND / 2] : null;
  }

  point(x, y) {
    let best = 48 ** 2, at = null;
    this.series?.forEach((s, k) => {
      for (let i = 0; i < s.x.length && !s.ghost; i++) {
        const spot = this.place(s, i), d = spot ? (spot[0] - x) ** 2 + (spot[1] - y) ** 2 : Infinity;
        if (d < best) [best, at] = [d, [k, i]];
      }
    });
    at ? this.read(at) : this.at && this.leave();
  }

  // Along the series, or to the next one at the same place.
  move(along, across) {
    const solid = this.series.map((s, k) => k).filter((k) => !this.series[k].ghost && this.series[k].x.length);
    if (!solid.length) return;
    let [k, i] = this.at ?? [solid[0], along > 0 ? -1 : 0];
    const x = this.series[k].x[Math.max(0, i)];
    if (across) {
      k = solid[(solid.indexOf(k) + across + solid.length) % solid.length];
      i = this.series[k].x.reduce((best, v, j) => (Math.abs(v - x) < Math.abs(this.series[k].x[best] - x) ? j : best), 0);
    }
    this.read([k, Math.min(this.series[k].x.length - 1, Math.max(0, i + along))]);
  }

  read(at) {
    this.at = at;
    const s = this.series[at[0]], spot = this.place(s, at[1]) ?? [this.px(s.x[at[1]]), this.area.bottom];
    this.tip(s.text(at[1]), ...spot);
    this.options.onHot?.(s.run);
    this.mark();
  }

  cursor(c) {
    const s = this.series[this.at[0]], spot = this.place(s, this.at[1]);
    if (!spot) return;
    c.strokeStyle = theme("--ink");
    c.lineWidth = 1.5;
    c.beginPath();
    c.arc(spot[0], spot[1], 5, 0, 7);
    c.stroke();
  }
}

// Depth against record, coloured by a value's logarithm. rows: one series of y, zeros, nonfinite per record; x at each column.
class Heatmap extends Plot {
  update({ rows, columns, steps, x, y, chosen, text }) {
    Object.assign(this, { rows, columns, steps, x, range: y, chosen, text, y: [rows.length, 0] });
    this.draw();
  }

  draw() {
    if (!this.rows || !this.box.clientWidth) return;
    const image = new ImageData(this.columns.length, this.rows.length), [lo, hi] = this.range;
    const palette = Array.from({ length: 256 }, (_, i) => shade(i / 255, true));
    this.rows.forEach((row, r) => row.y.forEach((value, i) => {
      let rgb = palette[Math.round((255 * (value - lo)) / (hi - lo || 1))];
      if (row.nonfinite?.[i]) rgb = [213, 94, 0];
      else if (Number.isNaN(value)) rgb = row.zeros?.[i] ? (row.closed?.[i] === row.zeros[i] ? [128, 128, 128] : [204, 121, 167]) : null;
      if (rgb) image.data.set([...rgb, 255], 4 * (r * this.columns.length + i));
    }));
    const small = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
    small.getContext("2d").putImageData(image, 0, 0);
    const c = this.context(this.under);
    this.frame(MARGIN.right, 0, 0);
    c.imageSmoothingEnabled = false;
    // A column reaches half way to its neighbours.
    const { left, right, top, bottom } = this.area, last = this.columns.length - 1, half = last ? (this.columns[last] - this.columns[0]) / last / 2 : this.x[1];
    const [from, to] = [this.px(this.columns[0] - half), this.px(this.columns[last] + half)];
    c.rect(left, top, right - left, bottom - top);
    c.clip();
    c.drawImage(small, from, top, to - from, bottom - top);
    this.mark();
  }

  mark() {
    if (!this.area) return;
    const c = this.context(this.over), { left, right, top, bottom } = this.area, height = (bottom - top) / this.rows.length;
    this.xAxis(c, 0);
    c.textAlign = "right";
    c.textBaseline = "middle";
    const stride = Math.ceil(16 / height);
    for (let r = 0; r < this.rows.length; r += stride) c.fillText(number(this.steps[r]), left - 6, top + (r + 0.5) * height);
    c.strokeStyle = theme("--ink");
    c.lineWidth = 1.5;
    c.strokeRect(left - 1, top + this.chosen * height, right - left + 2, height);
    if (this.at) c.strokeRect(this.px(this.columns[this.at[1]]) - 2, top + this.at[0] * height, 4, height);
  }

  point(x, y) {
    const { left, right, top, bottom } = this.area ?? {};
    if (!(x >= left && x <= right && y >= top && y < bottom)) return this.at && this.leave();
    const share = this.x[0] + ((x - left) / (right - left)) * (this.x[1] - this.x[0]);
    const column = this.columns.reduce((best, v, i) => (Math.abs(v - share) < Math.abs(this.columns[best] - share) ? i : best), 0);
    this.read([Math.floor(((y - top) / (bottom - top)) * this.rows.length), column]);
  }

  move(along, across) {
    const [row, column] = this.at ?? [this.chosen, 0], inside = (v, n) => Math.min(n - 1, Math.max(0, v));
    this.read([inside(row + across, this.rows.length), inside(column + along, this.columns.length)]);
  }

  read(at) {
    this.at = at;
    const { top, bottom } = this.area;
    this.tip(this.text(...at), this.px(this.columns[at[1]]), top + ((at[0] + 1) * (bottom - top)) / this.rows.length);
    this.mark();
  }
}
