// The figures of all runs, the legend, and the start of the page.

const hot = { hot: () => state.hot, onHot: setHot, colour };
// A getter, for it changes with the switch; made anew each time, for a spread would freeze it.
const depthAxis = (own) => ({ yLog: true, colour, ...own, get xLabel() { return state.x === "relative" ? "depth: image 0 → logits 1" : "layer, from image to logits"; } });
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
      const chart = (figures[`${name}-${end}`] ??= new Chart(byId(`${name}-${end}`), "", depthAxis(hot)));
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
  scatter("memory", "Peak memory over what was there at the start: ● measured, ○ planned", [["peak_memory_bytes", "measured"], ["planned_memory_bytes", "planned", true]],
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
  if (data.sweep) showSweep(data.sweep);
  if (!single) table();
  drawAll();
  if (single) choose(runs[0]);
  else byId("run").append(el("p", { className: "note" }, "The gradient of one run at each of its records, its heatmap, settings and files: choose it here or in the table."));
  dark.addEventListener("change", drawAll);
  // The second frame begins when the first one is on the screen.
  requestAnimationFrame(() => requestAnimationFrame(() => { document.documentElement.dataset.drawn = performance.now(); }));
}

start();
