/* Draws the page from the JSON in #data. */
const data = JSON.parse($("data").textContent);
const steps = Array.from({ length: data.steps }, (_, t) => t + 1);
const LINES_PER_SIDE = 5;
const state = { query: data.first, view: 0, heat: "top", drawn: new Set() };

/* ---- values ---- */
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.f4), (c) => c.charCodeAt(0));
  const flat = new Float32Array(bytes.buffer); // little-endian, as every browser's machine is
  if (packed.shape.length < 2) return flat;
  const width = packed.shape[1];
  return Array.from({ length: packed.shape[0] }, (_, r) => flat.subarray(r * width, (r + 1) * width));
}
const opened = new Map();
/* A query with its numbers in the view that is chosen. */
function open(index) {
  const key = `${index} ${state.view}`;
  if (!opened.has(key)) {
    const { views, ...q } = data.queries[index];
    Object.assign(q, views[state.view]);
    for (const name of ["values", "totals", "profile", "energy", "margin", "byGroup", "byCheckpoint"]) if (q[name]) q[name] = unpack(q[name]);
    opened.set(key, q);
  }
  return opened.get(key);
}
const unit = () => data.views[state.view].unit;

/* ---- charts ---- */
/* Plain numbers on an axis where they are readable, powers of ten elsewhere. */
function valueAxis(title, ...arrays) {
  const most = Math.max(...arrays.map((a) => a.reduce((m, v) => Math.max(m, Math.abs(v)), 0)));
  return { title: { text: title }, zeroline: true, zerolinewidth: 1.5, nticks: 7,
    tickformat: most >= 1e-2 && most < 1e6 ? ",.3~r" : ".2~e" };
}
const stepAxis = (extra = {}) => ({
  title: { text: "loop step" }, range: [0.4, data.steps + 0.6], showgrid: false, zeroline: false, fixedrange: true,
  tickmode: "array", tickvals: steps.filter((t) => data.steps <= 24 ? t % 2 === 0 || t === 1 : t % 4 === 0 || t === 1), ...extra,
});
/* Dotted line at the read-out, a veil over the steps after it. */
function readout(q, at = q.readStep) {
  const shapes = [{ type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: 1,
    line: { color: css("--soft"), width: 1.6, dash: "dot" } }];
  const annotations = [];
  annotations.push({ x: at, y: 1, xref: "x", yref: "paper", yanchor: "bottom", showarrow: false,
    text: `answer read at step ${q.readStep}`, font: { size: 12, color: css("--soft") },
    xanchor: q.readStep > data.steps * 0.8 ? "right" : "center" });
  if (q.readStep < data.steps) shapes.push({ type: "rect", xref: "x", yref: "paper", x0: q.readStep + 0.5, x1: data.steps + 0.6,
    y0: 0, y1: 1, line: { width: 0 }, fillcolor: css("--hatch"), layer: "below" });
  return { shapes, annotations };
}
const color = (q, row) => (row < q.helpful ? css("--helpful") : css("--harmful"));
const name = (q, row) => {
  const item = data.train[q.rows[row]];
  return item.text;
};

function drawLines(q) {
  const mark = readout(q);
  const shown = q.rows.map((_, r) => r).filter((r) => state.drawn.has(r));
  const traces = shown.map((r) => {
    const values = q.values[r];
    const rank = r < q.helpful ? r : r - q.helpful;
    return {
      x: steps, y: values, mode: "lines", type: "scatter", name: `${esc(short(name(q, r), 30))}  ${signed(q.totals[r])}`,
      line: { color: color(q, r), width: Math.max(1.3, 3.2 - 0.5 * rank), dash: r < q.helpful ? "solid" : "dash" },
      opacity: Math.max(0.5, 1 - 0.11 * rank),
      legendgroup: r < q.helpful ? "helpful" : "harmful",
      legendgrouptitle: { text: r < q.helpful ? "Helpful" : "Harmful", font: { size: 13, color: color(q, r) } },
      hovertemplate: `step %{x}: <b>%{y:.3g}</b><br>${esc(short(name(q, r), 60))}<extra></extra>`,
    };
  });
  traces.push({
    x: shown.map((r) => q.peaks[r]), y: shown.map((r) => q.values[r][q.peaks[r] - 1]), type: "scatter", mode: "markers",
    marker: { size: 9, color: shown.map((r) => color(q, r)), line: { width: 0 } }, showlegend: false, hoverinfo: "skip",
  });
  const narrow = $("lines").clientWidth < 620;
  draw("lines", traces, {
    ...mark, height: narrow ? 560 : 430, showlegend: true,
    legend: narrow ? { orientation: "h", y: -0.2, font: { family: css("--mono"), size: 11 } }
      : { font: { family: css("--mono"), size: 11.5 }, tracegroupgap: 14, itemclick: false, itemdoubleclick: false },
    xaxis: stepAxis(), yaxis: valueAxis(`influence at this step<br>${esc(unit())}`, ...shown.map((r) => q.values[r])),
  });
  $("lines-alt").textContent = shown.map((r) => `${name(q, r)}: total ${signed(q.totals[r])}, largest at step ${q.peaks[r]}.`).join(" ");
}

