"""Verdicts over a data set."""

from __future__ import annotations

import pytest
import torch
from verified import captured

from netwright.verify import Region, robustness_report, verify_point


def test_counts_and_distances():
    model = captured(1, 4, 12, 3)
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    labels = model.logits(x).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3

    def region(x, label):
        return Region((0, 1, 2, 3), 0.15, 2)

    found = robustness_report(model, (x, labels), region)
    assert (found.inputs, found.wrong) == (20, 3)
    assert found.safe + found.unsafe + found.unknown == 17
    assert found.safe > 0 < found.unsafe
    for i, result in found.results.items():
        assert result.status == verify_point(model, x[i], region(x[i], 0)).status
    assert found.distances == sorted(found.distances)
    assert len(found.distances) == found.unsafe
    assert "unsafe" in str(found)
    line = found.plot().lines[0]
    assert line.get_ydata()[-1] == pytest.approx(found.unsafe / 17)
    with pytest.raises(ValueError, match="as many classes, at least 1, got 2 and 1"):
        robustness_report(model, (x[:2], labels[:1]), region)


def test_results_are_data_and_text():
    found = verify_point(captured(0, 2, 2), torch.tensor([0.5, 0.5]), Region((0,), 5.0, 3))
    told = found.to_dict()
    assert told["status"] in ("safe", "unsafe")
    assert told["witness"] is None or len(told["witness"]) == 2
