"""`python -m preprocessing NAME ...`: see preprocessing/command_line.py."""

import sys

from preprocessing.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
