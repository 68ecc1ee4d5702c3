"""shoal's part of a node's start: opens a model, runs a few token ids, prints the token drawn. No tokenizer.

python start_worker.py MODEL THREADS CONTEXT
"""

import sys
from pathlib import Path

from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

model = Model.open(Path(sys.argv[1]))
with Stage(model, 0, model.n_units, StageOptions(threads=int(sys.argv[2]))) as stage:
    stage.open_sequence(0, Sampling(), int(sys.argv[3]))
    print(stage.run([Run(0, 0, [1, 2, 3, 4], Want.TOKEN)])[0].token)
