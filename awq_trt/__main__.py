"""`python -m awq_trt`: the command `awq-trt`."""

import sys

from awq_trt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
