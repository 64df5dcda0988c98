"""Whose a user id is: the same id in two applications is two users, in the store, in splits and in training."""

_BETWEEN = "\x1f"


def qualified(application: str, user_id: str) -> str:
    """Returns one name for a user of an application, another for each pair. That of no application is the bare id."""
    return f"{application}{_BETWEEN}{user_id}" if application or _BETWEEN in user_id else user_id


def readable(qualified_id: str) -> str:
    """Returns such a name for people: application/user."""
    application, between, user_id = qualified_id.partition(_BETWEEN)
    return f"{application}/{user_id}" if between else application
