"""Seeds are stable and do not collide."""

from mae_bench.data.seeds import derive_seed


def test_seeds_do_not_collide_and_are_stable() -> None:
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(-5, 10) for c in range(10)}
    assert len(seeds) == 1500
    assert derive_seed(1, 2, 3) == 6520558355739401531
