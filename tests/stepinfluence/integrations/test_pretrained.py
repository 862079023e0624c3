"""Looped models in Hugging Face folders as projects: bodies, losses, features against autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import FLOAT64
from hf_models import SPECIAL, WORDS, albert_config, transformers
from rounding import in_double
from stepinfluence import Project, attach
from stepinfluence.capture import ExactCapture
from stepinfluence.capture.discovery import find_loop
from stepinfluence.errors import BodyError, ProjectError
from stepinfluence.integrations.pretrained import IGNORED, Pretrained
from torch import nn

Saved = Callable[..., Path]
Lines = Callable[..., str]
TEXTS = [{"text": "the cat sees a red house"}, {"text": "the dog hears a bird", "id": "dog", "kind": 2}]


def hrm_config(**changes: Any) -> Any:
    if not hasattr(transformers, "HrmTextConfig"):
        pytest.skip("this version of transformers has no HRM-text")
    shape = {
        "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "H_cycles": 2, "L_cycles": 3,
    }  # fmt: skip
    return transformers.HrmTextConfig(**(shape | changes))


def check_features(pretrained: Pretrained, steps: int) -> None:
    """Features of a project's examples: sum over steps against exact gradients, by inner products."""
    project = Project.of(pretrained, pretrained.name)
    model = project.model()
    examples = project.dataset("train")
    batch = project.collate([examples[i] for i in range(len(examples))])
    body = project.body(model)
    with in_double(model):
        # A sketch longer than any parameter is without loss up to a rotation: inner products are exact.
        options = project.attach_options()
        capture = attach(model, body=body, sketch_size=4096, seed=0, **options)
        features = capture.featurize([batch], project.loss, progress=False)
        exact = ExactCapture(model, body=body, **options).featurize([batch], project.loss, progress=False)
        assert features.values.shape[:2] == (len(examples), steps)
        assert features.losses == pytest.approx(exact.losses, rel=1e-6)  # kept in float32
        for step in range(steps):
            got, want = features.values[:, step], exact.values[:, step]
            assert float(want.norm()) > 0  # every step counts
            norms = want.norm(dim=1)
            assert ((got @ got.T - want @ want.T).abs() <= 0.15 * norms[:, None] * norms).all()
        # and the sum over steps is the gradient of the body
        parameters = [p for name, p in model.named_parameters() if p.requires_grad and _within(name, body)]
        first = torch.autograd.grad(project.loss(model.eval(), batch)[0], parameters)
        size = float(sum(g.square().sum() for g in first)) ** 0.5
        assert float(exact.values[0].sum(0).norm()) == pytest.approx(size, rel=FLOAT64)


def _within(name: str, body: Any) -> bool:
    return any(name.startswith(part + ".") for part in ([body] if isinstance(body, str) else body))


def test_albert_masked(saved: Saved, lines: Lines) -> None:
    pretrained = Pretrained(saved("AlbertForMaskedLM", albert_config()), lines(train=TEXTS))
    assert pretrained.task == "masked-lm"
    assert Project.of(pretrained, pretrained.name).body(pretrained.model()) == "albert.encoder.albert_layer_groups.0"
    check_features(pretrained, steps=3)


def test_albert_groups_of_layers(saved: Saved, lines: Lines) -> None:
    config = albert_config(num_hidden_layers=4, num_hidden_groups=2, num_labels=2)
    data = lines(train=[{"text": "the cat", "label": 0}, {"text": "a red dog", "label": 1}])
    pretrained = Pretrained(saved("AlbertForSequenceClassification", config), data)
    assert pretrained.task == "classification"
    assert pretrained.body(pretrained.model()) == [f"albert.encoder.albert_layer_groups.{k}" for k in (0, 1)]
    batch = pretrained.collate(pretrained.dataset("train"))
    model = pretrained.model().eval()
    labels = batch["labels"]
    assert labels.tolist() == [0, 1]
    with torch.no_grad(), in_double(model):
        want = [model(**{k: v[i : i + 1] for k, v in batch.items()}).loss for i in (0, 1)]
        torch.testing.assert_close(pretrained.loss(model, batch), torch.stack(want))


def test_hrm_text(saved: Saved, lines: Lines) -> None:
    data = lines(train=[{"prompt": "the cat", "text": " sees a bird"}, {"text": "the dog hears a red bird"}])
    pretrained = Pretrained(saved("HrmTextForCausalLM", hrm_config()), data)
    assert pretrained.task == "causal-lm"
    model = pretrained.model()
    assert pretrained.body(model) == ["model.L_module", "model.H_module"]
    batch = pretrained.collate(pretrained.dataset("train"))
    assert batch["token_type_ids"][0].tolist() == [1, 1, 0, 0, 0, 0]  # the prompt is seen from both sides
    check_features(pretrained, steps=2 * (3 + 1))  # all cycles have gradients


