"""`python -m salad_compile.command_line`: the command line."""

import sys

from salad_compile.command_line import main

if __name__ == "__main__":
    sys.exit(main())
