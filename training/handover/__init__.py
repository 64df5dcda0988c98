"""Makes of a trained policy a registered version that serving can prove."""
