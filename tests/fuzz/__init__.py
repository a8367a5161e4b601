"""Random damage, random kills and races, as commands: `python -m tests.fuzz --help`. CI runs a few of each."""
