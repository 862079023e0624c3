"use strict";
/* What the report and the explorer share. Texts of a run reach the document through textContent only, and charts, which
   understand a little markup, through esc(). */
const $ = (id) => document.getElementById(id);
const root = document.documentElement;

/* ---- values ---- */
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const minus = (text) => text.replaceAll("-", "−");
function round(x, digits = 3) {
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return minus(x.toExponential(digits - 2));
  return minus(Number(x.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits }));
}
const signed = (x) => (x > 0 ? "+" : "") + round(x);
const short = (text, n) => (Array.from(text).length > n ? Array.from(text).slice(0, n - 1).join("") + "…" : text);
/* The isolates keep a right-to-left text to itself. */
const esc = (text) => "\u2068" + String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;") + "\u2069";
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/* ---- charts ---- */
function layout(extra) {
  const axis = {
    gridcolor: css("--faint"), zerolinecolor: css("--rule"), linecolor: css("--rule"), tickcolor: css("--rule"),
    tickfont: { color: css("--soft"), size: 12 }, title: { font: { color: css("--soft"), size: 13 } }, automargin: true,
  };
  const made = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 12, t: 26, b: 44 },
    font: { family: css("--sans"), color: css("--ink"), size: 13 }, hovermode: "closest", showlegend: false, dragmode: false,
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--rule"), align: "left",
      font: { color: css("--ink"), family: css("--sans"), size: 13 } },
    xaxis: {}, yaxis: {}, ...extra,
  };
  for (const name of Object.keys(made)) if (/^[xy]axis/.test(name)) {
    made[name] = { ...axis, ...made[name], title: { ...axis.title, ...made[name].title } };
  }
  return made;
}
function draw(id, traces, extra) {
  Plotly.react($(id), traces, layout(extra), { displayModeBar: false, responsive: true });
}
const ink = (value) => css(value >= 0 ? "--helpful" : "--harmful");
const signedBars = (x, y, hovertemplate) => ({ x, y, type: "bar", marker: { color: Array.from(y, ink) }, hovertemplate });
/* The largest magnitude of a matrix, and the one at which colours end: few values are beyond it. */
function limits(z) {
  const sizes = z.flatMap((row) => Array.from(row, Math.abs)).sort((a, b) => a - b);
  const most = sizes[sizes.length - 1] || 1;
  return { most, limit: sizes[Math.floor(0.985 * (sizes.length - 1))] || most };
}
function heatmap(z, x, y, { colorbar = {}, ...more }) {
  const { limit } = limits(z), dark = root.dataset.theme === "dark";
  return { type: "heatmap", z, x, y, zmid: 0, zmin: -limit, zmax: limit, xgap: 1, ygap: 1, colorscale: dark
    ? [[0, "#ffc39a"], [0.25, "#d9671b"], [0.5, css("--mid")], [0.75, "#1f7fbd"], [1, "#9ed8ff"]]
    : [[0, "#7a2e00"], [0.25, "#e07b35"], [0.5, css("--mid")], [0.75, "#4196cd"], [1, "#003f66"]],
  colorbar: { thickness: 12, outlinewidth: 0, len: 0.6, tickfont: { color: css("--soft"), size: 11 }, ...colorbar }, ...more };
}

/* ---- light and dark: as the system has it until one is chosen; charts take their colours when drawn ---- */
function themed(redraw, chosen = null) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const set = () => { root.dataset.theme = chosen ?? (system.matches ? "dark" : "light"); };
  system.addEventListener("change", () => { set(); redraw(); });
  $("theme").addEventListener("click", () => { chosen = root.dataset.theme === "dark" ? "light" : "dark"; set(); redraw(); });
  set();
  return (theme) => { chosen = theme; set(); };
}
