/* Keys, buttons, export, and the start. */
function show() { return state.view === "all" ? showAll() : state.query === null ? undefined : showQuery(); }
/* A filter was changed by a person. Wrong numbers are refused where they stand, and nothing else changes. */
function changed() {
  const wrong = refused();
  say(wrong, "refused");
  if (wrong) return;
  remember();
  redraw().catch(say);
}
async function redraw() {
  if (state.view === "all") { await showAll(); return; }
  if (state.query === null) return;
  $("main").classList.add("busy");
  try {
    await rank();
    if (state.row !== null && !$("pair").hidden) await choose(state.row);
    await compare();
  } finally { $("main").classList.remove("busy"); }
}

function save(kind) {
  const wanted = filters();
  if (refused()) return;
  if (!answers) { window.location.assign(`/api/export?${new URLSearchParams({ query: state.query, format: kind, ...wanted })}`); return; }
  const found = rankSaved(saved(state.query, wanted.score).examples, wanted);
  const guard = (t) => (/^[\t\r]|^\s*[=+\-@＝＋－＠]/.test(t) ? `'${t}` : t), cell = (v) => `"${String(v).replace(/"/g, '""')}"`;
  const taken = steps.slice(0, Math.max(0, ...[...found.helpful, ...found.harmful].map((e) => e.sdi.length)));
  const lines = [["side", "rank", "row", "id", "score", "standard_error", ...taken.map((t) => `step_${t}`), "text"].join(",")];
  for (const side of ["helpful", "harmful"]) found[side].forEach((e, i) => lines.push([side, i + 1, e.row, cell(guard(e.id)), e.score, e.error ?? "", ...e.sdi, cell(guard(e.text))].join(",")));
  const url = URL.createObjectURL(new Blob([kind === "json" ? JSON.stringify(found, null, 1) : lines.join("\n")]));
  const link = element("a", { href: url, download: `influence-${state.query}.${kind}` });
  link.click(); URL.revokeObjectURL(url);
}

function facts() {
  const failed = overview.failed.train + overview.failed.query, some = (n, what, more = `${what}s`) => `${n.toLocaleString("en")} ${n === 1 ? what : more}`;
  return `${some(overview.train, "training example")}, ${some(overview.queries, "query", "queries")}, ${some(overview.steps, "loop step")}, ` +
    `${some(overview.checkpoints.length, "checkpoint")}${overview.sketched ? ", sketched gradients" : ", exact gradients"}` + (failed ? `; ${failed} failed` : "") + ".";
}
async function move(by) {
  const place = state.place === null || state.view !== "one" ? 0 : state.place + by;
  if (place < 0 || place >= queryList.total) return;
  await queryList.load(place);
  const next = queryList.item(place);
  if (next) await open(next.row, place);
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing) return;
  // Arrow keys move in the list when it has the focus; elsewhere they scroll the page, as ever.
  const arrows = event.target === $("queries") ? { ArrowDown: () => move(1), ArrowUp: () => move(-1) } : {};
  const keys = { ...arrows, j: () => move(1), k: () => move(-1), "/": () => $("find").focus(), c: () => $("other").focus(), a: () => tab(state.view === "all" ? "one" : "all") };
  if (keys[event.key]) { event.preventDefault(); Promise.resolve(keys[event.key]()).catch(say); }
});
function tab(view) {
  if (view === state.view || (view === "one" && state.query === null)) return;
  state.view = view; state.row = null; state.tokens = false;
  remember();
  return show();
}

let typed;
$("find").addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(() => { state.place = null; queryList.reset().catch(say); }, 200); });
for (const id of ["first", "last", "k", "parameters", "score", "checkpoint", "weights"]) $(id).addEventListener("change", changed);
$("other").addEventListener("change", () => { remember(); compare(); });
$("exact").addEventListener("click", recompute);
$("by-token-button").addEventListener("click", byToken);
for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => save(button.dataset.export));
for (const button of document.querySelectorAll("[data-tab]")) button.addEventListener("click", () => tab(button.dataset.tab));
let width = innerWidth;
addEventListener("resize", () => { const was = narrow(); if (innerWidth !== width) { width = innerWidth; if ((width < 600) !== was || was) redraw().catch(say); } });

$("score").append(...overview.scores.map(({ key, name }) => element("option", { value: key }, name)));
$("by-score").hidden = overview.scores.length < 2;
$("uncorrected").hidden = !overview.uncorrected;
$("uncorrected").textContent = `Not corrected for curvature: ${overview.uncorrected}`;
$("checkpoint").append(...overview.checkpoints.map(({ name }, k) => element("option", { value: k }, name)));
$("by-checkpoint").hidden = overview.checkpoints.length < 2;
for (const name of overview.parameters) $("parameters").append(element("option", { value: name }, name));
$("by-parameters").hidden = Boolean(answers) || !overview.parameters.length;
$("facts").textContent = facts();
$("unit").textContent = overview.unit;
$("first").max = overview.steps; $("last").max = overview.steps;
$("limits").textContent = answers ? "Saved page: filters rank the examples kept in it (the leading ones over all steps, at each step and at each checkpoint)." : "";

/* From the address, at the start and when a person goes back. */
async function restore(start = false) {
  const query = fromAddress(), usable = (row) => row !== null && row < overview.queries && (!answers || row in answers.byQuery);
  if (!usable(state.other)) { state.other = null; $("other").value = ""; }
  if (start) {
    state.setTheme = themed(() => redraw().catch(say), state.theme);
    $("theme").addEventListener("click", () => { state.theme = root.dataset.theme; remember(true); });
  } else state.setTheme(state.theme);
  if (start) await queryList.reset();
  const first = queryList.items.find((q) => !q.failed) || queryList.items[0];
  const wanted = usable(query) ? query : first ? first.row : null;
  if (wanted !== state.query) state.place = null;
  state.query = wanted;
  if (state.place === null && answers) { const place = answers.queries.findIndex((q) => q.row === wanted); state.place = $("find").value || place < 0 ? null : place; }
  if (state.row !== null && state.row >= overview.train) state.row = null;
  offer();
  remember(true);
  await show();
}
addEventListener("popstate", () => restore().catch(say));
restore(true).catch(say);
