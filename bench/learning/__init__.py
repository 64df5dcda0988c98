"""Whether alignd's training learns: real preferences, a second hidden utility, simple rivals, what it costs."""
