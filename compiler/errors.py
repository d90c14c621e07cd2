"""Errors that a user can act on."""

from moec.runtime.errors import MoecError

__all__ = ["MoecError"]
