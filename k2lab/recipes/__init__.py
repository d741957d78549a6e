"""Shipped recipes (TOML): tiny (laptop, minutes), k2 and kimi_linear (nodes, cluster)."""
