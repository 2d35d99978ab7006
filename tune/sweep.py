"""A sweep: every setting of a space trained with Ray Tune, compared in MLflow (deepscale/sweeps).

python tune/sweep.py tune/spaces/small.yaml
"""

import sys

from deepscale.sweeps.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
