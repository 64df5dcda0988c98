"""When two failures are the same one again: `alignd up` and the server give up what fails at one place."""

from feedback.retry import place


def test_a_place_is_the_same_whatever_its_figures() -> None:
    assert place("ValueError: 13.7 of 15.1 GiB") == place("ValueError: 9 of 16 GiB")
    assert place("process 12345 died") == place("process 7 died")
    assert place("KeyError: a") != place("KeyError: b")