function drawProfile(q) {
  const mark = readout(q);
  const traces = [signedBars(steps, q.profile, "step %{x}: summed influence <b>%{y:.3g}</b><extra></extra>")];
  const extra = { height: q.margin ? 440 : 280, bargap: 0.3, xaxis: stepAxis(),
    yaxis: valueAxis(`all examples<br>${esc(unit())}`, q.energy) };
  traces.push({ x: steps, y: q.energy, type: "scatter", mode: "lines", line: { color: css("--ink"), width: 1.6, shape: "hvh" },
    hovertemplate: "step %{x}: regardless of sign <b>%{y:.3g}</b><extra></extra>" });
  let said = "Influence of all scored training examples: bars, added up; line, regardless of sign";
  if (q.margin) {
    traces.push({ x: steps, y: q.margin, xaxis: "x", yaxis: "y2", type: "scatter", mode: "lines+markers",
      line: { color: css("--accent"), width: 2.2 }, marker: { size: 6, color: css("--accent") },
      hovertemplate: "step %{x}: margin <b>%{y:.2f}</b><extra></extra>" });
    extra.yaxis.domain = [0.55, 1];
    extra.yaxis2 = { ...valueAxis("logit margin", q.margin), domain: [0, 0.45] };
    extra.xaxis.anchor = "y2";
    said += " (above), and by how much the right answer leads if the loop were stopped after each step (below)";
  }
  for (const t of q.energyPeaks) mark.shapes.push({ type: "rect", xref: "x", yref: "paper",
    x0: t - 0.5, x1: t + 0.5, y0: 0, y1: 1, line: { width: 0 }, fillcolor: css("--faint"), opacity: 0.75, layer: "below" });
  said += `. ${q.period.says}${q.energyPeaks.length ? "; grey bands: its peaks" : ""}. ${q.profilePeriod.says}`;
  if (q.marginPeriod) said += `. ${q.marginPeriod.says}`;
  $("profile-sub").textContent = said + ".";
  draw("profile", traces, { ...extra, ...mark });
}

function drawHeat(q) {
  const groups = state.heat === "groups" && q.byGroup;
  $("heat-top").setAttribute("aria-pressed", !groups);
  $("heat-groups").setAttribute("aria-pressed", Boolean(groups));
  const z = groups ? q.byGroup : q.values;
  const labels = groups ? data.groups.map((g) => `${g.name} (${g.count})`) : q.rows.map((_, r) => name(q, r));
  const { most, limit } = limits(z);
  const mark = readout(q, q.readStep + 0.5); // between cells
  if (!groups && q.helpful > 0 && q.helpful < labels.length) mark.shapes.push({ type: "line", xref: "paper", yref: "y", x0: 0, x1: 1,
    y0: q.helpful - 0.5, y1: q.helpful - 0.5, line: { color: css("--ink"), width: 1 } });
  const narrow = $("heat").clientWidth < 620;
  draw("heat", [heatmap(z, steps, labels.map((_, r) => r), {
    text: labels.map((label) => steps.map(() => esc(short(label, 60)))), hovertemplate: "step %{x}: <b>%{z:.3g}</b><br>%{text}<extra></extra>",
    colorbar: { title: { text: esc(unit()), side: "right" }, tickformat: valueAxis("", [limit]).tickformat },
  })], {
    ...mark, height: 110 + Math.max(220, labels.length * (groups ? 19 : 14)), xaxis: stepAxis(),
    yaxis: { autorange: "reversed", fixedrange: true, tickmode: "array", tickvals: labels.map((_, r) => r), showgrid: false, zeroline: false,
      ticktext: labels.map((label) => esc(short(label, narrow ? 14 : 34))), tickfont: { family: css("--mono"), size: groups ? 12 : 10.5, color: css("--soft") } },
  });
  const saturated = most > 1.01 * limit ? ` Colours end at ±${round(limit, 2)}; the largest value is ${round(most, 2)}.` : "";
  $("heat-sub").textContent = (groups ? "Mean influence of all scored examples of a group (number of examples in brackets). "
    : `The ${q.helpful} most helpful examples above the line, the ${labels.length - q.helpful} most harmful below it, by their total. `)
    + "Blue lowers the query’s loss, orange raises it." + saturated;
}

