"""What every method rests on: draws, positions, normalisers; and the traps of docs/traps.md that are a default."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import char_tokenizer, close, gradients, packed_loss, settings, tiny_policy
from plain import token_logprobs

from unift import rng
from unift.config.packaged import preset_names
from unift.config.sections import Show
from unift.hints import schedules
from unift.model.logprobs import chunked_logprobs, logprobs
from unift.model.packs import COMPLETION, HINT, Item, Member, pack
from unift.objectives.weights import weigh
from unift.rows.dataset import rows_of_step
from unift.rows.tokens import encode_row
from unift.training import evaluate
from unift.types import Row, Sample, Score

COSINE = Show(schedule="cosine", high=0.95, low=0.05, until=0.6)

# ---------------------------------------------------------------------------------------------- draws


def test_draws_are_pure():
    """Rows, hint and sampling numbers of a step as the loop asks for them: any order, any step alone, whatever else drew."""

    def drawn(step):
        rows = rows_of_step(3, step, 4, range(10))
        cuts = [schedules.draw(COSINE, schedules.At(3, step, 50, f"row{r}"), 9) for r in rows]
        return (
            rows,
            cuts,
            [rng.uniforms("sample", 3, step, i, f"row{r}", shape=(2, 5)).tolist() for i, r in enumerate(rows)],
        )

    forward = [drawn(step) for step in range(20)]
    np.random.seed(0)
    torch.manual_seed(0)
    assert [drawn(step) for step in reversed(range(20))][::-1] == forward


def test_rows_of_step():
    """Any step can be asked for alone, and a step of more prompts than rows takes rows again."""
    rows = [r for step in range(15) for r in rows_of_step(0, step, 4, range(10))]
    assert rows_of_step(0, 7, 4, range(10)) == rows[28:32]
    wide = rows_of_step(0, 0, 25, range(10))
    assert len(wide) == 25 and sorted(wide[:10]) == sorted(wide[10:20]) == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("t", [1, 150, 300])
def test_mean_of_many_draws(t):
    """100,000 draws, mean within 3 sigma of num * p(t)."""
    k = np.array([schedules.draw(COSINE, schedules.At(0, t - 1, 500, f"row{i}"), 9) for i in range(100_000)])
    p = schedules.probability(COSINE, t - 1, 500)
    assert abs(k.mean() - 5 * p) < 3 * np.sqrt(5 * p * (1 - p) / len(k))


# ---------------------------------------------------------------------------------------------- the hint's positions


@pytest.mark.parametrize("hint", [[5, 6], [7], []])
def test_hint_positions(hint):
    """Prompt [p0 p1 p2], hint [h0 h1]: the hint's log-probs come from positions {2, 3}, for no hint from
    none; their sum is the hint's log-prob in a plain forward of the whole sequence, whatever follows."""
    model, plain = tiny_policy(torch.float64)
    item = Item([3, 4, 9], hint, [Member([8, 1], COMPLETION, 1.0), Member([2, 2, 2], COMPLETION, -1.0)])
    config = settings("uft")
    batch = pack([item], [0], weigh([item], config), config)
    own = batch.role_S == HINT
    assert batch.at_S[own].tolist() == [2, 3][: len(hint)] and batch.target_S[own].tolist() == hint
    l_S, _ = logprobs(model, batch)
    logps, _ = token_logprobs(plain, [item.prompt + hint + [8, 1]])
    assert l_S[own].sum().item() == pytest.approx(
        logps[0][2 : 2 + len(hint)].sum().item(), abs=1e-6
    )  # the model norms in fp32


