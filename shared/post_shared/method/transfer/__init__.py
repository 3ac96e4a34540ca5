"""Transfer: p_s -> p_t on Φt with public text alone (method §3, Eq. 3-6)."""
