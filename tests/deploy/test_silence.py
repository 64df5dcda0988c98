"""How long a process may be silent: it is killed for more, and told of half of it."""

import os
import time
from pathlib import Path

import pytest

from deploy.silence import Silence, in_words
from feedback import heartbeat


@pytest.fixture
def beating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process beats as the relay."""
    monkeypatch.setattr(heartbeat, "_heart", heartbeat._Heart())
    monkeypatch.setattr(heartbeat, "_LEAST_SECONDS", 0.0)
    heartbeat.start(tmp_path, "relay")
    return tmp_path


def seconds_until_killed(silence: Silence, folder: Path, begin: float) -> int:
    return next(n for n in range(1, 2000) if silence.look(folder, "relay", begin + n))


def test_a_process_that_starts_has_ten_minutes_and_a_minute_from_its_first_beat_on(beating: Path) -> None:
    assert seconds_until_killed(Silence.begin(beating, "relay", 0.0), beating, 0.0) == 601
    silence = Silence.begin(beating, "relay", 0.0)
    heartbeat.beat()
    # The first look sees the beat.
    assert seconds_until_killed(silence, beating, 0.0) == 62
    # A process that is started anew has its ten minutes again.
    assert seconds_until_killed(Silence.begin(beating, "relay", 0.0), beating, 0.0) == 601


def test_a_process_that_starts_is_told_as_silent_no_earlier_than_it_must_be(beating: Path) -> None:
    path, now = heartbeat.path_of(beating, "relay"), time.time()

    def said_after(seconds: float) -> str:
        os.utime(path, (now - seconds,) * 2)
        return in_words(beating, "relay", now)

    assert (said_after(299), said_after(301)) == ("", "no progress for 301 s")
    heartbeat.beat()
    assert (said_after(29), said_after(31)) == ("", "no progress for 31 s")


def test_of_a_process_without_a_file_nothing_is_known(tmp_path: Path) -> None:
    assert in_words(tmp_path, "relay", time.time()) == ""
    assert Silence(0.0).look(tmp_path, "relay", 1e6) == ""
