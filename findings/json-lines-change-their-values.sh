#!/usr/bin/env bash
# datasets 5.2.0 (pandas 3.1.1, pyarrow 26.0.1): values of a .jsonl file change when it is loaded.
#
# 1. A field holds 3 in one record and "007" in another.
#    Guess: an error, or the values as written.
#    Instead: a Json feature that reads the strings as JSON: "007" becomes 7.
#    Likewise "true" becomes True, and "null" becomes None.
#    Without the 3, all of them stay strings.
#    Way out: features that name the field a string. Then 3 becomes "3".
# 2. All strings of a field look like dates.
#    Guess: they stay strings, as JSON has no dates.
#    Instead: timestamps, so str() gives another spelling.
#    An offset is applied and dropped: 10:00+02:00 becomes 08:00.
#    Features that name the field a string do not bring the spelling back.
#    One string that is no date, and all of them stay as written.
# 3. A latin-1 file with an é, loaded without naming the encoding.
#    Guess: load_dataset raises an error, as the bytes are not UTF-8.
#    Instead: it loads. Reading that row raises UnicodeDecodeError.
#    Way out: load_dataset(..., encoding="latin-1").
#
# Output:
#   1. with a 3: ['Json', 3, 7, True, None]
#      without the 3: ['007', 'true', 'null']
#      as strings: ['3', '007', 'true', 'null']
#   2. dates: ['timestamp[s]', '2024-01-05 00:00:00', '2024-01-05 08:00:00']
#      as strings: ['2024-01-05 00:00:00', '2024-01-05 08:00:00']
#      with a 'soon': ['2024-01-05', '2024-01-05T10:00:00+02:00', 'soon']
#   3. rows loaded, row 0: [2, 'tea']
#      row 1: UnicodeDecodeError, byte 0xe9
#      with encoding: ['tea', 'café']
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet datasets==5.2.0 numpy==2.4.6 pandas==3.1.1 pyarrow==26.0.1
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hf"
"$dir/venv/bin/python" - "$dir" <<'PY'
import itertools, json, pathlib, sys
from datasets import Features, Value, disable_progress_bars, load_dataset

sys.excepthook = lambda kind, error, trace: sys.stderr.write(f"DIFFERENT FROM WHAT IS STATED: {error!r}\n")
disable_progress_bars()
number = itertools.count()
strings = Features({"x": Value("string")})

def load(values, written_in="utf-8", **options):
    file = pathlib.Path(sys.argv[1], f"{next(number)}.jsonl")
    lines = [json.dumps({"x": value}, ensure_ascii=False) + "\n" for value in values]
    file.write_bytes("".join(lines).encode(written_in))
    return load_dataset("json", data_files=str(file), split="train", **options)

def check(label, seen, stated):
    print(f"{label}: {seen}")
    if repr(seen) != repr(stated):
        sys.exit(f"DIFFERENT FROM WHAT IS STATED: {label}: {stated}")

texts = ["007", "true", "null"]
rows = load([3] + texts)
check("1. with a 3", [type(rows.features["x"]).__name__, *rows["x"]], ["Json", 3, 7, True, None])
check("   without the 3", list(load(texts)["x"]), texts)
check("   as strings", list(load([3] + texts, features=strings)["x"]), ["3"] + texts)

dates = ["2024-01-05", "2024-01-05T10:00:00+02:00"]
changed = ["2024-01-05 00:00:00", "2024-01-05 08:00:00"]
rows = load(dates)
check("2. dates", [rows.features["x"].dtype, *map(str, rows["x"])], ["timestamp[s]", *changed])
check("   as strings", list(load(dates, features=strings)["x"]), changed)
check("   with a 'soon'", list(load(dates + ["soon"])["x"]), dates + ["soon"])

rows = load(["tea", "café"], written_in="latin-1")
check("3. rows loaded, row 0", [len(rows), rows[0]["x"]], [2, "tea"])
try:
    seen = rows[1]["x"]
except UnicodeDecodeError as error:
    seen = f"UnicodeDecodeError, byte {error.object[error.start]:#x}"
check("   row 1", seen, "UnicodeDecodeError, byte 0xe9")
check("   with encoding", list(load(["tea", "café"], "latin-1", encoding="latin-1")["x"]), ["tea", "café"])
PY
