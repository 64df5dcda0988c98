"""The trainer: from rankings in the store to a registered policy version."""
