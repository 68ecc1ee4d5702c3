"""Runs a model with shoal as installed, and prints a line for each instruction set: the backend, its results.

    python logits.py MODEL [ISA...]        (default: what shoal chooses by itself)

The hash is over the logits of whole batches and of single rows; the token is drawn with a temperature.
"""

import hashlib
import sys

import numpy as np

import shoal

PROMPT = [(7919 * i + 13) % 40000 for i in range(64)]


def computed(model: shoal.Model, isa: str) -> str:
    digest = hashlib.sha256()
    want = shoal.Want
    with shoal.Stage(model, 0, model.n_units, shoal.StageOptions(isa=isa, threads=2)) as stage:
        stage.open_sequence(0, shoal.Sampling(temperature=0.8, seed=5))
        stage.run([shoal.Run(0, 0, PROMPT[:56], want.NOTHING)])
        for first, last in ((56, 60), (60, 61), (61, 62), (62, 63)):
            (result,) = stage.run([shoal.Run(0, first, PROMPT[first:last], want.LOGITS)])
            assert result.logits is not None
            digest.update(np.ascontiguousarray(result.logits, np.float32).tobytes())
        (drawn,) = stage.run([shoal.Run(0, 63, PROMPT[63:], want.TOKEN)])
        return f"{stage.backend}: {digest.hexdigest()} then token {drawn.token}"


if __name__ == "__main__":
    opened = shoal.Model.open(sys.argv[1])
    for name in sys.argv[2:] or ["auto"]:
        print(computed(opened, name), flush=True)
