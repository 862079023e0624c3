/* Asks the server, or the answers in #data, and shows what they say. */
const { overview, answers } = JSON.parse($("data").textContent);
const steps = Array.from({ length: overview.steps }, (_, t) => t + 1);
const INFLUENCE = "influence, first order";
const state = { query: null, items: [], total: 0, rows: [], chosen: null, ticket: 0 };

/* ---- Where answers come from: the server, or this page itself --------------------------------------------------- */
const ask = async (path, fields) => {
  const reply = await fetch(`/api/${path}?${new URLSearchParams(fields)}`);
  const result = await reply.json();
  if (!reply.ok) throw new Error(result.error || `${path}: ${reply.status}`);
  return result;
};
const sum = (values, from = 0, to = values.length) => values.slice(from, to).reduce((a, b) => a + b, 0);
const saved = (row, score) => answers.byQuery[row].scores[score];
function rankSaved(row, { first, last, k, score }) {
  const scored = saved(row, score).examples.map((e) => ({ ...e, score: sum(e.sdi, first - 1, last) }));
  const down = scored.filter((e) => e.score > 0).sort((a, b) => b.score - a.score);
  const up = scored.filter((e) => e.score < 0).sort((a, b) => a.score - b.score);
  return { helpful: down.slice(0, k), harmful: up.slice(0, k) };
}
const source = answers ? {
  queries: async ({ find, offset, limit }) => {
    const word = find.toLowerCase();
    const all = answers.queries.filter((q) => !word || q.id.toLowerCase().includes(word) || q.text.toLowerCase().includes(word));
    return { total: all.length, items: all.slice(offset, offset + limit) };
  },
  example: async (side, row) => answers.byQuery[row].example,
  curve: async (row, { score }) => saved(row, score).curve,
  top: async (row, fields) => rankSaved(row, fields),
  pair: async (row, train, score) => saved(row, score).pairs[train] || null,
} : {
  queries: (fields) => ask("queries", fields),
  example: (side, row) => ask("example", { side, row }),
  curve: (row, { parameters, score }) => ask("curve", { query: row, parameters, score }),
  top: (row, fields) => ask("top", { query: row, ...fields }),
  pair: (row, train, score) => ask("pair", { query: row, train, score }),
  compare: (row, other, score) => ask("compare", { query: row, other, score }),
};

/* ---- Small things ------------------------------------------------------------------------------------------------ */
const bdi = (text, cls = null) => element("bdi", { class: cls }, text ?? "");
const peak = (values) => 1 + values.reduce((best, v, t) => (Math.abs(v) > Math.abs(values[best]) ? t : best), 0);
const label = (e) => (e.text && e.text !== e.id ? `${e.id}: ${e.text}` : e.id);
function say(error) { $("notice").hidden = !error; $("notice").textContent = error ? String(error.message || error) : ""; }

function spark(values) {
  const ns = "http://www.w3.org/2000/svg", w = 130, h = 26, most = Math.max(...values.map(Math.abs)) || 1;
  const svg = document.createElementNS(ns, "svg");
  svg.setAttribute("width", w); svg.setAttribute("height", h); svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `largest at step ${peak(values)}`);
  const each = w / values.length;
  values.forEach((v, t) => {
    const bar = document.createElementNS(ns, "rect"), size = Math.max(0.5, (Math.abs(v) / most) * (h / 2 - 1));
    bar.setAttribute("x", t * each); bar.setAttribute("width", Math.max(1, each - 1)); bar.setAttribute("height", size);
    bar.setAttribute("y", v >= 0 ? h / 2 - size : h / 2); bar.setAttribute("fill", ink(v));
    svg.append(bar);
  });
  return svg;
}
/* Charts can be zoomed into. */
const plot = (id, traces, extra) => draw(id, traces, { dragmode: "zoom", ...extra });
const stepAxis = { title: { text: "loop step" }, showgrid: false, zeroline: false, dtick: steps.length > 24 ? 4 : steps.length > 12 ? 2 : 1 };
const bars = (values) => signedBars(steps, values, "step %{x}: <b>%{y:.3g}</b><extra></extra>");
function describe(list, fields) {
  list.replaceChildren();
  for (const [name, value] of fields) {
    const dd = element("dd"); dd.append(bdi(value)); const dt = element("dt"); dt.append(bdi(name)); list.append(dt, dd);
  }
}
const about = (e) => [["id", e.id], ...Object.entries(e.metadata || {}),
  ["loss", e.losses.map((v) => (v === null ? "–" : Number(v.toPrecision(4)))).join(", ") + (e.losses.length > 1 ? " (by checkpoint)" : "")]];

