"""The record that measured times of decode go to. The measurements themselves need a GPU."""

from __future__ import annotations

import pytest
from tune.fit_costs import key_of, profile_of

from packinfer_sgl.planning.profiles import H200


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"),
     ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090")],
)  # fmt: skip
def test_a_record_bears_the_model_s_name(name: str, key: str) -> None:
    assert key_of(name) == key


def test_a_new_record_has_what_was_measured_and_the_rest_of_the_h200() -> None:
    measured = {"bytes_per_us": 1e6, "small_item_us": 3.0}
    new = profile_of("NVIDIA X100", 80, measured)
    assert (new.name, new.is_measured, new.multiprocessors, new.bytes_per_us) == ("X100", False, 80, 1e6)
    assert new.least_saving == H200.least_saving and new.stock_block_us == H200.stock_block_us
    known = profile_of("NVIDIA H200", 132, measured)
    assert known.is_measured and known.name == "H200" and known.small_item_us == 3.0
