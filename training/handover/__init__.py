"""From a trained policy to a registered version that serving can prove."""
