"""Evolutionary search over experts: candidates, how they change, what they are worth, and the loop (https://arxiv.org/abs/2407.00945)."""
