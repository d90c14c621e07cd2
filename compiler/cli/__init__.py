"""The command line: one file a command, found by its name.

Each file has a function `command` whose parameters are the options. A file is imported when its command runs, so that
`moec run` needs the base install only. `moec.compiler.cli.main` is the entry point.
"""
