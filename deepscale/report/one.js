// One run at all its records: a slider, gradient and signal, and the heatmap.

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
  const gradient = new Chart(places[0], "", depthAxis()), signal = new Chart(places[1], "", depthAxis());
  const heat = new Heatmap(places[2], "", depthAxis());
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
