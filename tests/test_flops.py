"""Operations of each method against the worked sizes of the specification (kFLOP a row, two heads, 7 fields of width 8)."""

import pytest

from benchmarks.flops import FORWARD, Case, pepnet

MTL, MSL = Case(7, 8, 0, 2, 1), Case(7, 8, 0, 1, 2)


@pytest.mark.parametrize(
    ("name", "thousands"),
    [
        ("mlp", 94.5),
        ("single_task", 221.4),
        ("shared_bottom", 127.2),
        ("cross_stitch", 224.5),
        ("esmm", 188.9),
        ("escm2", 188.9),
        ("escm2 dr", 283.4),
        ("mmoe", 427.3),
        ("ple", 1900.3),
        ("snr", 2769.2),
        ("snr aver", 420.1),
        ("mssm", 2769.2),
        ("aitm", 419.3),
        ("apg", 56.5),
    ],
)
def test_two_tasks(name, thousands):
    assert FORWARD[name](MTL) / 1e3 == pytest.approx(thousands, abs=0.051)


def test_star_with_its_auxiliary_network_and_without():
    assert FORWARD["star"](MSL) / 1e3 == pytest.approx(102.8, abs=0.051)
    assert FORWARD["star"](MTL) / 2e3 == pytest.approx(94.5, abs=0.051)


def test_hmoe_with_weights_for_each_task():
    assert FORWARD["hmoe"](MSL) / 1e3 == pytest.approx(426.0, abs=0.051)  # Of the W of two scenarios a row needs its own.
    assert FORWARD["hmoe"](MTL) - FORWARD["hmoe"](MSL) == 2 * (56 * 64 + 64 * 2)


def test_pepnet_with_the_gate_on_its_input():
    # The worked size has both of a scenario's and two tasks' parts: 13.4 is the gate of width 56 on the input.
    alone = 2 * ((56 + 8) * 56 + 56 * 56)
    assert (pepnet(MTL) + alone) / 1e3 == pytest.approx(968.3, abs=0.051)
    assert pepnet(MSL, epnet_hidden=56) - pepnet(Case(7, 8, 0, 1, 1)) == alone


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe", "snr", "snr aver", "mssm", "star", "apg", "single_task", "mlp"])
def test_what_only_the_own_scenario_needs_counts_once(name):
    assert FORWARD[name](Case(7, 8, 0, 1, 32)) == FORWARD[name](MSL)
