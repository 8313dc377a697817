"""Flags of `lp-dist finetune`: errors of the library, which name arguments, name flags there."""

from __future__ import annotations

import pytest

from lp_dist.training.arguments import DecayArguments

MESSAGE = "sparsity=0.3 of relative_to='decayed': take scope='global', start=0.1, cap=None"


@pytest.mark.parametrize(
    "arguments, in_flags",
    [
        (
            {"sparsity": 0.3},
            "--sparsity 0.3 of --relative_to decayed: take --scope global, --decay_start 0.1, --cap None",
        ),
        (
            {"groups": ["channels"], "group_sparsity": 0.3},
            "--group_sparsity 0.3 of --group_relative_to groups: take --group_scope global, --decay_start 0.1, --cap"
            " None",
        ),
        (
            {"groups": ["channels"], "group_sparsity": 0.3, "sparsity": 0.5},
            "sparsity=0.3 of relative_to='decayed': take scope='global', start=0.1, --cap None",
        ),
    ],
    ids=["weights", "groups", "both"],
)
def test_an_argument_becomes_the_flag_of_the_target_that_is_meant(arguments, in_flags):
    assert DecayArguments(**arguments).in_flags(MESSAGE) == in_flags


def test_targets_are_made_of_the_flags_groups_first():
    groups, weights = DecayArguments(
        sparsity=0.5,
        latent_windows=2.0,
        regrowth=0.2,
        update_every=3,
        relative_to="all",
        groups=["channels"],
        group_sparsity=0.3,
        group_relative_to="all",
        group_interval=4,
    ).targets()
    assert (groups.start, weights.end) == (0.1, 0.7) and groups.end == weights.start == pytest.approx(0.4)
    assert (groups.regrowth, groups.update_every, groups.relative_to, groups.interval) == (0.2, 3, "all", 4)
    assert (weights.regrowth, weights.update_every, weights.relative_to, weights.latent_windows) == (
        0.2,
        3,
        "all",
        2.0,
    )
    assert DecayArguments(groups=["heads"], group_sparsity=0.3).targets()[0].relative_to == "decayed"
