/* One training example: what it did to the query, token by token if asked, and what it did to all queries. */
async function choose(row, scroll = false) {
  state.row = row;
  for (const line of document.querySelectorAll(".ranked tr[data-row]")) line.setAttribute("aria-selected", String(Number(line.dataset.row) === row));
  const query = state.view === "one" ? state.query : null, f = filters(), listed = state.rows.find((e) => e.row === row);
  const current = () => state.row === row && (state.view === "one" ? state.query : null) === query;
  let found = null, everywhere = null, example = null;
  try {
    [found, everywhere] = await Promise.all([query === null ? null : source.pair(query, row, f), source.reverse(row, f)]);
    example = found?.train ?? everywhere?.train ?? (answers ? null : await source.example("train", row));
  } catch (error) { if (current()) say(error); return; }
  if (!current()) return;
  say(null);
  $("pair").hidden = false;
  const sdi = found?.sdi ?? (query === null ? null : listed?.sdi ?? null);
  $("pair-sub").textContent = (sdi ? `On this query: total ${signed(sum(sdi))}, largest at step ${peak(sdi)}.` : "") +
    (example ? "" : " This page holds text in full, parameters and matrix for the first examples only.");
  drawExample(example, listed, row);
  $("pair-charts").hidden = !sdi;
  if (sdi) drawPair(sdi, found, listed);
  drawMatrix(found?.matrix, query !== null);
  drawTokens(null);
  $("by-token").hidden = query === null;
  $("by-token-note").textContent = "";
  $("by-token-button").hidden = answers ? !(found && found.tokens) : !overview.model;
  if (!answers && !overview.model) $("by-token-note").textContent = `Influence by token is computed from the model: ${overview.noModel}`;
  if (answers && !(found && found.tokens)) $("by-token-note").textContent = "sdi report --tokens writes influence by token for the first examples.";
  drawEverywhere(everywhere);
  if (state.tokens && query !== null && !$("by-token-button").hidden) byToken();
  if (scroll) $("pair").scrollIntoView({ block: "start", behavior: "smooth" });
}
function drawExample(example, listed, row) {
  const tokens = example ? example.tokens : [];
  $("pair-tokens").replaceChildren(...tokens.map((t) => bdi(t)), ...(example && example.moreTokens ? [element("span", {}, `… and ${example.moreTokens} more`)] : []));
  $("pair-tokens").hidden = !tokens.length;
  $("pair-text").textContent = example ? example.text + (example.cut ? `\n… and ${example.cut} more characters` : "") || "(no text)" : listed ? listed.text : "";
  $("pair-text").hidden = tokens.length > 0 && !(example && example.cut);
  describe($("pair-meta"), example ? about(example) : [["id", listed ? listed.id : `row ${row}`]]);
}
function drawPair(sdi, found, listed) {
  const f = filters();
  plot("pair-line", [bars(sdi, f.parameters === "" ? listed?.errors : null)], { xaxis: stepAxis, height: 280, yaxis: { title: { text: INFLUENCE } } });
  $("pair-line-sub").hidden = !(listed?.errors && f.parameters === "");
  const groups = found ? found.parameters.map((g) => ({ ...g, total: sum(g.sdi) })).sort((a, b) => Math.abs(b.total) - Math.abs(a.total)).slice(0, 12).reverse() : [];
  $("groups-box").hidden = !groups.length;
  const across = (id, rows) => plot(id, [{ type: "bar", orientation: "h", x: rows.map((g) => g.total), y: rows.map((_, r) => r), text: rows.map((g) => esc(g.name)), textposition: "none",
    marker: { color: rows.map((g) => ink(g.total)) }, hovertemplate: "%{text}: <b>%{x:.3g}</b><extra></extra>" }],
  { height: Math.max(200, 60 + 22 * rows.length), margin: { l: 8, r: 16, t: 8, b: 40 }, xaxis: { nticks: 5, title: { text: INFLUENCE } },
    yaxis: { showgrid: false, tickvals: rows.map((_, r) => r), ticktext: rows.map((g) => esc(short(g.name, narrow() ? 16 : 34))), tickfont: { size: 11 }, automargin: true } });
  if (groups.length) across("pair-groups", groups);
  const parts = found && overview.checkpoints.length > 1 ? found.byCheckpoint.map((values, k) => ({ name: overview.checkpoints[k].name, total: sum(values) })).reverse() : [];
  $("checkpoints-box").hidden = !parts.length;
  if (parts.length) across("pair-checkpoints", parts);
}
function drawMatrix(matrix, asked) {
  $("matrix-box").hidden = !asked || (!matrix && Boolean(answers));
  $("matrix").hidden = !matrix;
  $("matrix-sub").textContent = matrix ? "Row: the step at which the training example's gradient arises. Column: the step of the query."
    : overview.trainSteps ? "" : "Not stored: featurize the training split with --per-step to see it.";
  if (matrix) plot("matrix", [heatmap(matrix, steps.slice(0, matrix[0].length), matrix.map((_, t) => t + 1), { hovertemplate: "training step %{y}, query step %{x}: <b>%{z:.3g}</b><extra></extra>", colorbar: scale() })],
    { height: 420, margin: heatMargin(), xaxis: { ...stepAxis, title: { text: "step of the query" } }, yaxis: { ...stepAxis, autorange: "reversed", title: { text: "step of the example" } } });
}

