"""Rules by which a token skips experts, one file each: from a routing trace to attributes of the op `skip`.

A rule is a function `fit(weights, fraction)`: weights [N, K], best first, of tokens of calibration text, and the fraction of the N * K
activations to skip (None: what the rule was published with), to attributes of `moec.compiler.ops.skip`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moec.compiler.plugins import file_names, load_file

Rule = Callable[[Tensor, float | None], dict[str, Any]]


def known_rules() -> list[str]:
    """The names of all rules: the files of this folder."""
    return file_names(__name__)


def get_rule(name: str) -> Rule:
    """A rule by name.

    Raises:
        MoecError: no such rule.
    """
    rule: Rule = load_file(__name__, "rule", name).fit
    return rule
