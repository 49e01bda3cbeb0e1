#!/usr/bin/env bash
# The paper's story in small: recycled, not recycled (table 1 of version 2) and the U-net (table 2),
# on phantoms, side by side. Three trainings of a few minutes; they can be stopped and continued by
# running this file again. Other data: DATA=hippocampus PRESET=laptop.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
FLAGS="--quiet --data ${DATA:-synthetic} --preset ${PRESET:-tiny}"
D=runs/diffseg3d-story-${DATA:-synthetic}

$PYTHON diffseg3d_recycle.py $FLAGS --out $D-recycled
$PYTHON diffseg3d_recycle.py $FLAGS --recycle none --out $D-not-recycled
$PYTHON diffseg3d_recycle.py $FLAGS --method unet --out $D-unet
$PYTHON -m common.metrics table $D-recycled $D-not-recycled $D-unet
