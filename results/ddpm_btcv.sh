#!/usr/bin/env bash
# The CT path from end to end on a laptop: six CTs of BTCV (13 organs), three to learn from, one to validate, two to test.
# Too few to conclude anything from; what it shows is that HU, window, axial slices, 13 organs, 3D scores and `predict` on a
# CT of another make (CT) work. Not mirrored: kidneys and adrenal glands differ by their side.
# SRC holds RawData/Training/img and label, as published. All can be stopped and continued by running this file again.
set -euo pipefail
cd "$(dirname "$0")/.."
SRC=${SRC:?set SRC to the folder of BTCV}
CT=${CT:-}
STEPS=${STEPS:-1000}
FINE=${FINE:-1000} # steps of fine-tuning; the preset's would be 3,000
PYTHON=${PYTHON:-python}
RUN=runs/ddpm-btcv64
FLAGS="--quiet --data btcv64 --preset laptop"

[ -e data/btcv64/dataset.json ] ||
  $PYTHON -m data_prep.msd --src "$SRC" --dst data/btcv64 --as-slices --side 64 --split-sizes 3,1,2
$PYTHON ddpm_pretrain_finetune.py pretrain $FLAGS --flip off --steps "$STEPS" --out $RUN
for STRATEGY in scratch decoder full; do
  $PYTHON ddpm_pretrain_finetune.py finetune $FLAGS --labels all --strategy $STRATEGY --steps "$FINE" --out $RUN
done
$PYTHON -m common.metrics table $RUN/finetune-all-*-per-class-draw0/summary.json --metric dice iou
[ -z "$CT" ] ||
  $PYTHON ddpm_pretrain_finetune.py predict --checkpoint $RUN/finetune-all-decoder-per-class-draw0/last.pt --image "$CT" --output $RUN/ct.nii.gz
