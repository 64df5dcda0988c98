"""The phases of a run: the runner that performs them, and what makes the rewards and the policy."""
