"""From an acknowledged event to one that is on the bus."""
