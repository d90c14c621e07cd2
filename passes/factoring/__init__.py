"""Parts of `low_rank`."""
