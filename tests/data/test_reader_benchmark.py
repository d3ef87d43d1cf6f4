from benchmarks.reader import generate, measure


def test_the_benchmark_measures_every_stage_of_what_it_generates(tmp_path):
    generate(tmp_path, rows=5000, num_sparse=3, num_multi=1, num_dense=2, row_group_size=1024)
    rates = measure(tmp_path, batch_size=256, epochs=1)
    assert set(rates) == {"decode", "batches", "sequential", "batches_cached"}
    assert all(rate > 0 for rate in rates.values())
