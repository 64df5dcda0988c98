"""The demo: the whole loop once, on this machine, and a report of what came of it."""
