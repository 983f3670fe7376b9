"""The Triton kernels of clipped_ratio without a GPU: interpreted, against float64; compiled, without spills."""

import pytest
import torch
from clipped_ratio_cases import arguments_of, batch, replaced, terms_of
from triton_kernels import ARCHITECTURES, compiled, interpreted, needs_triton

from megatron_srft.ops.clipped_ratio import reference

pytestmark = needs_triton

KERNEL = "megatron_srft.ops.triton.clipped_ratio:clipped_ratio"


def check(rows, terms):
    arguments = arguments_of(rows, terms)
    loss, gradients, figures = interpreted(KERNEL, *arguments).result
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    expected = reference(*exact)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients.double(), expected[1], rtol=5e-6, atol=1e-7)
    torch.testing.assert_close(figures.double(), expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 513])
@pytest.mark.parametrize("case", ["nll", "dual clip", "luffy", "shapings", "srft", "entropy", "many"])
def test_interpreted_kernels_agree_with_float64(case, count):
    rows = batch(count, dtype=torch.float32, seed=count)
    check(rows, [replaced(term, torch.float32) for term in terms_of(rows)[case]])


@pytest.mark.parametrize("missing", ["old_logprobs", "importance_weights"])
def test_what_may_be_missing(missing):
    rows = batch(100, dtype=torch.float32)
    check(rows | {missing: None}, terms_of(rows)["srft"])


def test_extreme_log_ratios_and_many_blocks():
    rows = batch(1500, dtype=torch.float32, spread=15.0)
    check(rows, terms_of(rows)["grpo"])


def test_nan_shows_in_the_loss_its_own_gradient_and_the_largest_values():
    rows = batch(600, dtype=torch.float32, demonstrations=0.0)
    rows["logprobs"][520] = torch.nan
    loss, gradients, figures = interpreted(KERNEL, *arguments_of(rows, terms_of(rows)["grpo"])).result
    assert loss.isnan() and figures[[0, 2, 10]].isnan().all()
    assert gradients.isnan().nonzero()[:, 1].tolist() == [520]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", ["grpo", "shapings", "srft", "many"])
def test_compiled_kernels_keep_to_registers(case, architecture):
    rows = batch(1024, dtype=torch.float32)
    builds = compiled(KERNEL, architecture, [arguments_of(rows, terms_of(rows)[case])])
    assert sorted(build.kernel for build in builds) == ["rows_kernel", "total_kernel"]
    assert [build.local_memory for build in builds] == [0, 0]
    assert max(build.stack_bytes for build in builds) <= 8  # reserved by ptxas on some targets, and never used


def test_other_numbers_do_not_compile_a_kernel_again():
    launches = []
    for count, scale in ((1024, 1.0), (48, 0.5), (16, 3.0)):
        rows = batch(count, dtype=torch.float32)
        terms = [term for term in terms_of(rows)["grpo"]]
        object.__setattr__(terms[0], "scale", scale)
        launches.append(arguments_of(rows, terms))
    assert len(compiled(KERNEL, 90, launches)) == 2
