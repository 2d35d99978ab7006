"use strict";
// Ticks, colours, and what every figure has: two canvases, an x axis, a readout for mouse and keyboard. Logarithmic axes are
// given log10 of their values.

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
