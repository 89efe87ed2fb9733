"""Claims: time is a range that follows from FLOPs, recomputation, peak rate and number of GPUs; no small model is
faster than its kernels are launched; the expected speed-up lies between what one pass saves in FLOPs and in tokens.
"""

from __future__ import annotations

import pytest

from mtr.model.flops import Flops
from mtr.plan.duration import DENSE, ROUTED, Setting, duration, expected_speedup, with_recomputation
from mtr.plan.gpus import find_gpu

WORK = Flops(linear=8e18, attention=1e18, head=1e18)
GPU = find_gpu("H100 SXM")


def seconds(setting: Setting, number: int = 1, gpu: str = "H100 SXM") -> tuple[float, float]:
    return duration(WORK, 1000, 36, setting, find_gpu(gpu), number).seconds


def test_time_is_work_over_a_share_of_the_peak() -> None:
    found = duration(WORK, 1000, 36, Setting("none", trained_whole=False), GPU)
    assert found.share == DENSE
    assert found.seconds == pytest.approx((1e19 / 989.4e12 / DENSE[1], 1e19 / 989.4e12 / DENSE[0]))


def test_what_is_recomputed_takes_time() -> None:
    """Of frozen weights the forward is half, of trained ones a third; step-cost.json has 1.25 and 1.48 for LoRA."""
    lora = {
        mode: with_recomputation(Flops(linear=1.0), Setting(mode, trained_whole=False))
        for mode in ("none", "products", "selective", "full", "offload")
    }
    assert lora == {"none": 1.0, "products": 1.0, "selective": 1.25, "full": 1.5, "offload": 1.5}
    assert with_recomputation(Flops(linear=3.0), Setting("full", trained_whole=True)) == pytest.approx(4.0)
    assert with_recomputation(Flops(attention=3.0), Setting("full", trained_whole=False)) == pytest.approx(4.0)
    assert with_recomputation(Flops(attention=3.0), Setting("selective", trained_whole=False)) == 3.0
    assert with_recomputation(Flops(head=3.0), Setting("full", trained_whole=False)) == 3.0


def test_more_and_faster_gpus_take_less() -> None:
    setting = Setting("full", trained_whole=False)
    assert seconds(setting, 8)[1] < seconds(setting)[0]
    assert seconds(setting, 8)[0] > seconds(setting)[0] / 8
    assert seconds(setting, gpu="A100 80GB")[0] == pytest.approx(seconds(setting)[0] * 989.4 / 312)


def test_experts_and_4_bits_take_more() -> None:
    plain, routed = Setting("none", trained_whole=False), Setting("none", trained_whole=False, routed=True)
    assert seconds(routed)[1] == pytest.approx(seconds(plain)[1] * DENSE[0] / ROUTED[0])
    in_4_bits = Setting("none", trained_whole=False, in_4_bits=True)
    assert all(more > less for more, less in zip(seconds(in_4_bits), seconds(plain), strict=True))


def test_a_small_model_is_bound_by_its_launches() -> None:
    low, high = duration(Flops(linear=1.0), 1000, 4, Setting("none", trained_whole=False), GPU).seconds
    assert 1 < low < high < 60


def test_the_expected_speed_up_is_between_flops_and_tokens() -> None:
    one, apart = Flops(linear=10.0, attention=4.0), Flops(linear=60.0, attention=12.0)
    assert apart.total / one.total < expected_speedup(one, apart) < apart.linear / one.linear
    assert expected_speedup(one, one) == 1.0
