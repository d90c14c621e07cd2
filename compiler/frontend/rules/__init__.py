"""Rewrite rules from traced ATen to the graph's normal form, one topic a file."""
