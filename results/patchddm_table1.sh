#!/usr/bin/env bash
# Tables 1 and 2 of the PatchDDM paper at laptop scale: patches with and without coordinates, whole volumes, half size,
# each trained for the same time. Two data sets: hippocampus (SRC_HIPPOCAMPUS, the unpacked Task04_Hippocampus) and
# 13 cases of BraTS at 2 mm (SRC_BRATS), whole tumour, 9 to train and 4 to test, which is few. A patch is an eighth of
# the padded volume, as in the paper, on BraTS, and about a quarter on hippocampus. Eight stages of MINUTES each; running
# the file again continues where it stopped. PROFILE=1 adds table 1's memory and seconds of the paper's network (a GPU).
# The paper's own setting, for METHOD patch, full and half, each in a folder of its own:
# python patchddm.py train --data brats --method METHOD --minutes 25200 --out runs/brats-METHOD
# python patchddm.py evaluate --data brats --sampling-steps 1000 --out runs/brats-METHOD
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
MINUTES_HIPPOCAMPUS=${MINUTES_HIPPOCAMPUS:-10}
MINUTES_BRATS=${MINUTES_BRATS:-15}

[ -e data/hippocampus/dataset.json ] || $PYTHON -m data_prep.msd --src "$SRC_HIPPOCAMPUS" --dst data/hippocampus
[ -e data/brats2mm/dataset.json ] || $PYTHON -m data_prep.brats --src "$SRC_BRATS" --dst data/brats2mm --split-sizes 9,0,4

row() { # DATA MINUTES PATCH BATCH NAME METHOD COORDS
  out=runs/table1-$1-$5
  $PYTHON patchddm.py train --data "$1" --preset laptop --out "$out" --method "$6" --coords "$7" --patch "$3" --batch "$4" \
    --lr-schedule constant --minutes "$2" --steps 1000000 --eval-every 1000000 --quiet
  $PYTHON patchddm.py evaluate --data "$1" --preset laptop --out "$out" --quiet
}
for data in "hippocampus $MINUTES_HIPPOCAMPUS 24,32,24 4" "brats2mm $MINUTES_BRATS 60,60,40 1"; do
  row $data patch patch on
  row $data patch-nocoords patch off
  row $data full full off
  row $data half half off
done
for data in hippocampus brats2mm; do
  $PYTHON -m common.metrics table runs/table1-$data-{patch,patch-nocoords,full,half}/summary.json
done
for METHOD in ${PROFILE:+patch full half}; do
  $PYTHON patchddm.py profile --preset paper --method $METHOD --out runs/table1-profile-$METHOD
done
for ROW in full half patch-nocoords; do
  $PYTHON -m common.metrics compare runs/table1-hippocampus-$ROW runs/table1-hippocampus-patch --metric dice hd95_mm
done
