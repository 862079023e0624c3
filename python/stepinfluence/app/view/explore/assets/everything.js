/* All queries together: which training examples matter to them on the whole. */
async function showAll() {
  const ticket = ++state.ticket;
  arrange();
  queryList.draw();
  document.title = `${overview.title} · all queries · influence by loop step`;
  const wrong = refused();
  say(wrong, "refused");
  if (wrong) return;
  $("pair").hidden = true;
  $("main").classList.add("busy");
  try {
    const f = { ...filters(), weights: $("weights").value }, found = await source.overall(f);
    if (ticket !== state.ticket) return;
    say(null);
    state.rows = [...found.helpful, ...found.harmful];
    const { energy, signed: total, helpful, harmful, lateMass } = found.profile;
    $("all-sub").textContent = `${found.queries.toLocaleString("en")}${found.queries < found.of ? ` of ${found.of.toLocaleString("en")} queries, evenly spread` : " queries"}; ${helpful.toLocaleString("en")} training examples help them on the whole, ${harmful.toLocaleString("en")} harm. ` +
      `The later half of the steps has ${(100 * lateMass).toFixed(0)} % of the energy.` + (answers && f.checkpoint !== "" ? " Saved page: all checkpoints." : "");
    plot("all-curve", [bars(total), { x: steps, y: energy, mode: "lines+markers", line: { color: css("--accent"), width: 2.2 },
      hovertemplate: "step %{x}: energy <b>%{y:.3g}</b><extra></extra>" }], { xaxis: stepAxis, yaxis: { title: { text: "influence on all queries" } }, height: 280 });
    const pick = (e) => { state.row = e.row; remember(); return choose(e.row, true); };
    table("all-helpful", found.helpful, { part: partOf(f), pick, chosen: state.row });
    table("all-harmful", found.harmful, { part: partOf(f), pick, chosen: state.row });
    if (state.row !== null) await choose(state.row);
  } catch (error) { if (ticket === state.ticket) say(error); } finally {
    if (ticket === state.ticket) $("main").classList.remove("busy");
  }
}
/* What belongs to the view that is chosen. */
function arrange() {
  for (const part of document.querySelectorAll("[data-view]")) part.hidden = part.dataset.view !== state.view;
  $("comparing").hidden = state.view !== "one" || Boolean(answers); // needs the scores of all examples
  for (const tab of document.querySelectorAll("[data-tab]")) tab.setAttribute("aria-pressed", String(tab.dataset.tab === state.view));
}
