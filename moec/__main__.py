"""`python -m moec`: the command line."""

import sys

from moec.compiler.cli.main import main

raise SystemExit(main())