def test_causal_loss_is_of_the_text_after_the_prompt(saved: Saved, lines: Lines) -> None:
    data = lines(train=[{"prompt": "the cat", "text": " sees a bird"}])
    pretrained = Pretrained(saved("HrmTextForCausalLM", hrm_config(prefix_lm=False)), data)
    model, batch = pretrained.model().eval(), pretrained.collate(pretrained.dataset("train"))
    with torch.no_grad(), in_double(model):
        logits = model(input_ids=batch["input_ids"]).logits[0]
        want = nn.functional.cross_entropy(logits[1:4], batch["input_ids"][0, 2:])
        found = pretrained.loss(model, batch)
    assert found.tolist() == pytest.approx([float(want)], rel=FLOAT64)


def test_masks_go_with_the_text(saved: Saved, lines: Lines) -> None:
    folder = saved("AlbertForMaskedLM", albert_config())
    pretrained = Pretrained(folder, lines(train=TEXTS), mask_share=0.5)
    records = pretrained.dataset("train")
    together, alone = pretrained.collate(records), pretrained.collate(records[1:])
    length = alone["input_ids"].shape[1]
    assert torch.equal(together["input_ids"][1, :length], alone["input_ids"][0])
    masked = together["labels"] != IGNORED
    assert masked.sum(1).tolist() == [3, 2]  # half of six and of five words
    mask = pretrained.tokenizer.mask_token_id
    assert torch.equal(together["input_ids"] == mask, masked)
    other = Pretrained(folder, lines(train=TEXTS), mask_share=0.5, seed=1).collate(records)
    assert not torch.equal(other["labels"], together["labels"])


def test_what_people_see(saved: Saved, lines: Lines) -> None:
    pretrained = Pretrained(saved("AlbertForMaskedLM", albert_config()), lines(train=TEXTS))
    project = Project.of(pretrained, pretrained.name)
    first, second = project.dataset("train")
    assert project.example_id(first, 0) == 0
    assert project.example_id(second, 1) == "dog"
    assert project.text(second) == "the dog hears a bird"
    assert project.metadata(second) == {"kind": 2}
    tokens = project.tokens(first)
    assert tokens is not None
    assert tokens[0] == "[CLS]"
    assert len(tokens) == 8
    assert project.from_json({"text": "a dog"}) == {"text": "a dog"}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("{", "no JSON"), ("[1]", "no text"), ('{"text": 5}', "no text"), ('{"text": ""}', "no token to predict")],
)
def test_bad_lines_are_named(saved: Saved, lines: Lines, tmp_path: Path, line: str, complaint: str) -> None:
    pretrained = Pretrained(saved("AlbertForMaskedLM", albert_config()), lines(train=TEXTS))
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ProjectError, match=rf"train\.jsonl:3: .*{complaint}"):
        pretrained.dataset("train")
    with pytest.raises(ProjectError, match=r"other\.jsonl: cannot be read"):
        pretrained.dataset("other")


def test_bad_labels_are_named(saved: Saved, lines: Lines) -> None:
    folder = saved("AlbertForSequenceClassification", albert_config(num_labels=2))
    with pytest.raises(ProjectError, match="label is 2; the model has the classes 0 to 1"):
        Pretrained(folder, lines(train=[{"text": "a cat", "label": 2}])).dataset("train")


def test_what_cannot_be_loaded(saved: Saved, lines: Lines, tmp_path: Path) -> None:
    data = lines(train=TEXTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProjectError, match="cannot load it"):
        Pretrained(tmp_path / "empty", data)
    folder = saved("AlbertModel", albert_config())
    with pytest.raises(ProjectError, match="AlbertModel; say the task"):
        Pretrained(folder, data)
    with pytest.raises(ProjectError, match="task: got 'poems'"):
        Pretrained(folder, data, task="poems")
    with pytest.raises(ProjectError, match="split"):
        Pretrained(folder, "train.jsonl")


def test_a_model_without_a_loop_has_no_body(saved: Saved, lines: Lines) -> None:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    pretrained = Pretrained(saved("BertForMaskedLM", config), lines(train=TEXTS))
    with pytest.raises(BodyError, match="no module is entered more than once"):
        pretrained.body(pretrained.model())


def test_find_body_leaves_the_model_as_it_was() -> None:
    shared, once = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.ModuleDict({"shared": nn.Sequential(shared, nn.ReLU()), "once": once})
    model["once"].eval()

    def forward() -> None:
        x = torch.ones(1, 3)
        for _ in range(3):
            x = model["shared"](x)
        once(x)

    assert find_loop(model, forward) == {"shared": 3}  # not also shared.0 within it
    assert model["shared"].training
    assert not once.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_without_a_hub_a_name_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would look for it again and again, and wait in between."""
    asked = []

    def no_network(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("stepinfluence.integrations.pretrained.getproxies", dict)
    with pytest.raises(ProjectError, match="the hub cannot be reached from here"):
        Pretrained("nobody/none", data="{split}.jsonl")
    assert len(asked) < 4, "tried again and again"
