"""Kills at random moments: `tests.tools.kill_runs`, shortened."""

import pytest

from tests.tools.kill_runs import Kill, check, kill_again_and_again, summary


def kill(**changes):
    values = {"began": 0, "done": 12, "saved": 10, "writing": False, "start": 1.0, "warnings": 0}
    return Kill(**values | changes)


def test_the_summary_counts_kills_and_lost_steps():
    text = summary([kill(), kill(began=None, done=10), kill(began=10, done=17, writing=True)], 60)
    assert "3 kills" in text and "1 before the first step" in text and "1 while a" in text
    assert "3.0 steps lost on average, 7 at most" in text


@pytest.mark.parametrize(
    "wrong",
    [{"began": 5}, {"done": 25}, {"saved": 5}, {"warnings": 1}],
    ids=["not from the newest", "too much lost", "a checkpoint vanished", "a broken checkpoint"],
)
def test_the_check_finds_errors(wrong):
    check([kill(), kill(began=10, done=13)])
    with pytest.raises(AssertionError):
        check([kill(), kill(**{"began": 10, "done": 13} | wrong)])


@pytest.mark.slow
def test_a_run_that_is_killed_many_times_ends_like_an_undisturbed_one(tmp_path):
    kills = kill_again_and_again(tmp_path, kills=20, steps=400, seed=1)
    assert len(kills) == 20 and any(kill.writing for kill in kills)
    assert any(kill.began is None for kill in kills)
