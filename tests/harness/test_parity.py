"""The parity check can fail.

On numbers, on NaN, on silence, and on two faults with a perfect loss.
"""

from __future__ import annotations

import pytest
import torch

from harness.compare import compare_gradients
from harness.parity import Case, train, train_all
from harness.pool import RankError, pool
from harness.report import FLOOR, Report, assert_parity


def _report(got: torch.Tensor, want: torch.Tensor, **kwargs) -> Report:
    report = Report("example")
    report.compare("x", got, want, **kwargs)
    return report


def test_equal_passes():
    assert_parity(_report(torch.ones(2), torch.ones(2)))
    assert_parity(_report(torch.tensor(float("nan")), torch.tensor(float("nan"))))


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (torch.tensor([1.0, 1 + 1e-6]), torch.ones(2), "9.54e-07"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), "inf"),
        (torch.ones(2), torch.tensor([1.0, float("nan")]), "inf"),
        (torch.tensor(1e-30), torch.tensor(0.0), "inf"),
        (torch.ones(3), torch.ones(2), r"want torch.float32 \(2,\)"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "want torch.float64"),
    ],
)
def test_difference_fails(got, want, message):
    with pytest.raises(AssertionError, match=message):
        assert_parity(_report(got, want))


def test_silence_fails():
    with pytest.raises(AssertionError, match="nothing was compared"):
        assert_parity(Report("example"))


def test_broken_contract_fails():
    report = _report(torch.ones(1), torch.ones(1))
    report.problems.append("left is right")
    with pytest.raises(AssertionError, match="left is right"):
        assert_parity([report])


def test_one_bad_rank_fails():
    with pytest.raises(AssertionError, match="above 1e-10"):
        assert_parity(
            [_report(torch.ones(1), torch.ones(1)), _report(torch.ones(1), torch.zeros(1))]
        )


def test_a_missing_gradient_fails():
    report = _report(torch.ones(1), torch.ones(1))
    compare_gradients(report, {}, {"model.norm.weight": torch.ones(1)})
    with pytest.raises(AssertionError, match=r"other parameters: \['model.norm.weight'\]"):
        assert_parity(report)


def test_vanishing_gradient_is_judged_by_its_block():
    """Rounding noise of a sum that cancels passes.

    Half of a true gradient a million times smaller does not.
    """
    block = "model.layers.0.self_attn."
    want = {block + "v_proj.weight": torch.ones(1), block + "q_proj.weight": torch.zeros(1)}
    report = Report("example")
    compare_gradients(report, {**want, block + "q_proj.weight": torch.tensor([1e-16])}, want)
    assert_parity(report)
    want[block + "q_proj.weight"] = torch.tensor([1e-6])
    report = Report("example")
    compare_gradients(report, {**want, block + "q_proj.weight": torch.tensor([5e-7])}, want)
    assert report.worst == pytest.approx(5e-7 / FLOOR)
    with pytest.raises(AssertionError, match="q_proj"):
        assert_parity(report)


def test_a_fault_that_cannot_be_put_in_place_is_not_a_finding():
    case = Case("llama", around="no_such_mutant")
    with pytest.raises(RankError, match="could not be entered"):
        pool(2).run(train_all, cases=[case])


@pytest.mark.parametrize("fault", ["not_summed", "averaged"])
def test_fault_with_a_perfect_loss_is_seen(fault):
    case = Case("qwen3", sp=False, around=f"partial_gradient_{fault}_qwen3_tp", steps=1)
    reports = pool(2).run(train, case=case)
    with pytest.raises(AssertionError, match=r"grad model\..*norm\.weight"):
        assert_parity(reports)
    losses = [row.error for row in reports[0].rows if row.what.endswith("loss")]
    assert max(losses) < 1e-12, "the fault was meant to leave the loss alone"
