/* One query: when it matters, who matters, and how far that can be trusted. */
const queryList = new VirtualList($("queries"), (offset, limit) => source.queries({ find: $("find").value, offset, limit }), (q, place) => {
  const who = element("span", { class: "who" }, bdi(q.id)), loss = element("span");
  loss.textContent = q.failed ? "failed" : `${q.right === null ? "" : q.right ? "✓ " : "✗ "}${q.loss === null ? "" : `loss ${Number(q.loss.toPrecision(3))}`}`;
  if (q.failed || q.right === false) loss.className = "failed";
  who.append(loss);
  const item = element("li", { role: "option", id: `item${q.row}`, "aria-selected": String(state.view === "one" && q.row === state.query) }, who, bdi(q.text, "what"));
  item.addEventListener("click", () => open(q.row, place));
  return item;
}, () => {
  $("found").textContent = ($("find").value ? `${queryList.total.toLocaleString("en")}${queryList.more ? " or more" : ""} found` : queryList.total.toLocaleString("en")) +
    (answers && answers.of > answers.queries.length ? ` (of ${answers.of.toLocaleString("en")} in the run)` : "");
  if (state.place === null) { const place = queryList.items.findIndex((q) => q.row === state.query); if (place >= 0 && queryList.items.length === queryList.pages.get(0).length) state.place = place; }
  offer();
});
/* The queries that can be compared with: those that the list has loaded. */
function offer() {
  const before = $("other").value, wanted = state.other;
  const options = queryList.items.filter((q) => !q.failed).map((q) => element("option", { value: q.row }, short(label(q), 60)));
  for (const row of [before, wanted]) if (row !== null && row !== "" && !options.some((o) => o.value === String(row))) options.push(element("option", { value: row }, `row ${row}`));
  $("other").replaceChildren(element("option", { value: "" }, "choose a query"), ...options);
  $("other").value = wanted ?? before;
  state.other = null;
}

/* A person chose a query. */
function open(row, place = null) {
  state.view = "one"; state.query = row; state.place = place; state.row = null; state.tokens = false; $("other").value = "";
  remember();
  return showQuery();
}
async function showQuery() {
  const row = state.query, ticket = ++state.ticket;
  arrange();
  $("pair").hidden = true; state.exact = null;
  if (!answers && !$("find").value && state.place === null) state.place = row;
  if (state.place !== null) queryList.reveal(state.place); else queryList.draw();
  $("queries").setAttribute("aria-activedescendant", `item${row}`);
  $("main").classList.add("busy");
  try {
    const asked = await source.example("query", row);
    if (ticket !== state.ticket) return;
    drawAsked(asked);
    if (asked.failed) throw new Error(`query ${asked.id} failed: ${asked.failed}`);
    await rank(ticket);
    if (ticket !== state.ticket) return;
    await Promise.all([state.row === null ? null : choose(state.row), compare()]);
  } catch (error) { if (ticket === state.ticket) { clear(); say(error); } } finally {
    if (ticket === state.ticket) $("main").classList.remove("busy");
  }
}
function drawAsked(asked) {
  document.title = `${overview.title} · ${short(asked.id, 40)} · influence by loop step`;
  const verdict = $("verdict"), has = asked.answer !== null || asked.truth !== null;
  verdict.hidden = !has;
  verdict.replaceChildren();
  if (asked.answer !== null) verdict.append("The model answers ", element("b", {}, bdi(asked.answer)));
  if (asked.truth !== null) verdict.append(asked.answer !== null ? "; the truth is " : "The truth is ", element("b", {}, bdi(asked.truth)));
  if (asked.right !== null) verdict.append(" ", element("span", { class: asked.right ? "right" : "wrong" }, asked.right ? "✓ right" : "✗ wrong"));
  $("tokens").replaceChildren(...asked.tokens.map((t) => bdi(t)), ...(asked.moreTokens ? [element("span", {}, `… and ${asked.moreTokens} more`)] : []));
  $("tokens").hidden = !asked.tokens.length;
  $("text").textContent = asked.text + (asked.cut ? `\n… and ${asked.cut} more characters` : "");
  $("text").hidden = !asked.text || asked.tokens.length > 0;
  describe($("meta"), about(asked));
}
function clear() {
  for (const id of ["helpful", "harmful"]) $(id).replaceChildren();
  for (const id of ["curve", "heat"]) Plotly.purge($(id));
  $("curve-sub").textContent = ""; $("dominance").hidden = true; $("shares-box").hidden = true; $("trust-box").hidden = true;
}

