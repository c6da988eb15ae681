"""Programs that change everything a meta-step depends on, between its calls."""
