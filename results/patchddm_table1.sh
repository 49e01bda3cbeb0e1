#!/usr/bin/env bash
# Tables 1 and 2 of the PatchDDM paper at a laptop's size: patches with and without coordinates,
# whole volumes, half size, each trained for the same time. Two data sets: hippocampus
# (SRC_HIPPOCAMPUS, the unpacked Task04_Hippocampus) and 13 cases of BraTS at 2 mm (SRC_BRATS),
# whole tumour, 9 to train and 4 to test, which is few. A patch is an eighth of the padded volume on
# BraTS, as in the paper, and about a quarter on hippocampus. Eight stages of MINUTES each; running
# the file again continues where it stopped. Shorter:
# DATASETS=hippocampus MINUTES_HIPPOCAMPUS=0.1 LIMIT=2. PROFILE=laptop (on a GPU: paper) adds table
# 1's seconds and memory of one evaluation of that preset's network.
# The paper's own setting, for METHOD patch, full and half:
# python patchddm.py train --data brats --preset paper --method METHOD --minutes 25200 --out runs/brats-METHOD
# python patchddm.py evaluate --data brats --sampling-steps 1000 --out runs/brats-METHOD
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-laptop}
DATASETS=${DATASETS:-hippocampus brats2mm}
MINUTES_HIPPOCAMPUS=${MINUTES_HIPPOCAMPUS:-10}
MINUTES_BRATS=${MINUTES_BRATS:-15}
SCORES=${LIMIT:+/test-$LIMIT} # fewer cases are scored in a folder of their own

row() { # DATA MINUTES PATCH BATCH NAME METHOD COORDS
  out=runs/table1-$1-$5
  $PYTHON patchddm.py train --data "$1" --preset "$PRESET" --out "$out" --method "$6" --coords "$7" \
    --patch "$3" --batch "$4" --lr-schedule constant --minutes "$2" --steps 1000000 \
    --eval-every 1000000 --quiet
  $PYTHON patchddm.py evaluate --data "$1" --preset "$PRESET" --out "$out" ${LIMIT:+--limit "$LIMIT"} --quiet
}
for data in $DATASETS; do
  case $data in
    hippocampus)
      setting="$MINUTES_HIPPOCAMPUS 24,32,24 4"
      [ -e data/hippocampus/dataset.json ] ||
        $PYTHON -m data_prep.msd --src "$SRC_HIPPOCAMPUS" --dst data/hippocampus
      ;;
    brats2mm)
      setting="$MINUTES_BRATS 60,60,40 1"
      [ -e data/brats2mm/dataset.json ] ||
        $PYTHON -m data_prep.brats --src "$SRC_BRATS" --dst data/brats2mm --split-sizes 9,0,4
      ;;
  esac
  row "$data" $setting patch patch on
  row "$data" $setting patch-nocoords patch off
  row "$data" $setting full full off
  row "$data" $setting half half off
done
for data in $DATASETS; do
  $PYTHON -m common.metrics table runs/table1-"$data"-{patch,patch-nocoords,full,half}"$SCORES"
done
[ -z "${PROFILE:-}" ] || $PYTHON -m results.patchddm_profile --preset "$PROFILE" --out runs/table1-profile
for data in $DATASETS; do
  for other in full half patch-nocoords; do
    $PYTHON -m common.metrics compare runs/table1-"$data"-{$other,patch}"$SCORES" --metric dice hd95_mm
  done
done
