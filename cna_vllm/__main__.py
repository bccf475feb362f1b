# SPDX-License-Identifier: Apache-2.0
"""`python -m cna_vllm`: the command `cna-vllm`."""

import sys

from cna_vllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
