"""Rollout: users' rankings decide whether a candidate becomes the live policy."""
