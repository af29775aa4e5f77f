"""Ratios that benches reached, and whether a new one has fallen behind.

`bench_ratios.json` holds them by kind of device and name: ours over what was measured beside it in
the same run, larger is better. A bench compares its own; to record a better one, edit the file.
"""

import json
from pathlib import Path

RECORDED = Path(__file__).with_name("bench_ratios.json")
LEAST = 0.95  # of the recorded ratio: runs differ by a few percent


def holds(device_kind: str, name: str, ratio: float, path: Path = RECORDED) -> bool:
    """Prints a line; False if the ratio is below LEAST of the recorded one."""
    recorded = json.loads(path.read_text()).get(device_kind, {}).get(name)
    if recorded is None:
        print(f"{name}: {ratio:.2f}; nothing recorded for {device_kind}")
        return True
    is_kept = ratio >= LEAST * recorded
    verdict = "holds" if is_kept else f"REGRESSION: below {LEAST:.2f} of it"
    print(f"{name}: {ratio:.2f}, recorded {recorded:.2f}: {verdict}")
    return is_kept
