# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A looped model from Hugging Face
#
# ALBERT applies one layer twelve times: it is a looped model. Here it learns which
# animal lives where, and is asked which sentences taught it that. The code is
# that of `transformers`; the weights are small and trained here, so that nothing is
# downloaded. With a model of the hub, only the name changes:
# `Pretrained("albert/albert-base-v2", ...)`.
#
# ## A model folder, and data in JSON lines

# %%
import json
import logging
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

torch.manual_seed(0)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("stepinfluence").setLevel(logging.ERROR)
folder = Path(tempfile.mkdtemp())

WHERE = {"cat": "house", "fish": "lake", "bird": "tree", "fox": "forest"}
DOES = {"cat": "sleeps", "fish": "swims", "bird": "sings", "fox": "hides"}
PLACES = list(WHERE.values())
SIZES = ("small", "big", "old", "young", "quick", "slow", "fat", "thin")
sentences = [
    {
        "id": f"{size} {animal}",
        "text": f"the {size} {animal} {DOES[animal]}",
        "label": PLACES.index(place),
        "animal": animal,
    }
    for animal, place in WHERE.items()
    for size in SIZES
]
queries = [s for s in sentences if s["id"].startswith("old")]
train = [s for s in sentences if s not in queries]
wrong = next(s for s in train if s["id"] == "quick fish")
wrong["label"] = PLACES.index("tree")  # one label is wrong
for split, lines in (("train", train), ("query", queries)):
    (folder / f"{split}.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )

special = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
words = sorted({word for s in sentences for word in s["text"].split()})
vocabulary = {
    word: number for number, word in enumerate([*special.values(), *words])
}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
)
transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, **special
).save_pretrained(folder / "model")

config = transformers.AlbertConfig(
    vocab_size=len(vocabulary),
    embedding_size=32,
    hidden_size=48,
    intermediate_size=96,
    num_attention_heads=4,
    num_hidden_layers=6,
    num_labels=len(PLACES),
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
transformers.AlbertForSequenceClassification(config).save_pretrained(
    folder / "model"
)

# %% [markdown]
# ## Load it as a project
#
# `Pretrained` knows how to load model and data, what the loss of an example is
# (here the cross-entropy of its class), and which module is the loop.

# %%
from stepinfluence.integrations.pretrained import Pretrained

pretrained = Pretrained(folder / "model", data=str(folder / "{split}.jsonl"))
model = pretrained.model()
print("loop body:", pretrained.body(model))


def batch(split):
    data = pretrained.dataset(split)
    return pretrained.collate([data[k] for k in range(len(data))])


optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for step in range(61):
    loss = pretrained.loss(model, batch("train")).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"update {step}: loss {loss.item():.2f}")

# %% [markdown]
# ## Who taught it where fish live?

# %%
import stepinfluence

model.eval()
capture = stepinfluence.attach(model, body=pretrained.body(model), sketch_size=2048)
train_features = capture.featurize(
    [batch("train")], pretrained.loss, per_step=False, progress=False
)
query_features = capture.featurize(
    [batch("query")], pretrained.loss, progress=False
)
scores = stepinfluence.influence(train_features, query_features)
scores = scores.with_texts(
    train=[f"{s['text']} → {PLACES[s['label']]}" for s in train],
    query=[s["text"] for s in queries],
)
fish = [s["animal"] for s in queries].index("fish")
scores.top(fish, k=6)

# %%
scores.top(fish, k=4, largest=False)

# %%
scores.plot(fish)

# %% [markdown]
# The sentences about fish help, and the one whose label is wrong harms.
#
# ## By animal
#
# Influence summed over the sentences of each animal, on the query of each animal,
# as a part of that query's largest: what is learnt better has smaller gradients.

# %%
import matplotlib.pyplot as plt

animals = list(WHERE)
right = [s for s in train if s is not wrong]
members = torch.tensor(
    [[s["animal"] == animal and s in right for s in train] for animal in animals]
)
by_animal = members.double() @ scores.sdi.sum(2).double()
by_animal /= by_animal.abs().amax(0)
order = [[s["animal"] for s in queries].index(animal) for animal in animals]
figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
image = axes.imshow(by_animal[:, order], cmap="RdBu", vmin=-1, vmax=1)
axes.set_xticks(range(4), animals)
axes.set_yticks(range(4), animals)
axes.set_xlabel("query")
axes.set_ylabel("training sentences")
figure.colorbar(image, label="influence, of the query's largest")
plt.show()

# %% [markdown]
# The same from the command line, with a store that can be asked again: `sdi init
# albert.py --hf FOLDER --data 'data/{split}.jsonl'`, then `sdi featurize --project
# albert.py --split train --split query --out run` and `sdi explore run`.
