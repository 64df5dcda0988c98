"""What a run leaves for people to look at: its report with plots, and TensorBoard events."""
