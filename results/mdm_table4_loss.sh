#!/usr/bin/env bash
# Table 4 of the paper: what is restored, and by which loss, on GlaS with 8 labels and FFHQ-34; and a row of ours, the
# SSIM of values in [0, 1], which sees the sign. On GlaS the rows with each method's own loss are those of
# results/mdm_table1.sh. Wants data/glas, data/ffhq34 (with --photographs) and a GPU; for PRESET=laptop set STEPS=3000.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-paper}
ACCUMULATE=${ACCUMULATE:-8} # a step of the paper's network keeps 2.3 GB a crop; with PRESET=laptop use 1
SPLIT=${SPLIT:-test}
OUT=runs/mdm

for DATA in glas ffhq34; do
  N=${STEPS:-$([ $DATA = glas ] && echo 10000 || echo 20000)}
  MAE=$([ $DATA = glas ] && echo ${MAE_STEPS:-2578} || echo $N) # 2,000 epochs of GlaS, as in table 1
  SCHEDULE=$([ $DATA = glas ] && echo cosine || echo linear)
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --steps $N --method ddpm --schedule $SCHEDULE --out $OUT-$DATA-ddpm
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --steps $N --method ddpm --schedule $SCHEDULE --target x0 --out $OUT-$DATA-ddpm-x0
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --steps $N --method ddpm --schedule $SCHEDULE --target x0 --loss ssim --out $OUT-$DATA-ddpm-x0-ssim
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --steps $MAE --method mae --out $OUT-$DATA-mae
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --steps $MAE --method mae --loss ssim --out $OUT-$DATA-mae-ssim
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --steps $N --method mdm --loss mse --out $OUT-$DATA-mdm-mse
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --steps $N --method mdm --out $OUT-$DATA-mdm
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --steps $N --method mdm --ssim-range unit --out $OUT-$DATA-mdm-unit
done

for ROW in ddpm ddpm-x0 ddpm-x0-ssim mae mae-ssim mdm-mse mdm mdm-unit; do
  METHOD=${ROW%%-*}
  $PYTHON masked_diffusion.py segment --quiet --data glas --preset $PRESET --method $METHOD --split $SPLIT --labels 8 --out $OUT-glas-$ROW
  $PYTHON masked_diffusion.py segment --quiet --data ffhq34 --preset $PRESET --method $METHOD --labels 20 --out $OUT-ffhq34-$ROW
done
