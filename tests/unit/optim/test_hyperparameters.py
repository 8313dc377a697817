"""Every bad hyperparameter is refused, in words that name the key, the value and the limit."""

import math
import re

import pytest

from lp_dist.optim.hyperparameters import check_hyperparameters

NAN, INF = math.nan, math.inf
BAD = [("lr", v, "0") for v in (-1.0, NAN)]
BAD += [("p", 4.5, "4"), ("p", -4.5, "-4"), ("p", NAN, "4"), ("p", INF, "4")]
BAD += [(key, v, "0") for key in ("weight_decay", "l2", "precondition") for v in (-0.25, NAN, INF)]
BAD += [
    ("cutoff", NAN, "phase='off'"),
    ("cutoff", -1.0, "phase='off'"),
    ("phase", "on", "frozen"),
    ("regrowth_below", -0.1, "zeros stay zero"),
    ("regrowth_below", INF, "finite"),
]
BAD += [("eps", v, "0") for v in (-1e-3, NAN)]
BAD += [("betas", v, "1") for v in ((1.0, 0.9), (0.9, 1.0), (-0.25, 0.9), (0.9, NAN))]
BAD += [("momentum", v, "0") for v in (-0.25, NAN)]


@pytest.mark.parametrize(("key", "value", "limit"), BAD)
def test_bad_hyperparameter_is_named(key, value, limit):
    with pytest.raises(ValueError) as error:
        check_hyperparameters(**{key: value})
    message = str(error.value)
    worst = next((b for b in value if not 0 <= b < 1), None) if key == "betas" else value
    assert re.search(rf"\b{key}\b", message)
    assert repr(worst) in message or f"{worst:g}" in message
    assert limit in message.replace(f"={value!r}", "").replace(f"={worst!r}", "")


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="(?s)nesterov.*momentum|momentum.*nesterov"):
        check_hyperparameters(nesterov=True, momentum=0.0)
    check_hyperparameters(nesterov=True, momentum=0.5)


def test_the_limits_themselves_are_allowed():
    check_hyperparameters(
        lr=0.0, p=-4.0, weight_decay=0.0, l2=0.0, precondition=0.0, cutoff=0.0, eps=0.0, betas=(0.0, 0.0)
    )
    check_hyperparameters(
        lr=1e9, p=4, weight_decay=1e9, l2=1e9, precondition=2.0, cutoff=math.inf, eps=1.0, momentum=0.0
    )
    for phase in ("decay", "off", "frozen"):
        check_hyperparameters(phase=phase)
