"""bfloat16 weights that cannot hold an update: told before training, as the optimizer finds it."""

from __future__ import annotations

import pytest
import torch

from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Lora
from unift.model.load import load_policy


@pytest.mark.parametrize("lr, moves", [(1e-6, False), (1e-3, True)])
def test_bfloat16_weights_that_would_not_move_are_told_before_training(tmp_path, lr, moves):
    from unift.commands.doctor import diagnose
    from unift.model import precision
    from unift.training.optimizer import make_optimizer

    words = ["data.task=lock", "model.dtype=bfloat16", f"train.lr={lr}", "train.master_weights=false"]
    config = resolve("sft", overrides=parse_overrides(words))
    policy = load_policy(config.model)
    before = [p.detach().clone() for p in policy.parameters()]
    with (
        pytest.warns(RuntimeWarning, match="bfloat16 rounds an update of train.lr=1e-06 away")
        if not moves
        else _silent()
    ):
        optimizer = make_optimizer(policy, config.train)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    same = sum(int((a == b).sum()) for a, b in zip(before, policy.parameters(), strict=True))
    share = precision.lost_share(precision.of_model(before), lr)
    assert share == pytest.approx(same / sum(p.numel() for p in before), abs=0.03)
    assert (share <= precision.LOST) == moves
    (check,) = [c for c in diagnose(config) if c.name == "precision"]
    assert check.ok == moves and (moves or "of the weights: they would not move" in check.text)
    lora = load_policy(config.model.model_copy(update={"lora": Lora(rank=2)}))
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    with _silent():
        make_optimizer(lora, config.train)


def _silent():
    import warnings

    caught = warnings.catch_warnings()

    class Silent:
        def __enter__(self):
            caught.__enter__()
            warnings.simplefilter("error", RuntimeWarning)

        def __exit__(self, *error):
            caught.__exit__(*error)

    return Silent()


def test_the_share_of_bfloat16_weights_that_stay():
    """1 + 2^-7 follows 1: half of that is 2^-8 upwards and 2^-9 downwards, where the numbers lie twice as close."""
    from unift.model.precision import lost_share

    one = [(torch.ones(4), 4)]
    assert lost_share(one, 2**-9 * 0.99) == 1 and lost_share(one, 2**-9 * 1.01) == 0
    assert lost_share([(torch.tensor([0.0, 1e-4]), 2), (torch.ones(2), 6)], 1e-5) == 6 / 8