function drawEnergy(q) {
  const alike = data.queries.map((_, i) => i).filter((i) => data.queries[i].readStep === q.readStep);
  const traces = [];
  if (alike.length > 3) {
    const at = (share) => steps.map((_, t) => {
      const sorted = alike.map((i) => open(i).energy[t]).sort((a, b) => a - b);
      const place = share * (sorted.length - 1), low = Math.floor(place);
      return sorted[low] + (place - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
    });
    const read = steps.filter((t) => t <= q.readStep); // zero has no logarithm
    traces.push({ x: read, y: at(0.25), type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip" },
      { x: read, y: at(0.75), type: "scatter", mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: css("--hatch"), hoverinfo: "skip" });
  }
  traces.push({ x: steps, y: q.energy, type: "scatter", mode: "lines+markers", line: { color: css("--accent"), width: 2.2 },
    marker: { size: 6, color: css("--accent") }, hovertemplate: "step %{x}: <b>%{y:.3g}</b><extra></extra>" });
  draw("energy", traces, { ...readout(q), height: 300, xaxis: stepAxis(), yaxis: { title: { text: `SDI energy<br>${esc(unit())}` }, type: "log", exponentformat: "power", dtick: 1 } });
}

function drawCheckpoints(q) {
  if (!q.byCheckpoint) return;
  const total = q.byCheckpoint.reduce((sum, v) => sum + v, 0) || 1;
  draw("checkpoints", [{ y: data.checkpoints, x: Array.from(q.byCheckpoint, (v) => (100 * v) / total), type: "bar", orientation: "h",
    marker: { color: css("--accent") }, hovertemplate: "%{y}: <b>%{x:.1f} %</b><extra></extra>" }], {
    height: 300, bargap: 0.4, xaxis: { title: { text: "share of the influence, %" }, range: [0, 100], fixedrange: true },
    yaxis: { type: "category", autorange: "reversed", fixedrange: true, showgrid: false, ticksuffix: " " },
  });
}

function drawAccuracy() {
  if (!$("accuracy")) return;
  draw("accuracy", [{ x: data.accuracy.map((a) => a.name), y: data.accuracy.map((a) => 100 * a.value), type: "bar",
    marker: { color: css("--accent"), opacity: data.accuracy.map((a) => (a.trained ? 1 : 0.35)) },
    hovertemplate: "%{x}: <b>%{y:.1f} %</b><extra></extra>" }], {
    height: 300, bargap: 0.25, xaxis: { type: "category", title: { text: data.accuracyOf }, showgrid: false, fixedrange: true },
    yaxis: { title: { text: "right answers, %" }, range: [0, 104], fixedrange: true },
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 99, y1: 99, line: { color: css("--soft"), width: 1.2, dash: "dot" } }],
  });
}

