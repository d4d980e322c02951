"""Where the mismatch comes from, and a reference without any."""
