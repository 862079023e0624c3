# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A looped model of your own
#
# A model that applies one layer several times, a training loop, and the question:
# which training examples made it answer as it does, and at which of its loop steps?
# It runs in seconds, without a GPU.
#
# ## The model
#
# It is shown five digits and has to name the largest.

# %%
import torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)


class LoopedMaximum(nn.Module):
    def __init__(self, digits=8, tokens=5, d=32, steps=6):
        super().__init__()
        self.embed = nn.Embedding(digits, d)
        self.block = nn.TransformerEncoderLayer(
            d, 4, 2 * d, dropout=0.0, batch_first=True, norm_first=True
        )
        self.read_out = nn.Linear(d, digits)
        self.steps = steps

    def forward(self, tokens):
        x = self.embed(tokens)
        state = x
        for _ in range(self.steps):  # the loop: the same weights at every step
            state = self.block(state + x)
        return self.read_out(state.mean(1))


# %% [markdown]
# 600 training examples, 60 queries, and a short training.

# %%
tokens = torch.randint(8, (660, 5))
labels = tokens.max(1).values
train_rows, query_rows = torch.arange(600), torch.arange(600, 660)

model = LoopedMaximum()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(150):
    rows = train_rows[torch.randint(600, (100,))]
    loss = nn.functional.cross_entropy(model(tokens[rows]), labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    right = (
        (model(tokens[query_rows]).argmax(1) == labels[query_rows]).float().mean()
    )
print(f"right on new examples: {right:.0%}")

# %% [markdown]
# ## Attach, featurize, score
#
# No layer has to be of a special type, and nothing has to be registered before
# training. The loop is found by looking at the first batch. What is needed of you
# is a loss for each example.

# %%
import stepinfluence

capture = stepinfluence.attach(model, sketch_size=1024)


def loss_fn(model, batch):
    tokens, labels = batch
    return nn.functional.cross_entropy(
        model(tokens), labels, reduction="none"
    )  # (B,): one loss for each example


def batches(rows):
    return [(tokens[part], labels[part]) for part in rows.split(100)]


train = capture.featurize(
    batches(train_rows), loss_fn, per_step=False, progress=False
)
queries = capture.featurize(batches(query_rows), loss_fn, progress=False)


# %%
texts = [f"{t.tolist()} → {label}" for t, label in zip(tokens, labels, strict=True)]
scores = stepinfluence.influence(train, queries).with_texts(
    train=texts[:600], query=texts[600:]
)
scores

# %% [markdown]
# ## One answer
#
# The query with the largest loss, the examples that help it most, and where in the
# loop they do. Positive: a training step on the example lowers the query's loss.

# %%
query = int(queries.losses.argmax())
scores.top(query, k=8)

# %%
scores.plot(query)

# %% [markdown]
# ## All answers
#
# Where in the loop does training act? The bars are the influence of all training
# examples, summed; the line is its size regardless of sign. Steps at which the bars
# are small and the line is not are steps where examples pull against each other.

# %%
scores.plot_steps()

# %%
scores.heatmap(query, k=15)

# %% [markdown]
# ## As a table

# %%
table = scores.to_pandas()
table.groupby("query_text").score.agg(["sum", "min", "max"]).sort_values(
    "sum", ascending=False
).head()

# %% [markdown]
# ## How far off are the sketches?
#
# Gradients were sketched into 1,024 numbers for each weight. On a few examples the
# exact answer is affordable; look at it once.

# %%
exact = stepinfluence.ExactCapture(model, body=model.block)
few = train_rows[:100]
true = stepinfluence.influence(
    exact.featurize(batches(few), loss_fn, per_step=False, progress=False),
    exact.featurize(batches(query_rows), loss_fn, progress=False),
)
error = (scores.sdi[:100] - true.sdi).norm() / true.sdi.norm()
ranks = [
    torch.stack(
        [a[:, q].sum(1).argsort().argsort() for a in (scores.sdi[:100], true.sdi)]
    )
    for q in range(60)
]
same = torch.stack([torch.corrcoef(r.double())[0, 1] for r in ranks]).mean()
print(f"relative error of the trajectories {error:.2f}")
print(f"rank correlation of the totals {same:.3f}")

# %% [markdown]
# A larger `sketch_size` makes the error smaller, by the square root. `sdi query
# --exact` recomputes a short list without sketches.
