"""Figures of speed and memory in the pages of docs, and of the tables that do not depend on the machine."""

# ruff: noqa: E501  # sentences of the pages
from __future__ import annotations

import json
from typing import Any

from kept import Parts, load, machines, source, table


def kernels() -> str:
    """docs/cpu.md: one sketch call."""
    texts = []
    for name, result in machines("sketch"):
        texts.append(source(name, False, result))
        threads = min(r["threads"] for r in result["linear"])
        linear = {(tuple(r["layer"]), r["hashing"], r["threads"]): r for r in result["linear"]}
        layers = list(dict.fromkeys(tuple(r["layer"]) for r in result["linear"]))
        rows = []
        for layer in layers:
            r = linear[layer, "balanced", threads]
            d_out, d_in, batch, tokens = layer
            ms = r["ms"]
            rows.append([
                f"{d_out} × {d_in}, {batch} × {tokens}", f"{ms['published']:.1f}", f"{ms['ours']:.2f} (`{r['route']}`)",
                f"{ms['dW GEMM']:.2f}", f"{r['published_over_ours']:.1f}", f"{r['ours_over_gemm']:.2f}",
            ])  # fmt: skip
        head = [
            "d_out × d_in, rows × tokens",
            "published package",
            "this",
            "dW GEMM",
            "published / this",
            "this / dW GEMM",
        ]
        texts.append(table(head, rows))
        iid = [linear[layer, "iid", threads] for layer in layers]
        gemms = ", ".join(f"{r['ours_over_gemm']:.2f}" for r in iid)
        timed = (
            f"{threads} thread(s), kernels `{result['kernels']}`, milliseconds, medians of {result['rounds']} rounds"
        )
        lines = [f"- The table is of {timed}.", f'- With `hashing="iid"` the rows are {gemms} dW GEMMs.']
        direct = [linear[layer, "balanced", threads] for layer in layers]
        speeds = [(_gflops(r, "ours"), _gflops(r, "dW GEMM")) for r in direct if r["route"] == "direct"]
        if speeds:
            ours, gemm = zip(*speeds, strict=True)
            lines.append(
                f"- `direct` reaches {min(ours):.0f} to {max(ours):.0f} GFLOP/s where the dW GEMM reaches {min(gemm):.0f} "
                f"to {max(gemm):.0f}."
            )
        lines += [
            f"- A bias (512, 32 × 81) takes {r['ms']['ours']:.3f} ms, of which the token sum alone is "
            f"{r['ms']['token sum']:.3f} in torch; the published package {r['ms']['published']:.3f}."
            for r in result["bias"]
            if r["threads"] == threads
        ]
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _gflops(row: dict[str, Any], who: str) -> float:
    d_out, d_in, rows, tokens = row["layer"]
    return float(2 * d_out * d_in * rows * tokens / row["ms"][who] / 1e6)


def host_overhead() -> str:
    """docs/kernels.md: host time of a batch."""
    texts = []
    for name, result in machines("host-overhead"):
        texts.append(f"{result['weights']} weights × {result['steps']} steps. {source(name, False, result)}")
        rows = [
            [f"`{row['route']}`, {calls}", f"{row[key]['launches']}", f"{row[key]['batch_ms']:.1f}", f"{row[key]['use_us']:.0f}",
             f"{row['ratio']:.1f}" if key == "grouped" else ""]
            for row in result["rows"]
            for key, calls in (("per use", "one call a use"), ("grouped", "one call a weight"))
        ]  # fmt: skip
        texts.append(table(["route, calls", "launches", "ms a batch", "µs a use", "times faster"], rows))
    return "\n\n".join(texts)


def scale() -> str:
    """docs/scale.md: the measured rates and the table."""
    from bench.scale import Rates, tables

    name, result = machines("scale")[0]
    rates = Rates(**result["rates"])
    speed, rows = tables(rates).split("\n\n", 1)
    measured = speed.partition("measured: ")[2]
    operations = speed.splitlines()[0].partition("per token: ")[2]
    return (
        f"Operations per token, matrix products only: {operations} (the weight-gradient product that is not run; the planner "
        f"takes what is cheaper). **Measured**, one thread, in CPU seconds, {rates.tokens} tokens: {measured} (writing: "
        f"encoding and checksums; scanning: for 8 queries). {source(name, False, result)}\n\n{rows}"
    )


