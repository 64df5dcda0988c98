"""Shows a run to people: its report with plots, and TensorBoard events."""
