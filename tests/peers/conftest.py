"""Shared by the comparisons with other PPO implementations: how far the numbers are apart.

The peers are installed in an environment of their own; `requirements.txt` says how, and how to run.
"""

import pytest
import torch

DIFFERENCES = pytest.StashKey[dict]()


@pytest.fixture
def agree(request):
    """Return `agree(what, ours, theirs)`: assert equality up to float32 rounding, and record it.

    `atol` is for numbers around 1; comparisons of small ones, as gradients, give a smaller one.
    """
    table = request.config.stash.setdefault(DIFFERENCES, {})

    def compare(what, ours, theirs, atol=1e-6):
        ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
        assert ours.numel() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)
        difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
        before = table.get(what, (0.0, 0.0, 0))
        table[what] = (max(before[0], difference), max(before[1], scale), before[2] + ours.numel())

    return compare


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash.get(DIFFERENCES, {})
    if table:
        terminalreporter.section("largest absolute difference of ours from the peer's")
        terminalreporter.line(f"{'':66} difference  largest |x|  numbers")
    for what, (difference, scale, count) in sorted(table.items()):
        terminalreporter.line(f"{what:66} {difference:10.1e} {scale:12.3g} {count:8d}")
