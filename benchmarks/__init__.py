"""Programs that measure this project; the figures in the documentation come from them."""
