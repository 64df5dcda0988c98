"""Tokens: only what was signed here is taken, and anything else is refused with a TokenError."""

import concurrent.futures
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignd.v1.feedback_token_pb2 import CompletionClaim, FeedbackClaims
from feedback.token import Keyring, KeyringError, TokenError, TokenReason, load_keyring, sign, verify

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEYRING = Keyring("new", {"new": b"n" * 32, "old": b"o" * 32})


def make_claims(lifetime: timedelta = timedelta(days=7)) -> FeedbackClaims:
    claims = FeedbackClaims(
        sample_id="s",
        user_id="u",
        completions=[CompletionClaim(completion_id=f"c{i}", policy_version=i + 1) for i in range(4)],
    )
    claims.issue_time.FromDatetime(NOW)
    claims.expire_time.FromDatetime(NOW + lifetime)
    return claims


TOKEN = sign(make_claims(), KEYRING)


def refusal(token: str, keyring: Keyring = KEYRING, now: datetime = NOW) -> TokenReason:
    with pytest.raises(TokenError) as caught:
        verify(token, keyring, now)
    return caught.value.reason


def test_a_token_says_what_was_signed() -> None:
    claims = verify(TOKEN, KEYRING, NOW)
    assert claims.key_id == "new"
    claims.ClearField("key_id")
    assert claims == make_claims()


def test_a_retired_key_still_verifies_and_an_unknown_one_does_not() -> None:
    old = sign(make_claims(), Keyring("old", KEYRING.secrets))
    assert verify(old, KEYRING, NOW).key_id == "old"
    assert refusal(old, Keyring("new", {"new": b"n" * 32})) is TokenReason.UNKNOWN_KEY


def test_another_secret_under_the_same_id_is_a_bad_signature() -> None:
    assert refusal(TOKEN, Keyring("new", {"new": b"m" * 32})) is TokenReason.BAD_SIGNATURE


def test_a_token_ends_when_it_says() -> None:
    end = NOW + timedelta(days=7)
    assert verify(TOKEN, KEYRING, end - timedelta(microseconds=1)).sample_id == "s"
    assert refusal(TOKEN, now=end) is TokenReason.EXPIRED


def test_a_token_without_end_is_refused() -> None:
    claims = make_claims()
    claims.ClearField("expire_time")
    assert refusal(sign(claims, KEYRING)) is TokenReason.EXPIRED


@pytest.mark.parametrize("token", ["", ".", "a", "é.é", "\ud800.\ud800", TOKEN.split(".")[0], TOKEN + "=", TOKEN + "."])
def test_near_misses_are_refused(token: str) -> None:
    assert refusal(token) in {TokenReason.MALFORMED, TokenReason.UNKNOWN_KEY, TokenReason.BAD_SIGNATURE}


@given(st.one_of(st.text(), st.binary().map(lambda raw: raw.decode("latin-1")), st.from_regex(r"[\w-]*\.[\w-]*")))
def test_any_text_is_refused_and_never_breaks(token: str) -> None:
    assert isinstance(refusal(token), TokenReason)


@given(st.integers(0, len(TOKEN) * 8 - 1))
def test_any_flipped_bit_is_refused(bit: int) -> None:
    flipped = bytearray(TOKEN.encode())
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert isinstance(refusal(flipped.decode("latin-1")), TokenReason)


@given(st.integers(0, len(TOKEN) - 1))
def test_any_cut_is_refused(length: int) -> None:
    assert isinstance(refusal(TOKEN[:length]), TokenReason)


def test_secrets_and_tokens_are_not_shown() -> None:
    assert "nnnn" not in repr(KEYRING)
    with pytest.raises(TokenError) as caught:
        verify(TOKEN + "x", KEYRING, NOW)
    assert TOKEN[:10] not in str(caught.value)


def test_a_missing_keyring_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "keyring"
    made = load_keyring(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_keyring(path) == made
    assert len(made.secrets[made.current]) == 32
    assert list(path.parent.iterdir()) == [path]


def test_processes_that_start_at_once_get_the_same_keyring(tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        keyrings = list(pool.map(load_keyring, [tmp_path / "keyring"] * 16))
    assert all(each == keyrings[0] for each in keyrings)


def test_the_first_key_signs(tmp_path: Path) -> None:
    (tmp_path / "keyring").write_text(f"b:{'0b' * 32}\na:{'0a' * 32}\n")
    keyring = load_keyring(tmp_path / "keyring")
    assert keyring.current == "b"
    assert keyring.secrets == {"b": b"\x0b" * 32, "a": b"\x0a" * 32}


@pytest.mark.parametrize("text", ["", "a", "a:00", f"a:{'00' * 31}", f"a:{'zz' * 32}", f"a:{'00' * 32}\na:{'01' * 32}"])
def test_a_bad_keyring_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keyring").write_text(text)
    with pytest.raises(KeyringError):
        load_keyring(tmp_path / "keyring")
