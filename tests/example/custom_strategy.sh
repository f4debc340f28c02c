# SPDX-License-Identifier: Apache-2.0
# [issue-4.3] A strategy from outside the library resolves by its flag, trains on two processes and keeps them equal.
set -eu
export OMP_NUM_THREADS=1
answer=$("$FABRIC_BIN/custom_strategy" --strategy average --devices 2)
echo "$answer"
case $answer in
'processes=2 error=0.00'*' equal=yes') ;;
*) exit 1 ;;
esac
# A name nearby is an error that knows the program's own strategy.
if error=$("$FABRIC_BIN/custom_strategy" --strategy averag 2>&1); then exit 1; fi
echo "$error" | grep -q "did you mean 'average'"
