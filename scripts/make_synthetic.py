"""Write a checkpoint with the real shapes of an architecture and random weights, of any size.

Tensor names and shapes come from the mlx-lm model of a config, built and quantized without
evaluating it; bytes are made and written piece by piece, so a few hundred megabytes of memory do
for any model. The result is what `mlx_lm.convert` would write: `flashmoe repack` takes it bit for
bit. What the model says means nothing.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.support.synthetic.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
