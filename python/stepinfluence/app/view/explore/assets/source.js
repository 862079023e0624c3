/* Where answers come from: the server, or the answers in #data, which a saved page holds itself. */
const { overview, answers } = JSON.parse($("data").textContent);
const steps = Array.from({ length: overview.steps }, (_, t) => t + 1);
const SHOWN = 10; // rows on either side at first; a saved page knows how far these can be trusted
const sum = (values, from = 0, to = values.length) => values.slice(from, to).reduce((a, b) => a + b, 0);

async function ask(path, fields) {
  const reply = await fetch(`/api/${path}?${new URLSearchParams(fields)}`);
  const result = await reply.json().catch(() => ({ error: `${path}: the server failed (${reply.status}); its terminal says why` }));
  if (!reply.ok) throw new Error(result.error || `${path}: ${reply.status}`);
  return result;
}

/* ---- Saved answers ----------------------------------------------------------------------------------------------- */
const saved = (row, score) => answers.byQuery[row].scores[score];
const all = ({ first, last, checkpoint }) => first === 1 && last === overview.steps && checkpoint === "";
function rankSaved(examples, f) {
  const scored = examples.map((e) => {
    const sdi = f.checkpoint === "" ? e.sdi : e.parts[f.checkpoint];
    const { error, errors, ...rest } = e; // of the sum over all steps and checkpoints
    return { ...rest, sdi, score: sum(sdi, f.first - 1, f.last), ...(all(f) && errors ? { error, errors } : {}) };
  });
  const down = scored.filter((e) => e.score > 0).sort((a, b) => b.score - a.score);
  const up = scored.filter((e) => e.score < 0).sort((a, b) => a.score - b.score);
  return { helpful: down.slice(0, f.k), harmful: up.slice(0, f.k) };
}
const only = (what) => { throw new Error(`A saved page holds ${what}; sdi explore has the rest.`); };

const source = answers ? {
  queries: async ({ find, offset, limit }) => {
    const word = find.toLowerCase();
    const found = answers.queries.filter((q) => !word || q.id.toLowerCase().includes(word) || q.text.toLowerCase().includes(word));
    return { total: found.length, items: found.slice(offset, offset + limit) };
  },
  example: async (side, row) => answers.byQuery[row]?.example ?? only("the first queries"),
  curve: async (row, f) => (f.checkpoint === "" ? saved(row, f.score).curve : saved(row, f.score).curves[f.checkpoint]),
  top: async (row, f) => rankSaved(saved(row, f.score).examples, f),
  agreement: async (row, f) => (all(f) && f.k === SHOWN ? saved(row, f.score).agreement : only(`this for all steps, all checkpoints and ${SHOWN} rows`)),
  pair: async (row, train, f) => {
    const found = saved(row, f.score).pairs[train];
    return !found ? null : f.checkpoint === "" ? found : { ...found, sdi: found.byCheckpoint[f.checkpoint], parameters: [], matrix: null };
  },
  exact: async (row, f) => (all(f) && f.k === SHOWN ? answers.byQuery[row].exact : null) ?? only(`exact influence only if it was written with --exact, for all steps and ${SHOWN} rows`),
  tokens: async (row, train, f) => (f.checkpoint === "" ? saved(row, f.score).pairs[train]?.tokens : null) ?? only("influence by token only if it was written with --tokens, for the first examples and all checkpoints"),
  overall: async (f) => {
    const found = answers.overall[f.score][f.weights];
    return { ...found, ...rankSaved([...found.helpful, ...found.harmful], { ...f, checkpoint: "", k: 20 }) };
  },
  reverse: async (train, f) => answers.reverse[f.score][train] || null,
} : {
  queries: (fields) => ask("queries", fields),
  example: (side, row) => ask("example", { side, row }),
  curve: (row, { parameters, score, checkpoint }) => ask("curve", { query: row, parameters, score, checkpoint }),
  top: (row, f) => ask("top", { query: row, ...f }),
  agreement: (row, f) => ask("agreement", { query: row, ...f }),
  pair: (row, train, { score, checkpoint }) => ask("pair", { query: row, train, score, checkpoint }),
  compare: (row, other, { score, checkpoint }) => ask("compare", { query: row, other, score, checkpoint }),
  exact: (row, f) => ask("exact", { query: row, ...f }),
  tokens: (row, train, { parameters, score, checkpoint }) => ask("tokens", { query: row, train, parameters, score, checkpoint }),
  overall: (f) => ask("overall", { ...f, k: 20 }),
  reverse: (train, { score, checkpoint }) => ask("reverse", { train, score, checkpoint }),
};
