"""Pictures: packs and sampling against the model's own forward of every sequence alone, for each family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vision_zoo as zoo
from conftest import close, settings

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
        if "cross_attention_mask" in made:  # the processor makes it of the text
            from transformers.models.mllama import processing_mllama as mllama

            sees = mllama.get_cross_attention_token_mask(tokens, processor.image_token_id)
            tiles = made["aspect_ratio_mask"][0].sum(-1).tolist()
            dense = mllama.convert_sparse_cross_attention_mask_to_dense([sees], [tiles], 4, len(tokens))
            made["cross_attention_mask"] = torch.from_numpy(dense)
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
    why = "cross attention" if family == "mllama" else "differ"
    assert policy.shared or why in policy.why_plain  # the reason, for people
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
    for part in (lambda name: True, lambda name: "vis" in name):  # of the whole, and of the tower alone
        names = [n for n, p in model.named_parameters() if part(n) and p.grad is not None]
        both = [dict(m.named_parameters()) for m in (policy.model, model)]
        close(*([own[n].grad for n in names] for own in both), 1e-5)
    for name, p in policy.model.named_parameters():
        assert p.grad is None or both[1][name].grad is not None or not p.grad.any(), name


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


def test_a_picture_is_computed_once_for_its_group():
    """In sampling and in training, however many completions it has."""
    policy, _, processor = zoo.policy("idefics3")
    rows, met = encoded(processor), []
    count = lambda module, args, kwargs: met.append(len(kwargs["pixel_values"]))  # noqa: E731
    handle = policy.base.model.vision_model.register_forward_pre_hook(count, with_kwargs=True)
    pictures, draws = sum(map(len, SIZES)), np.random.default_rng(0).random((5, 6))
    found = generate(policy, [Request(e.prompt, draws, e.shown) for e in rows], 6)
    assert met == [pictures]
    items = [
        Item(e.prompt, [], [Member(s.tokens, COMPLETION, 1.0, s.logps) for s in own], shown=e.shown)
        for e, own in zip(rows, found, strict=True)
    ]
    config = settings("rft")
    batch = pack(items, range(len(items)), weigh(items, config), config)
    l_S, _ = logprobs(policy, batch)
    assert met == [pictures, pictures]
    assert (l_S - batch.sampler_S).abs().max() < 1e-5
    handle.remove()


def test_a_sampled_placeholder_ends_the_completion():
    """It is a target like any other token, and no input."""
    policy, model, processor = zoo.policy("idefics3")
    rows = encoded(processor)
    (place,) = policy.reader.placeholders
    with torch.no_grad():
        for m in (policy.base, model):
            m.lm_head.weight[place] = 0.0
            m.lm_head.weight += (
                torch.outer(torch.nn.functional.one_hot(torch.tensor(place), len(m.lm_head.weight)), torch.ones(32)) * 5
            )
    draws = np.random.default_rng(0).random((20, 8))
    found = generate(policy, [Request(rows[0].prompt, draws, rows[0].shown)], 8)[0]
    ended = [s for s in found if s.tokens[-1] == place]
    assert ended and all(s.finished and place not in s.tokens[:-1] for s in ended)
    items = [Item(rows[0].prompt, [], [Member(s.tokens, COMPLETION, 1.0, s.logps) for s in found], shown=rows[0].shown)]
    config = settings("rft")
    l_S, _ = logprobs(policy, batch := pack(items, [0], weigh(items, config), config))
    assert (l_S - batch.sampler_S).abs().max() < 1e-4


def test_mixed_hints_and_cuts_of_a_pack_change_nothing():
    """Three-dimensional positions go on from the prompt's largest, whichever groups lie in a pack."""
    policy, _, processor = zoo.policy("qwen2_5_vl")
    rows, vocabulary = encoded(processor), len(processor.tokenizer)
    items = items_of(rows, vocabulary - 90, vocabulary - 10)
    config = settings("uft", "likelihood.weight=0.5", "reference.kl=0")
    weights = weigh(items, config)
    whole = logprobs(policy, pack(items, range(len(items)), weights, config))[0]
    apart = torch.cat([logprobs(policy, pack(items, [i], weights, config))[0] for i in range(len(items))])
    assert (whole - apart).abs().max() < 1e-5
