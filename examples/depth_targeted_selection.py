"""Which training examples act in the late loop steps? Select data for a depth; it is another selection."""

from __future__ import annotations

import stepinfluence
from stepinfluence.evaluation.builtin import make_problem
from stepinfluence.search import top_k


def main(k: int = 20) -> float:
    problem = make_problem("adder")
    model = problem.fit(range(len(problem.train)), 0)
    capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
    train = capture.featurize(problem.batches("train"), problem.loss, per_step=False, progress=False)
    query = capture.featurize(problem.batches("query"), problem.loss, progress=False)
    half = model.steps // 2
    early = top_k(train, query, k, steps=range(half), progress=False)
    late = top_k(train, query, k, steps=range(half, model.steps), progress=False)
    shared = [len(set(a.tolist()) & set(b.tolist())) / k for a, b in zip(early.rows, late.rows, strict=True)]
    print(f"for the first query, early steps: {early.train_ids[0].tolist()[:8]} ...")
    print(f"                      late steps: {late.train_ids[0].tolist()[:8]} ...")
    print(f"the two selections of {k} share {sum(shared) / len(shared):.0%} of their examples on average")
    return sum(shared) / len(shared)


if __name__ == "__main__":
    main()
