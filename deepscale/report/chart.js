// The two kinds of figures: lines or dots, and a heatmap.

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
