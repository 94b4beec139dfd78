"""What keys may ask and keep, by itself; tests/app/test_limits.py asks the service."""

import pytest

from clasp_core import limits
from clasp_core.errors import InvalidInput
from clasp_core.limits import Pace, Rate


def test_a_rate_lets_a_burst_through_and_then_as_many_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over any stretch of time: at most one burst and what the rate allows, not twice that around the edge
    of a window; and who waits as long as told is let in."""
    now = 1000.0
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    pace, rate = Pace(), Rate.parse("600/minute")
    assert [pace.take("k", rate) for _ in range(600)] == [0.0] * 600
    assert pace.take("k", rate) == pytest.approx(0.1)
    assert pace.take("other", rate) == 0.0
    let_in = 0
    for _ in range(1000):
        now += 0.025
        let_in += pace.take("k", rate) == 0.0
    assert let_in == 250
    now += pace.take("k", rate)
    assert pace.take("k", rate) == 0.0
    now += 3600
    assert sum(pace.take("k", rate) == 0.0 for _ in range(700)) == 600
    assert pace.take("k", Rate(1, "second")) == 0.0, "another rate begins anew"


@pytest.mark.parametrize("text", ["", "10", "0/second", "-1/second", "10/hour", "1.5/second", "10/ second"])
def test_a_rate_that_cannot_be_is_refused(text: str) -> None:
    """A limit that is read as another one, or as none, is found out when it is too late."""
    with pytest.raises(InvalidInput):
        Rate.parse(text)
