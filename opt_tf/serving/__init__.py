"""The engine of serving: a cache whose rows come and go."""