/* ---- Token by token ---------------------------------------------------------------------------------------------- */
const TOKEN_ROWS = 60; // lines of the chart: of longer examples those that matter most
async function byToken() {
  const query = state.query, row = state.row;
  $("by-token-button").disabled = true; $("by-token-note").textContent = answers ? "" : "computing from the model …";
  try {
    const found = await source.tokens(query, row, filters());
    if (query !== state.query || row !== state.row) return;
    state.tokens = true; remember();
    $("by-token-note").textContent = "";
    drawTokens(found);
  } catch (error) { if (query === state.query && row === state.row) { $("by-token-note").textContent = String(error.message || error); drawTokens(null); } } finally { $("by-token-button").disabled = false; }
}
/* Colour of a box: strongest where the influence is largest, none where it is zero; its text stays readable. */
function tint(box, value, most) {
  const strongest = root.dataset.theme === "dark" ? 50 : 62, share = most ? Math.min(1, Math.abs(value) / most) : 0;
  box.style.background = `color-mix(in srgb, ${ink(value)} ${Math.round(strongest * share)}%, var(--panel))`;
  box.title = signed(value);
}
function drawTokens(found) {
  $("by-token-box").hidden = !found;
  if (!found) return;
  const { first, last } = filters(), totals = found.sdi.map((values) => sum(values, first - 1, last)), most = Math.max(...totals.map(Math.abs));
  $("by-token-sub").textContent = `What training on each token did to this query (${partOf(filters())}): blue lowers its loss, orange raises it, full colour is ${round(most, 2)}. ` +
    "The tokens add up to the example." + (found.more ? ` The first ${found.tokens.length} tokens.` : "");
  $("token-boxes").replaceChildren(...found.tokens.map((token, t) => { const box = bdi(token); tint(box, totals[t], most); return box; }));
  const order = found.tokens.map((_, t) => t).sort((a, b) => Math.abs(totals[b]) - Math.abs(totals[a])).slice(0, TOKEN_ROWS).sort((a, b) => a - b), z = order.map((t) => found.sdi[t]);
  plot("token-heat", [heatmap(z, steps.slice(0, z[0].length), order.map((_, r) => r), { text: order.map((t) => steps.map(() => esc(short(found.tokens[t], 40)))), hovertemplate: "%{text}, step %{x}: <b>%{z:.3g}</b><extra></extra>",
    colorbar: scale() })],
  { height: Math.max(220, (narrow() ? 120 : 70) + 20 * z.length), margin: heatMargin(), xaxis: stepAxis,
    yaxis: { autorange: "reversed", showgrid: false, tickvals: order.map((_, r) => r), ticktext: order.map((t) => esc(short(found.tokens[t], 16))), tickfont: { size: 11 }, automargin: true } });
}

/* ---- The reverse: which queries does it affect? ------------------------------------------------------------------- */
function drawEverywhere(found) {
  $("reverse").hidden = !found;
  if (!found) return;
  $("reverse-sub").textContent = `Of all queries it helps ${found.helps.toLocaleString("en")} and harms ${found.harms.toLocaleString("en")}. Choose one to look at it.`;
  const pick = (e) => open(e.row, answers ? answers.queries.findIndex((q) => q.row === e.row) : $("find").value ? null : e.row);
  const usable = (rows) => (answers ? rows.filter((e) => answers.byQuery[e.row]) : rows);
  table("helped", usable(found.helpful), { part: "total", pick, chosen: state.view === "one" ? state.query : null });
  table("harmed", usable(found.harmful), { part: "total", pick, chosen: state.view === "one" ? state.query : null });
}
