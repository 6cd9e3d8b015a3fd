"""The seeded order: disjoint shards, new epochs and rounds, nothing else moves it."""

from __future__ import annotations

from fkd_med.data.sampling import SeededSampler

IDS = [f"image-{i}" for i in range(11)]


def test_shards_are_disjoint_and_cover() -> None:
    shards = [list(SeededSampler(IDS[:9], 1, 0, "a", 3, rank)) for rank in range(3)]
    assert [len(s) for s in shards] == [3, 3, 3]
    assert sorted(i for s in shards for i, _ in s) == list(range(9))


def test_short_ranks_are_padded() -> None:
    shards = [list(SeededSampler(IDS, 1, 0, "a", 3, rank)) for rank in range(3)]
    assert [len(s) for s in shards] == [4, 4, 4] == [len(SeededSampler(IDS, 1, 0, "a", 3, r)) for r in range(3)]
    drawn = sorted(i for s in shards for i, _ in s)
    assert set(drawn) == set(range(11)) and len(drawn) == 12
    assert len(list(SeededSampler(IDS[:2], 1, 0, "a", 5, 4))) == 1  # more ranks than images


def test_ranks_together_draw_what_one_process_draws() -> None:
    one = list(SeededSampler(IDS[:10], 1, 0, "a"))
    two = [list(SeededSampler(IDS[:10], 1, 0, "a", 2, rank)) for rank in range(2)]
    assert one[0::2] == two[0] and one[1::2] == two[1]


def test_order_and_seeds_change_with_everything_they_derive_from() -> None:
    def draws(seed: int = 1, round: int = 0, client: str = "a", epoch: int = 0) -> list[tuple[int, int]]:
        sampler = SeededSampler(IDS, seed, round, client)
        sampler.set_epoch(epoch)
        return list(sampler)

    base = draws()
    assert draws() == base
    others = [draws(seed=2), draws(round=1), draws(round=-1), draws(client="b"), draws(epoch=1)]
    orders = {tuple(i for i, _ in d) for d in [base, *others]}
    assert len(orders) == 6
    seeds = {s for d in [base, *others] for _, s in d}
    assert len(seeds) == 6 * len(IDS)


def test_a_sample_keeps_its_seed_when_the_set_changes() -> None:
    few, many = dict(SeededSampler(IDS[:5], 1, 0, "a")), dict(SeededSampler(IDS, 1, 0, "a"))
    assert all(many[i] == few[i] for i in range(5))