def test_no_advantage_leaves_sft_on_the_hint():
    """All of the solution shown and A = 0: the gradient is beta times that of the hint's mean NLL."""
    model, plain = tiny_policy()
    items = [
        Item([3, 4], [5, 6, 7], [Member([8, 1], COMPLETION, 0.0)] * 2),
        Item([9], [2, 6], [Member([4], COMPLETION, 0.0)] * 2),
    ]
    _, got = packed_loss(model, items, settings("uft", "likelihood.weight=0.25", "reference.kl=0"))
    logps, _ = token_logprobs(plain, [i.prompt + i.hint for i in items])
    nll = -torch.cat([l[len(i.prompt) - 1 :] for l, i in zip(logps, items, strict=True)]).mean()
    (0.25 * nll).backward()
    close(got, gradients(plain), 1e-5)


def test_normalisers():
    """Hints of 1 token (CE 2.0) and 9 tokens (CE 1.0) -> 1.5, 1.1, 5.5."""
    items = [Item([2], [3], []), Item([2], [4] * 9, [])]
    ce = [[2.0], [1.0] * 9]
    for norm, expected in (("microbatch_token_mean", 1.5), ("token_mean", 1.1), ("seq_mean_token_sum", 5.5)):
        more = ["train.micro_prompts=1"] if norm.startswith("micro") else []
        config = settings("uft", "likelihood.weight=1", f"likelihood.norm={norm}", *more)
        w = [weight.likelihood for weight in weigh(items, config)]
        assert sum(x * sum(c) for x, c in zip(w, ce, strict=True)) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------- traps


def test_large_logits_keep_their_gradient():
    """docs/traps.md 7: nothing is clamped. z = (300, 0, -300), target 2: dL/dz = softmax - onehot = (1, 0, -1)."""
    z = torch.tensor([[300.0, 0.0, -300.0]], dtype=torch.float64, requires_grad=True)
    l_S, _ = chunked_logprobs(z, torch.eye(3).double(), None, torch.tensor([2]), torch.ones(1).double())
    (grad,) = torch.autograd.grad(-l_S.sum(), z)
    assert l_S.item() == -600 and grad[0].tolist() == pytest.approx([1.0, 0.0, -1.0], abs=1e-12)


@pytest.mark.parametrize("method", preset_names())
def test_format_credit_and_entropy_only_where_the_source_has_them(method):
    """docs/traps.md 3 and 24: neither is on by default. On in the official behaviour of UFT and its baselines; in ReFT's
    reward (arXiv 2401.08967: .1 for a wrong number) and its PPO; LUFFY's, ReLIFT's and HPT's code have the entropy bonus."""
    config = settings(method)
    official = method.endswith("-paper")
    assert config.reward.format_score == (0.1 if official or method in ("ppo", "reft") else 0.0)
    bonus = official or method in ("luffy", "relift", "hpt")
    for stage in config.phases or [config]:
        samples = stage.sample.completions > 0
        assert stage.policy.entropy == (0.001 if bonus and samples else 0.0)


def test_chat_messages_go_through_the_template():
    """docs/traps.md 25: every message counts, through the tokenizer's template; text stays as it is; without one: refused."""
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"})
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = char_tokenizer(template=template)
    row = Row("r", turns, ("42",), ".", "42")
    encoded = encode_row(tokenizer, row, 500)
    assert tokenizer.decode(encoded.prompt) == "[system]Be brief.[user]6*7?[assistant]"
    assert tokenizer.decode(encode_row(tokenizer, Row("t", "6*7?", ("42",), ".", "42"), 500).prompt) == "6*7?"
    with pytest.raises(Exception, match="the tokenizer has no chat template"):
        encode_row(char_tokenizer(), row, 500)


def test_accuracy_is_the_verdict_not_the_reward():
    """docs/traps.md 33: no format credit, nor a full reward without a right answer, is accuracy; no verdict counts as wrong."""

    class Fixed:
        def score(self, rows, texts, hints):
            return [Score(0.1), Score(1.0, correct=False), Score(0.3, correct=True), Score(1.0), None]

    rows = [Row(str(i), "p", (), "", "") for i in range(5)]
    groups = [[Sample([1], [0.0], True, "x")] for _ in rows]
    assert evaluate.verdicts(Fixed(), rows, groups) == [[False], [False], [True], [True], [False]]  # type: ignore[arg-type]
