"""Pictures: packs and sampling against the model's own forward of every sequence alone, for each family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vision_zoo as zoo
from conftest import settings

from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, HINT, Item, Member, pack
from unift.objectives.weights import weigh
from unift.rows.readers import rows_of
from unift.rows.tokens import encode_rows
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import generate

# transformers makes arrays of tensors in a way that numpy is about to give up
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SIZES = ([(32, 48)], [(48, 32), (64, 32)], [], [(64, 64)])  # width and height of the pictures of each row


def encoded(processor):
    """Rows with one picture, two, none and one, of different sizes."""
    rows = [
        {
            "prompt": [
                {"role": "user", "content": [*[{"type": "image"}] * len(sizes), {"type": "text", "text": f"Q{i}?"}]}
            ],
            "images": [zoo.noise(7 * i + j, *size) for j, size in enumerate(sizes)],
            "steps": [f" step {i}.", " and on."],
            "answer": str(i),
        }
        for i, sizes in enumerate(SIZES)
        if sizes or not processor.tokenizer.unift_pictures.needs_pictures
    ]
    return encode_rows(processor.tokenizer, rows_of(rows, need_steps=False), 400)


def own_logits(model, processor, tokens, encoded_row):
    """Logits [L, V] of one sequence by transformers alone."""
    more = {}
    if encoded_row.shown is not None:
        from unift.rows.pictures import opened

        images = [opened(p) for p in encoded_row.shown.pictures]
        made = processor(text=[processor.image_token * len(images)], images=[images], return_tensors="pt")
        made = {k: v for k, v in made.items() if k not in ("input_ids", "attention_mask", "labels")}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in made:
                image = torch.isin(torch.tensor(tokens), torch.tensor(placeholders(model))).long()[None]
                behind = (torch.arange(len(tokens)) >= encoded_row.shown.prompt).long()[None]
                made[name] = image if bool(made[name].any()) else behind
        more = {k: v.to(model.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in made.items()}
    return model(input_ids=torch.tensor([tokens]), use_cache=False, **more).logits[0]


def placeholders(model):
    names = ("image_token_id", "image_token_index")
    return [getattr(model.config, n) for n in names if isinstance(getattr(model.config, n, None), int)]


def items_of(rows, low, high):
    rng = np.random.default_rng(3)
    items = []
    for i, e in enumerate(rows):
        hint = e.solution[: 3 * i]
        members = [Member(rng.integers(low, high, n).tolist(), COMPLETION, 1.0) for n in (4, 1, 7)]
        items.append(Item(e.prompt, hint, members, shown=e.shown))
    return items


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_logprobs_and_gradients_are_those_of_the_model_itself(family):
    policy, model, processor = zoo.policy(family)
    assert policy.shared == (family in zoo.SHARED), policy.why_plain
    assert policy.shared or "differ" in policy.why_plain  # the reason, for people
    rows, vocabulary = encoded(processor), len(processor.tokenizer)
    items = items_of(rows, vocabulary - 90, vocabulary - 10)
    config = settings("uft", "likelihood.weight=0.5", "likelihood.tokens=hint", "reference.kl=0")
    batch = pack(items, range(len(items)), weigh(items, config), config)
    weight_S = torch.randn(len(batch.target_S), generator=torch.Generator().manual_seed(1))
    l_S, _ = logprobs(policy, batch)
    (l_S * weight_S).sum().backward()
    expected, seen = [], {}
    for s, target in enumerate(batch.target_S.tolist()):
        i, j, role = (int(x[s]) for x in (batch.item_S, batch.member_S, batch.role_S))
        item = items[i]
        if (i, j) not in seen:
            head = item.prompt + item.hint
            tokens = head if role == HINT else head + item.members[j].tokens
            seen[i, j] = (
                own_logits(model, processor, tokens, rows[i]).log_softmax(-1),
                len(item.prompt if role == HINT else head),
            )
        logp_LV, at = seen[i, j]
        expected.append(logp_LV[at - 1, target])
        seen[i, j] = logp_LV, at + 1
    own_S = torch.stack(expected)
    assert (l_S - own_S).abs().max() < 1e-5 * own_S.abs().max()
    (own_S * weight_S).sum().backward()
    both = dict(policy.model.named_parameters())
    tower = 0.0
    for name, p in model.named_parameters():
        got = both[name].grad
        if p.grad is None:
            assert got is None or not got.any(), name
            continue
        scale = p.grad.abs().max().item()
        gap = (got - p.grad).abs().max().item()
        assert gap < 1e-5 * max(scale, 1e-3 * float(weight_S.abs().sum())), (name, gap, scale)
        tower = max(tower, scale) if "vis" in name else tower
    assert tower > 0


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_greedy_completions_are_those_of_the_model_itself(family):
    policy, model, processor = zoo.policy(family)
    rows = encoded(processor)
    assert len(rows) == len(SIZES) - (family == "paligemma")
    found = generate(policy, [Request(e.prompt, None, e.shown) for e in rows], 12)
    ends = {*policy.end_ids, *policy.reader.placeholders}
    for e, (sample,) in zip(rows, found, strict=True):
        tokens = list(e.prompt)
        with torch.no_grad():
            for got, logp in zip(sample.tokens, sample.logps, strict=True):
                own_V = own_logits(model, processor, tokens, e)[-1].log_softmax(-1)
                assert got == int(own_V.argmax())
                assert abs(logp - float(own_V[got])) < 1e-4
                tokens.append(got)
        assert sample.finished == (sample.tokens[-1] in ends)
        assert not ends & set(sample.tokens[:-1])
