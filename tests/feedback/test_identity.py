"""The same user id in two applications is two users, whatever ids look like."""

from hypothesis import given
from hypothesis import strategies as st

from feedback.identity import qualified, readable

APPLICATIONS = st.sampled_from(["", "shop", "bank", "a-1"])
USERS = st.text(st.sampled_from("ab/\x1f:"), max_size=6) | st.text(max_size=20)


@given(one=st.tuples(APPLICATIONS, USERS), other=st.tuples(APPLICATIONS, USERS))
def test_two_users_never_have_one_name(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (qualified(*one) == qualified(*other)) == (one == other)


def test_the_users_of_no_application_keep_the_names_that_they_had() -> None:
    assert qualified("", "ada") == "ada"
    assert readable(qualified("shop", "ada")) == "shop/ada"
    assert readable("ada") == "ada"
