"""`python -m preprocessing NAME ...`: see preprocessing/common/command_line.py."""

import sys

from preprocessing.common.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
