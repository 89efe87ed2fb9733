"""Claims: a GPU is found by any name that fits one only; rates are dense, each with its source; memory is what a
process finds, less than the data sheet's.
"""

from __future__ import annotations

import pytest

from mtr.errors import UserError
from mtr.plan.gpus import GPUS, USUAL, find_gpu


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100 SXM", "H100 SXM"),
        ("h100-sxm", "H100 SXM"),
        ("H100", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("H 100", "H100 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("a10080gb", "A100 80GB"),
        ("Tesla T4", "T4"),
        ("l4", "L4"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
    ],
)
def test_a_gpu_is_found_by_its_name(name: str, found: str) -> None:
    assert find_gpu(name).name == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a100", "more than one GPU; use A100 80GB or A100 40GB"),
        ("RTX 6000", "more than one GPU; use RTX PRO 6000 or RTX 6000 Ada"),
        ("L40", "no GPU that mtr knows; use L40S"),
        ("5", "use one of B200, H200"),
        ("", "use one of B200, H200"),
        ("\x1b[31m", "no GPU that mtr knows"),
    ],
)
def test_a_name_that_fits_none_or_several_is_refused_with_those_near(name: str, words: str) -> None:
    with pytest.raises(UserError, match=r"^--gpu: ") as error:
        find_gpu(name)
    assert words in str(error.value)


def test_names_are_unique_and_each_rate_has_a_source() -> None:
    assert len({find_gpu(gpu.name).name for gpu in GPUS}) == len(GPUS)
    assert all(gpu.source.startswith("https://") for gpu in GPUS)
    assert all(find_gpu(name).name == name for name in USUAL)


def test_rates_are_dense() -> None:
    """Data sheets print 1,979 for an H100, 733 for an L40S and 330 for a 4090, with sparsity."""
    rates = {gpu.name: gpu.bf16_tflops for gpu in GPUS}
    assert (rates["H100 SXM"], rates["L40S"], rates["RTX 4090"], rates["RTX 3090"]) == (989.4, 362.0, 165.2, 71.0)
    assert rates["A100 80GB"] == rates["A100 40GB"] == 312.0
    with_sparsity = {
        "H100 NVL": 1671.0,
        "H100 PCIe": 1513.0,
        "L4": 242.0,
        "A10G": 140.0,
        "RTX 5090": 419.0,
        "B200": 4500.0,
    }
    assert {name: 2 * rates[name] for name in with_sparsity} == with_sparsity


def test_memory_is_less_than_the_data_sheet_says() -> None:
    sheet = {"H100 SXM": 80, "H200": 141, "A100 40GB": 40, "L40S": 48, "L4": 24, "RTX 4090": 24, "T4": 16, "B200": 180}
    for name, gigabytes in sheet.items():
        assert 0.9 * gigabytes < find_gpu(name).memory_gib < gigabytes


def test_gpus_without_bfloat16() -> None:
    assert [gpu.name for gpu in GPUS if not gpu.bf16] == ["V100 32GB", "T4"]
