#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# [issue-4.7] examples/config_check, from the outside. Usage: run.sh PROGRAM
set -u
program=$1
failed=0

# expect STATUS TEXT ARGUMENTS...: the program must end with that status and say that text.
expect() {
  status=$1 text=$2
  shift 2
  output=$(env -u LT_STRATEGY -u LT_DEVICES "$program" "$@" 2>&1)
  got=$?
  case $output in
    *"$text"*) [ $got -eq $status ] && return ;;
  esac
  echo "config_check $*: status $got instead of $status, or no '$text' in: $output"
  failed=1
}

expect 0 "strategy    Ddp  (--strategy ddp)" --accelerator cpu --strategy ddp --devices 2
expect 0 "also possible:" --accelerator cpu --strategy ddp --explain
expect 0 '"what": "strategy", "chosen": "Fsdp"' --accelerator cuda --cuda-devices 8 --strategy fsdp --json
expect 0 "--num-nodes" --help
expect 2 "did you mean 'ddp'" --strategy dpd
expect 2 '"codes": ["invalid_strategy_name", "zero_devices"]' --strategy dpd --devices 0 --json
expect 2 "is not available on this machine" --accelerator tpu
expect 0 "environment Slurm" --accelerator cpu --environment slurm
expect 2 "no list of hosts" hostlist 'n[1-'

hosts=$("$program" hostlist 'n[1-3],login')
[ "$hosts" = "n1
n2
n3
login" ] || { echo "hostlist: $hosts"; failed=1; }

exit $failed
