"""Rules by which a token skips experts, one file each: from a routing trace to attributes of the op `skip`.

A rule is a function `fit(weights, fraction)`: weights [N, K], best first, of tokens of calibration text, and the fraction of the N * K
activations to skip (None: what the rule was published with), to attributes of `moec.compiler.ops.skip`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moec.runtime.errors import unknown

Rule = Callable[[Tensor, float | None], dict[str, Any]]


def known_rules() -> list[str]:
    """The names of all rules: the files of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get_rule(name: str) -> Rule:
    """A rule by name.

    Raises:
        MoecError: no such rule.
    """
    if name not in known_rules():
        raise unknown("rule", name, known_rules())
    rule: Rule = importlib.import_module(f"{__name__}.{name}").fit
    return rule
