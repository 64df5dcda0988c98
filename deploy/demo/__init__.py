"""The demo: the whole loop once, on this machine, and a report of the results."""
