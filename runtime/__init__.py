"""The runtime: executes artifacts. It imports numpy, and when needed the tokenizer and the library that runs the code.

import moec.runtime

with moec.runtime.load("olmoe.moec") as session:
    for token in session.generate("Once upon a time", max_new_tokens=32):
        print(token.text, end="", flush=True)
"""

from moec.runtime.errors import MoecError
from moec.runtime.generate import Token
from moec.runtime.session import OpenSequence, Session, load

__all__ = ["MoecError", "OpenSequence", "Session", "Token", "load"]
