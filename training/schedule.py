"""How learning rates go, as a factor of their peak."""

import math


def cosine_to_tenth(step: int, num_steps: int) -> float:
    """From 1 at step 0 to 0.1 at the last, along a cosine (InstructGPT, appendices C.1 and C.2)."""
    progress = step / max(1, num_steps - 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def linear_warmup(step: int, num_warmup_steps: int) -> float:
    """From 1 / (num_warmup_steps + 1) at step 0 to 1, and 1 from then on."""
    return min(1.0, (step + 1) / (num_warmup_steps + 1))
