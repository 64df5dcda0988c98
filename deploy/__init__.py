"""How alignd is started and operated on one machine, and the demo."""
