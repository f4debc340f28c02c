# SPDX-License-Identifier: Apache-2.0
# run.sh PROGRAM FOUND CORPUS: looks for inputs that break PROGRAM, starting with those of CORPUS. An input that takes
# longer than a second breaks it too.
exec "$1" -max_total_time="${FABRIC_FUZZ_SECONDS:-3}" -timeout=1 -max_len=4096 -rss_limit_mb=1024 \
  -artifact_prefix="$2/" "$2" "$3"
