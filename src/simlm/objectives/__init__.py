"""Pre-training objectives."""
