"""What the manager knows of a vTPM that sleeps."""

from manager.sleepers import LONGEST_RETRY, Asleep


def test_one_that_does_not_wake_for_weeks_is_tried_again_and_again() -> None:
    entry = Asleep(1, 0.0)
    assert [entry.pause() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert {entry.pause() for _ in range(20_000)} == {LONGEST_RETRY}, "a number that grows would overflow one day"
