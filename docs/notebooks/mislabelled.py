# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Find mislabelled data
#
# Handwritten digits (scikit-learn's, 8 × 8 pixels), of which we spoil some labels.
# A looped model learns them, and an example's influence on itself says which labels
# to look at first.
#
# ## Data and model

# %%
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
data = load_digits()
rng = np.random.default_rng(0)
rows = rng.permutation(len(data.target))[:900]
images = torch.tensor(
    data.images[rows] / 16, dtype=torch.float32
)  # (900, 8, 8): a token for each row of pixels
truth = torch.tensor(data.target[rows])
labels = truth.clone()
spoiled = torch.from_numpy(rng.permutation(900)[:45])  # one in twenty
labels[spoiled] = (labels[spoiled] + torch.from_numpy(rng.integers(1, 10, 45))) % 10


class LoopedReader(nn.Module):
    def __init__(self, d=48, steps=4):
        super().__init__()
        self.embed = nn.Linear(8, d)
        self.position = nn.Parameter(0.3 * torch.randn(8, d))
        self.core = nn.TransformerEncoderLayer(
            d, 4, 2 * d, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(d, 10)
        self.steps = steps

    def forward(self, image):
        x = self.embed(image) + self.position
        state = x
        for _ in range(self.steps):
            state = self.core(state + x)
        return self.head(state.mean(1))


model = LoopedReader()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(12):
    for part in torch.randperm(900).split(100):
        loss = nn.functional.cross_entropy(model(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
with torch.no_grad():
    agrees = (model(images).argmax(1) == truth).float().mean()
print(f"the model agrees with {agrees:.0%} of the true labels")

# %% [markdown]
# ## Self-influence
#
# How much would a training step on an example lower its own loss? Where others
# explain it, little; a wrong label is explained by nobody. It is the squared length
# of the example's gradient: no queries are needed.

# %%
import stepinfluence


def loss_fn(model, batch):
    image, label = batch
    return nn.functional.cross_entropy(model(image), label, reduction="none")


capture = stepinfluence.attach(model, body=model.core, sketch_size=1024)
features = capture.featurize(
    [(images[part], labels[part]) for part in torch.arange(900).split(100)],
    loss_fn,
    progress=False,
)
by_step = stepinfluence.self_influence(features)  # (900, 4)
suspicion = by_step.sum(1)
order = suspicion.argsort(descending=True)
is_spoiled = torch.zeros(900, dtype=torch.bool)
is_spoiled[spoiled] = True
for looked in (45, 90, 180):
    found = int(is_spoiled[order[:looked]].sum())
    print(f"looking at the first {looked}: {found} of 45 spoiled labels found")

# %% [markdown]
# ## The first suspects
#
# In orange, those whose label we spoiled. The others are worth a look, too: digits
# that are hard to read.

# %%
import matplotlib.pyplot as plt

figure, places = plt.subplots(3, 8, figsize=(9, 4.2), layout="constrained")
for axes, row in zip(places.flat, order.tolist(), strict=False):
    axes.imshow(images[row], cmap="gray_r")
    note = (
        f"{int(labels[row])}, is {int(truth[row])}"
        if is_spoiled[row]
        else f"{int(labels[row])}"
    )
    axes.set_title(
        note, fontsize=9, color="#c94f00" if is_spoiled[row] else "#5a6068"
    )
    axes.set_axis_off()
plt.show()

# %% [markdown]
# ## How much work it saves

# %%
from stepinfluence.evaluation import mislabel_auc

scores = {
    "self-influence": suspicion.numpy(),
    "loss": features.losses.numpy(),
    "chance": rng.random(900),
}
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, score in scores.items():
    found = is_spoiled[torch.from_numpy(np.argsort(-score))].cumsum(0) / 45
    axes.plot(
        np.arange(1, 901) / 900,
        found,
        label=f"{name}: AUC {mislabel_auc(score, is_spoiled.numpy()).value:.2f}",
    )
axes.set_xlabel("share of the data looked at")
axes.set_ylabel("share of spoiled labels found")
axes.legend(frameon=False)
plt.show()
# %% [markdown]
# ## At which loop step does a wrong label pull?

# %%
share = by_step / by_step.sum(1, keepdim=True)
figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
steps = np.arange(1, 5)
axes.bar(
    steps - 0.2,
    share[is_spoiled].mean(0),
    width=0.38,
    color="#c94f00",
    label="spoiled",
)
axes.bar(
    steps + 0.2,
    share[~is_spoiled].mean(0),
    width=0.38,
    color="#0072b2",
    label="others",
)
axes.set_xticks(steps)
axes.set_xlabel("loop step")
axes.set_ylabel("share of self-influence")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# [Uses](../uses.html#find-mislabelled-data) has the same over seeds, beside other
# scores. On a run of your own: `sdi outliers run`.