/* ---- The list of queries ----------------------------------------------------------------------------------------- */
async function list(more = false) {
  const offset = more ? state.items.length : 0, find = $("find").value;
  const found = await source.queries({ find, offset, limit: 100 });
  if (find !== $("find").value) return;
  state.items = more ? state.items.concat(found.items) : found.items;
  state.total = found.total;
  $("queries").replaceChildren(...state.items.map((q) => {
    const who = element("span", { class: "who" }, bdi(q.id)), loss = element("span");
    loss.textContent = q.failed ? "failed" : q.loss === null ? "" : `loss ${Number(q.loss.toPrecision(3))}`;
    if (q.failed) loss.className = "failed";
    who.append(loss);
    const item = element("li", { role: "option", id: `item${q.row}`, "aria-selected": String(q.row === state.query) }, who, bdi(q.text, "what"));
    item.addEventListener("click", () => show(q.row));
    return item;
  }));
  $("found").textContent = `${state.items.length} of ${state.total}` + (answers && answers.of > answers.queries.length ? ` (of ${answers.of} in the run)` : "");
  $("more").hidden = state.items.length >= state.total;
  $("other").replaceChildren(element("option", { value: "" }, "choose a query"), ...state.items.map((q) => element("option", { value: q.row }, short(label(q), 60))));
}

/* ---- One query --------------------------------------------------------------------------------------------------- */
const filters = () => ({ first: Number($("first").value), last: Number($("last").value), k: Number($("k").value), parameters: $("parameters").value, score: $("score").value });
async function show(row) {
  state.query = row; state.chosen = null; $("pair").hidden = true; $("other").value = ""; Plotly.purge($("compare"));
  for (const item of $("queries").children) item.setAttribute("aria-selected", String(item.id === `item${row}`));
  const item = $(`item${row}`), box = $("queries"); // the list alone: scrollIntoView would move the page, too
  if (item) box.scrollTop = Math.min(Math.max(box.scrollTop, item.offsetTop + item.offsetHeight - box.clientHeight), item.offsetTop);
  $("queries").setAttribute("aria-activedescendant", `item${row}`);
  history.replaceState(null, "", `#q${row}`);
  const ticket = ++state.ticket;
  $("main").classList.add("busy");
  try {
    const asked = await source.example("query", row);
    if (ticket !== state.ticket) return;
    $("tokens").replaceChildren(...asked.tokens.map((t) => bdi(t)));
    $("text").textContent = asked.text + (asked.cut ? `\n… and ${asked.cut} more characters` : "");
    $("text").hidden = !asked.text || asked.tokens.length > 0;
    describe($("meta"), about(asked));
    if (asked.failed) throw new Error(`query ${asked.id} failed: ${asked.failed}`);
    await rank(ticket);
  } catch (error) { if (ticket === state.ticket) { clear(); say(error); } } finally {
    if (ticket === state.ticket) $("main").classList.remove("busy");
  }
}
function clear() { for (const id of ["helpful", "harmful"]) $(id).replaceChildren(); for (const id of ["curve", "heat"]) Plotly.purge($(id)); $("curve-sub").textContent = ""; $("dominance").hidden = true; }
async function rank(ticket = ++state.ticket) {
  const wanted = filters();
  if (!(wanted.first >= 1 && wanted.first <= wanted.last && wanted.last <= overview.steps)) throw new Error(`steps: give two numbers from 1 to ${overview.steps}, the smaller one first`);
  if (!(wanted.k >= 1 && wanted.k <= 1000)) throw new Error("rows: give a number from 1 to 1000");
  const [curve, found] = await Promise.all([source.curve(state.query, wanted), source.top(state.query, wanted)]);
  if (ticket !== state.ticket) return;
  say(null);
  drawCurve(curve, wanted);
  state.rows = [...found.helpful, ...found.harmful];
  table("helpful", found.helpful, wanted); table("harmful", found.harmful, wanted);
  drawHeat();
}
function drawCurve(curve, { first, last }) {
  $("curve-sub").textContent = `Scores: ${overview.scores.find((s) => s.key === $("score").value).name}. Energy: influence of all training examples at each loop step, whatever its sign; bars: its signed sum. ` +
    `${curve.helpful} examples help, ${curve.harmful} harm. The later half of the steps has ${(100 * curve.lateMass).toFixed(0)} % of the energy.` +
    (curve.shares.length > 1 ? ` By checkpoint: ${curve.shares.map((s, k) => `${overview.checkpoints[k].name} ${(s < 1 ? Math.min(100 * s, 99.9) : 100).toFixed(1)} %`).join(", ")}.` : "");
  $("dominance").textContent = curve.dominance; $("dominance").hidden = !curve.dominance;
  plot("curve", [bars(curve.signed), { x: steps, y: curve.energy, mode: "lines+markers", line: { color: css("--accent"), width: 2.2 },
    hovertemplate: "step %{x}: energy <b>%{y:.3g}</b><extra></extra>" }], { xaxis: stepAxis, yaxis: { title: { text: INFLUENCE } }, height: 280,
    shapes: first > 1 || last < overview.steps ? [{ type: "rect", xref: "x", yref: "paper", x0: first - 0.5, x1: last + 0.5, y0: 0, y1: 1, line: { width: 0 }, fillcolor: css("--faint"), opacity: 0.7, layer: "below" }] : [] });
}
function table(id, rows, { first, last }) {
  const head = element("tr");
  const part = first > 1 || last < overview.steps ? `steps ${first}–${last}` : "total";
  for (const [cls, name] of [["score", part], ["spark", "by loop step"], ["peak", "peak"], ["id", "id"], ["words", "text"]]) head.append(element("th", { class: cls, scope: "col" }, name));
  $(id).replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows.map((e) => {
    const line = element("tr", { tabindex: "0", "data-row": e.row, "aria-selected": String(e.row === state.chosen) });
    line.append(element("td", { class: `score ${e.score >= 0 ? "helpful" : "harmful"}-ink` }, signed(e.score)), element("td", { class: "spark" }, spark(e.sdi)),
      element("td", { class: "peak" }, String(peak(e.sdi))), element("td", { class: "id" }, bdi(e.id)), element("td", { class: "words" }, bdi(e.text)));
    line.addEventListener("click", () => choose(e));
    line.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(e); } });
    return line;
  })));
  if (!rows.length) $(id).append(element("caption", {}, "none"));
}
function drawHeat() {
  const z = state.rows.map((e) => e.sdi), text = state.rows.map((e) => steps.map(() => esc(short(label(e), 60))));
  plot("heat", z.length ? [heatmap(z, steps, z.map((_, r) => r), { text, hovertemplate: "step %{x}: <b>%{z:.3g}</b><br>%{text}<extra></extra>" })] : [], {
    xaxis: stepAxis, height: Math.max(260, 60 + 22 * z.length), margin: { l: 150, r: 16, t: 8, b: 44 },
    yaxis: { autorange: "reversed", showgrid: false, tickvals: z.map((_, r) => r), ticktext: state.rows.map((e) => esc(short(e.id, 18))) } });
}