/* ---- words and tables ---- */
function fillTable(q, id, from, to) {
  const table = $(id);
  table.querySelectorAll("thead, tbody").forEach((part) => part.remove());
  const head = table.createTHead().insertRow();
  for (const title of ["plot", "example", `total, ${unit()}`, "largest at step"]) head.append(element("th", { scope: "col" }, title));
  const body = table.createTBody();
  for (let r = from; r < Math.min(to, from + 12); r++) {
    const item = data.train[q.rows[r]];
    const row = body.insertRow();
    const box = element("input", { type: "checkbox", "aria-label": `Draw the trajectory of ${item.text}` });
    box.checked = state.drawn.has(r);
    box.addEventListener("change", () => { box.checked ? state.drawn.add(r) : state.drawn.delete(r); drawLines(q); });
    row.insertCell().append(box);
    const text = row.insertCell();
    text.append(element("bdi", { title: item.text }, item.text), element("small", {}, [item.label, item.group, `id ${item.id}`].filter(Boolean).join(" · ")));
    row.insertCell().textContent = signed(q.totals[r]);
    row.insertCell().textContent = q.peaks[r];
  }
  if (from === to) body.insertRow().append(element("td", { colspan: 4 }, "none"));
}
function describe(q) {
  const verdict = $("verdict");
  verdict.replaceChildren(
    "answers ", element("b", {}, q.prediction), ", truth ", element("b", {}, q.truth), " ",
    element("span", { class: q.right ? "right" : "wrong" }, q.right ? "✓ right" : "✗ wrong"),
    `, loss ${round(q.loss)}`);
  $("tokens").replaceChildren(...(q.tokens.length ? q.tokens : [q.text]).map((token) => element("bdi", {}, token)));
  const view = data.views[state.view];
  $("view-note").textContent = `${view.note}${view.note ? " " : ""}Unit: ${view.unit}.`;
  $("dominance").textContent = q.dominance;
  $("dominance").hidden = !q.dominance;
  $("counts").textContent = `${q.counts[0]} of the scored examples help this query and ${q.counts[1]} harm it. The strongest of each, by influence added up over all loop steps; tick the ones to draw above.`;
}

function show(index) {
  state.query = (index + data.queries.length) % data.queries.length;
  const q = open(state.query);
  state.drawn = new Set(q.rows.map((_, r) => r).filter((r) => (r < q.helpful ? r : r - q.helpful) < LINES_PER_SIDE));
  $("pick").value = state.query;
  describe(q);
  fillTable(q, "helpful", 0, q.helpful);
  fillTable(q, "harmful", q.helpful, q.rows.length);
  redraw();
}
function redraw() {
  const q = open(state.query);
  drawLines(q); drawProfile(q); drawHeat(q); drawEnergy(q); drawCheckpoints(q); drawAccuracy();
}
function setHeat(which) {
  state.heat = which;
  drawHeat(open(state.query));
}

/* ---- start ---- */
const sections = new Map();
data.queries.forEach((q, index) => {
  if (!sections.has(q.group)) {
    const section = q.group ? element("optgroup", { label: q.group }) : $("pick");
    sections.set(q.group, section);
    if (q.group) $("pick").append(section);
  }
  sections.get(q.group).append(element("option", { value: index }, (q.note ? `${q.note}: ` : "") + short(q.text, 44) + (q.right ? "" : "  ✗")));
});
data.views.forEach((view, index) => $("view").append(element("option", { value: index }, view.name)));
$("view").parentElement.hidden = data.views.length < 2;
$("view").addEventListener("change", () => { state.view = Number($("view").value); show(state.query); });
$("pick").addEventListener("change", () => show(Number($("pick").value)));
$("prev").addEventListener("click", () => show(state.query - 1));
$("next").addEventListener("click", () => show(state.query + 1));
$("heat-top").addEventListener("click", () => setHeat("top"));
$("heat-groups").addEventListener("click", () => setHeat("groups"));
if (!data.groups.length) $("heat-groups").parentElement.hidden = true;

const asked = new URLSearchParams(location.hash.slice(1)); // #theme=dark&query=3&view=1&rows=groups: to link to a view
themed(redraw, asked.get("theme"));
if (asked.get("rows") === "groups" && data.groups.length) state.heat = "groups";
state.view = Math.min(Math.max(0, Number(asked.get("view")) || 0), data.views.length - 1);
$("view").value = state.view;
show(Number(asked.get("query") ?? data.first) || 0);
addEventListener("resize", () => { clearTimeout(state.resizing); state.resizing = setTimeout(redraw, 200); });