async function rank(ticket = ++state.ticket) {
  const wrong = refused();
  say(wrong, "refused");
  if (wrong) return;
  const wanted = filters();
  state.exact = null;
  const [curve, found] = await Promise.all([source.curve(state.query, wanted), source.top(state.query, wanted)]);
  if (ticket !== state.ticket) return;
  say(null);
  drawCurve(curve, wanted);
  state.ranked = found;
  state.rows = [...found.helpful, ...found.harmful];
  drawRanked(wanted); drawHeat(found);
  drawTrust(ticket, wanted);
}
const partOf = ({ first, last }) => (first > 1 || last < overview.steps ? `steps ${first}–${last}` : "total");
function drawRanked(wanted) {
  const known = state.exact && state.exact.rows;
  const extra = known ? [["exact", "exact", (e) => (known[e.row] ? signed(known[e.row].score) : "–")]] : [];
  for (const side of ["helpful", "harmful"]) {
    $(side).classList.toggle("with-exact", Boolean(known));
    table(side, state.ranked[side], { part: partOf(wanted), extra, pick: pickRow, chosen: state.row });
  }
}
const pickRow = (e) => { state.row = e.row; state.tokens = false; remember(); return choose(e.row, true); };

function drawCurve(curve, { first, last, checkpoint, score }) {
  const share = (s) => `${(s < 1 ? Math.min(100 * s, 99.9) : 100).toFixed(1)} %`;
  $("curve-sub").textContent = `Scores: ${overview.scores.find((s) => s.key === score).name}${checkpoint === "" ? "" : `, at checkpoint ${overview.checkpoints[checkpoint].name} alone`}. ` +
    "Energy: influence of all training examples at each loop step, whatever its sign; bars: its signed sum. " +
    `${curve.helpful.toLocaleString("en")} examples help, ${curve.harmful.toLocaleString("en")} harm. The later half of the steps has ${(100 * curve.lateMass).toFixed(0)} % of the energy.`;
  $("dominance").textContent = curve.dominance; $("dominance").hidden = !curve.dominance || checkpoint !== "";
  $("shares-box").hidden = curve.shares.length < 2;
  $("shares").replaceChildren(...curve.shares.map((s, k) => {
    const bar = element("span", { class: "bar" }), button = element("button", { class: "share", "aria-pressed": String(String(k) === checkpoint) }, bdi(overview.checkpoints[k].name, "name"), bar, element("span", { class: "percent" }, share(s)));
    bar.style.setProperty("--share", `${100 * s}%`);
    button.addEventListener("click", () => { $("checkpoint").value = $("checkpoint").value === String(k) ? "" : k; changed(); });
    return button;
  }));
  plot("curve", [bars(curve.signed), { x: steps, y: curve.energy, mode: "lines+markers", line: { color: css("--accent"), width: 2.2 },
    hovertemplate: "step %{x}: energy <b>%{y:.3g}</b><extra></extra>" }], { xaxis: stepAxis, yaxis: { title: { text: INFLUENCE } }, height: 280,
    shapes: first > 1 || last < overview.steps ? [{ type: "rect", xref: "x", yref: "paper", x0: first - 0.5, x1: last + 0.5, y0: 0, y1: 1, line: { width: 0 }, fillcolor: css("--faint"), opacity: 0.7, layer: "below" }] : [] });
}
const HEAT_ROWS = 20; // on either side: more could not be told apart
function drawHeat({ helpful, harmful }) {
  const shown = [...helpful.slice(0, HEAT_ROWS), ...harmful.slice(0, HEAT_ROWS)], z = shown.map((e) => e.sdi);
  $("heat-sub").textContent = `Each row is one of the examples above${shown.length < state.rows.length ? ` (the first ${HEAT_ROWS} on either side)` : ""}; blue helps, orange harms.`;
  plot("heat", z.length ? [heatmap(z, steps.slice(0, z[0].length), z.map((_, r) => r), { text: shown.map((e) => steps.map(() => esc(short(label(e), 60)))), hovertemplate: "step %{x}: <b>%{z:.3g}</b><br>%{text}<extra></extra>",
    colorbar: scale() })] : [], {
    xaxis: stepAxis, height: Math.max(260, (narrow() ? 120 : 70) + 22 * z.length), margin: heatMargin(),
    yaxis: { autorange: "reversed", showgrid: false, ...names(shown) } });
}

