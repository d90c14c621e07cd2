"""What passes that rewrite routing share: where nodes go in, how much each layer may drop, what calibration text says about it."""