/* ---- One example ------------------------------------------------------------------------------------------------- */
async function choose(e) {
  state.chosen = e.row;
  for (const line of document.querySelectorAll(".ranked tr[data-row]")) line.setAttribute("aria-selected", String(Number(line.dataset.row) === e.row));
  const query = state.query;
  let found;
  try { found = await source.pair(state.query, e.row, $("score").value); } catch (error) { say(error); return; }
  if (query !== state.query || state.chosen !== e.row) return;
  $("pair").hidden = false;
  $("pair-sub").textContent = `Total ${signed(sum(e.sdi))}, largest at step ${peak(e.sdi)}.` + (found ? "" : " This page holds text in full, parameters and matrix for the first examples only.");
  $("pair-text").textContent = found ? found.train.text || "(no text)" : e.text;
  describe($("pair-meta"), found ? about(found.train) : [["id", e.id]]);
  plot("pair-line", [bars(e.sdi)], { xaxis: stepAxis, height: 280, yaxis: { title: { text: INFLUENCE } } });
  const groups = found ? [...found.parameters].map((g) => ({ ...g, total: sum(g.sdi) })).sort((a, b) => Math.abs(b.total) - Math.abs(a.total)).slice(0, 12).reverse() : [];
  $("groups-box").hidden = !groups.length;
  if (groups.length) plot("pair-groups", [{ type: "bar", orientation: "h", x: groups.map((g) => g.total), y: groups.map((g) => esc(short(g.name, 34))),
    marker: { color: groups.map((g) => ink(g.total)) }, hovertemplate: "%{y}: <b>%{x:.3g}</b><extra></extra>" }],
  { height: Math.max(280, 60 + 22 * groups.length), margin: { l: 8, r: 16, t: 8, b: 40 }, yaxis: { automargin: true, showgrid: false, tickfont: { size: 11 } }, xaxis: { nticks: 5 } });
  const matrix = found && found.matrix;
  $("matrix").hidden = !matrix;
  $("matrix-sub").textContent = matrix ? "Row: the step at which the training example's gradient arises. Column: the step of the query."
    : overview.trainSteps ? "" : "Not stored: featurize the training split with --per-step to see it.";
  if (matrix) plot("matrix", [heatmap(matrix, steps, matrix.map((_, t) => t + 1), { hovertemplate: "training step %{y}, query step %{x}: <b>%{z:.3g}</b><extra></extra>" })],
    { height: 420, xaxis: { ...stepAxis, title: { text: "step of the query" } }, yaxis: { autorange: "reversed", title: { text: "step of the example" }, showgrid: false } });
  $("pair").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

/* ---- Two queries ------------------------------------------------------------------------------------------------- */
async function compare() {
  const other = $("other").value;
  if (other === "") return;
  try {
    const found = await source.compare(state.query, Number(other), $("score").value);
    const r = found.correlation === null ? "" : ` Correlation over all examples: ${found.correlation.toFixed(2)}.`;
    $("compare-sub").textContent = `${found.points.length} examples that matter most to either query.${r}`;
    plot("compare", [{ type: "scatter", mode: "markers", x: found.points.map((p) => p.a), y: found.points.map((p) => p.b), text: found.points.map((p) => esc(short(label(p), 60))),
      marker: { size: 8, color: css("--helpful"), opacity: 0.7 }, hovertemplate: "%{text}<br>this %{x:.3g}, other %{y:.3g}<extra></extra>" }],
    { height: 420, xaxis: { title: { text: "influence on this query" } }, yaxis: { title: { text: "influence on the other" } } });
  } catch (error) { say(error); }
}

/* ---- Export ------------------------------------------------------------------------------------------------------ */
function save(kind) {
  const wanted = filters();
  if (!answers) { window.location.assign(`/api/export?${new URLSearchParams({ query: state.query, format: kind, ...wanted })}`); return; }
  const found = rankSaved(state.query, wanted), guard = (t) => (/^[\t\r]|^\s*[=+\-@＝＋－＠]/.test(t) ? `'${t}` : t), cell = (v) => `"${String(v).replace(/"/g, '""')}"`;
  const lines = [["side", "rank", "row", "id", "score", ...steps.map((t) => `step_${t}`), "text"].join(",")];
  for (const side of ["helpful", "harmful"]) found[side].forEach((e, i) => lines.push([side, i + 1, e.row, cell(guard(e.id)), e.score, ...e.sdi, cell(guard(e.text))].join(",")));
  const url = URL.createObjectURL(new Blob([kind === "json" ? JSON.stringify(found, null, 1) : lines.join("\n")]));
  const link = element("a", { href: url, download: `influence-${state.query}.${kind}` });
  link.click(); URL.revokeObjectURL(url);
}

async function recolour() {
  if (state.query === null) return;
  await rank();
  const chosen = state.rows.find((e) => e.row === state.chosen);
  if (chosen && !$("pair").hidden) await choose(chosen);
  await compare();
}

/* ---- Start ------------------------------------------------------------------------------------------------------- */
function facts() {
  const failed = overview.failed.train + overview.failed.query;
  return `${overview.train.toLocaleString("en")} training examples, ${overview.queries.toLocaleString("en")} queries, ${overview.steps} loop steps, ` +
    `${overview.checkpoints.length} checkpoint${overview.checkpoints.length > 1 ? "s" : ""}${overview.sketched ? ", sketched gradients" : ", exact gradients"}` + (failed ? `; ${failed} failed` : "") + ".";
}
function move(by) {
  const place = state.items.findIndex((q) => q.row === state.query), next = state.items[place + by];
  if (next) show(next.row);
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing) return;
  // Arrow keys move in the list when it has the focus; elsewhere they scroll the page, as ever.
  const arrows = event.target === $("queries") ? { ArrowDown: () => move(1), ArrowUp: () => move(-1) } : {};
  const keys = { ...arrows, j: () => move(1), k: () => move(-1), "/": () => $("find").focus(), c: () => $("other").focus() };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
let typed;
$("find").addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(() => list().catch(say), 200); });
$("more").addEventListener("click", () => list(true).catch(say));
for (const id of ["first", "last", "k", "parameters"]) $(id).addEventListener("change", () => rank().catch(say));
$("other").addEventListener("change", compare);
$("score").append(...overview.scores.map(({ key, name }) => element("option", { value: key }, name)));
$("by-score").hidden = overview.scores.length < 2;
$("uncorrected").hidden = !overview.uncorrected;
$("uncorrected").textContent = `Not corrected for curvature: ${overview.uncorrected}`;
$("score").addEventListener("change", () => recolour().catch(say));
for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => save(button.dataset.export));
themed(() => recolour().catch(say));
$("facts").textContent = facts();
$("unit").textContent = overview.unit;
$("last").value = overview.steps; $("first").max = overview.steps; $("last").max = overview.steps;
for (const name of overview.parameters) $("parameters").append(element("option", { value: name }, name));
$("by-parameters").hidden = Boolean(answers) || !overview.parameters.length;
$("comparing").hidden = Boolean(answers); // needs the scores of all examples
$("limits").textContent = answers ? "Saved page: filters rank the examples kept in it (the leading ones over all steps and at each step)." : "";
list().then(() => {
  const asked = Number((location.hash.match(/^#q(\d+)$/) || [])[1]);
  const first = state.items.find((q) => q.row === asked) || state.items.find((q) => !q.failed) || state.items[0];
  if (first) show(first.row);
}).catch(say);
