# SPDX-License-Identifier: Apache-2.0
# [issue-5.5] Digits in FP8: the hidden layer trains in it, the last one has 10 columns and is said to stay as it is.
set -eu
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
output=$("$FABRIC_BIN/train_digits" --accelerator cpu --devices 1 --precision transformer-engine --epochs 8 2>"$folder/stderr") ||
  { cat "$folder/stderr"; exit 1; }
echo "$output"
echo "$output" | awk -F= '$1 == "accuracy" { good += $2 >= 0.96 } END { exit !(good == 1 && NR == 1) }'
grep -q 'stay in BF16: logits (128 -> 10)' "$folder/stderr"
if grep -q 'hidden' "$folder/stderr"; then exit 1; fi

# [issue-5.accept] --explain says how FP8 is computed.
"$FABRIC_BIN/train_digits" --accelerator cpu --devices 1 --precision transformer-engine --explain 2>"$folder/stderr" |
  grep '^kernels: .* on BFloat16 weights; FP8, emulated in 32 bits, in 1 layer$'

# [issue-5.accept] Likewise with weights in half floats, which need a larger eps.
"$FABRIC_BIN/train_digits" --accelerator cpu --devices 1 --precision transformer-engine-float16 --eps 1e-4 --epochs 8 2>"$folder/stderr" |
  awk -F= '{ print } $1 == "accuracy" { good += $2 >= 0.96 } END { exit !(good == 1) }'
