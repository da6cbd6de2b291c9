"""Distil with lightly-train: a script for a Python that has it, which need not have eupe.

PYTHON -m benchmarks.lightly JSON      the options of `lightly_train.pretrain`
"""

import json
import sys

if __name__ == "__main__":  # its processes that load pictures import this module, too
    import lightly_train

    lightly_train.pretrain(**json.loads(sys.argv[1]))
