/* Small things that are shown, and a list of any length of which only what is seen exists. */
const bdi = (text, cls = null) => element("bdi", { class: cls }, text ?? "");
const peak = (values) => 1 + values.reduce((best, v, t) => (Math.abs(v) > Math.abs(values[best]) ? t : best), 0);
const label = (e) => (!e.text ? e.id : e.text.startsWith(e.id) ? e.text : `${e.id}: ${e.text}`);
const narrow = () => innerWidth < 600;
function say(error, id = "notice") { $(id).hidden = !error; $(id).textContent = error ? String(error.message || error) : ""; }

/* Charts can be zoomed into. */
const plot = (id, traces, extra) => draw(id, traces, { dragmode: narrow() ? false : "zoom", ...extra });
const INFLUENCE = "influence, first order";
const stepAxis = { title: { text: "loop step" }, showgrid: false, zeroline: false, dtick: steps.length > 24 ? 4 : steps.length > 12 ? 2 : 1 };
const bars = (values, errors = null) => ({ ...signedBars(steps, values, "step %{x}: <b>%{y:.3g}</b><extra></extra>"),
  ...(errors ? { error_y: { type: "data", array: errors, color: css("--soft"), thickness: 1, width: 3 } } : {}) });
/* A heat map's scale: beside it, or above where there is no room. */
const scale = () => ({ title: { text: "influence", side: narrow() ? "top" : "right", font: { size: 11, color: css("--soft") } },
  ...(narrow() ? { orientation: "h", len: 0.9, thickness: 9, x: 0.5, xanchor: "center", y: 1, yanchor: "bottom", ypad: 4, nticks: 5 } : {}) });
const heatMargin = () => ({ l: 8, r: 8, t: narrow() ? 64 : 8, b: 44 });
/* Names of rows beside a chart: id and text, as much as there is room for. */
const names = (examples) => {
  const most = narrow() ? 14 : 34;
  return { tickvals: examples.map((_, r) => r), ticktext: examples.map((e) => esc(short(label(e), most))), tickfont: { size: 11 }, automargin: true };
};

function spark(values) {
  const ns = "http://www.w3.org/2000/svg", w = 130, h = 26, most = Math.max(...values.map(Math.abs)) || 1;
  const svg = document.createElementNS(ns, "svg");
  svg.setAttribute("width", w); svg.setAttribute("height", h); svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `largest at step ${peak(values)}`);
  const each = w / Math.max(steps.length, values.length); // one scale for examples that took different numbers of steps
  values.forEach((v, t) => {
    const bar = document.createElementNS(ns, "rect"), size = Math.max(0.5, (Math.abs(v) / most) * (h / 2 - 1));
    bar.setAttribute("x", t * each); bar.setAttribute("width", Math.max(1, each - 1)); bar.setAttribute("height", size);
    bar.setAttribute("y", v >= 0 ? h / 2 - size : h / 2); bar.setAttribute("fill", ink(v));
    svg.append(bar);
  });
  return svg;
}
/* Sparks of long tables are drawn when they come into sight. */
const waiting = new WeakMap();
const sight = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) { target.replaceChildren(spark(waiting.get(target))); sight.unobserve(target); }
}, { rootMargin: "300px" });
addEventListener("beforeprint", () => { for (const cell of document.querySelectorAll("td.spark:empty")) cell.replaceChildren(spark(waiting.get(cell))); });
function sparkCell(values) {
  const cell = element("td", { class: "spark" });
  waiting.set(cell, values); sight.observe(cell);
  return cell;
}

