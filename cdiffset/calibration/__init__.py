"""From σ² to an expected error in grey levels, and its pictures."""
