// What a sweep found: its question, the table of means, and its figures. Text is only ever set as text.

function showSweep({ question, progress, head, rows, left, note, figures }) {
  const side = (i) => (i < left ? "" : "right");
  const heads = head.map((text, i) => el("th", { scope: "col", className: side(i) }, text));
  const lines = rows.map((cells) => el("tr", {}, ...cells.map((text, i) => el("td", { className: side(i) }, text))));
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...lines));
  const pictures = figures.map(({ caption, src }) => el("figure", {}, el("figcaption", {}, caption), el("img", { src, alt: caption })));
  byId("sweep").append(
    el("h2", {}, question || "Results"),
    el("p", { className: "note" }, progress),
    el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "table of results" }, table),
    el("p", { className: "note" }, note),
    el("div", { className: "grid" }, ...pictures),
  );
  byId("sweep").hidden = false;
}
