# SPDX-License-Identifier: Apache-2.0
# [issue-3.11] [issue-5.3] [issue-8.accept] The benchmarks run and write their JSON. How fast anything is, is not asserted.
set -eu
[ -x "$FABRIC_BIN/bench_overhead" ] || { echo 'skipped: configured without FABRIC_BENCH'; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1
for name in overhead ddp optimizers compile_time sharding; do
  "$FABRIC_BIN/bench_$name" "$folder/$name.json" --quick
done
python3 - "$folder" <<'END'
import json, math, sys
units = {"overhead": {"us/step"}, "ddp": {"us/step"}, "optimizers": {"us/step"}, "compile_time": {"s", "processor s"},
         "sharding": {"us/step", "MiB"}}
for name, expected in units.items():
    report = json.load(open(f"{sys.argv[1]}/{name}.json"))
    assert report["machine"] and report["rows"], name
    for row in report["rows"]:
        if name == "sharding" and row["unit"] == "us/step":  # beside Python, if it is installed and there is time
            assert row["ours"] > 0, row
            continue
        assert row["name"] and row["baseline_name"] and row["unit"] in expected, row
        assert row["ours"] > 0 and row["baseline"] > 0, row
        assert math.isclose(row["ratio"], row["ours"] / row["baseline"]), row
        assert row["ours_spread"][0] <= row["ours"] <= row["ours_spread"][1], row
END
if "$FABRIC_BIN/bench_ddp" 2>/dev/null; then exit 1; fi