def large() -> str:
    """docs/scale.md: the model of 1.3 billion parameters."""
    from bench.scale import Rates, data, tables

    result = load("large.json")
    seconds, sizes, errors = result["seconds (clock, processor)"], result["bytes"], result["errors"]
    tokens = result["examples"] * result["tokens"]
    (clock, processor), (_, first), (_, exact) = (
        seconds[name] for name in ("featurize", "featurize, first call", "exact influence of 4 pairs")
    )
    whole, features = sizes["gradients of an example by step, all parameters, fp32"], sizes["features of an example"]
    _, kept = machines("scale")[0]
    rates = Rates("large", tokens, processor / tokens, kept["rates"]["write"], kept["rates"]["scan"])
    speed, rows = tables(rates).split("\n\n", 1)
    rate = speed.partition("measured: ")[2].partition(", store")[0]
    return (
        f"{result['parameters']:,} parameters, {result['in the loop']:,} of them in the loop, τ = {result['steps']}; "
        f"{result['examples']} examples of {result['tokens']} tokens; fp32, one thread. A featurize call took "
        f"{processor:.0f} processor seconds ({clock:.0f} by the clock, on a busy machine), the first one, which verifies "
        f"itself, {first:.0f}: {rate}, what checkpointing computes again not counted. Peak memory "
        f"{data(sizes['peak of featurizing'])}, {data(sizes['peak with the model made'])} of it with the model made. "
        f"{source('large.json', False, result)}\n\n"
        f"Features by step are {data(features)} an example. Its gradients by step would be "
        f"{data(sizes['gradients of an example by step, fp32'])} ({result['in the loop']:,} × {result['steps']} × 4 bytes), "
        f"{data(whole)} with the parameters outside the loop: {whole / features:,.0f} times as much. Exact influence of all "
        f"four pairs took another {exact:.0f} processor seconds and {data(sizes['factors of the exact influence'])} of "
        f"factors; against it the sketches' relative error, over {result['steps']} steps, is "
        f"{errors['relative error, an example with itself']:.3f} for an example with itself and "
        f"{errors['relative error, different examples']:.2f} between the two, whose gradients are nearly orthogonal (cosine "
        f"{errors['cosine of different examples']:.3f}). No error exceeds {errors['largest error over norms']:.3f} of the "
        f"product of the norms; five standard deviations are {errors['bound']:.3f} at most.\n\n{rows}"
    )


