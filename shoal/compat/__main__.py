"""`python -m shoal.compat script.py [args]`: run a program that says `import ray` on shoal."""

import sys

from shoal.compat.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
