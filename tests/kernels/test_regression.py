"""Benches compare their ratios with recorded ones."""

import json

from pallas_kernels import regression


def test_a_ratio_that_fell_behind_is_told(tmp_path, capsys):
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps({"GPU": {"peer / ours": 2.0}}))
    assert regression.holds("GPU", "peer / ours", 1.91, path)
    assert not regression.holds("GPU", "peer / ours", 1.89, path)
    assert not regression.holds("GPU", "peer / ours", float("nan"), path)
    assert regression.holds("GPU", "other / ours", 0.1, path)
    assert regression.holds("TPU", "peer / ours", 0.1, path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "peer / ours: 1.91, recorded 2.00: holds"
    assert lines[1].endswith("REGRESSION: below 0.95 of it")
    assert "nothing recorded for TPU" in lines[4]


def test_recorded_ratios_are_ratios():
    for ratios in json.loads(regression.RECORDED.read_text()).values():
        assert all(0.5 < ratio < 20 for ratio in ratios.values())
