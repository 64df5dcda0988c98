"""What a run would hold in memory and how long it would take, from formulas."""
