"""What `benchmarks.throughput` makes of the figures of a run."""

import pytest
import torch

from benchmarks import throughput


def test_start_up_is_what_comes_before_the_first_step_and_what_the_first_window_takes_longer():
    # Windows of 100 rows: 10 s, then 5 s each; the first step began 4 s after the process.
    assert throughput._speed(started=5.0, first_step=9.0, windows=[10.0, 20.0, 20.0, 25.0], rows=100) == (20.0, 9.0)
    # A first window that is no slower takes nothing away.
    assert throughput._speed(started=5.0, first_step=9.0, windows=[40.0, 20.0, 20.0], rows=100) == (20.0, 4.0)


def test_the_floor_counts_the_fastest_product_at_hand(monkeypatch):
    def seconds_of(work, device, calls=1):
        return 0.001 if work.func is throughput.at_input else 0.004

    monkeypatch.setattr(throughput, "seconds_of", seconds_of)
    threads = torch.get_num_threads()
    try:
        assert throughput.rates(1)["fp32"] == pytest.approx(2 * throughput.BATCH * 512 * 1024 / 0.001)
    finally:
        torch.set_num_threads(threads)


def test_other_forms_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["throughput", "--apart", "bf16,fp8"])
    with pytest.raises(SystemExit):
        throughput.main()
    assert "--apart bf16,fp8: choose of bf16,compiled" in capsys.readouterr().err
