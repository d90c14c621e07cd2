"""Parts of `slim_experts`."""