/* A table of examples (or queries), one line each; extra columns as [class, title, cell of an example]. */
function table(id, rows, { part, extra = [], pick, chosen = null }) {
  const head = element("tr");
  const columns = [["score", part], ...extra.map(([cls, name]) => [cls, name]), ["spark", "by loop step"], ["peak", "peak"], ["id", "id"], ["words", "text"]];
  for (const [cls, name] of columns) head.append(element("th", { class: cls, scope: "col" }, name));
  if (!rows.length) { $(id).replaceChildren(element("caption", {}, "none")); return; }
  $(id).replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows.map((e) => {
    const line = element("tr", { tabindex: "0", "data-row": e.row, "aria-selected": String(e.row === chosen) });
    const score = element("td", { class: `score ${e.score >= 0 ? "helpful" : "harmful"}-ink` }, signed(e.score));
    if (e.error !== undefined && e.error !== null) score.append(element("small", { title: "standard error from sketching, at most" }, ` ± ${round(e.error, 2)}`));
    line.append(score, ...extra.map(([cls, , cell]) => element("td", { class: cls }, cell(e))), sparkCell(e.sdi),
      element("td", { class: "peak" }, String(peak(e.sdi))), element("td", { class: "id", title: e.id }, bdi(e.id)), element("td", { class: "words", title: e.text }, bdi(e.text)));
    line.addEventListener("click", () => pick(e));
    line.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(e); } });
    return line;
  })));
}
function describe(list, fields) {
  list.replaceChildren();
  for (const [name, value] of fields) list.append(element("dt", {}, bdi(name)), element("dd", {}, bdi(value)));
}
const losses = (e) => e.losses.map((v) => (v === null ? "–" : Number(v.toPrecision(4)))).join(", ") + (e.losses.length > 1 ? " (by checkpoint)" : "");
const about = (e) => [["id", e.id], ...Object.entries(e.metadata || {}), ["loss", losses(e)]];

/* Only the lines in sight exist; pages of 100 are fetched as they are needed. */
class VirtualList {
  static PAGE = 100; static HEIGHT = 52; static TALLEST = 8e6; // browsers cannot make much taller elements
  constructor(box, fetch, render, loaded) {
    Object.assign(this, { box, fetch, render, loaded, turn: 0, pages: new Map(), total: 0 });
    box.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(box);
  }
  async reset() {
    const turn = ++this.turn;
    const first = await this.fetch(0, VirtualList.PAGE);
    if (turn !== this.turn) return;
    this.pages = new Map([[0, first.items]]); this.total = first.total; this.more = Boolean(first.more);
    this.box.style.setProperty("--space", `${Math.min(this.total * VirtualList.HEIGHT, VirtualList.TALLEST)}px`);
    this.box.scrollTop = 0;
    this.draw(); this.loaded();
  }
  get seen() { return this.box.clientHeight / VirtualList.HEIGHT; }
  get squeezed() { return this.total * VirtualList.HEIGHT > VirtualList.TALLEST; }
  /* The place, with a fraction, that is at the top. */
  get top() {
    if (!this.squeezed) return this.box.scrollTop / VirtualList.HEIGHT;
    return (this.box.scrollTop / (VirtualList.TALLEST - this.box.clientHeight)) * (this.total - this.seen);
  }
  item(place) { const page = this.pages.get(Math.floor(place / VirtualList.PAGE)); return Array.isArray(page) ? page[place % VirtualList.PAGE] : undefined; }
  get items() { return [...this.pages.values()].filter(Array.isArray).flat(); }
  async load(place) {
    const page = Math.floor(place / VirtualList.PAGE), turn = this.turn;
    if (place < 0 || place >= this.total || this.pages.has(page)) return;
    this.pages.set(page, "on its way");
    try {
      const found = await this.fetch(page * VirtualList.PAGE, VirtualList.PAGE);
      if (turn !== this.turn) return;
      this.pages.set(page, found.items);
      this.draw(); this.loaded();
    } catch (error) { if (turn === this.turn) this.pages.delete(page); throw error; }
  }
  draw() {
    const top = this.top, from = Math.max(0, Math.floor(top) - 4), to = Math.min(this.total, Math.ceil(top + this.seen) + 4), lines = [];
    for (let place = from; place < to; place++) {
      const item = this.item(place);
      if (item === undefined) this.load(place).catch(say);
      const line = item === undefined ? element("li", { class: "coming" }, "…") : this.render(item, place);
      line.setAttribute("aria-posinset", place + 1); line.setAttribute("aria-setsize", this.total);
      line.style.top = `${this.box.scrollTop + (place - top) * VirtualList.HEIGHT}px`;
      lines.push(line);
    }
    this.box.replaceChildren(...lines);
  }
  /* Scroll so far that a place is seen; the list alone: scrollIntoView would move the page, too. */
  reveal(place) {
    const top = this.top, whole = Math.max(1, Math.floor(this.seen));
    if (place < top) this.scroll(place); else if (place > top + whole - 1) this.scroll(place - whole + 1);
    this.draw();
  }
  scroll(top) {
    this.box.scrollTop = this.squeezed ? (top / (this.total - this.seen)) * (VirtualList.TALLEST - this.box.clientHeight) : top * VirtualList.HEIGHT;
  }
}
