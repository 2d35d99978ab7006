// The table of runs, and links to files. Text of a run is only ever set as text.

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