def paper_batch() -> str:
    """docs/scale.md: the model of D.1 at its own batch."""
    from bench.scale import data

    result = load("paper-batch.json")
    seconds, sizes = result["seconds (clock, processor)"], result["bytes"]
    rounds = len(seconds["forward pass for inference"])
    medians = {name: sorted(processor for _, processor in took)[rounds // 2] for name, took in seconds.items()}
    forward, featurize = medians["forward pass for inference"], medians["featurize, core checkpointed"]
    return (
        f"{result['parameters']:,} parameters, τ = {result['steps']}, {result['examples']} examples of {result['tokens']} "
        f"tokens; fp32, medians of {rounds} rounds: a forward pass for inference {forward:.0f} processor seconds, featurizing "
        f"{featurize:.0f}, {featurize / forward:.1f} times that (the core is checkpointed and runs once more), the scores of all pairs "
        f"{medians['scores of all pairs']:.1f}. Over the forward pass that is {result['processor seconds over the forward pass']:.0f} "
        f"seconds for a checkpoint, where the paper's GPU (RTX A6000), which keeps the activations, takes 2.55. Peak memory "
        f"{data(sizes['peak'])}, {data(sizes['peak with the model made'])} of it with the model made; features "
        f"{data(sizes['features'])}, gradients by step would be {data(sizes['gradients by step, fp32'])}. "
        f"{source('paper-batch.json', False, result)}"
    )


def variance() -> str:
    """docs/design.md: variance of the families."""
    result = load("variance-table.json")
    families = list(dict.fromkeys(c.split()[0] for c in result["columns"]))
    order = [f for f in ("balanced", "iid", "block") if f in families]
    kinds = ("measured", "exact", "bound")
    columns = [f"{family} {kind}" for family in order for kind in kinds]
    rows = [
        [r["matrices"], str(r["m"]), *(f"{r['cells'][result['columns'].index(c)]:.2f}" for c in columns)]
        for r in result["rows"]
    ]
    return (
        f"{result['trials']} draws of the tables, matrices of seed {result['seed']}. "
        f"{source('variance-table.json', False, result)}\n\n" + table(["matrices", "m", *columns], rows)
    )


def explore() -> str:
    """docs/explore.md: seconds of a click."""
    texts = []
    for name, result in machines("explore"):
        size = f"{result['rows']:,} training rows of {result['columns']:,} columns in int8 and {result['queries']:,} queries"
        texts.append(
            f"{source(name, False, result)} {size[0].upper()}{size[1:]}; the median of {result['rounds']} clicks, each of "
            "something that nothing is kept of. Where the load is above the number of cores, the clock's seconds are those "
            "of a busy machine."
        )
        rows = [[what, f"{s['wall s']:.2f}", f"{s['processor s']:.2f}"] for what, s in result["clicks"].items()]
        texts.append(table(["what is chosen", "seconds by the clock", "of the processor, all threads"], rows))
    return "\n\n".join(texts)


def search() -> str:
    """docs/search.md: speed and recall."""
    texts = []
    for name, result in machines("search"):
        sizes = [k for k in result if k.isdigit()]
        clock = {"cpu": "processor seconds", "wall": "wall seconds"}[result["clock"]]
        texts.append(f"{source(name, False, result)} {clock[0].upper()}{clock[1:]}, the best of the rounds.")

        def cell(size: str, queries: int, result: dict[str, Any] = result) -> str:
            r = result[size]["scan"][f"{queries} queries"]
            return f"{r['scan GB/s']:.1f} of {r['read GB/s']:.1f} ({r['scan GB/s'] / r['read GB/s']:.0%})"

        counts = [int(key.split()[0]) for key in result[sizes[0]]["scan"] if key.endswith("queries")]
        rows = [[f"scan, {q} queries, GB/s of a plain read's", *(cell(s, q) for s in sizes)] for q in counts]
        rows.append([
            "first scan after opening, 1 query, GB/s",
            *(f"{result[s]['scan']['first scan after opening GB/s']:.1f}" for s in sizes)])  # fmt: skip
        rows.append([
            "whole `top_k` with trajectories and ids, 1 / 16 queries, ms",
            *(" / ".join(f"{1e3 * result[s]['scan'][f'{q} queries']['top_k s']:.0f}" for q in (1, 16)) for s in sizes)])  # fmt: skip
        rows.append(
            ["recall@10 of the int8 scan, against float32", *(f"{result[s]['recall int8']:.3f}" for s in sizes)]
        )
        rows.append([
            "index (sqrt(N) lists), recall@10 with 32 / 128 lists looked at",
            *(" / ".join(f"{result[s][f'index, {n} lists']['recall@10']:.3f}" for n in (32, 128)) for s in sizes)])  # fmt: skip
        rows.append([
            "index, ms a query with 32 / 128 lists",
            *(" / ".join(f"{1e3 * result[s][f'index, {n} lists']['s/query']:.1f}" for n in (32, 128)) for s in sizes)])  # fmt: skip
        rows.append(["index, seconds to build", *(f"{result[s]['index build s']:.0f}" for s in sizes)])
        texts.append(table(["", *(f"{int(s):,} rows ({result[s]['scan']['gigabytes']:.1f} GB)" for s in sizes)], rows))
        real = result["real"]
        more = ", ".join(f"{real[f'{c} candidates']:.3f} with {c} candidates" for c in (20, 50, 100, 200))
        texts.append(
            f"Two stages, against the exact influence of all real examples (`--real`): sketches of 1024 columns alone "
            f"have recall@10 {real['sketches']:.3f}; re-ranking exactly gives {more}."
        )
    return "\n\n".join(texts)


def integrations() -> str:
    texts = []
    for name, r in machines("integrations"):
        low, high = r["quartiles"]
        full, weights = r["save_with_moments"], r["save_weights"]
        texts.append(
            f"What it costs, on an ALBERT of {r['parameters'] / 1e6:.1f}M parameters and {r['loop_steps']} loop steps, batch "
            f"{r['batch']} × {r['length']}, processor time of one thread: a training step {r['step_s']:.2f} s; with loop counts "
            f"{r['with_loop_counts']:.2f} of that (quartiles {low:.2f} to {high:.2f}); a save {full['s']:.2f} s and "
            f"{full['mib']:.1f} MiB, without second moments {weights['s']:.2f} s and {weights['mib']:.1f} MiB. "
            f"{source(name, False, r)}"
        )
    return "\n\n".join(texts)


def peers() -> str:
    """docs/peers.md: the table and what was asked."""
    from bench.peers.__main__ import markdown

    result = load("peers.json")
    return f"{source('peers.json', False, result)}\n\n{markdown(result['libraries'])}"


def startup() -> str:
    """docs/cli.md: processor seconds that commands take before they do anything."""
    texts = []
    for name, result in machines("startup"):
        rows = [[f"`{command}`", f"{seconds:.2f}"] for command, seconds in result["cpu_seconds"].items()]
        texts += [
            table(["command", "processor s"], rows),
            f"Medians of {result['rounds']}. {source(name, False, result)}",
        ]
    return "\n\n".join(texts)


def per_example() -> str:
    """docs/cpu.md: full per-example gradients beside the sketches."""
    texts = []
    for name, result in machines("per-example"):
        texts.append(
            f"{source(name, False, result)} Processor seconds, medians of {result['rounds']} rounds; a call may add "
            f"{result['limit_gib']:g} GiB."
        )
        for part, unit in (("layers", ""), ("batch", "examples"), ("steps", "loop steps")):
            sizes = result.get(part, [])
            names = list(dict.fromkeys(row["name"] for size in sizes for row in size["rows"]))
            rows = []
            for who in names:
                found = [next((r for r in size["rows"] if r["name"] == who), None) for size in sizes]
                rows.append([who, *(_cell(row) for row in found)])
            if rows:
                texts.append(table(["over ours; MiB", *(_head(s["size"], part, unit) for s in sizes)], rows))
    return "\n\n".join(texts)


def _head(size: dict[str, Any], part: str, unit: str) -> str:
    if part == "layers":
        return f"{size['d_out']} × {size['d_in']}, {size['rows']} × {size['tokens']}"
    return f"{size[part]} {unit}"


def _cell(row: dict[str, Any] | None) -> str:
    """How many times as long as ours, and what a call adds at its peak."""
    if row is None:
        return "–"
    if row["out_of_memory"]:
        return "out of memory"
    peak = "n/a" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    return f"{row['over_ours']:.2f}; {peak}"


def predicted() -> str:
    """docs/kernels.md: what the cost model predicts for a GPU that has not been there."""
    from bench.gpu.predict import RESULT

    result = json.loads(RESULT.read_text(encoding="utf-8"))
    goals = [[goal["goal"], f"{goal['predicted']:.2f}", "yes" if goal["met"] else "**no**"] for goal in result["goals"]]
    rows = []
    for row in result["rows"]:
        if row["m"] != 2048 or row["tokens"] != 128:
            continue
        tokens, over = row["rows"] * row["tokens"], row["best_over"]
        cells = [
            f"{1e6 * row['routes'][name]['ms'] / tokens:.1f} ({row['routes'][name]['bound']})"
            for name in ("fft", "direct")
        ]
        rows.append([
            f"{row['d_out']} × {row['d_in']}", row["dtype"], *cells, f"{over['weight_gradient_gemm']:.2f}",
            f"{1 / over['published_formula']:.1f}",
        ])  # fmt: skip
    assumed = "; ".join(f"{name} {value:.3g}" for name, value in result["assumed"].items())
    return "\n\n".join(
        (
            f"`bench/results/{RESULT.name}`: `python -m bench.gpu.predict --keep`. Assumed: {assumed}.",
            table(["goal", "predicted", "met"], goals),
            "At m = 2048, 128 tokens a row (the file has all shapes): ns a token and what binds; the faster of both over the weight-gradient product, and how many times faster than the published formula.",
            table(["d_out × d_in", "dtype", "`fft`", "`direct`", "/product", "× published"], rows),
        )
    )


PARTS: Parts = {
    "predicted": predicted,
    "startup": startup,
    "kernels": kernels,
    "host-overhead": host_overhead,
    "scale": scale,
    "large": large,
    "paper-batch": paper_batch,
    "variance": variance,
    "search": search,
    "explore": explore,
    "integrations": integrations,
    "peers": peers,
    "per-example": per_example,
}
