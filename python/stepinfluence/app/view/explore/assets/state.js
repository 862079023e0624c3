/* What is looked at, and the address that leads back to it: #q3&row=12&score=sdi&checkpoint=1&steps=2-4&k=20&... */
const state = { view: "one", query: null, place: null, row: null, tokens: false, theme: null, rows: [], exact: null, ticket: 0 };
const SELECTS = ["score", "checkpoint", "parameters", "weights"];
const DEFAULTS = { score: overview.scores[0].key, checkpoint: "", parameters: "", weights: "alike", first: 1, last: overview.steps, k: SHOWN };

/* The filters as they stand. */
const filters = () => ({ first: Number($("first").value), last: Number($("last").value), k: Number($("k").value),
  parameters: $("parameters").value, score: $("score").value, checkpoint: $("checkpoint").value });
/* What is wrong with them, in words; the fields that are wrong are marked. */
function refused() {
  const { first, last, k } = filters(), whole = (n, most) => Number.isInteger(n) && n >= 1 && n <= most;
  const steps_ = whole(first, overview.steps) && whole(last, overview.steps) && first <= last, rows = whole(k, 1000);
  $("first").setAttribute("aria-invalid", String(!(whole(first, overview.steps) && (steps_ || !whole(last, overview.steps)))));
  $("last").setAttribute("aria-invalid", String(!(whole(last, overview.steps) && (steps_ || !whole(first, overview.steps)))));
  $("k").setAttribute("aria-invalid", String(!rows));
  return !steps_ ? `steps: give two numbers from 1 to ${overview.steps}, the smaller one first` : !rows ? "rows: give a number from 1 to 1000" : null;
}

function addressed() {
  const f = filters(), parts = state.query === null ? [] : [`q${state.query}`], put = (name, value) => parts.push(`${name}=${encodeURIComponent(value)}`);
  if (state.view !== "one") put("view", state.view);
  for (const name of SELECTS) if ($(name).value !== DEFAULTS[name]) put(name, $(name).value);
  if (f.first !== DEFAULTS.first || f.last !== DEFAULTS.last) put("steps", `${f.first}-${f.last}`);
  if (f.k !== DEFAULTS.k) put("k", f.k);
  if (state.row !== null) put("row", state.row);
  if (state.tokens) put("tokens", 1);
  if ($("other").value !== "") put("with", $("other").value);
  if (state.theme) put("theme", state.theme);
  return `#${parts.join("&")}`;
}
/* A new entry of the browser's history, if anything but what is drawn by itself has changed. */
function remember(replace = false) {
  const address = addressed();
  if (address === (location.hash || "#")) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
}
const wholeOf = (text) => (/^\d+$/.test(text ?? "") ? Number(text) : null);
/* Sets all controls by the address; what it does not say, or says wrongly, gets its default. */
function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)), row = location.hash.match(/^#q(\d+)(?:&|$)/);
  state.view = asked.get("view") === "all" ? "all" : "one";
  for (const name of SELECTS) {
    const value = asked.get(name) ?? DEFAULTS[name];
    $(name).value = value;
    if ($(name).value !== value) $(name).value = DEFAULTS[name];
  }
  const [, first, last] = (asked.get("steps") || "").match(/^(\d+)-(\d+)$/) || [null, DEFAULTS.first, DEFAULTS.last];
  $("first").value = first; $("last").value = last; $("k").value = wholeOf(asked.get("k")) ?? DEFAULTS.k;
  if (refused()) { $("first").value = DEFAULTS.first; $("last").value = DEFAULTS.last; $("k").value = DEFAULTS.k; refused(); }
  state.row = wholeOf(asked.get("row")); state.tokens = asked.has("tokens");
  state.theme = ["light", "dark"].includes(asked.get("theme")) ? asked.get("theme") : null;
  state.other = wholeOf(asked.get("with"));
  return row ? Number(row[1]) : null;
}
