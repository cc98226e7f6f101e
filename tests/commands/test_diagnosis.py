"""The first screen of a run's page: each cause with numbers that trigger it, and with numbers that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from unift.commands.report import sections
from unift.commands.report.diagnosis import causes, next_steps, verdict
from unift.commands.report.gather import RunData
from unift.intervals import wilson

STEPS = 40
SOUND = {
    "reward": 0.5, "groups/all_wrong": 0.2, "groups/all_right": 0.2, "frac_reward_zero_std": 0.4, "hint/fraction": 0.0,
    "completions/no_answer": 0.0, "completions/clipped_ratio": 0.0, "sampling/sampling_logp_difference/mean": 1e-6,
}  # fmt: skip


def share(p, n=500):
    low, high = wilson(p * n, n)
    return {"accuracy": p, "low": low, "high": high, "n": n}


def run(change=None, result=None, base=0.1, test=0.5, stopped=False, hinted=None, peak=None):
    """A finished run of sound numbers. change: metrics of all steps; hinted: of the first half, with hints. peak: accuracy in the
    middle."""
    metrics = [{"step": 0, "base": share(base)}]
    for step in range(1, STEPS + 1):
        early = {"hint/fraction": 0.6} | (hinted or {}) if hinted is not None and step <= STEPS // 2 else {}
        metrics.append({"step": step, "eval/test/accuracy": test} | SOUND | (change or {}) | early)
    if peak is not None:
        metrics[STEPS // 2]["eval/test/accuracy"] = peak
    done = {"reward_seen": 100, "test": share(test), "scorer": {"train": {"total": 800}}} | (result or {})
    settings = {"method": "uft", "train": {"steps": STEPS}}
    return RunData(Path("run"), settings, None, metrics, done, {}, [], 0, stopped, [])


def names(found):
    return [cause.name for cause in causes(found)]


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("not finite", {"stopped": True}, {}),
        ("reward errors", {"result": {"scorer": {"train": {"total": 800, "timeouts": 3}}}}, {}),
        ("no reward seen", {"change": {"reward": 0.0, "groups/all_wrong": 1.0}, "result": {"reward_seen": 0}},
         {"change": {"reward": 0.001}, "result": {"reward_seen": 1}}),
        ("no answer", {"change": {"completions/no_answer": 0.11}}, {"change": {"completions/no_answer": 0.1}}),
        ("shrunk completions",
         {"change": {"completions/mean_length": 7.0, "groups/all_wrong": 0.9, "reward": 0.1, "completions/no_answer": 0.9},
          "hinted": {"completions/mean_length": 30.0, "hint/fraction": 0.0, "groups/all_wrong": 0.5, "reward": 0.5}},
         {"change": {"completions/mean_length": 7.0, "groups/all_wrong": 0.9, "reward": 0.5},
          "hinted": {"completions/mean_length": 30.0, "hint/fraction": 0.0, "groups/all_wrong": 0.5}}),
        ("shrunk completions", {"change": {"completions/mean_length": 7.0, "groups/all_wrong": 0.9, "reward": 0.1},
          "hinted": {"completions/mean_length": 30.0, "hint/fraction": 0.0, "groups/all_wrong": 0.5, "reward": 0.5}},
         {"change": {"completions/mean_length": 8.0, "groups/all_wrong": 0.9, "reward": 0.1},
          "hinted": {"completions/mean_length": 30.0, "hint/fraction": 0.0, "groups/all_wrong": 0.5, "reward": 0.5}}),
        ("cut", {"change": {"completions/clipped_ratio": 0.11}}, {"change": {"completions/clipped_ratio": 0.1}}),
        ("hints too short", {"hinted": {"groups/all_wrong": 0.9}}, {"hinted": {"groups/all_wrong": 0.7}}),
        ("hints too short", {"hinted": {"groups/all_wrong": 0.9}}, {"change": {"groups/all_wrong": 0.9}}),
        ("hints too long", {"hinted": {"groups/all_right": 0.9}}, {"hinted": {"groups/all_right": 0.7}}),
        ("hints gone too soon", {"change": {"reward": 0.01}, "hinted": {"reward": 0.5}},
         {"change": {"reward": 0.1}, "hinted": {"reward": 0.5}}),
        ("rows solved", {"change": {"groups/all_right": 0.9}}, {"change": {"groups/all_right": 0.7}}),
        ("equal completions", {"change": {"frac_reward_zero_std": 0.85}}, {"change": {"frac_reward_zero_std": 0.75}}),
        ("rows without a solution", {"change": {"reward/without_solution": 0.04, "reward/with_solution": 0.5}},
         {"change": {"reward/without_solution": 0.05, "reward/with_solution": 0.5}}),
        ("fell back", {"peak": 0.62}, {"peak": 0.54}),
        ("sampler gap", {"change": {"sampling/sampling_logp_difference/mean": 0.03}},
         {"change": {"sampling/sampling_logp_difference/mean": 0.02}}),
        ("rows learned by heart", {"result": {"train": share(0.9)}}, {"result": {"train": share(0.51)}}),
    ],
)  # fmt: skip
def test_each_cause_is_found_where_it_is_and_not_where_it_is_not(name, bad, good):
    found = run(**bad)
    assert names(found) == [name]
    assert next_steps(found) == [causes(found)[0].advice]
    assert name not in names(run(**good))


def test_rows_are_not_called_solved_where_the_result_says_otherwise():
    """The last steps of a short run hold a few groups; the accuracy on training rows is of all of them."""
    easy = {"groups/all_right": 1.0}
    assert names(run(change=easy)) == ["rows solved"]
    assert names(run(change=easy, result={"train": share(0.5)})) == []


def test_a_sound_run_has_no_cause():
    assert names(run()) == [] and names(run(hinted={})) == []
    assert "More seeds" in next_steps(run())[0] and "More steps" in next_steps(run(test=0.1))[0]


@pytest.mark.parametrize(
    ("base", "test", "kind", "word"),
    [(0.1, 0.5, "good", "Yes"), (0.5, 0.1, "watch", "gets worse"), (0.1, 0.11, "watch", "Not measurably")],
)
def test_the_verdict_goes_by_intervals(base, test, kind, word):
    found = verdict(run(base=base, test=test))
    assert found[0] == kind and word in found[1]


def test_while_hints_are_shown_it_is_too_early_to_say():
    whole = run(base=0.1, test=0.1, change={"hint/fraction": 0.5})
    unfinished = RunData(**(vars(whole) | {"result": None}))
    assert "Too early to say" in verdict(unfinished)[1] and "Too early" not in verdict(whole)[1]
    assert "Let it go on" in next_steps(unfinished)[0]


def test_equal_completions_are_not_said_where_the_reason_is_known():
    for known in ({"groups/all_right": 0.9}, {"reward": 0.0, "groups/all_wrong": 1.0}):
        result = {"reward_seen": 0} if "reward" in known else None
        assert "equal completions" not in names(run(change={"frac_reward_zero_std": 0.95} | known, result=result))


def test_advice_on_shrunk_completions_names_the_penalty_where_there_is_one():
    long = {"completions/mean_length": 30.0, "hint/fraction": 0.0, "groups/all_wrong": 0.5, "reward": 0.5}
    found = run(change={"completions/mean_length": 1.0, "groups/all_wrong": 1.0, "reward": 0.0}, hinted=long)
    assert "credit.overlong" not in causes(found)[0].advice
    with_penalty = RunData(**(vars(found) | {"settings": found.settings | {"credit": {"overlong": 8}}}))
    assert "credit.overlong=0" in causes(with_penalty)[0].advice


def test_the_first_screen_says_it():
    text = str(sections.diagnosis(run(change={"completions/clipped_ratio": 0.5})))
    assert [text.index(t) for t in ("Is it learning?", "were cut", "Raise sample.max_tokens")] == sorted(
        text.index(t) for t in ("Is it learning?", "were cut", "Raise sample.max_tokens")
    )
    assert "Nothing that these numbers show." in sections.diagnosis(run())
