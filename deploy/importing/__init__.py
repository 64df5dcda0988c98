"""Import of a user's own model: what it has is checked, its weights are written anew, and both sides try it, before any
server serves it.
"""
