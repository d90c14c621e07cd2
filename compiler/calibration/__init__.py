"""Calibration: running text through a model to see what its experts do."""
