"""Parts of tools/estimate_speed.py: models, measured times, the law fitted to them, the prediction."""