/* ---- How far can it be trusted? ---------------------------------------------------------------------------------- */
async function drawTrust(ticket, wanted) {
  $("trust-box").hidden = false;
  const put = (...rows) => describe($("trust"), rows);
  put(["sketch noise", "…"]);
  $("exact-note").textContent = ""; $("exact").hidden = true;
  try {
    const found = await source.agreement(state.query, wanted);
    if (ticket !== state.ticket) return;
    const best = state.ranked.helpful[0] || state.ranked.harmful[0];
    const noise = found.noise === null ? found.noErrors && found.noHalves ? `not known: ${found.noErrors}` : "none: these are exact" :
      `a score is off by ± ${round(found.noise, 2)} (${found.noErrors ? "standard error as two halves of the columns tell it" : "standard error, at most"}); the first one is ${signed(best.score)}`;
    const kept = (side) => found.sides[side].halves ? `${found.sides[side].halves.join(" and ")} of the ${found.sides[side].rows} ${side}` : null;
    const lines = ["helpful", "harmful"].map(kept).filter(Boolean);
    put(["sketch noise", noise], ["by half the sketch", found.noHalves ? `not known: ${found.noHalves}` : lines.length ? `${lines.join(", ")} lead by the one and by the other half of the columns, too` : "no example leads"]);
  } catch (error) { if (ticket === state.ticket) put(["sketch noise", String(error.message || error)]); }
  if (ticket !== state.ticket) return;
  $("exact").hidden = !canExact(wanted).can;
  $("exact-note").textContent = canExact(wanted).why;
}
function canExact({ score }) {
  if (score !== "sdi") return { can: false, why: "Exact influence has no curvature: choose the score SDI to recompute it." };
  if (answers) return answers.byQuery[state.query].exact ? { can: true, why: "" } : { can: false, why: "sdi report --exact also writes exact influence." };
  return overview.model ? { can: true, why: "" } : { can: false, why: overview.noModel };
}
async function recompute() {
  const ticket = state.ticket, wanted = filters();
  $("exact").disabled = true; $("exact-note").textContent = "recomputing from the model …";
  try {
    const found = await source.exact(state.query, wanted);
    if (ticket !== state.ticket) return;
    state.exact = found;
    drawRanked(wanted);
    const lines = ["helpful", "harmful"].filter((side) => state.ranked[side].length).map((side) => `${found.remain[side]} of the ${state.ranked[side].length} ${side}`);
    $("exact-note").textContent = `Recomputed without sketches: ${lines.join(" and ")} lead by exact influence, too, of ${found.candidates} candidates.`;
  } catch (error) { if (ticket === state.ticket) $("exact-note").textContent = String(error.message || error); } finally { $("exact").disabled = false; }
}

/* ---- Two queries ------------------------------------------------------------------------------------------------- */
const COMPARE = "Compare with another query of the list: do the same examples help both?";
async function compare() {
  const other = $("other").value, ticket = state.ticket;
  if (answers) return;
  if (other === "") { Plotly.purge($("compare")); $("compare").hidden = true; $("compare-sub").textContent = COMPARE; return; }
  try {
    const found = await source.compare(state.query, Number(other), filters());
    if (ticket !== state.ticket) return;
    $("compare").hidden = false;
    const r = found.correlation === null ? "" : ` Correlation over all examples: ${found.correlation.toFixed(2)}.`;
    $("compare-sub").textContent = `${found.points.length} examples that matter most to either query.${r}`;
    plot("compare", [{ type: "scatter", mode: "markers", x: found.points.map((p) => p.a), y: found.points.map((p) => p.b), text: found.points.map((p) => esc(short(label(p), 60))),
      marker: { size: 8, color: css("--helpful"), opacity: 0.7 }, hovertemplate: "%{text}<br>this %{x:.3g}, other %{y:.3g}<extra></extra>" }],
    { height: 420, xaxis: { title: { text: "influence on this query" } }, yaxis: { title: { text: "influence on the other" } } });
  } catch (error) { say(error); }
}
