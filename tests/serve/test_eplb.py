"""Placement of expert copies: the published vector, 200 published outputs, balance, bad sizes."""

from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.serve import eplb

SIZES = dict(num_slots=16, num_groups=4, num_nodes=2, num_devices=8)
GOLDEN = Path(__file__).parents[1] / "golden" / "eplb.npz"


def published_cases():
    """Loads, sizes, and the slots, replicas and counts of the published code, one case each."""
    file = np.load(GOLDEN)
    used = dict.fromkeys(("loads", "slots", "replicas", "counts"), 0)

    def take(name, *shape):
        start, used[name] = used[name], used[name] + int(np.prod(shape))
        return file[name][start : used[name]].reshape(shape)

    for layers, experts, slots, groups, nodes, devices, most in file["sizes"].tolist():
        yield (
            take("loads", layers, experts),
            dict(num_slots=slots, num_groups=groups, num_nodes=nodes, num_devices=devices),
            take("slots", layers, slots),
            take("replicas", layers, experts, most),
            take("counts", layers, experts),
        )
    assert used == {name: file[name].size for name in used}


def test_published_vector():
    load_LE = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    placement = eplb.place(load_LE, **SIZES)
    assert placement.slot_to_expert_LR.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_200_random_cases_equal_the_published_code():
    policies = {"hierarchical": 0, "global": 0, "spare slots": 0}
    for load_LE, sizes, slots_LR, replicas_LEC, counts_LE in published_cases():
        placement = eplb.place(load_LE, **sizes)
        np.testing.assert_array_equal(placement.slot_to_expert_LR, slots_LR, str(sizes))
        np.testing.assert_array_equal(placement.counts_LE, counts_LE)
        most = replicas_LEC.shape[-1]
        np.testing.assert_array_equal(placement.replicas_LEC[..., :most], replicas_LEC)
        assert (placement.replicas_LEC[..., most:] == -1).all()
        policies["global" if sizes["num_groups"] % sizes["num_nodes"] else "hierarchical"] += 1
        policies["spare slots"] += sizes["num_slots"] > load_LE.shape[1]
    assert policies["hierarchical"] + policies["global"] == 200 and min(policies.values()) >= 20


def test_balance_is_never_worse_with_spare_slots():
    rng = np.random.default_rng(7)
    without, with_spare = [], []
    for case in range(200):
        load_LE = rng.zipf(1.6, (2, 32)).clip(max=1000)
        num_groups, num_nodes = ((8, 1), (8, 2), (8, 4), (1, 1))[case % 4]  # the last is global
        sizes = dict(num_groups=num_groups, num_nodes=num_nodes, num_devices=8)
        in_order = eplb.imbalance(load_LE.reshape(2, 8, 4).sum(-1))
        placed = [
            eplb.imbalance(eplb.device_load(load_LE, eplb.place(load_LE, num_slots=n, **sizes), 8))
            for n in (32, 48)
        ]
        without.append(np.minimum(in_order, placed[0]))
        with_spare.append(placed[1])
    without, with_spare = np.array(without), np.array(with_spare)
    assert (with_spare <= without + 1e-9).all()
    assert with_spare.mean() < 0.7 * without.mean()


def test_load_of_slots_and_devices_by_hand():
    placement = eplb.Placement(
        slot_to_expert_LR=np.array([[0, 1, 1, 2]]),
        replicas_LEC=np.array([[[0, -1], [1, 2], [3, -1]]]),
        counts_LE=np.array([[1, 2, 1]]),
    )
    load_LE = np.array([[5, 8, 3]])
    assert eplb.slot_load(load_LE, placement).tolist() == [[5, 4, 4, 3]]
    load_LU = eplb.device_load(load_LE, placement, 2)
    assert load_LU.tolist() == [[9, 7]] and eplb.imbalance(load_LU).tolist() == [9 / 8]
    assert eplb.imbalance(np.zeros((1, 2))).tolist() == [1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(num_slots=8), "8 slots for 12 experts on 8 devices.*e.g. 16"),
        (dict(num_slots=20), "20 slots for 12 experts on 8 devices"),
        (dict(num_nodes=1, num_groups=5), "12 experts in 5 groups"),
        (dict(num_nodes=4, num_devices=2), "2 devices in 4 nodes"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        eplb.place(np.ones((1, 12)), **{**SIZES, **change})
