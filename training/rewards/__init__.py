"""The reward model: how it is fitted to rankings, evaluated, and accepted or refused."""
