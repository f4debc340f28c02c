# SPDX-License-Identifier: Apache-2.0
# [issue-3.11] sweep measures each entry of its menu, Ddp's on two processes, and writes valid JSON.
set -eu
json=$(mktemp)
trap 'rm -f "$json"' EXIT
export OMP_NUM_THREADS=1
"$FABRIC_BIN/sweep" --steps 3 --rounds 2 --width 16 --json "$json"
python3 - "$json" <<'END'
import json, math, sys
rows = json.load(open(sys.argv[1]))["rows"]
assert {row["name"] for row in rows} == {
    f"Fabric<Cpu, {s}, {p}>" for s in ("SingleDevice", "Ddp") for p in ("F32", "F64", "BF16", "BF16Mixed")}, rows
for row in rows:
    assert row["processes"] == (2 if "Ddp" in row["name"] else 1), row
    assert 0 < row["least"] <= row["median"] <= row["most"] and row["rows_per_second"] > 0, row
losses = {row["name"]: row["loss"] for row in rows}
# The ranks of this loop train on equal rows, so that an entry learns the same on one process and on two.
for precision in ("F32", "F64"):
    assert math.isclose(losses[f"Fabric<Cpu, SingleDevice, {precision}>"], losses[f"Fabric<Cpu, Ddp, {precision}>"],
                        rel_tol=1e-5), losses
END
"$FABRIC_BIN/sweep" --steps 1 --rounds 1 --width 8 --only 'SingleDevice, F64' --json "$json"
python3 -c 'import json, sys; rows = json.load(open(sys.argv[1]))["rows"]; assert len(rows) == 1, rows' "$json"
if error=$("$FABRIC_BIN/sweep" --only Nothing 2>&1); then exit 1; fi
echo "$error" | grep -q 'Fabric<Cpu, Ddp, BF16>'
